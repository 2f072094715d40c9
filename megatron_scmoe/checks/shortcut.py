"""What a shortcut refuses: of the model, and of the command line around it.

Rows take the host's config and ours, so that they also protect a model that is built from Python.
"""

import re
from argparse import Namespace
from collections.abc import Callable
from operator import attrgetter

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.c2r import placement
from megatron_scmoe.checks.refusal import Found, Refusal, refuse
from megatron_scmoe.config import ScMoEConfig, has_units
from megatron_scmoe.model import norm
from megatron_scmoe.model.routing import ROUTERS
from megatron_scmoe.model.specs import moe_layer_pattern
from megatron_scmoe.overlap.schedule import TAPS, window
from megatron_scmoe.words import flag


def check_model(config: TransformerConfig, scmoe: ScMoEConfig) -> None:
    """Refuse a model that cannot work.

    Raises:
        ValueError: one line that says what is wrong and what to do.
    """
    refuse((TRANSFORMER_ENGINE,), config)
    refuse(WITHOUT_EFFECT, config, scmoe)
    if norm.is_torchs(config):
        refuse(norm.REFUSALS, config)
    if scmoe.enabled:
        refuse(of_shortcut(config, scmoe), config, scmoe)


def of_shortcut(config: TransformerConfig, scmoe: ScMoEConfig) -> list[Refusal]:
    """Rows about any unit, and those of the variants that were chosen.

    Raises:
        ValueError: a value is in no table of variants.
    """
    of_variants = [row for variant in scmoe.variants(config) for row in variant.refusals]
    return [*SHORTCUT, *of_variants]


def router_has_no_gradient(config: TransformerConfig | Namespace) -> bool:
    """Whether every router weight is 1: a softmax over one selected expert, (2)(3) with K = 1."""
    return (
        config.moe_router_topk == 1
        and config.moe_router_score_function == "softmax"
        and not config.moe_router_pre_softmax
        and config.moe_router_load_balancing_type != "sinkhorn"  # its weights are sigmoids
    )


# Asked of the command line before the host looks at it, which complains about the first fusion
# that it misses instead.
TRANSFORMER_ENGINE = Refusal(
    lambda options: options.transformer_impl == "transformer_engine" and not HAVE_TE,
    "--transformer-impl transformer_engine, the default, needs Transformer Engine, which is not "
    "installed",
    "install it, or use --transformer-impl local",
)


def _unsupported(
    option: str,
    is_set: Callable[[TransformerConfig], Found],
    reason: str,
    remedy: str = "drop it",
) -> Refusal:
    return Refusal(
        lambda config, scmoe: is_set(config),
        f"{option} does not work with a shortcut",
        remedy,
        reason,
    )


# What the host offers and a unit does not support: by field, why, and the others.
_FIELDS = {
    "moe_shared_expert_overlap": "the unit already runs the shared expert beside the all-to-all",
    "overlap_moe_expert_parallel_comm": "its schedule knows single layers only and would run the "
    "unit in the wrong order",
    "delay_wgrad_compute": "it belongs to --overlap-moe-expert-parallel-comm",
    "overlap_dispatch_backward_with_experts_wgrad": "it is wired into the host's dispatch, which "
    "the unit replaces",
    "mtp_num_layers": "the host builds its multi-token prediction layers without the shortcut",
    "experimental_attention_variant": "the host builds its layers by another path",
    "fused_residual_rmsnorm": "the tapped tensor would not exist as a tensor",
    "fine_grained_activation_offloading": "the units' steps are not offloading groups",
    "first_last_layers_bf16": "the host counts block layers, and a unit is one block layer with "
    "two attention layers",
    "qk_clip": "the host clips one attention for each block layer, and a unit has two",
    "log_max_attention_logit": "the host looks at one attention for each block layer, and a unit "
    "has two",
}
_UNSUPPORTED = (
    *(_unsupported(flag(dest), attrgetter(dest), reason) for dest, reason in _FIELDS.items()),
    _unsupported(
        "A model without --num-experts",
        lambda config: config.num_moe_experts is None,
        "there are no routed experts to move",
        "add experts, or drop --scmoe-shortcut-position",
    ),
    _unsupported(
        "Leaving out --disable-bias-linear",
        lambda config: config.add_bias_linear,
        "the host's shared and routed experts have no biases",
        "add it",
    ),
    _unsupported(
        "--cuda-graph-impl",
        lambda config: config.cuda_graph_impl != "none",
        "the number of exchanged rows changes from step to step",
    ),
    _unsupported(
        "--moe-latent-size",
        lambda config: config.moe_latent_size is not None,
        "latent projections are not part of the unit's stages",
    ),
    _unsupported(
        "--heterogeneous-layers-config-path",
        lambda config: config.heterogeneous_block_specs,
        "layers of one unit would have different shapes",
    ),
    _unsupported(
        "--transformer-impl inference_optimized",
        lambda config: config.transformer_impl == "inference_optimized",
        "it replaces the dispatcher",
        "use local or transformer_engine",
    ),
    _unsupported(
        "Kitchen quantization",
        lambda config: config.use_kitchen or config.use_kitchen_attention,
        "the linear layer after an unfused norm would not be quantized",
    ),
    _unsupported(
        "--recompute-modules moe with FP8 or FP4",
        lambda config: bool(
            (config.fp8 or config.fp4)
            and config.recompute_granularity == "selective"
            and "moe" in config.recompute_modules
        ),
        "the experts would be recomputed in another precision",
        "use moe_act, or --recompute-granularity full",
    ),
    _unsupported(
        "--mlp-chunks-for-training",
        lambda config: config.mlp_chunks_for_training > 1,
        "the unit's MoE is not cut into chunks",
    ),
    _unsupported(
        "CPU offloading",
        lambda config: config.cpu_offloading,
        "the host counts its layers, not units",
    ),
)


