"""Names on disk, in one table.

Every attention layer has the name of the baseline's, `layers.<number - 1>.`, whatever unit, stage
or position it runs in, and the names of Transformer Engine's layers, fused or not. So a checkpoint
loads at another pipeline split, at another shortcut position, and as a baseline's.

docs/architecture.md shows what is added.
"""

from collections.abc import Mapping

from megatron_scmoe.model.combine import COMBINES
from megatron_scmoe.model.experts.at_home import AT_HOME
from megatron_scmoe.model.routing import ROUTERS
from megatron_scmoe.model.routing.dual import GATINGS
from megatron_scmoe.model.variant import Variant

# SequentialMLP's name for a linear layer of all routed experts, which are an axis of its tensors.
ROUTED_EXPERTS = "experts."

# Norms that Transformer Engine has inside the next linear layer; the first two with latent
# attention only, the third without. The norm in front of a MoE is never inside.
LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
INPUT_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}

# The local spec of stock Megatron gives the norm in front of a MoE the name of a fused one.
LOCAL_NAMES = {f".{ours}": f".{stock}" for ours, stock in MLP_NORM.items()}


def norms(names: dict[str, str], is_moe: bool, is_latent: bool) -> dict[str, str]:
    """Module to name on disk, of one layer's norms.

    Args:
        names: the host's.
        is_moe: the layer has a MoE.
        is_latent: its attention is multi-latent.
    """
    kept = {module: name for module, name in names.items() if module not in MLP_NORM}
    attention = LATENT_NORMS if is_latent else INPUT_NORM
    return {**kept, **attention, **({} if is_moe else MLP_NORM)}


def layers(prefix: str, numbers: list[tuple[int, int]]) -> dict[str, str]:
    """Prefix in memory to prefix on disk, of the layers of a block; the first match wins.

    Args:
        prefix: of the block.
        numbers: of every layer, its number in the block and that of its attention layer.
    """
    names: dict[str, str] = {}
    for layer_number, attention_number in numbers:
        in_memory = f"{prefix}layers.{layer_number - 1}."
        # The longer prefix first.
        names[f"{in_memory}dense_layer."] = f"{prefix}layers.{attention_number - 2}."
        names[in_memory] = f"{prefix}layers.{attention_number - 1}."
    return names


def added() -> dict[str, list[str]]:
    """What a baseline does not have, under a MoE layer's name: how the keys begin, and the options
    with which they exist."""
    table = {
        "shortcut_layernorm.": ["--scmoe-shortcut-norm own"],
        "post_layernorm.": ["--scmoe-post-norm"],
    }
    tables: dict[str, Mapping[str, type[Variant]]] = {
        "combine": COMBINES,
        "router": ROUTERS,
        "dual-gating": GATINGS,
    }
    for option, variants in tables.items():
        for value, variant in variants.items():
            for name in variant.names_on_disk:
                table.setdefault(name, []).append(f"--scmoe-{option} {value}")
    for kind, experts in AT_HOME.items():
        if "weights" in vars(experts):  # else it has none
            table[f"mlp.at_home.{kind}."] = [f"--scmoe-num-{kind}-experts"]
    return table
