"""What a model is, in both tongues: options of Megatron, and a config.json of model_type scmoe.

One way for each direction; what the other side has no word for is refused with the list of options.
"""

from math import log, sqrt
from typing import Any

from megatron_scmoe.huggingface.tensor_names import Config
from megatron_scmoe.run.checkpoint.model_options import flag

ARCHITECTURES = ["ScMoEForCausalLM"]
AUTO_MAP = {
    "AutoConfig": "configuration_scmoe.ScMoEConfig",
    "AutoModel": "modeling_scmoe.ScMoEModel",
    "AutoModelForCausalLM": "modeling_scmoe.ScMoEForCausalLM",
}

SAME_NAME = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "shortcut_position": "scmoe_shortcut_position",
    "shortcut_norm": "scmoe_shortcut_norm",
    "post_norm": "scmoe_post_norm",
    "router": "scmoe_router",
    "scoring_func": "moe_router_score_function",
    "pre_softmax": "moe_router_pre_softmax",
    "dual_gating": "scmoe_dual_gating",
    "distinct_experts": "scmoe_distinct_experts",
    "gating_residual": "scmoe_gating_residual",
    "gate_layers": "scmoe_gate_layers",
    "renormalise": "scmoe_renormalise",
    "input_scale": "scmoe_input_scale",
    "scaled_experts": "scmoe_scaled_experts",
    "routed_topk": "scmoe_routed_topk",
    "c2r_top_t": "scmoe_c2r_top_t",
    "mla_scale": "scmoe_mla_scale",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
    "gated_linear_unit": "swiglu",
    "mlp_bias": "add_bias_linear",
    "attention_output_bias": "add_bias_linear",
    "router_bias": "add_bias_linear",
    "rms_norm_eps": "layernorm_epsilon",
    "qk_layernorm": "qk_layernorm",
    "max_position_embeddings": "max_position_embeddings",
}
"""Fields of config.json that are options of Megatron, value for value."""

NEWER: dict[str, Any] = {
    "scmoe_dual_gating": "none",
    "scmoe_distinct_experts": True,
    "scmoe_gating_residual": False,
    "scmoe_gate_layers": 1,
    "scmoe_renormalise": False,
    "scmoe_input_scale": 1.0,
    "scmoe_scaled_experts": "all",
    "scmoe_routed_topk": None,
    "scmoe_c2r_top_t": None,
    "scmoe_mla_scale": False,
    "yarn_original_max_position_embeddings": None,
    "yarn_beta_fast": None,
    "yarn_beta_slow": None,
}
"""Options that older records do not have, and what those runs computed."""

LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
"""The same with multi-latent attention; None without."""

NEUTRAL: Config = {
    "model_type": "scmoe",
    "shortcut_position": "none",
    "shortcut_norm": "own",
    "combine": "add",
    "post_norm": False,
    "router": "topk",
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "expert_bias": False,
    "dual_gating": "none",
    "distinct_experts": True,
    "gating_residual": False,
    "gate_layers": 1,
    "renormalise": False,
    "input_scale": 1.0,
    "scaled_experts": "all",
    "routed_topk": None,
    "c2r_top_t": None,
    "balance_groups": None,
    "mla_scale": False,
    "n_group": None,
    "topk_group": None,
    "zero_experts": 0,
    "copy_experts": 0,
    "constant_experts": 0,
    "shared_expert_intermediate_size": 0,
    "hidden_act": "silu",
    "gated_linear_unit": True,
    "attention_output_bias": False,
    "mlp_bias": False,
    "router_bias": False,
    "norm": "rmsnorm",
    "qk_layernorm": False,
    "position_embedding": "rope",
    "rope_interleaved": False,
    "softmax_scale": None,
    **dict.fromkeys(LATENT),
}
"""A model of none of the variants: a baseline, as far as its config.json does not say."""

POSITIONS = {"rope": "rope", "learned": "learned_absolute", "none": "none"}
NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
AT_HOME = ("zero", "copy", "constant")

# Options that have no field: the one value with which a model has a config.json.
ONLY: dict[str, tuple[Any, ...]] = {
    "quick_geglu": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "window_attn_skip_freq": (None,),
    "no_rope_freq": (None,),
    "use_mup": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "mtp_num_layers": (None, 0),
    "experimental_attention_variant": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "apply_query_key_layer_scaling": (False,),
    "fp8": (None,),
    "fp4": (None,),
}