def _slot_outside(config: TransformerConfig, scmoe: ScMoEConfig) -> Found:
    operators = window(scmoe.scmoe_shortcut_position)
    names = ", ".join(step.value for step in operators)
    outside = [slot for slot in scmoe.initial_slots if slot > len(operators)]
    return bool(outside) and {"slot": outside[0], "last": len(operators), "names": names}


def _moe_first(config: TransformerConfig, scmoe: ScMoEConfig) -> Found:
    freq = config.moe_layer_freq
    if not scmoe.has_shortcut or not isinstance(freq, int) or freq == 1:
        return False
    repeats, rest = divmod(config.num_layers, freq)
    advice = (
        f"--num-layers {config.num_layers} is no multiple of {freq}, so write the pattern as a "
        "list with a 0 in front of every 1"
        if rest
        else f"write --moe-layer-freq '([{','.join(['0'] * (freq - 1) + ['1'])}]*{repeats})'"
    )
    return {"advice": advice}


def _no_dense_layer(config: TransformerConfig, scmoe: ScMoEConfig) -> Found:
    freq = config.moe_layer_freq
    pattern = [1] * config.num_layers if isinstance(freq, int) else freq
    pairs = zip([1, *pattern[:-1]], pattern, strict=True)
    alone = [number for number, (before, here) in enumerate(pairs, 1) if before and here]
    if not TAPS[scmoe.scmoe_shortcut_position].is_pair or not alone:
        return False
    advice = "use pos1, which reads the MoE layer's own input"
    count, rest = divmod(config.num_layers, 2)
    if count:
        # An odd layer comes first and is dense.
        advice += f", or --moe-layer-freq '{'([0]+[0,1]*' if rest else '([0,1]*'}{count})'"
    return {"layer": alone[0], "advice": advice}


def _of_another_model(config: TransformerConfig, scmoe: ScMoEConfig) -> Found:
    """Why a placement is not one of this model.

    Raises:
        ValueError: the file holds none.
    """
    if scmoe.scmoe_expert_placement is None:
        return False
    placed = placement.read(scmoe.scmoe_expert_placement)
    layers = [number for number, is_moe in enumerate(moe_layer_pattern(config), 1) if is_moe]
    experts, ranks = config.num_moe_experts, config.expert_model_parallel_size
    assert experts is not None
    why = placed.complaint(experts, ranks, layers)
    return why is not None and {"why": why}


