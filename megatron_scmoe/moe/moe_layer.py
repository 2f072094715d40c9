"""The MoE of a shortcut unit: routed experts that read the shortcut, a shared expert that does not.

    MoE(x, z) = c_s * SE(x) + c_r * sum_i G(z)_i E_i(z)          [arXiv:2404.05019, (7), (14)-(17)]

x is the current representation, z the shortcut's. Differs from
megatron.core.transformer.moe.moe_layer.MoELayer: it has no forward of its own. The unit's schedule
calls the stages one by one, with dense work between them, and every stage gets what it needs as
arguments. Router, experts and shared expert are the host's.

Shapes: s sequence / TP, b batch, h hidden, T = s*b, E experts, R rows at this rank's experts
"""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.moe.token_dispatcher import AllToAllDispatcher, DispatchState, ExpertInput
from megatron_scmoe.overlap.meter import ExchangeMeter


@dataclass(frozen=True)
class SharedOutput:
    """The shared expert's part of the sum, and the weight of the routed part."""

    output: Tensor
    """c_s * SE(x), [s, b, h]."""
    routed_weight: Tensor | None
    """c_r, [s, b, 1]; None for 1."""


class ScMoELayer(MoELayer):
    """Stages of one MoE; see ShortcutLayer for the order in which they run."""

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
        self.token_dispatcher = AllToAllDispatcher(
            self.config, pg_collection, self.local_expert_indices
        )
        self.meter = ExchangeMeter()
        self.combine_gate = CombineGate(self.config) if scmoe.scmoe_combine == "cg2" else None
        # The exchanges are not repeated in backward: recomputing "moe" means recomputing what
        # stands between them, and the shared expert.
        self.shared_experts_recompute |= self.moe_layer_recompute

    def forward(self, *args, **kwargs):
        raise RuntimeError("the stages of ScMoELayer are called by the schedule of ShortcutLayer")

    def start_dispatch(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> DispatchState:
        """Send z, [s, b, h], to its experts; probs and routing_map are [T, E]."""
        meter = self.meter if self.training else None
        return self.token_dispatcher.start_dispatch(hidden_states, probs, routing_map, meter)

    def wait_dispatch(self, state: DispatchState) -> ExpertInput:
        """Rows for this rank's experts, [R, h]."""
        return self.token_dispatcher.wait_dispatch(state)

    def routed_experts(self, rows: ExpertInput) -> Tensor:
        """sum_i G(z)_i E_i(z) before the sum: weighted expert outputs, [R, h]."""

        def compute(hidden_states: Tensor, probs: Tensor) -> Tensor:
            output, _ = self.experts(hidden_states, rows.tokens_per_expert, probs)
            return output

        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(compute, False, rows.hidden_states, rows.probs)
        return compute(rows.hidden_states, rows.probs)

    def start_combine(self, expert_output: Tensor, state: DispatchState) -> DispatchState:
        """Send the weighted outputs, [R, h], back to their tokens."""
        return self.token_dispatcher.start_combine(expert_output, state)

    def wait_combine(self, state: DispatchState) -> Tensor:
        """sum_i G(z)_i E_i(z), [s, b, h]."""
        return self.token_dispatcher.wait_combine(state)

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