# The host's numbers that are no options, rotary_pos_embedding.py and transformer_config.py.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What YaRN's --yarn-original-max-position-embeddings and so on are when they are not given.
YARN: dict[str, Any] = {
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

# Of the run that wrote a checkpoint, under "megatron" in config.json: for the way back.
KEPT = (
    "moe_layer_freq",
    "layernorm_zero_centered_gamma",
    "make_vocab_size_divisible_by",
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    "scmoe_tau",
    "scmoe_combine",
    "scmoe_balance_groups",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
)


def from_record(record: dict[str, Any]) -> Config:
    """The config.json of a checkpoint's record (run/checkpoint/record.py).

    Raises:
        ValueError: options that it has no field for, all of them in one line.
    """
    options = {**NEWER, **record["options"], **record["model"]}
    refuse(options)
    config: Config = {
        "architectures": ARCHITECTURES,
        "auto_map": AUTO_MAP,
        "model_type": "scmoe",
        "vocab_size": record["tokenizer"]["vocab_size"] or record["padded_vocab_size"],
    }
    config |= {field: options[name] for field, name in SAME_NAME.items()}
    latent = options["multi_latent_attention"]
    config |= {field: options[name] if latent else None for field, name in LATENT.items()}
    grouped = options["group_query_attention"] and not latent
    heads = options["num_attention_heads"]
    config["num_key_value_heads"] = options["num_query_groups"] if grouped else heads
    config["head_dim"] = options["qk_pos_emb_head_dim"] if latent else options["kv_channels"]
    shared = options["moe_shared_expert_intermediate_size"]
    config["shared_expert_intermediate_size"] = shared or 0
    config["moe_layers"] = moe_layers(options["moe_layer_freq"], options["num_layers"])
    config["combine"] = _combine(options)
    longcat = options["scmoe_router"] == "longcat"  # it has a bias without the host's option
    config["expert_bias"] = options["moe_router_enable_expert_bias"] or longcat
    groups = options.get("scmoe_balance_groups") or options["expert_model_parallel_size"]
    config["balance_groups"] = groups if longcat else None
    config["norm_topk_prob"] = _is_renormalised(options)
    config["routed_scaling_factor"] = options["moe_router_topk_scaling_factor"] or 1.0
    config |= {f"{kind}_experts": options["scmoe_experts_at_home"].get(kind, 0) for kind in AT_HOME}
    config["hidden_act"] = _activation(options)
    biased = options["add_bias_linear"] or options["add_qkv_bias"]
    config["attention_bias"] = biased and not latent  # the host's down projections have none
    config["norm"] = _key(NORMS, options["normalization"])
    config["position_embedding"] = _key(POSITIONS, options["position_embedding_type"])
    config["rope_parameters"] = rope_parameters(options)
    config["softmax_scale"] = softmax_scale(options) if latent else None
    config["rope_interleaved"] = latent or options["rotary_interleaved"]
    config["tie_word_embeddings"] = not options["untie_embeddings_and_output_weights"]
    config["router_aux_loss_coef"] = options.get("moe_aux_loss_coeff") or 0.0
    config["router_tau"] = options.get("scmoe_tau", 0.75)
    config["megatron"] = {name: options[name] for name in KEPT if name in options} | {
        "iteration": record["iteration"],
        "padded_vocab_size": record["padded_vocab_size"],
    }
    return config


def refuse(options: dict[str, Any]) -> None:
    """Raise for what a config.json has no field for.

    Raises:
        ValueError: these options, in one line.
    """
    found = [
        f"{flag(name)} {options[name]}"
        for name, values in ONLY.items()
        if name in options and options[name] not in values
    ]
    if options["num_experts"] is None:
        found.append("no --num-experts")
    for table, name in ((NORMS, "normalization"), (POSITIONS, "position_embedding_type")):
        if options[name] not in table.values():
            found.append(f"{flag(name)} {options[name]}")
    known = set(AT_HOME)
    found += [
        f"--scmoe-num-{kind}-experts" for kind in options["scmoe_experts_at_home"].keys() - known
    ]
    if found:
        raise ValueError(f"this model has no form in Hugging Face's: {', '.join(found)}")


def to_options(config: Config) -> dict[str, Any]:
    """Megatron's options of a config.json: all that `record["model"]` holds, and the vocabulary.

    Args:
        config: as `from_record` writes it, or made of another dialect's (dialects.py).
    """
    kept = config.get("megatron", {})
    latent = config["kv_lora_rank"] is not None
    options: dict[str, Any] = {name: config[field] for field, name in SAME_NAME.items()}
    if latent:
        options |= {name: config[field] for field, name in LATENT.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    layers, moe = config["num_hidden_layers"], config["moe_layers"]
    rope = config.get("rope_parameters") or {}
    own = {kind: config[f"{kind}_experts"] for kind in AT_HOME}
    freq = [int(layer in moe) for layer in range(layers)]
    scaling = config["routed_scaling_factor"]
    return options | {
        "multi_latent_attention": latent,
        "rope_type": ("yarn" if rope.get("rope_type") == "yarn" else "rope") if latent else None,
        "rotary_scaling_factor": kept.get("rotary_scaling_factor", 1.0),
        "mscale": kept.get("mscale", 1.0),
        "mscale_all_dim": kept.get("mscale_all_dim", 0.0),
        **{
            f"yarn_{name}": None if rope.get(name, default) == default else rope[name]
            for name, default in YARN.items()
        },
        "group_query_attention": groups != heads,
        "num_query_groups": groups if groups != heads else 1,
        "kv_channels": config["hidden_size"] // heads if latent else config["head_dim"],
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"] or None,
        "moe_layer_freq": kept.get("moe_layer_freq", 1 if all(freq) else freq),
        "scmoe_combine": kept.get("scmoe_combine", config["combine"]),
        "moe_router_enable_expert_bias": config["expert_bias"] and config["router"] != "longcat",
        "moe_shared_expert_gate": config["combine"] == "cg1"
        and config["shared_expert_intermediate_size"] > 0,
        "moe_router_topk_scaling_factor": None if scaling == 1.0 else scaling,
        "scmoe_experts_at_home": {kind: number for kind, number in own.items() if number},
        "squared_relu": config["hidden_act"] == "relu2",
        "bias_gelu_fusion": config["hidden_act"] == "gelu_pytorch_tanh",
        "add_qkv_bias": config["attention_bias"] and not config["mlp_bias"],
        "normalization": NORMS[config["norm"]],
        "layernorm_zero_centered_gamma": kept.get("layernorm_zero_centered_gamma", False),
        "position_embedding_type": POSITIONS[config["position_embedding"]],
        "add_position_embedding": True,  # the host's default, and compared
        "rotary_base": rope.get("rope_theta", 10000),
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "rotary_interleaved": config["rope_interleaved"] and not latent,
        "rotary_seq_len_interpolation_factor": (
            rope["factor"] if rope.get("rope_type") == "linear" else None
        ),
        "use_rope_scaling": rope.get("rope_type") == "llama3",
        "rope_scaling_factor": rope["factor"] if rope.get("rope_type") == "llama3" else 8.0,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }


def there_and_back(config: Config) -> Config:
    """The config.json of the model that Megatron's options of this one make."""
    kept = config.get("megatron", {})
    options = {name: values[0] for name, values in ONLY.items()} | to_options(config)
    return from_record(
        {
            "options": {name: kept[name] for name in KEPT if name in kept}
            | {"expert_model_parallel_size": config.get("balance_groups") or 1},
            "model": options,
            "tokenizer": {"vocab_size": config["vocab_size"]},
            "padded_vocab_size": kept.get("padded_vocab_size"),
            "iteration": kept.get("iteration"),
        }
    )


def moe_layers(freq: int | list[int], layers: int) -> list[int]:
    """Numbers from 0 of the layers with a MoE, from --moe-layer-freq."""
    if isinstance(freq, int):
        return [layer for layer in range(layers) if layer % freq == 0]
    return [layer for layer, has in enumerate(freq) if has]


def _combine(options: dict[str, Any]) -> str:
    """What the model computes; stock Megatron's gate is cg1, and one expert needs no gate."""
    if not options["moe_shared_expert_intermediate_size"]:
        return "add"
    if options["scmoe_shortcut_position"] != "none":
        return options["scmoe_combine"]
    return "cg1" if options["moe_shared_expert_gate"] else "add"


def _is_renormalised(options: dict[str, Any]) -> bool:
    """Whether the weights of the chosen experts are divided by their sum (moe_utils.py)."""
    if options["moe_router_score_function"] == "softmax":
        return not options["moe_router_pre_softmax"]
    return options["moe_router_topk"] > 1


def _activation(options: dict[str, Any]) -> str:
    """The host's fused GELU, which only layers with biases have, is the approximation."""
    if options["swiglu"]:
        return "silu"
    if options["squared_relu"]:
        return "relu2"
    fused = options["add_bias_linear"] and options.get("bias_gelu_fusion")
    return "gelu_pytorch_tanh" if fused else "gelu"


def _key(table: dict[str, str], value: str) -> str:
    return next(key for key, other in table.items() if other == value)


def rope_parameters(options: dict[str, Any]) -> dict[str, Any] | None:
    """Those of transformers 5, from Megatron's options; None without rotary embeddings."""
    if options["position_embedding_type"] != "rope":
        return None
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(options["rotary_base"]),
        "partial_rotary_factor": options["rotary_percent"],
    }
    factor = options["rotary_scaling_factor"]
    if options["multi_latent_attention"] and options["rope_type"] != "rope":  # the host's default
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            **{
                name: default if options[f"yarn_{name}"] is None else options[f"yarn_{name}"]
                for name, default in YARN.items()
            },
            "attention_factor": _mscale(factor, options["mscale"])
            / _mscale(factor, options["mscale_all_dim"]),
        }
    if options["multi_latent_attention"]:
        return rope
    if options["use_rope_scaling"]:
        return rope | {"rope_type": "llama3", "factor": options["rope_scaling_factor"], **LLAMA3}
    if factor := options["rotary_seq_len_interpolation_factor"]:
        return rope | {"rope_type": "linear", "factor": factor}
    return rope


def softmax_scale(options: dict[str, Any]) -> float | None:
    """The host's, multi_latent_attention.py:177; None for one over the root of the head size."""
    mscale = _mscale(options["rotary_scaling_factor"], options["mscale_all_dim"])
    size = options["qk_head_dim"] + options["qk_pos_emb_head_dim"]
    return None if mscale == 1.0 else mscale * mscale / sqrt(size)


def _mscale(factor: float, mscale: float) -> float:
    """`_yarn_get_mscale` of the host, yarn_rotary_pos_embedding.py."""
    return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0
