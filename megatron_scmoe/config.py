"""Every option of ScMoE, once, and every combination that cannot work.

The command line is generated from this dataclass (arguments.py). It stands beside the host's
TransformerConfig instead of deriving from it, because the host drops derived config classes with
--multi-latent-attention (megatron/training/argument_utils.py:292).
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import LNImpl
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.overlap.schedule import POSITIONS, Slots, window

# Fields of ScMoEConfig that stand on no command line.
NO_OPTIONS = ("scmoe_measured_slots",)


@dataclass
class ScMoEConfig:
    """Shortcut-connected mixture of experts (arXiv:2404.05019)."""

    scmoe_shortcut_position: Literal["none", "pos1", "pos2", "pos3"] = "none"
    """Where the routed experts read: pos1, the input of the MoE layer's attention; pos2, between
    attention and MLP of the dense layer in front; pos3, the input of that dense layer; none, after
    the MoE layer's own attention, which is stock Megatron."""

    scmoe_combine: Literal["add", "cg1", "cg2"] = "cg1"
    """How shared and routed outputs meet: add; cg1, a sigmoid gate on the shared expert; cg2, a
    softmax gate on both."""

    scmoe_shortcut_norm: Literal["own", "shared"] = "own"
    """Norm of the tapped tensor: its own, or the norm that the main branch applies to the same
    tensor (LongCat-Flash)."""

    scmoe_post_norm: bool = False
    """Normalise the sum of shared and routed outputs before the residual add."""

    scmoe_overlap: bool = True
    """Run the all-to-alls beside dense work. Without it the same steps run, but every all-to-all is
    awaited where it starts; results are bitwise the same."""

    scmoe_expert_slot: str = "auto"
    """Dense operators of the window that run before the routed experts. Attention is three
    operators: QKV, core, projection. Pos-1: attention, shared expert (0..4). Pos-2: MLP, attention,
    shared expert (0..5). Pos-3: attention, MLP, attention, shared expert (0..8). auto: measured in
    the first iterations, forward and backward separately, then kept, in checkpoints too; N: fixed;
    N,M: forward and backward. Results are bitwise the same at every slot."""

    scmoe_remeasure_slot: bool = False
    """Measure the expert slots again where a checkpoint has them."""

    scmoe_num_chunks: int = 1
    """Parts of the tokens that are exchanged one by one, so that the experts of one part run beside
    the exchange of another: for a link that the dense work alone cannot hide."""

    scmoe_trace_dir: str | None = None
    """Write a trace of the units for Perfetto and tools/overlap_report.py into this folder, a file
    for each rank, of the iterations from --profile-step-start to before --profile-step-end."""

    scmoe_measured_slots: list[int] | None = None
    """Slots that a run before this one has measured: from its checkpoint, not an option."""

    @property
    def enabled(self) -> bool:
        """Whether there is a shortcut at all."""
        return self.scmoe_shortcut_position != "none"

    @property
    def initial_slots(self) -> Slots:
        """Where the routed experts run in the first iteration, forward and backward.

        Raises:
            ValueError: --scmoe-expert-slot is neither auto nor one or two numbers.
        """
        if self.scmoe_expert_slot != "auto":
            numbers = self.scmoe_expert_slot.split(",")
            if len(numbers) > 2 or not all(number.strip().isdecimal() for number in numbers):
                raise ValueError(
                    f"--scmoe-expert-slot {self.scmoe_expert_slot}: write auto, a number, or two "
                    "numbers for forward and backward, for example 1,2."
                )
            return Slots(int(numbers[0]), int(numbers[-1]))
        if self.scmoe_measured_slots is not None:
            return Slots(*self.scmoe_measured_slots)
        slot = POSITIONS[self.scmoe_shortcut_position].default_slot
        return Slots(slot, slot)

    @property
    def measures_slots(self) -> bool:
        """Whether the first iterations decide where the experts run."""
        return (
            self.scmoe_overlap
            and self.scmoe_expert_slot == "auto"
            and self.scmoe_measured_slots is None
        )

    def check(self, config: TransformerConfig) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: one line that says what is wrong and what to do.
        """
        check_transformer_impl(config.transformer_impl)
        _check_norms(config)
        if not self.enabled:
            return
        position = self.scmoe_shortcut_position
        assert position in POSITIONS
        for row in _UNSUPPORTED:
            if row.is_set(config):
                raise ValueError(
                    f"{row.option} does not work with a shortcut: {row.reason}; {row.remedy}."
                )
        operators = window(position)
        for slot in self.initial_slots:
            if slot > len(operators):
                names = ", ".join(step.value for step in operators)
                raise ValueError(
                    f"--scmoe-expert-slot {slot} is outside 0..{len(operators)}, the window of "
                    f"{position} ({names})."
                )
        if self.scmoe_num_chunks < 1:
            raise ValueError(f"--scmoe-num-chunks {self.scmoe_num_chunks} is not at least 1.")
        if self.scmoe_num_chunks > 1 and config.moe_pad_expert_input_to_capacity:
            raise ValueError(
                "--scmoe-num-chunks > 1 does not work with --moe-pad-expert-input-to-capacity: the "
                "capacity is that of all tokens; drop one of them."
            )
        if config.moe_shared_expert_gate and self.scmoe_combine != "cg1":
            raise ValueError(
                f"--moe-shared-expert-gate is --scmoe-combine cg1; drop it to use "
                f"{self.scmoe_combine}."
            )
        if self.scmoe_combine == "cg1" and not config.moe_shared_expert_gate:
            raise ValueError(
                "--scmoe-combine cg1 is the host's gate: add --moe-shared-expert-gate, or use "
                "--scmoe-combine add or cg2."
            )
        if router_has_no_gradient(config):
            raise ValueError(
                "--moe-router-topk 1 with a softmax over the selected expert gives every weight 1 "
                "and the router no gradient: add --moe-router-pre-softmax."
            )
        _check_layer_pattern(position, config)

    def check_options(self, args: Namespace) -> None:
        """Refuse what cannot work and stands on the command line only, not in the config.

        Raises:
            ValueError: one line that says what is wrong and what to do.
        """
        for dest, reason in _UNSUPPORTED_OPTIONS.items():
            if self.enabled and getattr(args, dest):
                raise ValueError(
                    f"--{dest.replace('_', '-')} does not work with a shortcut: {reason}; drop it."
                )
        if uses_grouped_experts(args):
            _check_stacked_weights(args)


def check_transformer_impl(transformer_impl: str) -> None:
    """Refuse Transformer Engine where it cannot be imported.

    The command line asks this before the host looks at its options: the host complains about the
    first fusion that it misses instead.

    Raises:
        ValueError: one line that says what to do.
    """
    if transformer_impl == "transformer_engine" and not HAVE_TE:
        raise ValueError(
            "--transformer-impl transformer_engine, the default, needs Transformer Engine, which "
            "is not installed: install it, or use --transformer-impl local."
        )


def uses_grouped_experts(config: TransformerConfig | Namespace) -> bool:
    """Whether `--moe-grouped-gemm` means the experts of model/experts/grouped.py.

    The host's local spec has no grouped experts and ignores the option. Experts with biases, which
    a shortcut refuses, stay the host's.
    """
    return (
        config.transformer_impl == "local"
        and config.moe_grouped_gemm
        and not config.add_bias_linear
    )


def _check_stacked_weights(args: Namespace) -> None:
    """Refuse what looks for every expert's own matrix."""
    if args.optimizer not in ("adam", "sgd"):
        option = f"--optimizer {args.optimizer}"
    elif args.moe_use_upcycling:
        option = "--moe-use-upcycling"
    elif args.ckpt_format != "torch_dist" and (args.save or args.load):
        option = f"--ckpt-format {args.ckpt_format}"
    else:
        return
    raise ValueError(
        f"{option} wants every expert's weights as matrices of their own, and --moe-grouped-gemm "
        "with --transformer-impl local stacks them: drop --moe-grouped-gemm."
    )


