"""Every tensor by its two names, Megatron's on disk and Hugging Face's, in one table.

Export and import walk the same rows, so what one writes the other reads. `python -m
megatron_scmoe.huggingface.tensor_names` prints the table of docs/huggingface.md.

A stacked tensor of Megatron is one tensor for each layer and expert here: `{layer}` counts
attention layers and `{expert}` routed experts, both from 0. Shapes are in the names of `sizes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_scmoe.words import markdown_table

Config = dict[str, Any]
"""A config.json of model_type scmoe."""


@dataclass(frozen=True)
class TensorPart:
    """A tensor of the Hugging Face directory."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of Megatron's and the parts that it holds, along its first dimension."""

    megatron: str
    parts: tuple[TensorPart, ...]
    layout: str = "joined"
    """How the parts lie in it, a key of layouts.LAYOUTS."""
    needs: tuple[str, ...] = ()
    """What the model has to have, of `features`; `no X` for what it must not have."""
    keeps_dtype: bool = False
    """Whether --dtype leaves it alone: less precise, a router chooses other experts."""


def _row(
    megatron: str, parts: str, shapes: str, needs: str = "", layout: str = "joined"
) -> TensorRow:
    """Parts by blanks, their shapes by blanks, dimensions by commas, needs by commas."""
    names = parts.split()
    dimensions = [tuple(shape.split(",")) for shape in shapes.split()]
    tensors = tuple(TensorPart(*pair) for pair in zip(names, dimensions, strict=True))
    conditions = tuple(filter(None, needs.split(",")))
    return TensorRow(megatron, tensors, layout, conditions)


def _under(
    megatron: str, hugging_face: str, *rows: tuple[str, ...], keeps_dtype: bool = False
) -> list[TensorRow]:
    """Rows whose names begin alike; each has the rest of both names, and what follows in `_row`."""
    found = [
        _row(megatron + ours, hugging_face + theirs, *others) for ours, theirs, *others in rows
    ]
    return [replace(row, keeps_dtype=keeps_dtype) for row in found]


def _norm(megatron: str, hugging_face: str, size: str = "h", needs: str = "") -> list[TensorRow]:
    """Weight and bias; `{}` in Megatron's name is where the kind stands."""
    bias = ",".join(filter(None, (needs, "layernorm")))
    return [
        _row(megatron.format("weight"), f"{hugging_face}.weight", size, needs, "norm"),
        _row(megatron.format("bias"), f"{hugging_face}.bias", size, bias),
    ]


def _mlp(
    megatron: str, hugging_face: str, size: str, needs: str = "", bias: str = ""
) -> list[TensorRow]:
    """Both linear layers, gated or not; their biases with `bias`. Names end where those begin."""

    def all_of(*conditions: str) -> str:
        return ",".join(filter(None, conditions))

    rows = []
    for kind, up, down, more in (
        ("weight", f"{size},h", f"h,{size}", needs),
        ("bias", size, "h", all_of(needs, bias)),
    ):
        if kind == "bias" and not bias:
            continue
        gate_name, up_name, down_name = (
            f"{hugging_face}{part}_proj.{kind}" for part in ("gate", "up", "down")
        )
        fc1, fc2 = f"{megatron}linear_fc1.{kind}", f"{megatron}linear_fc2.{kind}"
        rows += [
            _row(fc1, f"{gate_name} {up_name}", f"{up} {up}", all_of(more, "gated")),
            _row(fc1, up_name, up, all_of(more, "no gated")),
            _row(fc2, down_name, down, more),
        ]
    return rows


MODEL = [
    _row(
        "embedding.word_embeddings.weight",
        "model.embed_tokens.weight",
        "vocabulary,h",
        layout="vocabulary",
    ),
    _row(
        "embedding.position_embeddings.weight",
        "model.embed_positions.weight",
        "positions,h",
        "learned",
    ),
    *_norm("decoder.final_layernorm.{}", "model.norm"),
    _row("output_layer.weight", "lm_head.weight", "vocabulary,h", "untied", layout="vocabulary"),
]
"""Once a model."""

