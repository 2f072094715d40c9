"""Every option of ScMoE, once. Combinations that cannot work: checks/shortcut.py.

The command line is generated from this dataclass (arguments.py). It stands beside the host's
TransformerConfig instead of deriving from it, because the host drops derived config classes with
--multi-latent-attention (megatron/training/argument_utils.py:292).
"""

from dataclasses import dataclass
from typing import Literal

from megatron_scmoe.overlap.schedule import POSITIONS, Slots

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
        """Where the routed experts run in the first iteration, forward and backward."""
        if self.scmoe_expert_slot != "auto":
            numbers = self.scmoe_expert_slot.split(",")
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
