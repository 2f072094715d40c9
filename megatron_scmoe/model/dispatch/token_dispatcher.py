"""How tokens get to their experts and back, as trips that hand their state on.

    dispatcher.prepare([z]) -> [Trip]  cargo, collective -> (exchange) -> expert_input -> (experts)
                                       -> reply -> (exchange) -> restore

Differs from megatron.core.transformer.moe.token_dispatcher: a trip is one chunk of one micro-batch
and holds all its state, so that any number can be in flight; it says what is exchanged and leaves
the exchange itself to overlap/branch.py. Permutations are the host's.

Shapes: s sequence / TP, b batch, h hidden, T = s*b local tokens (of a chunk), E experts, e local
experts, K top-k, N rows sent (T*K without dropping), R rows for this rank's experts
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import (
    get_align_size_for_quantization,
    get_capacity,
    pad_routing_map,
    permute,
    sort_chunks_by_idxs,
    unpermute,
)
from megatron.core.transformer.moe.token_dispatcher import (
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.model.dispatch.row_counts import KnownRowCounts, RowCounts
from megatron_scmoe.overlap.collectives import (
    AllGather,
    AllToAll,
    Collective,
    Fused,
    ReduceScatter,
)


@dataclass(frozen=True)
class Chunk:
    """A part of one micro-batch's tokens, to be sent to its experts."""

    hidden_states: Tensor
    """What the routed experts read, [T, h]."""
    probs: Tensor
    """Router weights, zero where not routed, [T, E]."""
    routing_map: Tensor
    """[T, E], bool."""


@dataclass(frozen=True)
class ExpertInput:
    """Rows of this rank's experts, sorted by expert."""

    hidden_states: Tensor
    """[R, h]."""
    probs: Tensor
    """Router weight of each row, [R]."""
    tokens_per_expert: Tensor
    """[e], on the CPU."""


class Trip(Protocol):
    """One chunk of tokens on the way to its experts and back."""

    def cargo(self) -> tuple[Tensor, ...]:
        """What is sent; call it once. Nothing else holds these tensors."""

    def collective(self) -> Collective:
        """How it is sent. May block the host until the numbers of rows are known."""

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """What the exchange brought, as the experts want it."""

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """The exchange that brings weighted outputs, [R, h], back, and what it sends."""

    def restore(self, rows: Tensor) -> Tensor:
        """Sum over the K experts of each token, [T, h], from what came back."""


class Dispatcher(Protocol):
    """One way of exchanging tokens."""

    def prepare(self, chunks: list[Chunk], host_waited: Callable[[float], None]) -> Sequence[Trip]:
        """Begin a trip with each chunk, and ask for the numbers of rows of all.

        Args:
            host_waited: told the seconds for which the host stands still until it knows them.
        """


def build_dispatcher(
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    local_expert_indices: list[int],
    host: MoETokenDispatcher,
) -> Dispatcher:
    """The dispatcher of --moe-token-dispatcher-type.

    Args:
        host: the host's own.
    """
    local_experts = slice(local_expert_indices[0], local_expert_indices[-1] + 1)
    if isinstance(host, MoEFlexTokenDispatcher):
        return FlexDispatcher(host, local_experts)
    if config.moe_token_dispatcher_type == "allgather":
        return AllGatherDispatcher(config, pg_collection, local_experts)
    return AllToAllDispatcher(config, pg_collection, local_experts)


