"""--moe-token-dispatcher-type dense."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.dispatch import DISPATCHERS
from megatron_scmoe.model.dispatch.trip import Chunk, Dispatcher, ExpertInput
from megatron_scmoe.overlap.collectives import AllGather, Collective, ReduceScatter


class DenseDispatcher(Dispatcher):
    """Every expert computes every token, with weight 0 where not routed."""

    refusals = (
        Refusal(
            lambda config, scmoe: config.moe_router_padding_for_quantization,
            "--moe-token-dispatcher-type dense does not work with "
            "--moe-router-padding-for-quantization",
            "drop one of them",
        ),
    )

    def prepare(
        self, chunks: list[Chunk], host_waited: Callable[[float], None]
    ) -> "list[DenseTrip]":
        """Every rank has as many tokens: no numbers of rows are asked for."""
        return [DenseTrip(self, chunk) for chunk in chunks]


class DenseTrip:
    """Tokens gathered from all ranks; outputs summed over them."""

    tokens_per_expert = None

    def __init__(self, dispatcher: DenseDispatcher, chunk: Chunk) -> None:
        self._dispatcher = dispatcher
        self._cargo: tuple[Tensor, ...] = (chunk.probs, chunk.hidden_states)

    def cargo(self) -> tuple[Tensor, ...]:
        """Router weights, [T, E], and hidden states, [T, h]."""
        cargo, self._cargo = self._cargo, ()
        return cargo

    def collective(self) -> Collective:
        return AllGather(self._dispatcher.tp_ep_group)

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """All tokens, once for every local expert."""
        probs, tokens = received
        of_experts = probs[:, self._dispatcher.local_experts].T
        experts = len(of_experts)
        counts = torch.full((experts,), len(tokens))
        return ExpertInput(tokens.repeat(experts, 1), of_experts.flatten(), counts)

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """Summed over the local experts."""
        local = self._dispatcher.local_experts
        experts = local.stop - local.start
        rows = expert_output.view(experts, -1, expert_output.shape[1]).sum(dim=0)
        return ReduceScatter(self._dispatcher.tp_ep_group), rows

    def restore(self, rows: Tensor) -> Tensor:
        return rows


DISPATCHERS["dense"] = DenseDispatcher