# Rows take the host's config and ours.
SHORTCUT = (
    *_UNSUPPORTED,
    Refusal(
        _of_another_model,
        "--scmoe-expert-placement {scmoe_expert_placement} is not one of this model",
        "make one with tools/c2r.py place",
        "{why}",
    ),
    Refusal(
        lambda config, scmoe: (
            scmoe.has_shortcut
            and config.moe_shared_expert_intermediate_size is None
            and not scmoe.dual_gating
        ),
        "A model without --moe-shared-expert-intermediate-size does not work with a shortcut",
        "add it, for example with the size of --ffn-hidden-size",
        "a shared expert reads the current representation",
    ),
    Refusal(
        lambda config, scmoe: (
            not scmoe.has_shortcut
            and config.moe_shared_expert_intermediate_size is None
            and scmoe.scmoe_combine != "add"
        ),
        "--scmoe-combine {scmoe_combine} weighs a shared expert, and there is none",
        "use add, or --moe-shared-expert-intermediate-size",
    ),
    Refusal(
        lambda config, scmoe: scmoe.dual_gating and not scmoe.has_shortcut,
        "--scmoe-dual-gating {scmoe_dual_gating} does not work without a shortcut",
        "add --scmoe-shortcut-position",
        "one of its gates reads it",
    ),
    Refusal(
        lambda config, scmoe: (
            scmoe.scmoe_expert_slot != "auto"
            and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)?", scmoe.scmoe_expert_slot)
        ),
        "--scmoe-expert-slot {scmoe_expert_slot}",
        "write auto, a number, or two numbers for forward and backward, for example 1,2",
    ),
    Refusal(
        _slot_outside,
        "--scmoe-expert-slot {slot} is outside 0..{last}, the window of "
        "{scmoe_shortcut_position} ({names})",
    ),
    Refusal(
        lambda config, scmoe: scmoe.scmoe_num_chunks < 1,
        "--scmoe-num-chunks {scmoe_num_chunks} is not at least 1",
    ),
    Refusal(
        lambda config, scmoe: (
            scmoe.scmoe_num_chunks > 1 and config.moe_pad_expert_input_to_capacity
        ),
        "--scmoe-num-chunks > 1 does not work with --moe-pad-expert-input-to-capacity",
        "drop one of them",
        "the capacity is that of all tokens",
    ),
    Refusal(
        lambda config, scmoe: router_has_no_gradient(config),
        "--moe-router-topk 1 with a softmax over the selected expert gives every weight 1 and the "
        "router no gradient",
        "add --moe-router-pre-softmax",
    ),
    Refusal(
        _moe_first,
        "--moe-layer-freq {moe_layer_freq} puts the MoE first; a shortcut needs the dense "
        "layer first",
        "{advice}",
    ),
    Refusal(
        lambda config, scmoe: not isinstance(freq := config.moe_layer_freq, int) and not any(freq),
        "--moe-layer-freq lists no MoE layer, so there is nothing to connect",
        "put a 1 behind a 0, for example '([0,1]*12)'",
    ),
    Refusal(
        _no_dense_layer,
        "--scmoe-shortcut-position {scmoe_shortcut_position} needs a dense layer in front of every "
        "MoE layer, and layer {layer} has none",
        "{advice}",
    ),
)


def _of_another_router(config: TransformerConfig, scmoe: ScMoEConfig) -> Found:
    """The first option that was changed and that another router than the chosen one reads."""
    defaults = ScMoEConfig()
    for name, router in ROUTERS.items():
        for option in router.options:
            changed = getattr(scmoe, option) != getattr(defaults, option)
            if changed and name != scmoe.scmoe_router:
                return {"option": flag(option), "router": name}
    return False


# Options that would be ignored.
WITHOUT_EFFECT = (
    Refusal(
        _of_another_router,
        "{option} is an option of --scmoe-router {router}, and this one is {scmoe_router}",
        "drop it, or change the router",
    ),
    Refusal(
        lambda config, scmoe: scmoe.scmoe_mla_scale and not config.multi_latent_attention,
        "--scmoe-mla-scale scales the latents of --multi-latent-attention, which is not given",
        "drop it, or add that",
    ),
    Refusal(
        lambda config, scmoe: (
            scmoe.scmoe_dispatch_copies != "expert"
            and config.moe_token_dispatcher_type != "alltoall"
        ),
        "--scmoe-dispatch-copies {scmoe_dispatch_copies} is about --moe-token-dispatcher-type "
        "alltoall, and this one is {moe_token_dispatcher_type}",
        "drop it, or use that",
        "allgather and flex send a token once to a rank already",
    ),
    Refusal(
        lambda config, scmoe: not scmoe.scmoe_distinct_experts and not scmoe.dual_gating,
        "--no-scmoe-distinct-experts is an option of --scmoe-dual-gating, which is not given",
        "drop it, or add that",
    ),
)


def _unsupported_option(dest: str, reason: str) -> Refusal:
    return Refusal(
        lambda args: has_units(args) and getattr(args, dest),
        f"--{dest.replace('_', '-')} does not work with a shortcut",
        "drop it",
        reason,
    )


# What stands on the command line only, not in the config.
OPTIONS = (
    _unsupported_option("spec", "the units are the layers"),
    _unsupported_option("hybrid_layer_pattern", "it belongs to the host's HybridModel"),
    _unsupported_option(
        "use_megatron_fsdp", "it gathers weights layer by layer, in the order of stock layers"
    ),
    _unsupported_option(
        "use_torch_fsdp2", "it gathers weights layer by layer, in the order of stock layers"
    ),
    _unsupported_option(
        "moe_use_upcycling", "a dense checkpoint has no shared experts and no shortcut"
    ),
    Refusal(
        lambda args: (
            args.scmoe_expert_placement is not None
            and (args.ckpt_format != "torch_dist" or args.non_persistent_ckpt_type == "local")
        ),
        "--scmoe-expert-placement works neither with --ckpt-format other than torch_dist nor with "
        "--non-persistent-ckpt-type local",
        "drop one of them",
        "these hold experts by ranks and not by their numbers",
    ),
)