class AllToAllDispatcher:
    """Sends each token to the ranks of its experts (`alltoall`)."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, local_experts: slice
    ) -> None:
        self.config = config
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.tp_ep_group = pg_collection.tp_ep
        self.local_experts = local_experts

        # The fused permutation reads its order on the device.
        device = torch.cuda.current_device() if config.moe_permute_fusion else "cpu"
        num_local_experts = local_experts.stop - local_experts.start
        chunks = torch.arange(self.tp_ep_group.size() * num_local_experts, device=device)
        # Received chunks lie rank by rank, each rank's by expert; experts want the opposite.
        self.by_expert = chunks.view(self.tp_ep_group.size(), -1).T.ravel()
        self.by_rank = chunks.view(-1, self.tp_ep_group.size()).T.ravel()

    def prepare(
        self, chunks: list[Chunk], host_waited: Callable[[float], None]
    ) -> "list[AllToAllTrip]":
        """Permute the tokens by expert and ask the other ranks for their numbers of rows."""
        config = self.config
        if config.moe_router_padding_for_quantization:
            multiple = get_align_size_for_quantization(config)
            chunks = [
                replace(chunk, routing_map=pad_routing_map(chunk.routing_map, multiple))
                for chunk in chunks
            ]
        maps = [chunk.routing_map for chunk in chunks]
        if config.moe_pad_expert_input_to_capacity:
            num_tokens, num_experts = maps[0].shape
            shape = (self.tp_ep_group.size(), len(maps), num_experts)
            counts: RowCounts = KnownRowCounts(shape, self._capacity(num_tokens), maps[0].device)
        else:
            counts = RowCounts(maps, self.tp_ep_group, host_waited)
        return [AllToAllTrip(self, chunk, counts, index) for index, chunk in enumerate(chunks)]

    def most_rows(self, routing_map: Tensor) -> int:
        """Rows that a routing map, [T, E], may have; all that it has if they are padded to
        capacity."""
        config = self.config
        num_tokens, num_experts = routing_map.shape
        if config.moe_pad_expert_input_to_capacity:
            return num_experts * self._capacity(num_tokens)
        rows = num_tokens * config.moe_router_topk
        if config.moe_router_padding_for_quantization:
            rows += num_experts * (get_align_size_for_quantization(config) - 1)
        return min(rows, num_tokens * num_experts)

    def _capacity(self, num_tokens: int) -> int:
        config = self.config
        return get_capacity(
            num_tokens=num_tokens * config.moe_router_topk,
            num_experts=config.num_moe_experts,
            capacity_factor=config.moe_expert_capacity_factor,
        )


class AllToAllTrip:
    """Rows sorted by expert, sent to the ranks of the experts and back.

    How many rows there are the host need not know to permute them: it permutes as many as there can
    be, real ones first, and sends those.
    """

    def __init__(
        self, dispatcher: AllToAllDispatcher, chunk: Chunk, counts: RowCounts, index: int
    ) -> None:
        self._dispatcher = dispatcher
        self._config = dispatcher.config
        self._shape = chunk.hidden_states.shape
        self._probs_dtype = chunk.probs.dtype
        self._routing_map = chunk.routing_map
        self._counts, self._index = counts, index
        rows, row_probs, self._permutation, _, _ = permute(
            chunk.hidden_states,
            chunk.routing_map,
            probs=chunk.probs,
            num_out_tokens=dispatcher.most_rows(chunk.routing_map),
            fused=self._config.moe_permute_fusion,
            drop_and_pad=self._config.moe_pad_expert_input_to_capacity,
        )
        # The small exchange first: with CUDA_DEVICE_MAX_CONNECTIONS=1 work that is enqueued behind
        # a second exchange would wait for the first one.
        self._cargo: tuple[Tensor, ...] = (row_probs, rows)

    def cargo(self) -> tuple[Tensor, ...]:
        """Router weights, [N], and rows, [N, h]."""
        cargo, self._cargo = self._cargo, ()
        return cargo

    def collective(self) -> Collective:
        """Splits from everybody's numbers of rows.

        Raises:
            RuntimeError: the router chose more than K experts for some token.
        """
        own = self._dispatcher
        ranks = own.ep_group.size(), own.tp_group.size()
        counts = self._counts.on_host()[:, self._index].unflatten(0, ranks)
        sent = counts[own.ep_group.rank(), own.tp_group.rank()]
        self._num_rows = int(sent.sum())
        most = own.most_rows(self._routing_map)
        if self._num_rows > most:
            raise RuntimeError(f"the router selected {self._num_rows} rows, {most} at most fit")
        received = counts[:, :, own.local_experts]
        self._tokens_per_expert = received.sum(dim=(0, 1))
        # Rows from each (expert tensor parallel, expert parallel) rank for each local expert,
        # [ETP * EP, e]: the gather over expert tensor parallel ranks puts their blocks one after
        # another. A fused permutation reads them on the device.
        if self._config.moe_permute_fusion:
            counts = self._counts.on_device()[:, self._index].unflatten(0, ranks)
        self._chunk_sizes = counts[:, :, own.local_experts].transpose(0, 1).flatten(0, 1)
        self._rows_per_tp_rank = received.sum(dim=(0, 2)).tolist()
        self._collective = AllToAll(
            group=own.ep_group,
            input_splits=sent.view(own.ep_group.size(), -1).sum(dim=1).tolist(),
            output_splits=received[:, own.tp_group.rank()].sum(dim=1).tolist(),
        )
        return self._collective

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """The rows of all expert tensor parallel ranks, sorted by expert."""
        probs, rows = received
        own = self._dispatcher
        if own.tp_group.size() > 1:
            rows, probs = (
                gather_from_sequence_parallel_region(
                    tensor, group=own.tp_group, output_split_sizes=self._rows_per_tp_rank
                )
                for tensor in (rows, probs)
            )
        if self._several_experts():
            rows, probs = self._sort(rows, self._chunk_sizes, own.by_expert, probs)
        return ExpertInput(rows, probs, self._tokens_per_expert)

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """Each row to the rank it came from; expert tensor parallel parts are summed before, in
        the router's precision."""
        rows = expert_output
        own = self._dispatcher
        if self._several_experts():
            rows, _ = self._sort(rows, self._chunk_sizes.T, own.by_rank)
        if own.tp_group.size() > 1:
            rows = reduce_scatter_to_sequence_parallel_region(
                rows.to(self._probs_dtype),
                group=own.tp_group,
                input_split_sizes=self._rows_per_tp_rank,
            ).to(rows.dtype)
        return self._collective.mirrored(), rows

    def restore(self, rows: Tensor) -> Tensor:
        """Back in the order of the tokens."""
        fused = self._config.moe_permute_fusion
        return unpermute(
            rows,
            # A fused permutation lists places of tokens, another one tokens of rows.
            self._permutation if fused else self._permutation[: self._num_rows],
            restore_shape=self._shape,
            routing_map=self._routing_map,
            fused=fused,
            drop_and_pad=self._config.moe_pad_expert_input_to_capacity,
        )

    def _several_experts(self) -> bool:
        return self._tokens_per_expert.numel() > 1

    def _sort(
        self, rows: Tensor, chunk_sizes: Tensor, order: Tensor, probs: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        return sort_chunks_by_idxs(
            rows, chunk_sizes.ravel(), order, probs=probs, fused=self._config.moe_permute_fusion
        )


class AllGatherDispatcher:
    """Sends every token to all ranks, which pick those of their experts (`allgather`)."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, local_experts: slice
    ) -> None:
        self.config = config
        self.group = pg_collection.tp_ep
        self.local_experts = local_experts

    def prepare(
        self, chunks: list[Chunk], host_waited: Callable[[float], None]
    ) -> "list[AllGatherTrip]":
        """Nothing is computed before the exchange."""
        maps = [chunk.routing_map for chunk in chunks]
        counts = RowCounts(maps, self.group, host_waited)
        return [AllGatherTrip(self, chunk, counts, index) for index, chunk in enumerate(chunks)]


class AllGatherTrip:
    """Tokens gathered from the expert (tensor) parallel ranks; outputs summed over them."""

    def __init__(
        self, dispatcher: AllGatherDispatcher, chunk: Chunk, counts: RowCounts, index: int
    ) -> None:
        self._dispatcher = dispatcher
        self._fused = dispatcher.config.moe_permute_fusion
        self._dtype = chunk.hidden_states.dtype
        self._counts, self._index = counts, index
        # Small ones first, as in an all-to-all.
        self._cargo: tuple[Tensor, ...] = (chunk.routing_map, chunk.probs, chunk.hidden_states)

    def cargo(self) -> tuple[Tensor, ...]:
        """Routing map and router weights, [T, E], and hidden states, [T, h]."""
        cargo, self._cargo = self._cargo, ()
        return cargo

    def collective(self) -> Collective:
        """One number of tokens on all ranks: no need to know the numbers of rows."""
        return AllGather(self._dispatcher.group)

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """The tokens of this rank's experts; a token of several experts is repeated."""
        routing_map, probs, hidden_states = received
        local = self._dispatcher.local_experts
        self._local_map = routing_map[:, local].contiguous()
        self._shape = hidden_states.shape
        self._probs_dtype = probs.dtype
        tokens_per_expert = self._counts.on_host()[:, self._index, local].sum(dim=0)
        rows, row_probs, self._permutation, _, _ = permute(
            hidden_states,
            self._local_map,
            probs=probs[:, local].contiguous(),
            num_out_tokens=int(tokens_per_expert.sum()),
            fused=self._fused,
        )
        return ExpertInput(rows, row_probs, tokens_per_expert)

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """Outputs in the order of all ranks' tokens, in the router's precision."""
        rows = unpermute(
            expert_output,
            self._permutation,
            restore_shape=self._shape,
            routing_map=self._local_map,
            fused=self._fused,
        )
        return ReduceScatter(self._dispatcher.group), rows.to(self._probs_dtype)

    def restore(self, rows: Tensor) -> Tensor:
        """The sum is of this rank's tokens already."""
        return rows.to(self._dtype)


class FlexDispatcher:
    """DeepEP's and HybridEP's fused exchanges, through the host's managers (`flex`).

    Args:
        host: builds the manager of --moe-flex-dispatcher-backend and speaks to it.
    """

    def __init__(self, host: MoEFlexTokenDispatcher, local_experts: slice) -> None:
        self.host = host
        self.local_experts = local_experts

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
        manager.setup_metadata(by_rank, probs_by_rank)
        visits = by_rank.any(dim=2)
        self._rows_leaving = visits.sum() - visits[:, manager.group.rank()].sum()
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
        return Fused(dispatch, self._rows_leaving, blocks_host=blocks)

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
        return Fused(combine, self._rows_leaving), rows

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