def _check_norms(config: TransformerConfig) -> None:
    uses_torch = LNImpl is WrappedTorchNorm or config.normalization == "RMSNorm"
    if config.transformer_impl != "local" or not uses_torch:
        return
    for is_set, remedy in (
        (config.layernorm_zero_centered_gamma, "drop --apply-layernorm-1p"),
        (config.persist_layer_norm, "add --no-persist-layer-norm"),
        (config.memory_efficient_layer_norm, "drop --memory-efficient-layer-norm"),
    ):
        if is_set:
            raise ValueError(f"--transformer-impl local uses torch's norms: {remedy}.")


def router_has_no_gradient(config: TransformerConfig | Namespace) -> bool:
    """Whether every router weight is 1: a softmax over one selected expert, (2)(3) with K = 1."""
    return (
        config.moe_router_topk == 1
        and config.moe_router_score_function == "softmax"
        and not config.moe_router_pre_softmax
        and config.moe_router_load_balancing_type != "sinkhorn"  # its weights are sigmoids
    )


def _check_layer_pattern(position: str, config: TransformerConfig) -> None:
    freq = config.moe_layer_freq
    if isinstance(freq, int) and freq > 1:
        repeats, rest = divmod(config.num_layers, freq)
        advice = (
            f"write --moe-layer-freq '([{','.join(['0'] * (freq - 1) + ['1'])}]*{repeats})'"
            if rest == 0
            else f"--num-layers {config.num_layers} is no multiple of {freq}, so write the pattern "
            "as a list with a 0 in front of every 1"
        )
        raise ValueError(
            f"--moe-layer-freq {freq} puts the MoE first; a shortcut needs the dense layer first: "
            f"{advice}."
        )
    pattern = [1] * config.num_layers if isinstance(freq, int) else freq
    if not any(pattern):
        raise ValueError(
            "--moe-layer-freq lists no MoE layer, so there is nothing to connect: put a 1 behind a "
            "0, for example '([0,1]*12)'."
        )
    if position == "pos1":
        return
    for layer, (before, here) in enumerate(zip([1, *pattern[:-1]], pattern, strict=True)):
        if here and before:
            advice = "use pos1, which reads the MoE layer's own input"
            pairs, rest = divmod(config.num_layers, 2)
            if pairs:
                # An odd layer comes first and is dense.
                pattern_of_pairs = "([0]+[0,1]*" if rest else "([0,1]*"
                advice += f", or --moe-layer-freq '{pattern_of_pairs}{pairs})'"
            raise ValueError(
                f"--scmoe-shortcut-position {position} needs a dense layer in front of every MoE "
                f"layer, and layer {layer + 1} has none: {advice}."
            )


