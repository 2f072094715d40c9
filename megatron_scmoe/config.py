"""Every option of ScMoE, once. Combinations that cannot work: checks/shortcut.py.

The command line is generated from this dataclass (arguments.py). It stands beside the host's
TransformerConfig instead of deriving from it, because the host drops derived config classes with
--multi-latent-attention (megatron/training/argument_utils.py:292).
"""

import os
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.model.combine import COMBINES
from megatron_scmoe.model.dispatch import COPIES, DISPATCHERS, dispatcher_of
from megatron_scmoe.model.experts.at_home import AT_HOME
from megatron_scmoe.model.experts.offload.experts import Offload
from megatron_scmoe.model.routing import ROUTERS
from megatron_scmoe.model.routing.dual import GATINGS
from megatron_scmoe.model.variant import Variant
from megatron_scmoe.overlap.schedule import POSITIONS, Slots, default_slots, window
from megatron_scmoe.presets import PRESETS

# Fields of ScMoEConfig that stand on no command line.
NO_OPTIONS = ("scmoe_measured_slots", "scmoe_offload", "scmoe_experts_at_home")


def _option(default: Any, **shown: Any) -> Any:
    """A field that the host's parser is told more about."""
    return field(default=default, metadata={"argparse_meta": shown})


def _of_table(table: Mapping[str, type[Variant]], default: str) -> Any:
    """A field whose values are the keys of a table, also of those that are added to it later."""
    return _option(default, choices=table)


def _shown_as(metavar: str, default: Any) -> Any:
    """A field whose value has a name in --help."""
    return _option(default, metavar=metavar)


def _switch() -> Any:
    """A field that a preset may switch on, and the command line off again."""
    return _option(False, action=BooleanOptionalAction)


