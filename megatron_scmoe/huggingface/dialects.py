"""Hugging Face directories that can come in, each by its own config and its own names.

A dialect says what its config.json is in ours, and where a tensor of ours lies in its files. What
follows is the same for all of them (load.py). Dialects that no model here computes are refused by
name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_scmoe.huggingface import longcat
from megatron_scmoe.huggingface.config import LLAMA3, NEUTRAL
from megatron_scmoe.huggingface.tensor_names import Config


@dataclass(frozen=True)
class Where:
    """A tensor of ours in the files of a dialect."""

    name: str | None
    """None for a tensor that is drawn at random."""
    expert: int | None = None
    """Along the first dimension of a tensor that holds all experts."""
    part: tuple[int, int] = (0, 1)
    """Which one of so many equal parts, as of gate and up in one tensor."""
    dimension: int = 0
    """Along which it is cut."""
    scale: float = 1.0
    std: float = 0.0
    """Of what is drawn."""


def is_computed(name: str, config: Config) -> bool:
    """The angles of rotary embeddings, which older files hold and every model computes."""
    return name.endswith(".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Dialect:
    """How another program writes a model: its config.json and the names in its files."""

    config: Callable[[Config], Config]
    """Theirs in ours.

    Raises:
        ValueError: a setting that no model here has.
        KeyError: a field is missing.
    """
    where: Callable[[str, Config, set[str]], Where]
    """A name of ours, our config, and the names in their files."""
    is_ignored: Callable[[str, Config], bool] = is_computed
    """Whether a name in their files is left out on purpose."""


# Where the fields of a baseline come from when its config.json leaves them out (transformers 5.23).
DEFAULTS = {"tie_word_embeddings": False, "attention_bias": False, "head_dim": None}


def of_config(config: Config) -> Dialect:
    """The dialect of a config.json.

    Raises:
        ValueError: nothing here can be started from it; with the reason.
    """
    match config.get("architectures"):
        case [str(name), *_]:
            pass
        case _:
            name = str(config.get("model_type"))
    if name in REFUSED:
        raise ValueError(f"{name} cannot be imported: {REFUSED[name]}")
    if name not in DIALECTS:
        known = ", ".join(sorted(DIALECTS))
        raise ValueError(f"{name} cannot be imported: it is none of {known}")
    return DIALECTS[name]


def _ours(config: Config) -> Config:
    if config.get("model_type") != "scmoe":
        raise ValueError(f"model_type is {config.get('model_type')} and not scmoe")
    return {**NEUTRAL, **config}


def _same(name: str, config: Config, names: set[str]) -> Where:
    return Where(name)


def _mixtral(config: Config) -> Config:
    return baseline(config, "num_local_experts", config["intermediate_size"], True)


def _mixtral_name(name: str, config: Config, names: set[str]) -> Where:
    """w1 is the gate, w3 up, w2 down."""
    name = re.sub(r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1.", name)
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = re.sub(rf"(experts\.\d+\.){ours}", rf"\1{theirs}", name)
    return Where(name)


def _qwen2(config: Config) -> Config:
    ours = baseline(config, "num_experts", config["moe_intermediate_size"])
    return ours | {
        "attention_bias": config.get("qkv_bias", True),
        "shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "combine": "cg1",
    }


def _qwen3(config: Config) -> Config:
    # transformers 5 writes Mixtral's name for it.
    experts = "num_local_experts" if "num_local_experts" in config else "num_experts"
    ours = baseline(config, experts, config["moe_intermediate_size"])
    if config.get("attention_bias"):
        raise ValueError("attention_bias true puts a bias on the output projection alone")
    return ours | {"qk_layernorm": True}


def baseline(
    config: Config, experts: str, expert_size: int, renormalises: bool | None = None
) -> Config:
    """A decoder with grouped-query attention, RMSNorm, SwiGLU and softmax routing.

    Raises:
        ValueError: settings that no model here has.
        KeyError: a field is missing.
    """
    config = {**DEFAULTS, **config}
    if config.get("use_sliding_window", True) and config.get("sliding_window"):
        raise ValueError(f"sliding_window {config['sliding_window']} has no counterpart here")
    if config["hidden_act"] != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']} has no counterpart here")
    if renormalises is None:
        renormalises = config["norm_topk_prob"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    moe = [n for n in range(layers) if n not in dense and config[experts] and (n + 1) % step == 0]
    if not moe:
        raise ValueError("it has no layer with experts")
    return {
        **NEUTRAL,
        **{
            name: config[name]
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "num_experts_per_tok",
                "rms_norm_eps",
                "max_position_embeddings",
                "tie_word_embeddings",
                "attention_bias",
            )
        },
        **{name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config["head_dim"] or config["hidden_size"] // heads,
        "num_experts": config[experts],
        "moe_intermediate_size": expert_size,
        "moe_layers": moe,
        "pre_softmax": not renormalises,
        "norm_topk_prob": renormalises,
        "rope_parameters": _rope(config),
        "router_aux_loss_coef": config.get("router_aux_loss_coef", 0.0),
    }


def _rope(config: Config) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or the two fields that it was before.

    Raises:
        ValueError: positions are scaled in a way that Megatron's options cannot say.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    rope.setdefault("partial_rotary_factor", 1.0)
    known = rope["rope_type"] in ("default", "linear") or (
        rope["rope_type"] == "llama3" and {**rope, **LLAMA3} == rope
    )
    if not known:
        raise ValueError(f"rope_parameters {rope} cannot be said in Megatron's options")
    return rope


def _longcat(config: Config) -> Config:
    return {**NEUTRAL, **longcat.from_theirs(config)}


def _longcat_name(name: str, config: Config, names: set[str]) -> Where:
    """One tensor for each expert, or all of a layer in two (transformers 5)."""
    theirs = longcat.name_of(name)
    expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", theirs)
    if expert is None or theirs in names:
        return Where(theirs)
    part = {"gate": (0, 2), "up": (1, 2), "down": (0, 1)}[expert[3]]
    fused = "down_proj" if expert[3] == "down" else "gate_up_proj"
    return Where(f"{expert[1]}.{fused}", int(expert[2]), part)


DIALECTS = {
    "ScMoEForCausalLM": Dialect(_ours, _same),
    longcat.ARCHITECTURE: Dialect(_longcat, _longcat_name, longcat.is_ignored),
    "MixtralForCausalLM": Dialect(_mixtral, _mixtral_name),
    "Qwen2MoeForCausalLM": Dialect(_qwen2, _same),
    "Qwen3MoeForCausalLM": Dialect(_qwen3, _same),
}
"""By the first of `architectures`."""

REFUSED = {
    "LongcatFlashNgramForCausalLM": "its n-gram embeddings have no counterpart in Megatron",
    "LongcatCausalLM": "its sparse attention (LSA) and n-gram embeddings have no counterpart",
    "LongcatNextForCausalLM": "its linear attention layers (KDA) have no counterpart here",
    "FLASHLocalForCausalLM": "its linear attention layers (KDA) have no counterpart here",
}
