"""DeepEP and HybridEP: permutation and exchange in one kernel.

Shapes: s sequence / TP, b batch, h hidden, T = s*b local tokens (of a chunk), E experts, e local
experts, K top-k, R rows for this rank's experts
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, Self

import torch
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.moe.token_dispatcher import (
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.dispatch.row_counts import RowCounts
from megatron_scmoe.model.dispatch.trip import Chunk, Dispatcher, ExpertInput
from megatron_scmoe.overlap.collectives import Collective, Fused


class FlexDispatcher(Dispatcher):
    """DeepEP's and HybridEP's fused exchanges, through the host's managers.

    Args:
        host: builds the manager of --moe-flex-dispatcher-backend and speaks to it.
    """

    host_type = "flex"
    refusals = (
        Refusal(
            lambda config, scmoe: config.moe_flex_dispatcher_backend == "ncclep",
            "--moe-flex-dispatcher-backend ncclep does not work with a shortcut",
            "use deepep or hybridep",
            "its buffers are made for one exchange at a time",
        ),
    )

    def __init__(self, host: MoEFlexTokenDispatcher, local_experts: slice) -> None:
        self.host = host
        self.local_experts = local_experts

    @classmethod
    def build(cls, host: MoETokenDispatcher, ranks_per_node: int, *layer: Any) -> Self:
        assert isinstance(host, MoEFlexTokenDispatcher)
        return cls(host, layer[-1])

    def prepare(
        self, chunks: list[Chunk], host_waited: Callable[[float], None]
    ) -> "list[FlexTrip]":
        """Find the ranks of each token."""
        trips = [FlexTrip(self, chunk) for chunk in chunks]
        if all(trip.asks_for_counts() for trip in trips):
            maps = [chunk.routing_map for chunk in chunks]
            counts = RowCounts(maps, self.host._comm_manager.group, host_waited)
            for index, trip in enumerate(trips):
                trip.counts = counts, index
        return trips


class FlexTrip:
    """Permutation and exchange in one kernel; one manager for there and back."""

    tokens_per_expert: Tensor | None = None

    def __init__(self, dispatcher: FlexDispatcher, chunk: Chunk) -> None:
        self._dispatcher = dispatcher
        host = dispatcher.host
        # The host's manager holds the state of one micro-batch; a copy holds this trip's. Buffers
        # of the backend, counters of dropped tokens and groups stay shared.
        self._manager = manager = copy(host._comm_manager)
        # The host's looks for the valid indices, and waits for the device to count them.
        manager._indices_to_multihot = partial(_multihot, manager.num_local_experts)
        # [T, TP * EP, e]: every rank of the group with its experts.
        by_rank, probs_by_rank = host._initialize_metadata(chunk.routing_map, chunk.probs)
        if chunk.rows_per_token is not None:
            manager.router_topk = host.tp_size * chunk.rows_per_token
        manager.setup_metadata(by_rank, probs_by_rank)
        if (chosen := getattr(manager, "token_indices", None)) is not None:
            # DeepEP's takes K experts of every token, those without weight too; with a capacity
            # some are -1 already.
            is_routed = by_rank.flatten(1).gather(1, chosen.clamp(min=0))
            manager.token_indices = chosen.masked_fill(~is_routed, -1)
        visits = by_rank.any(dim=2)
        self._rows_to = visits.sum(dim=0)
        self._rows_to[manager.group.rank()] = 0
        self.counts: tuple[RowCounts, int] | None = None
        self._cargo: tuple[Tensor, ...] = (chunk.hidden_states, manager.token_probs)
        manager.token_probs = None

    def asks_for_counts(self) -> bool:
        """Whether the manager waits for numbers of rows wherever it needs them, unless it is told:
        HybridEP's, where no capacity decides them."""
        hybrid = self._dispatcher.host.config.moe_flex_dispatcher_backend == "hybridep"
        return hybrid and self._manager.num_permuted_tokens is None

    def cargo(self) -> tuple[Tensor, ...]:
        """Hidden states, [T, h], and router weights, [T, K] or [T, E]."""
        cargo, self._cargo = self._cargo, ()
        return cargo

    def collective(self) -> Collective:
        """The manager's dispatch. DeepEP's blocks the host until the numbers of rows are known."""
        manager, config = self._manager, self._dispatcher.host.config
        if self.counts is not None:
            counts, index = self.counts
            rows = counts.on_host()[:, index, self._dispatcher.local_experts].sum(dim=0)
            if config.fp8 or config.fp4:
                rows += -rows % get_align_size_for_quantization(config)
            manager.tokens_per_expert, manager.num_permuted_tokens = rows, int(rows.sum())

        def dispatch(hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
            manager.token_probs = probs
            rows = manager.dispatch(
                hidden_states, async_finish=False, allocate_on_comm_stream=False
            )
            received, manager.dispatched_probs = manager.dispatched_probs, None
            manager.token_probs = None
            return rows, received

        blocks = config.moe_flex_dispatcher_backend == "deepep"
        return Fused(dispatch, manager.group, self._rows_to, blocks_host=blocks)

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """What the exchange has not sorted by expert yet is sorted here."""
        rows, self._manager.dispatched_probs = received
        rows, probs = self._manager.get_permuted_hidden_states_by_experts(rows)
        return ExpertInput(rows, probs, self._manager.get_number_of_tokens_per_expert().cpu())

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """The manager's combine."""
        manager = self._manager

        def combine(rows: Tensor) -> tuple[Tensor]:
            return (manager.combine(rows, async_finish=False, allocate_on_comm_stream=False),)

        rows = manager.get_restored_hidden_states_by_experts(expert_output)
        return Fused(combine, manager.group, self._rows_to), rows

    def restore(self, rows: Tensor) -> Tensor:
        """In the order of the tokens already."""
        return rows


def _multihot(num_local_experts: int, indices: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts a token has and with which weights, each [R, e], from DeepEP's [R, K]; an index
    of -1 is of no expert of this rank."""
    # A column for those that have none.
    columns = indices.where(indices >= 0, num_local_experts)
    size = (len(indices), num_local_experts + 1)
    routing_map = torch.zeros(size, dtype=torch.bool, device=indices.device)
    weights = torch.zeros(size, dtype=torch.float32, device=indices.device)
    routing_map = routing_map.scatter(1, columns, True)
    weights = weights.scatter(1, columns, probs)
    return routing_map[:, :-1].contiguous(), weights[:, :-1].contiguous()