@dataclass
class ScMoEConfig:
    """Shortcut-connected mixture of experts (arXiv:2404.05019)."""

    scmoe_preset: str | None = _option(
        None,
        choices=tuple(PRESETS),
        help="The options of a published system; what is typed wins. "
        + "; ".join(f"{name}: {options}" for name, options in PRESETS.items())
        + ".",
    )
    """A published system by name, a key of presets.PRESETS."""

    scmoe_shortcut_position: str = _option(
        "none",
        choices=("none", *POSITIONS),
        help="Where the routed experts read: "
        + "".join(f"{name}, {position.reads}; " for name, position in POSITIONS.items())
        + "none, behind its own attention: stock Megatron, or with another variant a unit without "
        "a shortcut.",
    )
    """Where the routed experts read, a key of overlap.schedule.POSITIONS; or none."""

    scmoe_combine: str = _of_table(COMBINES, "cg1")
    """How shared and routed outputs meet."""

    scmoe_router: str = _of_table(ROUTERS, "topk")
    """How experts are chosen."""

    scmoe_tau: float = _shown_as("TAU", 0.75)
    """Weight of an expert at home in the balancing loss of --scmoe-router heterogeneous: a routed
    expert gets TAU times the tokens of one at home (MoE++)."""

    scmoe_gating_residual: bool = _switch()
    """Add to the router's logits a learnt matrix times those of the MoE layer in front, with
    --scmoe-router heterogeneous (MoE++)."""

    scmoe_capacity_of: Literal["slots", "tokens"] = "slots"
    """What --moe-expert-capacity-factor is a factor of with --scmoe-router heterogeneous: slots,
    the top-k of every token; tokens, as MoE++ prints it."""

    scmoe_renormalise: bool = False
    """Give the weight of chosen zero experts to the others, so that they sum up to 1, with
    --scmoe-router heterogeneous (MoE++'s released code, not its paper)."""

    scmoe_gate_layers: int = _shown_as("1|2", 1)
    """Layers of the gate of --scmoe-router heterogeneous: 1, MoE++'s paper; 2, with a tanh between,
    its released code."""

    scmoe_input_scale: float = _shown_as("X", 1.0)
    """Multiply what all experts read by this number; the released code of MoE++ takes 2."""

    scmoe_routed_topk: float | None = _shown_as("K", None)
    """Routed experts that a token is to get on average with --scmoe-router longcat, whose
    bias grows by --moe-router-bias-update-rate times what is missing of their share; by default in
    proportion to their number."""

    scmoe_bias_decay: Literal["constant", "linear", "cosine"] = "constant"
    """How --moe-router-bias-update-rate of --scmoe-router longcat falls to 0 over the run."""

    scmoe_balance_groups: int | None = _shown_as("D", None)
    """Groups of routed experts in the balancing loss of --scmoe-router longcat; by default one for
    each expert-parallel rank."""

    scmoe_scaled_experts: Literal["all", "routed"] = "all"
    """Whose weights --scmoe-router longcat multiplies by --moe-router-topk-scaling-factor: those of
    experts at home too (transformers, vLLM), or not (SGLang)."""

    scmoe_c2r_lists: str | None = _shown_as("FILE", None)
    """Partners of every expert, written by tools/c2r.py lists; implies --scmoe-router c2r. Without
    it that router goes on with the lists of the checkpoint."""

    scmoe_c2r_top_t: int | None = _shown_as("T", None)
    """Best partners of a token's first expert among which --scmoe-router c2r takes its others, from
    K - 1 to all others; by default the checkpoint's."""

    scmoe_mla_scale: bool = _switch()
    """Multiply queries and keys and values of multi-latent attention by the square root of hidden
    size / rank of the latent they come from (LongCat-Flash)."""

    scmoe_dual_gating: str = _of_table(GATINGS, "none")
    """How many gates a unit has, and whose weights."""

    scmoe_distinct_experts: bool = _option(
        True,
        help="Let both gates of --scmoe-dual-gating send a token to the same expert. By default "
        "the gate on the current representation takes its second expert then.",
    )
    """Where both gates of --scmoe-dual-gating want the same expert, the gate on the current
    representation takes its second one."""

    scmoe_shortcut_norm: Literal["own", "shared"] = "own"
    """Norm of the tapped tensor: its own, or the norm that the main branch applies to the same
    tensor (LongCat-Flash)."""

    scmoe_post_norm: bool = False
    """Normalise the sum of shared and routed outputs before the residual add."""

    scmoe_overlap: bool = _option(
        True,
        help="Await every all-to-all where it starts, instead of running it beside dense work; "
        "results are bitwise the same.",
    )
    """Run the all-to-alls beside dense work. Without it the same steps run, but every all-to-all is
    awaited where it starts; results are bitwise the same."""

    scmoe_expert_slot: str = _shown_as("auto|N|N,M", "auto")
    """Dense operators of the window that run before the routed experts. Attention is three
    operators: QKV, core, projection. Pos-1: attention, shared expert (0..4). Pos-2: MLP, attention,
    shared expert (0..5). Pos-3: attention, MLP, attention, shared expert (0..8). auto: measured in
    the first iterations, forward and backward separately, then kept, in checkpoints too, and the
    last where experts are offloaded; N: fixed; N,M: forward and backward. Results are bitwise the
    same at every slot."""

    scmoe_remeasure_slot: bool = False
    """Measure the expert slots again where a checkpoint has them."""

    scmoe_num_chunks: int = _shown_as("N", 1)
    """Parts of the tokens that are exchanged one by one, so that the experts of one part run beside
    the exchange of another: for a link that the dense work alone cannot hide."""

    scmoe_dispatch_copies: str = _of_table(COPIES, "expert")
    """How often --moe-token-dispatcher-type alltoall sends a token."""

    scmoe_ranks_per_node: int | None = _shown_as("N", None)
    """Ranks that share a node, for --scmoe-dispatch-copies node and for what is reported of nodes;
    by default those that the launcher started here."""

    scmoe_expert_placement: str | None = _shown_as("FILE", None)
    """Which expert-parallel rank every routed expert lies on, a file of tools/c2r.py place. Losses
    stay the same; checkpoints load with any placement or none."""

    scmoe_trace_dir: str | None = _shown_as("DIR", None)
    """Write a trace of the units for Perfetto and tools/overlap_report.py into this folder, a file
    for each rank, of the iterations from --profile-step-start to before --profile-step-end."""

    scmoe_collaboration_dir: str | None = _shown_as("DIR", None)
    """Count which experts are chosen together, over all ranks, and write it into this folder at
    every save and at the end: what was chosen since the file before, for tools/c2r.py."""

    scmoe_measured_slots: list[int] | None = None
    """Slots that a run before this one has measured, two of each route: from its checkpoint, not an
    option."""

    scmoe_offload: Offload | None = None
    """Where routed experts are kept that are not on the device; of generation, not an option of
    training."""

    scmoe_experts_at_home: dict[str, int] = field(default_factory=dict)
    """Experts of every kind that are computed where their tokens are, by --scmoe-num-KIND-experts
    for every key of AT_HOME."""

    @property
    def enabled(self) -> bool:
        """Whether MoE layers are units of ours."""
        return has_units(self)

    @property
    def has_shortcut(self) -> bool:
        """Whether the experts of a unit read an earlier tensor than stock Megatron's."""
        return self.scmoe_shortcut_position != "none"

    @property
    def own_norm(self) -> bool:
        """Whether what the experts read has a norm of its own."""
        return self.has_shortcut and self.scmoe_shortcut_norm == "own"

    @property
    def ranks_per_node(self) -> int:
        """Ranks of the job that share a node."""
        return self.scmoe_ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @property
    def dual_gating(self) -> bool:
        """Whether a unit has two gates, and no shared expert."""
        return self.scmoe_dual_gating != "none"

    @property
    def at_home(self) -> dict[str, int]:
        """Numbers of the kinds of experts at home that exist, in the order of their columns."""
        numbers = {kind: self.scmoe_experts_at_home.get(kind, 0) for kind in AT_HOME}
        return {kind: number for kind, number in numbers.items() if number > 0}

    def variants(self, config: TransformerConfig) -> list[type[Variant]]:
        """The classes of all that was chosen from a table.

        Raises:
            ValueError: a value is in no table; the command line knows no such values.
        """
        host_type, copies = config.moe_token_dispatcher_type, self.scmoe_dispatch_copies
        chosen: list[tuple[str, str, Mapping[str, type[Variant]]]] = [
            ("--moe-token-dispatcher-type", host_type, DISPATCHERS),
            ("--scmoe-dispatch-copies", copies, COPIES),
            ("--scmoe-combine", self.scmoe_combine, COMBINES),
            ("--scmoe-router", self.scmoe_router, ROUTERS),
            ("--scmoe-dual-gating", self.scmoe_dual_gating, GATINGS),
            *(("A kind of experts at home:", kind, AT_HOME) for kind in self.scmoe_experts_at_home),
        ]
        for option, value, table in chosen:
            if value not in table:
                raise ValueError(f"{option} {value} is none of {', '.join(table) or 'them'}.")
        for kind, number in self.scmoe_experts_at_home.items():
            if number < 0:
                raise ValueError(f"--scmoe-num-{kind}-experts {number} is not at least 0.")
        return [
            dispatcher_of(host_type, copies),
            COMBINES[self.scmoe_combine],
            ROUTERS[self.scmoe_router],
            GATINGS[self.scmoe_dual_gating],
            *(AT_HOME[kind] for kind in self.at_home),
        ]

    @property
    def initial_slots(self) -> Slots:
        """Where the routed experts run in the first iteration, forward and backward."""
        if self.scmoe_expert_slot != "auto":
            numbers = self.scmoe_expert_slot.split(",")
            return Slots(int(numbers[0]), int(numbers[-1]))
        if self.scmoe_offload is not None:
            # Experts travel longer than rows: the whole window is theirs.
            last = len(window(self.scmoe_shortcut_position))
            return Slots(last, last)
        if self.scmoe_measured_slots is not None:
            return Slots(*self.scmoe_measured_slots[:2])
        return default_slots(self.scmoe_shortcut_position)

    @property
    def measures_slots(self) -> bool:
        """Whether the first iterations decide where the experts run."""
        return (
            self.scmoe_overlap
            and self.scmoe_expert_slot == "auto"
            and self.scmoe_measured_slots is None
        )


def has_units(options: ScMoEConfig | Namespace) -> bool:
    """Whether MoE layers are units of ours: with a shortcut, or with what stock Megatron does not
    have.

    Args:
        options: these, or the command line that has them.
    """
    return (
        options.scmoe_shortcut_position != "none"
        or options.scmoe_router != "topk"
        or options.scmoe_dual_gating != "none"
        or any(options.scmoe_experts_at_home.values())
        or options.scmoe_input_scale != 1
        or options.scmoe_dispatch_copies != "expert"
        or options.scmoe_expert_placement is not None
    )
