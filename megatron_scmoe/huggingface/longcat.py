"""LongCat-Flash (arXiv:2509.01322) as a ScMoE model, in both directions.

A layer of theirs is a pair of ours: the experts read what the first dense MLP reads (Pos-2, shared
norm), and the second MLP, which the routed output joins, is our shared expert.

    theirs p                         ours
    self_attn.0, mlps.0              layer 2p, dense
    self_attn.1, mlps.1, mlp         layer 2p + 1: attention, shared expert, router and experts
"""

import re
from typing import Any

from megatron_scmoe.huggingface.config import LATENT, NEUTRAL, YARN, rope_parameters, softmax_scale
from megatron_scmoe.huggingface.tensor_names import Config

ARCHITECTURE = "LongcatFlashForCausalLM"

SAME_NAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "shared_expert_intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "expert_ffn_hidden_size",
    "num_experts": "n_routed_experts",
    "copy_experts": "zero_expert_num",
    "num_experts_per_tok": "moe_topk",
    "routed_scaling_factor": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
"""Fields of ours that are theirs, value for value."""

FREE = {
    "routed_scaling_factor",
    "routed_topk",
    "balance_groups",
    "copy_experts",
    "shared_expert_intermediate_size",
    "softmax_scale",
    *LATENT,
}
FIXED: Config = {
    **{field: value for field, value in NEUTRAL.items() if field not in FREE},
    "shortcut_position": "pos2",
    "shortcut_norm": "shared",
    "router": "longcat",
    "pre_softmax": True,
    "norm_topk_prob": False,
    "expert_bias": True,
    "mla_scale": True,
    "attention_bias": False,
    "qk_layernorm": True,
    "rope_interleaved": True,
    "tie_word_embeddings": False,
}
"""What a LongCat-Flash model is in our fields, whatever its sizes."""