# Under decoder.layers.{layer}. and model.layers.{layer}.
_QKV = "self_attn.q_proj.{0} self_attn.k_proj.{0} self_attn.v_proj.{0}"
ATTENTION = [
    *_norm("self_attention.linear_qkv.layer_norm_{}", "input_layernorm", needs="no latent"),
    *_norm("input_layernorm.{}", "input_layernorm", needs="latent"),
    _row(
        "self_attention.linear_qkv.weight",
        _QKV.format("weight"),
        "q,h kv,h kv,h",
        "no latent",
        "qkv",
    ),
    _row("self_attention.linear_qkv.bias", _QKV.format("bias"), "q kv kv", "qkv bias", "qkv"),
    *_norm("self_attention.q_layernorm.{}", "self_attn.q_norm", "head", "no latent,qk norm"),
    *_norm("self_attention.k_layernorm.{}", "self_attn.k_norm", "head", "no latent,qk norm"),
    *_under(
        "self_attention.linear_",
        "self_attn.",
        ("proj.weight", "o_proj.weight", "h,values"),
        ("proj.bias", "o_proj.bias", "h", "o bias"),
        ("q_proj.weight", "q_proj.weight", "q,h", "latent,no latent q"),
        ("q_down_proj.weight", "q_a_proj.weight", "q_rank,h", "latent,latent q"),
    ),
    *_norm(
        "self_attention.linear_q_up_proj.layer_norm_{}",
        "self_attn.q_a_layernorm",
        "q_rank",
        "latent,latent q,qk norm",
    ),
    *_under(
        "self_attention.linear_",
        "self_attn.",
        ("q_up_proj.weight", "q_b_proj.weight", "q,q_rank", "latent,latent q"),
        ("kv_down_proj.weight", "kv_a_proj_with_mqa.weight", "kv_down,h", "latent"),
    ),
    *_norm(
        "self_attention.linear_kv_up_proj.layer_norm_{}",
        "self_attn.kv_a_layernorm",
        "kv_rank",
        "latent,qk norm",
    ),
    _row(
        "self_attention.linear_kv_up_proj.weight",
        "self_attn.kv_b_proj.weight",
        "kv_up,kv_rank",
        "latent",
    ),
]
"""Every layer."""

DENSE = [
    *_norm("mlp.linear_fc1.layer_norm_{}", "post_attention_layernorm"),
    *_mlp("mlp.", "mlp.", "ffn", bias="bias"),
]
"""A layer without a MoE."""

MOE = [
    *_norm("pre_mlp_layernorm.{}", "post_attention_layernorm"),
    *_norm("shortcut_layernorm.{}", "mlp.shortcut_layernorm", needs="own norm"),
    *_under(
        "mlp.router.",
        "mlp.gate.",
        ("weight", "weight", "choices,gate_input"),
        ("inner_weight", "inner_weight", "gate_input,h", "two gate layers"),
        ("residual_weight", "residual_weight", "choices,choices", "gating residual,no first MoE"),
        ("bias", "bias", "choices", "router bias"),
        ("expert_bias", "e_score_correction_bias", "choices", "expert bias"),
        ("partners", "partners", "choices,others", "partners"),
        keeps_dtype=True,
    ),
    *_under(
        "mlp.current_router.",
        "mlp.current_gate.",
        ("weight", "weight", "choices,h", "separate gates"),
        ("expert_bias", "e_score_correction_bias", "choices", "separate gates,expert bias"),
        keeps_dtype=True,
    ),
    *_mlp("mlp.shared_experts.", "mlp.shared_expert.", "shared_ffn", "shared"),
    _row("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1,h", "shared,cg1"),
    _row("mlp.combine_gate.weight", "mlp.combine_gate.weight", "2,h", "cg2"),
    *_under(
        "mlp.at_home.constant.",
        "mlp.zero_computation.constant.",
        ("mix_weight", "mix_weight", "constants,2,h", "constants"),
        ("vector", "vector", "constants,h", "constants"),
    ),
    *_norm("post_layernorm.{}", "mlp.post_layernorm", needs="post norm"),
]
"""A layer with one."""

# Under mlp.experts.experts.{expert}. and mlp.experts.{expert}.; on disk the experts are an axis.
EXPERT = _mlp("", "", "expert_ffn", bias="bias")
"""Every routed expert of such a layer."""

PLACES = (
    ("", "", MODEL),
    ("decoder.layers.{layer}.", "model.layers.{layer}.", ATTENTION),
    ("decoder.layers.{layer}.", "model.layers.{layer}.", DENSE),
    ("decoder.layers.{layer}.", "model.layers.{layer}.", MOE),
    (
        "decoder.layers.{layer}.mlp.experts.experts.{expert}.",
        "model.layers.{layer}.mlp.experts.{expert}.",
        EXPERT,
    ),
)
"""Prefixes of both names, and the rows under them."""

OTHER_STATE = ("optimizer.", "rng_state", "rerun_state", "common_state", "chained_")
"""What of a checkpoint is no weight and stays there."""
INNER = 8
"""Width of a gate's inner layer, for each expert (model/routing/heterogeneous.py)."""
NO_WEIGHTS = "_extra_state"
"""Transformer Engine's scales of FP8, and empty without it: not converted."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of Megatron's that a model has, and its parts."""

    megatron: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    row: TensorRow
    layer: int | None
    expert: int | None