_UNSUPPORTED_OPTIONS = {
    "spec": "the units are the layers",
    "hybrid_layer_pattern": "it belongs to the host's HybridModel",
    "use_megatron_fsdp": "it gathers weights layer by layer, in the order of stock layers",
    "use_torch_fsdp2": "it gathers weights layer by layer, in the order of stock layers",
    "moe_use_upcycling": "a dense checkpoint has no shared experts and no shortcut",
}


class _Unsupported(NamedTuple):
    option: str
    is_set: Callable[[TransformerConfig], bool]
    reason: str
    remedy: str = "drop it"


# What the host offers and a shortcut unit does not support.
_UNSUPPORTED = (
    _Unsupported(
        "A model without --num-experts",
        lambda config: config.num_moe_experts is None,
        "there are no routed experts to move",
        "add experts, or drop --scmoe-shortcut-position",
    ),
    _Unsupported(
        "A model without --moe-shared-expert-intermediate-size",
        lambda config: config.moe_shared_expert_intermediate_size is None,
        "a shared expert reads the current representation",
        "add it, for example with the size of --ffn-hidden-size",
    ),
    _Unsupported(
        "Leaving out --disable-bias-linear",
        lambda config: config.add_bias_linear,
        "the host's shared and routed experts have no biases",
        "add it",
    ),
    _Unsupported(
        "--moe-flex-dispatcher-backend ncclep",
        lambda config: config.moe_flex_dispatcher_backend == "ncclep",
        "its buffers are made for one exchange at a time",
        "use deepep or hybridep",
    ),
    _Unsupported(
        "--moe-router-padding-for-quantization with --moe-token-dispatcher-type allgather",
        lambda config: (
            config.moe_router_padding_for_quantization
            and config.moe_token_dispatcher_type == "allgather"
        ),
        "the host pads the rows of the other dispatchers only",
        "use alltoall, or drop the padding",
    ),
    _Unsupported(
        "--moe-shared-expert-overlap",
        lambda config: config.moe_shared_expert_overlap,
        "the unit already runs the shared expert beside the all-to-all",
    ),
    _Unsupported(
        "--overlap-moe-expert-parallel-comm",
        lambda config: config.overlap_moe_expert_parallel_comm,
        "its schedule knows single layers only and would run the unit in the wrong order",
    ),
    _Unsupported(
        "--delay-wgrad-compute",
        lambda config: config.delay_wgrad_compute,
        "it belongs to --overlap-moe-expert-parallel-comm",
    ),
    _Unsupported(
        "--overlap-dispatch-backward-with-experts-wgrad",
        lambda config: config.overlap_dispatch_backward_with_experts_wgrad,
        "it is wired into the host's dispatch, which the unit replaces",
    ),
    _Unsupported(
        "--cuda-graph-impl",
        lambda config: config.cuda_graph_impl != "none",
        "the number of exchanged rows changes from step to step",
    ),
    _Unsupported(
        "--mtp-num-layers",
        lambda config: bool(config.mtp_num_layers),
        "the host builds its multi-token prediction layers without the shortcut",
    ),
    _Unsupported(
        "--moe-latent-size",
        lambda config: config.moe_latent_size is not None,
        "latent projections are not part of the unit's stages",
    ),
    _Unsupported(
        "--heterogeneous-layers-config-path",
        lambda config: config.heterogeneous_block_specs,
        "layers of one unit would have different shapes",
    ),
    _Unsupported(
        "--experimental-attention-variant",
        lambda config: config.experimental_attention_variant is not None,
        "the host builds its layers by another path",
    ),
    _Unsupported(
        "--transformer-impl inference_optimized",
        lambda config: config.transformer_impl == "inference_optimized",
        "it replaces the dispatcher",
        "use local or transformer_engine",
    ),
    _Unsupported(
        "--fused-residual-rmsnorm",
        lambda config: config.fused_residual_rmsnorm,
        "the tapped tensor would not exist as a tensor",
    ),
    _Unsupported(
        "--fine-grained-activation-offloading",
        lambda config: config.fine_grained_activation_offloading,
        "the units' steps are not offloading groups",
    ),
    _Unsupported(
        "Kitchen quantization",
        lambda config: config.use_kitchen or config.use_kitchen_attention,
        "the linear layer after an unfused norm would not be quantized",
    ),
    _Unsupported(
        "--recompute-modules moe with FP8 or FP4",
        lambda config: bool(
            (config.fp8 or config.fp4)
            and config.recompute_granularity == "selective"
            and "moe" in config.recompute_modules
        ),
        "the experts would be recomputed in another precision",
        "use moe_act, or --recompute-granularity full",
    ),
    _Unsupported(
        "--first-last-layers-bf16",
        lambda config: config.first_last_layers_bf16,
        "the host counts block layers, and a unit is one block layer with two attention layers",
    ),
    _Unsupported(
        "--qk-clip",
        lambda config: config.qk_clip,
        "the host clips one attention for each block layer, and a unit has two",
    ),
    _Unsupported(
        "--log-max-attention-logit",
        lambda config: config.log_max_attention_logit,
        "the host looks at one attention for each block layer, and a unit has two",
    ),
    _Unsupported(
        "--mlp-chunks-for-training",
        lambda config: config.mlp_chunks_for_training > 1,
        "the unit's MoE is not cut into chunks",
    ),
    _Unsupported(
        "CPU offloading",
        lambda config: config.cpu_offloading,
        "the host counts its layers, not units",
    ),
)