# Settings of their files, and the value with which they are this model; absent is that value.
THEIRS: dict[str, tuple[Any, ...]] = {
    "attention_method": ("MLA",),
    "zero_expert_type": ("identity", None),
    "router_bias": (False,),
    "norm_topk_prob": (False,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "hidden_act": ("silu",),
    "mla_scale_q_lora": (True,),
    "mla_scale_kv_lora": (True,),
    "ngram_vocab_size_ratio": (None,),
    "quantization_config": (None,),
}
LATENT_EPS = 1e-6
"""Of the norms of their latents, whatever rms_norm_eps is (transformers 5.23)."""

YARN_KEPT = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
"""Options that a config.json of ours has under "megatron"."""

_PAIRED = "input_layernorm|post_attention_layernorm|self_attn"


def from_theirs(config: Config) -> Config:
    """A config.json of LongcatFlashForCausalLM in ours.

    Raises:
        ValueError: settings that no model here has.
        KeyError: a field is missing.
    """
    other = [
        f"{name} {config[name]}"
        for name, values in THEIRS.items()
        if name in config and config[name] not in values
    ]
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 1e7))
    if rope["rope_type"] not in ("default", "yarn"):
        other.append(f"rope {rope['rope_type']}")
    if other:
        raise ValueError(f"no model here has {', '.join(other)}")
    pairs = config["num_layers"]
    ours = {field: config[name] for field, name in SAME_NAME.items()}
    positions = _positions(rope, config)
    return {
        **FIXED,
        **ours,
        **{name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "megatron": config.get("megatron", {})  # of an export
        | {name: positions[name] for name in YARN_KEPT},
        "num_hidden_layers": 2 * pairs,
        "moe_layers": list(range(1, 2 * pairs, 2)),
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config["qk_rope_head_dim"],
        "rope_parameters": rope_parameters(positions),
        "softmax_scale": softmax_scale(positions),
    }


def _positions(rope: dict[str, Any], config: Config) -> dict[str, Any]:
    """Megatron's options of their angles and of the scale of their scores.

    Raises:
        ValueError: YaRN with settings that Megatron's has not.
        KeyError: a field is missing.
    """
    yarn = rope["rope_type"] == "yarn"
    mscales = {name: rope.get(name) for name in ("mscale", "mscale_all_dim")}
    options = {
        "position_embedding_type": "rope",
        "multi_latent_attention": True,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": 1.0,
        "rotary_scaling_factor": rope["factor"] if yarn else 1.0,
        "mscale": mscales["mscale"] or 1.0,
        "mscale_all_dim": mscales["mscale_all_dim"] or 0.0,
        **{f"yarn_{name}": rope.get(name) for name in YARN},
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
    }
    if not yarn:
        return options
    if rope.get("original_max_position_embeddings") is None:
        raise KeyError("original_max_position_embeddings")
    # One without the other: transformers leaves it out of the angles, Megatron does not.
    alone = len([value for value in mscales.values() if value]) == 1
    factor = (rope_parameters(options) or {})["attention_factor"]
    if alone or not rope.get("truncate", True) or rope.get("attention_factor", factor) != factor:
        raise ValueError(f"rope_parameters {rope} cannot be said in Megatron's options")
    return options


def to_theirs(config: Config) -> Config:
    """Our config.json in theirs.

    Raises:
        ValueError: the model is no LongCat-Flash; with the fields that differ.
    """
    layers = config["num_hidden_layers"]
    wanted = {
        **FIXED,
        "shared_expert_intermediate_size": config["intermediate_size"],
        "moe_layers": list(range(1, layers, 2)),
        "num_key_value_heads": config["num_attention_heads"],
    }
    other = [f"{name} {config[name]}" for name, value in wanted.items() if config[name] != value]
    other += [f"{name} None" for name in ("q_lora_rank", "kv_lora_rank") if config[name] is None]
    rope = config["rope_parameters"] or {}
    kept = {name: config["megatron"].get(name) or 0.0 for name in YARN_KEPT}
    yarn = rope.get("rope_type") == "yarn"
    # One without the other is another model in transformers.
    alone = yarn and not kept["mscale_all_dim"] and kept["mscale"] != 1.0
    known = rope.get("rope_type") in ("default", "yarn") and not alone
    if not known or rope.get("partial_rotary_factor") != 1.0:
        other.append(f"rope_parameters {rope}")
    if other:
        raise ValueError(f"this model is no LongCat-Flash layer: {', '.join(other)}")
    scaling = {name: rope[name] for name in ("rope_type", "factor", *YARN)} if yarn else {}
    scaling |= {name: kept[name] for name in YARN_KEPT[1:]} if kept["mscale_all_dim"] else {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "longcat_flash",
        **{name: config[field] for field, name in SAME_NAME.items()},
        **{name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **{name: values[0] for name, values in THEIRS.items() if values[0] is not None},
        # num_hidden_layers would halve it in transformers.
        "num_layers": layers // 2,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config["qk_rope_head_dim"],  # what transformers makes angles for
        # As their own files say it: SGLang's class of the config stumbles over rope_parameters.
        "rope_theta": rope["rope_theta"],
        **({"rope_scaling": scaling} if yarn else {}),
        "dtype": config["dtype"],
        "megatron": config["megatron"],
    }


def notes(config: Config) -> list[str]:
    """What readers of an export make different, a line each."""
    found = []
    if config["rms_norm_eps"] != LATENT_EPS:
        found.append(
            f"--norm-epsilon is {config['rms_norm_eps']:g}: LongCat's latents are normalised with "
            f"{LATENT_EPS:g} in transformers; train with that for equal logits"
        )
    if config["copy_experts"] and config["routed_scaling_factor"] != 1.0:
        found.append(
            "SGLang does not scale the weights of zero experts by --moe-router-topk-scaling-factor "
            f"{config['routed_scaling_factor']:g}, transformers and vLLM do"
        )
    return found


def rows_without_weights(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """Zeros that transformers 5.23 wants for experts without weights, names and shapes: its
    `gate_up_proj` has rows for them, `down_proj` has not."""
    first, number = config["num_experts"], config["copy_experts"]
    shape = (config["moe_intermediate_size"], config["hidden_size"])
    return [
        (f"model.layers.{pair}.mlp.experts.{expert}.{part}_proj.weight", shape)
        for pair in range(config["num_hidden_layers"] // 2)
        for expert in range(first, first + number)
        for part in ("gate", "up")
    ]


def name_of(name: str) -> str:
    """Theirs, of a tensor of ours, one for each expert."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if found is None:
        return name
    pair, half = divmod(int(found[1]), 2)
    inner = re.sub(rf"^({_PAIRED})\.", rf"\1.{half}.", found[2])
    if half == 0:
        inner = re.sub(r"^mlp\.", "mlps.0.", inner)
    inner = inner.replace("mlp.shared_expert.", "mlps.1.")
    inner = inner.replace("mlp.gate.weight", "mlp.router.classifier.weight")
    inner = inner.replace("mlp.gate.", "mlp.router.")
    return f"model.layers.{pair}.{inner}"


def is_ignored(name: str, config: Config) -> bool:
    """Next-token prediction modules, which transformers ignores too, and the rows that it writes
    for experts without weights."""
    expert = re.search(r"\.mlp\.experts\.(\d+)\.", name)
    return name.startswith("model.mtp.") or (
        expert is not None and int(expert[1]) >= config["num_experts"]
    )
