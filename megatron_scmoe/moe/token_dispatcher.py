"""How tokens get to their experts and back, as trips that hand their state on.

    dispatcher.prepare(z) -> Trip      cargo, collective -> (exchange) -> expert_input -> (experts)
                                       -> reply -> (exchange) -> restore

Differs from megatron.core.transformer.moe.token_dispatcher: a trip is one chunk of one micro-batch
and holds all its state, so that any number can be in flight; it says what is exchanged and leaves
the exchange itself to overlap/branch.py. Permutations are the host's.

Shapes: s sequence / TP, b batch, h hidden, T = s*b local tokens (of a chunk), E experts, e local
experts, K top-k, N rows sent (T*K without dropping), R rows for this rank's experts
"""

from copy import copy
from dataclasses import dataclass
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

from megatron_scmoe.overlap.collectives import (
    AllGather,
    AllToAll,
    Collective,
    Fused,
    ReduceScatter,
)
from megatron_scmoe.overlap.streams import HostCopy, launch


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

    def prepare(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Trip:
        """Begin a trip.

        Args:
            hidden_states: what the routed experts read, [T, h].
            probs: router weights, zero where not routed, [T, E].
            routing_map: [T, E], bool.
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
    if isinstance(host, MoEFlexTokenDispatcher):
        return FlexDispatcher(host)
    local_experts = slice(local_expert_indices[0], local_expert_indices[-1] + 1)
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

    def prepare(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> "AllToAllTrip":
        """Permute the tokens by expert and ask the other ranks for their numbers of rows."""
        return AllToAllTrip(self, hidden_states, probs, routing_map)


class AllToAllTrip:
    """Rows sorted by expert, sent to the ranks of the experts and back."""

    def __init__(
        self,
        dispatcher: AllToAllDispatcher,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
    ) -> None:
        self._dispatcher = dispatcher
        self._config = config = dispatcher.config
        if config.moe_router_padding_for_quantization:
            routing_map = pad_routing_map(routing_map, get_align_size_for_quantization(config))
        self._shape = hidden_states.shape
        self._probs_dtype = probs.dtype
        self._routing_map = routing_map
        self._counts = _RowCounts(dispatcher, routing_map)
        # Without dropping and padding the host need not wait for the counts to permute.
        if config.moe_expert_capacity_factor is None and not (
            config.moe_router_padding_for_quantization
        ):
            self._num_rows = routing_map.shape[0] * config.moe_router_topk
        else:
            self._num_rows = int(self._own_counts().sum())
        rows, row_probs, self._permutation, _, _ = permute(
            hidden_states,
            routing_map,
            probs=probs,
            num_out_tokens=self._num_rows,
            fused=config.moe_permute_fusion,
            drop_and_pad=config.moe_pad_expert_input_to_capacity,
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
            RuntimeError: the router chose another number of experts than K for some token.
        """
        own = self._dispatcher
        sent = self._own_counts()
        if int(sent.sum()) != self._num_rows:
            raise RuntimeError(
                f"the router selected {int(sent.sum())} rows, not tokens x top-k = {self._num_rows}"
            )
        counts, device_counts = self._counts.wait()
        received = counts[:, :, own.local_experts]
        self._tokens_per_expert = received.sum(dim=(0, 1))
        # Rows from each (expert tensor parallel, expert parallel) rank for each local expert,
        # [ETP * EP, e]: the gather over expert tensor parallel ranks puts their blocks one after
        # another. A fused permutation reads them on the device.
        chunk_counts = device_counts if self._config.moe_permute_fusion else counts
        self._chunk_sizes = chunk_counts[:, :, own.local_experts].transpose(0, 1).flatten(0, 1)
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
        return unpermute(
            rows,
            self._permutation,
            restore_shape=self._shape,
            routing_map=self._routing_map,
            fused=self._config.moe_permute_fusion,
            drop_and_pad=self._config.moe_pad_expert_input_to_capacity,
        )

    def _own_counts(self) -> Tensor:
        """Rows that this rank sends to each expert, [E], on the CPU."""
        own = self._dispatcher
        counts, _ = self._counts.wait()
        return counts[own.ep_group.rank(), own.tp_group.rank()]

    def _several_experts(self) -> bool:
        return self._tokens_per_expert.numel() > 1

    def _sort(
        self, rows: Tensor, chunk_sizes: Tensor, order: Tensor, probs: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        return sort_chunks_by_idxs(
            rows, chunk_sizes.ravel(), order, probs=probs, fused=self._config.moe_permute_fusion
        )


class _RowCounts:
    """Rows from every rank for every expert, [EP, ETP, E], int64, gathered beside other work."""

    def __init__(self, dispatcher: AllToAllDispatcher, routing_map: Tensor) -> None:
        config, group = dispatcher.config, dispatcher.tp_ep_group
        num_tokens, num_experts = routing_map.shape
        self._shape = (dispatcher.ep_group.size(), dispatcher.tp_group.size(), num_experts)
        self._pending: HostCopy | None = None
        if config.moe_pad_expert_input_to_capacity:
            capacity = get_capacity(
                num_tokens=num_tokens * config.moe_router_topk,
                num_experts=num_experts,
                capacity_factor=config.moe_expert_capacity_factor,
            )
            self._host = torch.full(self._shape, capacity, dtype=torch.int64)
            self._device = self._host.to(routing_map.device)
            return
        counts = routing_map.sum(dim=0)
        if group.size() == 1:
            self._device = counts
            self._host = counts.cpu()
            return
        gather = AllGather(group)
        self._device = gather.buffer(counts)
        flight = launch(
            lambda async_op: [gather.issue(self._device, counts, async_op)], [counts, self._device]
        )
        self._pending = HostCopy(flight, self._device)

    def wait(self) -> tuple[Tensor, Tensor]:
        """The counts on the CPU and on the device; blocks the host the first time."""
        if self._pending is not None:
            self._host, self._pending = self._pending.wait(), None
        return self._host.view(self._shape), self._device.view(self._shape)


class AllGatherDispatcher:
    """Sends every token to all ranks, which pick those of their experts (`allgather`)."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, local_experts: slice
    ) -> None:
        self.config = config
        self.group = pg_collection.tp_ep
        self.local_experts = local_experts

    def prepare(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> "AllGatherTrip":
        """Nothing is computed before the exchange."""
        return AllGatherTrip(self, hidden_states, probs, routing_map)


class AllGatherTrip:
    """Tokens gathered from the expert (tensor) parallel ranks; outputs summed over them."""

    def __init__(
        self,
        dispatcher: AllGatherDispatcher,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
    ) -> None:
        self._dispatcher = dispatcher
        self._fused = dispatcher.config.moe_permute_fusion
        self._dtype = hidden_states.dtype
        # Small ones first, as in an all-to-all.
        self._cargo: tuple[Tensor, ...] = (routing_map, probs, hidden_states)

    def cargo(self) -> tuple[Tensor, ...]:
        """Routing map and router weights, [T, E], and hidden states, [T, h]."""
        cargo, self._cargo = self._cargo, ()
        return cargo

    def collective(self) -> Collective:
        """One number of tokens on all ranks: nothing to ask for."""
        return AllGather(self._dispatcher.group)

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """The tokens of this rank's experts; a token of several experts is repeated."""
        routing_map, probs, hidden_states = received
        self._local_map = routing_map[:, self._dispatcher.local_experts].contiguous()
        local_probs = probs[:, self._dispatcher.local_experts]
        self._shape = hidden_states.shape
        self._probs_dtype = probs.dtype
        tokens_per_expert = self._local_map.sum(dim=0).cpu()
        rows, _, self._permutation, _, _ = permute(
            hidden_states,
            self._local_map,
            num_out_tokens=int(tokens_per_expert.sum()),
            fused=self._fused,
        )
        row_probs = local_probs.T.masked_select(self._local_map.T)
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

    def __init__(self, host: MoEFlexTokenDispatcher) -> None:
        self.host = host

    def prepare(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> "FlexTrip":
        """Find the ranks of each token."""
        return FlexTrip(self, hidden_states, probs, routing_map)


class FlexTrip:
    """Permutation and exchange in one kernel; one manager for there and back."""

    def __init__(
        self,
        dispatcher: FlexDispatcher,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
    ) -> None:
        host = dispatcher.host
        # The host's manager holds the state of one micro-batch; a copy holds this trip's. Buffers
        # of the backend, counters of dropped tokens and groups stay shared.
        self._manager = manager = copy(host._comm_manager)
        # [T, TP * EP, e]: every rank of the group with its experts.
        by_rank, probs_by_rank = host._initialize_metadata(routing_map, probs)
        manager.setup_metadata(by_rank, probs_by_rank)
        visits = by_rank.any(dim=2)
        self._rows_leaving = visits.sum() - visits[:, manager.group.rank()].sum()
        self._cargo: tuple[Tensor, ...] = (hidden_states, manager.token_probs)
        manager.token_probs = None

    def cargo(self) -> tuple[Tensor, ...]:
        """Hidden states, [T, h], and router weights, [T, K] or [T, E]."""
        cargo, self._cargo = self._cargo, ()
        return cargo

    def collective(self) -> Collective:
        """The manager's dispatch; it blocks the host until the numbers of rows are known."""
        manager = self._manager

        def dispatch(hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
            manager.token_probs = probs
            rows = manager.dispatch(
                hidden_states, async_finish=False, allocate_on_comm_stream=False
            )
            received, manager.dispatched_probs = manager.dispatched_probs, None
            manager.token_probs = None
            return rows, received

        return Fused(dispatch, self._rows_leaving)

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
