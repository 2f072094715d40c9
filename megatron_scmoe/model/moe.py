"""The MoE of a shortcut unit: routed experts that read the shortcut, a shared expert that does not.

    MoE(x, z) = c_s * SE(x) + c_r * sum_i G(z)_i E_i(z)          [arXiv:2404.05019, (7), (14)-(17)]

x is the current representation, z the shortcut's. Differs from
megatron.core.transformer.moe.moe_layer.MoELayer: it has no forward of its own. The unit's schedule
calls the stages one by one, with dense work between them, and every stage gets what it needs as
arguments. Router, experts and shared expert are the host's.

Shapes: s sequence / TP, b batch, h hidden, T = s*b, E experts, R rows at this rank's experts
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.dispatch.token_dispatcher import (
    Chunk,
    ExpertInput,
    Trip,
    build_dispatcher,
)
from megatron_scmoe.overlap.branch import RoutedBranch
from megatron_scmoe.overlap.recorder import UnitRecorder


@dataclass(frozen=True)
class SharedOutput:
    """The shared expert's part of the sum, and the weight of the routed part."""

    output: Tensor
    """c_s * SE(x), [s, b, h]."""
    routed_weight: Tensor | None
    """c_r, [s, b, 1]; None for 1."""


@dataclass
class RoutedWork:
    """The routed half of one forward pass; its steps hand this on."""

    shape: torch.Size
    """[s, b, h] of z."""
    trips: list[Trip]
    """One for each chunk of the tokens."""
    branch: RoutedBranch
    expert_inputs: dict[int, ExpertInput] = field(default_factory=dict)
    """Of the chunks that were received and not yet computed."""
    expert_outputs: dict[int, Tensor] = field(default_factory=dict)
    """[R, h], of the chunks that were computed and not yet sent back."""


class ScMoELayer(MoELayer):
    """Stages of one MoE; see ShortcutLayer for the order in which they run."""

    token_dispatcher: Any  # the host's, until ours takes its place

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        scmoe: ScMoEConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        # The host chooses its dispatcher with an if/elif on the type (moe_layer.py:298).
        self.token_dispatcher = build_dispatcher(
            self.config, pg_collection, self.local_expert_indices, self.token_dispatcher
        )
        self.num_chunks = scmoe.scmoe_num_chunks
        self.recorder = UnitRecorder()
        self.combine_gate = CombineGate(self.config) if scmoe.scmoe_combine == "cg2" else None
        # The exchanges are not repeated in backward: recomputing "moe" means recomputing what
        # stands between them, and the shared expert.
        self.shared_experts_recompute |= self.moe_layer_recompute

    def forward(self, *args, **kwargs):
        raise RuntimeError("the stages of ScMoELayer are called by the schedule of ShortcutLayer")

    def prepare_dispatch(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor, overlap: bool
    ) -> "RoutedWork":
        """Permute z, [s, b, h], by expert; probs and routing_map are [T, E].

        Args:
            overlap: launch the exchanges of the backward pass early; otherwise wait at once.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        whole, rest = divmod(flat.shape[0], self.num_chunks)
        sizes = [whole + (chunk < rest) for chunk in range(self.num_chunks)]
        parts = zip(flat.split(sizes), probs.split(sizes), routing_map.split(sizes), strict=True)
        # Evaluation is not recorded.
        recorder = self.recorder if self.training else None
        waited = self.recorder.host_waited if self.training else _forget
        trips = self.token_dispatcher.prepare([Chunk(*part) for part in parts], waited)
        work = RoutedWork(hidden_states.shape, trips, RoutedBranch(overlap, recorder))
        work.branch.depart([trip.cargo() for trip in trips])
        return work

    def start_dispatch(self, work: "RoutedWork") -> None:
        """Launch the exchanges of all chunks; blocks the host until their sizes are known."""
        for chunk, trip in enumerate(work.trips):
            work.branch.send(chunk, trip.collective())

    def wait_dispatch(self, work: "RoutedWork", chunk: int) -> None:
        """Rows for this rank's experts, [R, h]."""
        received = work.branch.receive(chunk)
        rows = work.trips[chunk].expert_input(received)
        if self.training:
            self.recorder.routed(rows.tokens_per_expert)
        work.expert_inputs[chunk] = rows

    def routed_experts(self, work: "RoutedWork", chunk: int) -> None:
        """G(z)_i E_i(z): weighted expert outputs, [R, h]."""
        rows = work.expert_inputs.pop(chunk)

        def compute(hidden_states: Tensor, probs: Tensor) -> Tensor:
            output, _ = self.experts(hidden_states, rows.tokens_per_expert, probs)
            return output

        if self.moe_layer_recompute and self.training:
            output = tensor_parallel.checkpoint(compute, False, rows.hidden_states, rows.probs)
        else:
            output = compute(rows.hidden_states, rows.probs)
        work.expert_outputs[chunk] = output

    def start_combine(self, work: "RoutedWork", chunk: int) -> None:
        """Send the weighted outputs, [R, h], back to their tokens."""
        collective, rows = work.trips[chunk].reply(work.expert_outputs.pop(chunk))
        work.branch.send_back(chunk, collective, rows)

    @staticmethod
    def routed_output(work: "RoutedWork") -> Tensor:
        """sum_i G(z)_i E_i(z), [s, b, h]."""
        returned = zip(work.trips, work.branch.arrive(), strict=True)
        first, *others = [trip.restore(rows) for trip, rows in returned]
        tokens = torch.cat([first, *others]) if others else first
        return tokens.view(work.shape)

    def shared_expert(self, hidden_states: Tensor) -> SharedOutput:
        """Shared expert and coefficient gate on x, [s, b, h].

        CG-1 is the host's shared expert gate (--moe-shared-expert-gate), applied inside it.
        """
        output = self.shared_experts_compute(hidden_states)
        if self.combine_gate is None:
            return SharedOutput(output, None)
        shared_weight, routed_weight = self.combine_gate(hidden_states)
        return SharedOutput(output * shared_weight, routed_weight)

    @staticmethod
    def merge(routed_output: Tensor, shared: SharedOutput) -> Tensor:
        """Sum of shared and routed parts, [s, b, h]."""
        if shared.routed_weight is not None:
            routed_output = routed_output * shared.routed_weight
        return routed_output + shared.output


def _forget(_seconds: float) -> None:
    pass


class CombineGate(MegatronModule):
    """CG-2: c = Softmax(W_CG x), one weight for the shared, one for the routed output. [(16)]"""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(
            torch.empty(2, config.hidden_size, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            config.init_method(self.weight)
        # Replicated over TP while x is split along the sequence: the host sums its gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] -> shared weight and routed weight, each [s, b, 1]."""
        weights = torch.softmax(torch.nn.functional.linear(hidden_states, self.weight), dim=-1)
        shared_weight, routed_weight = weights.split(1, dim=-1)
        return shared_weight, routed_weight