def tensors(config: Config) -> Iterator[Tensor]:
    """Every tensor of a model, layer by layer, experts in order.

    Args:
        config: of model_type scmoe.
    """
    have, size = features(config), sizes(config)
    moe_layers = set(config["moe_layers"])
    yield from _of_rows("", "", MODEL[:2], have, size)
    for layer in range(config["num_hidden_layers"]):
        rows = [*ATTENTION, *(MOE if layer in moe_layers else DENSE)]
        first = {"first MoE"} if layer == min(moe_layers) else set()
        yield from _of_rows(*PLACES[1][:2], rows, have | first, size, layer)
        for expert in range(config["num_experts"] if layer in moe_layers else 0):
            yield from _of_rows(*PLACES[4][:2], EXPERT, have, size, layer, expert)
    yield from _of_rows("", "", MODEL[2:], have, size)


def _of_rows(
    megatron: str,
    hugging_face: str,
    rows: list[TensorRow],
    have: set[str],
    size: dict[str, int],
    layer: int | None = None,
    expert: int | None = None,
) -> Iterator[Tensor]:
    prefixes = [name.format(layer=layer, expert=expert) for name in (megatron, hugging_face)]
    for row in rows:
        if not all(
            (need.removeprefix("no ") in have) != need.startswith("no ") for need in row.needs
        ):
            continue
        parts = tuple(
            (prefixes[1] + part.name, tuple(size[dimension] for dimension in part.shape))
            for part in row.parts
        )
        yield Tensor(prefixes[0] + row.megatron, parts, row, layer, expert)


def features(config: Config) -> set[str]:
    """What the `needs` of rows ask for."""
    asked = {
        "untied": not config["tie_word_embeddings"],
        "learned": config["position_embedding"] == "learned",
        "layernorm": config["norm"] == "layernorm",
        "latent": config["kv_lora_rank"] is not None,
        "latent q": config["q_lora_rank"] is not None,
        "qk norm": config["qk_layernorm"],
        "qkv bias": config["attention_bias"],
        "o bias": config["attention_output_bias"],
        "bias": config["mlp_bias"],
        "gated": config["gated_linear_unit"],
        "own norm": config["shortcut_position"] != "none" and config["shortcut_norm"] == "own",
        "post norm": config["post_norm"],
        "shared": config["shared_expert_intermediate_size"] > 0,
        "cg1": config["combine"] == "cg1",
        "cg2": config["combine"] == "cg2",
        "router bias": config["router_bias"],
        "expert bias": config["expert_bias"],
        "constants": config["constant_experts"] > 0,
        "two gate layers": config["gate_layers"] == 2,
        "gating residual": config["gating_residual"],
        "partners": config["router"] == "c2r",
        "separate gates": config["dual_gating"] == "separate",
    }
    return {name for name, answer in asked.items() if answer}


def sizes(config: Config) -> dict[str, int]:
    """The dimensions that shapes are made of."""
    heads = config["num_attention_heads"]
    at_home = sum(config[f"{kind}_experts"] for kind in ("zero", "copy", "constant"))
    choices = config["num_experts"] + at_home
    two = config["gate_layers"] == 2
    size = {
        "1": 1,
        "2": 2,
        "h": config["hidden_size"],
        "vocabulary": config["vocab_size"],
        "positions": config["max_position_embeddings"],
        "ffn": config["intermediate_size"],
        "expert_ffn": config["moe_intermediate_size"],
        "shared_ffn": config["shared_expert_intermediate_size"],
        "constants": config["constant_experts"],
        "choices": choices,
        "others": choices - 1,
        "gate_input": INNER * choices if two else config["hidden_size"],
    }
    if config["kv_lora_rank"] is None:
        head = config["head_dim"]
        width = heads * head
        return size | {
            "head": head,
            "q": width,
            "values": width,
            "kv": config["num_key_value_heads"] * head,
        }
    nope, rope, value = (
        config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    return size | {
        "q": heads * (nope + rope),
        "values": heads * value,
        "q_rank": config["q_lora_rank"] or 0,
        "kv_rank": config["kv_lora_rank"],
        "kv_down": config["kv_lora_rank"] + rope,
        "kv_up": heads * (nope + value),
    }


def table() -> list[str]:
    """The lines of docs/huggingface.md's table: both names, shapes, layout, what a row takes."""
    rows = []
    for megatron, hugging_face, place in PLACES:
        for row in place:
            parts = [f"`{hugging_face}{part.name}` [{', '.join(part.shape)}]" for part in row.parts]
            needs = ", ".join(row.needs)
            rows.append((f"`{megatron}{row.megatron}`", "<br>".join(parts), row.layout, needs))
    return markdown_table(("Megatron", "Hugging Face", "layout", "exists with"), rows)


if __name__ == "__main__":
    print(*table(), sep="\n")
