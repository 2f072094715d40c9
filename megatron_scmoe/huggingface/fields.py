"""Values of a config.json that no model has, and values that contradict each other.

Asked of every directory that comes in, whatever its dialect, in our fields and before a tensor is
read: what the shapes of tensors do not show would be lost on the way, or found by a training run.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_scmoe.checks.ranges import NOT_NEGATIVE, POSITIVE, RANGES, SHARE, SIZES, Range
from megatron_scmoe.checks.refusal import Found, Refusal, refuse
from megatron_scmoe.huggingface.config import AT_HOME, LATENT, NEUTRAL, SAME_NAME, there_and_back
from megatron_scmoe.huggingface.tensor_names import Config


@dataclass(frozen=True)
class Kind:
    """What a field may hold."""

    text: str
    holds: Callable[[Any], bool]


def _whole(bounds: Range) -> Kind:
    return Kind(f"a whole number {bounds}", lambda value: type(value) is int and value in bounds)


def _number(bounds: Range) -> Kind:
    return Kind(f"a number {bounds}", lambda value: _is_number(value) and value in bounds)


def _or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.text}, or null", lambda value: value is None or kind.holds(value))


def _one_of(*values: str) -> Kind:
    return Kind(f"one of {', '.join(values)}", lambda value: value in values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
ANY = Kind("a number", _is_number)
LAYERS = Kind(
    "a list of numbers of layers, each once",
    lambda value: (
        isinstance(value, list)
        and all(type(layer) is int for layer in value)
        and len(set(value)) == len(value) > 0
    ),
)
OBJECTS = ("rope_parameters", "megatron")
OBJECT = Kind("an object", lambda value: isinstance(value, dict))

OPTIONS = {
    **SAME_NAME,
    **LATENT,
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
}
EXPERTS_AT_HOME = tuple(f"{kind}_experts" for kind in AT_HOME)
KINDS: dict[str, Kind] = {
    **{field: _whole(RANGES[name]) for field, name in OPTIONS.items() if name in RANGES},
    "vocab_size": _whole(RANGES["vocab_size"]),
    "shared_expert_intermediate_size": _whole(
        Range(0, SIZES["moe_shared_expert_intermediate_size"])
    ),
    **dict.fromkeys(EXPERTS_AT_HOME, _whole(Range(0, SIZES["num_experts"]))),
    "gate_layers": _whole(Range(1, 2)),
    **{field: _or_none(_whole(RANGES[name])) for field, name in LATENT.items()},
    **dict.fromkeys(("n_group", "topk_group", "c2r_top_t"), _or_none(_whole(Range(1)))),
    "rms_norm_eps": _number(POSITIVE),
    "routed_scaling_factor": _number(POSITIVE),
    "input_scale": ANY,
    "routed_topk": _or_none(_number(POSITIVE)),
    "softmax_scale": _or_none(_number(POSITIVE)),
    **{field: FLAG for field, value in NEUTRAL.items() if isinstance(value, bool)},
    **dict.fromkeys(
        ("pre_softmax", "norm_topk_prob", "attention_bias", "tie_word_embeddings"), FLAG
    ),
    "shortcut_position": _one_of("none", "pos1", "pos2", "pos3"),
    "combine": _one_of("add", "cg1", "cg2"),
    "shortcut_norm": _one_of("own", "shared"),
    "router": _one_of("topk", "heterogeneous", "longcat", "c2r"),
    "scaled_experts": _one_of("all", "routed"),
    "dual_gating": _one_of("none", "shared", "separate"),
    "scoring_func": _one_of("softmax", "sigmoid", "sqrtsoftplus"),
    "norm": _one_of("rmsnorm", "layernorm"),
    "position_embedding": _one_of("rope", "learned", "none"),
    "hidden_act": _one_of("silu", "gelu", "gelu_pytorch_tanh", "relu2"),
    "moe_layers": LAYERS,
    "rope_parameters": _or_none(OBJECT),
    "megatron": OBJECT,
}
"""By field; what is not here decides nothing of a model."""

INNER_KINDS: dict[str, dict[str, Kind]] = {
    "rope_parameters": {
        "rope_type": _one_of("default", "linear", "llama3", "yarn"),
        "rope_theta": _number(POSITIVE),
        "partial_rotary_factor": _number(RANGES["rotary_percent"]),
        "factor": _number(POSITIVE),
        "original_max_position_embeddings": _whole(Range(1)),
        **dict.fromkeys(
            ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"),
            _number(POSITIVE),
        ),
    },
    "megatron": {
        "iteration": _whole(NOT_NEGATIVE),
        "padded_vocab_size": _or_none(_whole(RANGES["padded_vocab_size"])),
        "make_vocab_size_divisible_by": _whole(RANGES["make_vocab_size_divisible_by"]),
        "layernorm_zero_centered_gamma": FLAG,
        "scmoe_tau": _number(SHARE),
        **dict.fromkeys(
            ("rotary_scaling_factor", "mscale", "mscale_all_dim"), _number(NOT_NEGATIVE)
        ),
    },
}
"""Of fields that are objects."""


def _wrong(kinds: dict[str, Kind], fields: Config, prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if name in kinds and not kinds[name].holds(value):
            shown = repr(value) if len(repr(value)) < 40 else f"{value!r:.40}..."
            yield f"{prefix}{name} is {shown} and not {kinds[name].text}"


def _values(config: Config) -> Found:
    found = list(_wrong(KINDS, config))
    for name, kinds in INNER_KINDS.items():
        if isinstance(inner := config.get(name), dict):
            found += _wrong(kinds, inner, f"{name}.")
    return bool(found) and {"all": "; ".join(found)}


def _columns(config: Config) -> int:
    """Experts of every kind, which a router chooses among."""
    return config["num_experts"] + sum(config[field] for field in EXPERTS_AT_HOME)


def _behind_no_dense_layer(config: Config) -> Found:
    moe = config["moe_layers"]
    alone = [layer for layer in moe if layer == 0 or layer - 1 in moe]
    crosses = config["shortcut_position"] in ("pos2", "pos3")
    return crosses and bool(alone) and {**config, "layer": alone[0]}


def _groups(config: Config) -> Found:
    groups, best = config["n_group"], config["topk_group"]
    if groups is None and best is None:
        return None
    fits = groups and best and best <= groups and config["num_experts"] % groups == 0
    return not fits and config


def _partners(config: Config) -> Found:
    least, most = max(1, config["num_experts_per_tok"] - 1), config["num_experts"] - 1
    wrong = config["router"] == "c2r" and not least <= (config["c2r_top_t"] or 0) <= most
    return wrong and {**config, "least": least, "most": most}


def _lost(config: Config) -> Found:
    """What Megatron's options do not say of the model, by going there and back."""
    made = there_and_back(config)
    lost = [
        f"{field} {config[field]!r} (not {made[field]!r})"
        for field in KINDS
        if field in config and made[field] != config[field] and field not in OBJECTS
    ]
    ropes = [each.get("rope_parameters") or {} for each in (config, made)]
    lost += [
        f"rope_parameters.{name} {value!r}"
        for name, value in ropes[0].items()
        if name in INNER_KINDS["rope_parameters"] and ropes[1].get(name, value) != value
    ]
    return bool(lost) and {"lost": ", ".join(lost)}


CONFIG = (
    Refusal(_values, "{all}"),
    Refusal(
        lambda config: config["num_attention_heads"] % config["num_key_value_heads"] and config,
        "num_attention_heads {num_attention_heads} is no multiple of num_key_value_heads "
        "{num_key_value_heads}",
    ),
    Refusal(
        lambda config: config["num_experts_per_tok"] > _columns(config) and config,
        "num_experts_per_tok {num_experts_per_tok} is more than there are experts",
    ),
    Refusal(
        _behind_no_dense_layer,
        "layer {layer} of moe_layers has no dense layer in front, which shortcut_position "
        "{shortcut_position} reads",
    ),
    Refusal(
        _groups,
        "n_group {n_group} and topk_group {topk_group} are no groups of {num_experts} experts",
    ),
    Refusal(_partners, "c2r_top_t {c2r_top_t} is not in {least}..{most}"),
    Refusal(_lost, "fields that contradict the others, or that no option says: {lost}"),
)
"""What a config.json is refused for; rows take its fields, and may rely on those before."""


def check(config: Config) -> None:
    """Refuse a config.json that nothing can be made of.

    Raises:
        ValueError: why, in one line.
        KeyError: a field is missing.
    """
    refuse(CONFIG, config)
