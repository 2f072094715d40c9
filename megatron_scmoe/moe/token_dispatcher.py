"""Token dispatch by all-to-all, in four calls that hand their state on.

    start_dispatch -> wait_dispatch -> (experts) -> start_combine -> wait_combine

Differs from megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher: each
exchange is split in start and wait, and what later calls need travels in a DispatchState, so that
several micro-batches can be in flight. The number of rows sent is counted, not assumed to be
T * K, so a token may have fewer than K routed experts, or none. Permutations are the host's.

Shapes: s sequence / TP, b batch, h hidden, T = s*b local tokens, E experts, e local experts,
K top-k, N rows sent (T*K without dropping), R rows received by this rank's experts
"""

from dataclasses import dataclass, replace
from typing import Any

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
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.overlap.all_to_all import AllToAllHandle, AllToAllPlan, LocalHandle, start
from megatron_scmoe.overlap.meter import ExchangeMeter


@dataclass(frozen=True)
class DispatchState:
    """What wait_dispatch and the combine need of start_dispatch."""

    hidden_shape: torch.Size
    """[s, b, h] of the routed hidden states."""
    permutation: Tensor
    """Token of each sent row, [N]."""
    routing_map: Tensor
    """[T, E], bool."""
    probs_dtype: torch.dtype
    """Reductions over expert tensor parallel ranks are done in the router's precision."""
    plan: AllToAllPlan
    tokens_per_expert: Tensor
    """Rows received for each local expert, [e], on the CPU."""
    chunk_sizes: Tensor
    """Rows from each (expert tensor parallel, expert parallel) rank for each local expert,
    [ETP * EP, e], where the permutation reads them: on the device if it is fused."""
    rows_per_tp_rank: list[int]
    """Rows that each expert tensor parallel rank received, ETP values."""
    handle: AllToAllHandle | LocalHandle
    """The exchange in flight."""


@dataclass(frozen=True)
class ExpertInput:
    """Received rows, sorted by local expert."""

    hidden_states: Tensor
    """[R, h]."""
    probs: Tensor
    """Router weight of each row, [R]."""
    tokens_per_expert: Tensor
    """[e], on the CPU."""


class AllToAllDispatcher:
    """Sends each token to the ranks of its experts and back."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        local_expert_indices: list[int],
    ) -> None:
        self.config = config
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.tp_ep_group = pg_collection.tp_ep
        self.local_experts = slice(local_expert_indices[0], local_expert_indices[-1] + 1)

        self.num_local_experts = len(local_expert_indices)
        # The fused permutation reads its order on the device.
        device = torch.cuda.current_device() if config.moe_permute_fusion else "cpu"
        chunks = torch.arange(self.tp_ep_group.size() * self.num_local_experts, device=device)
        # Received chunks lie rank by rank, each rank's by expert; experts want the opposite.
        self._by_expert = chunks.view(self.tp_ep_group.size(), -1).T.ravel()
        self._by_rank = chunks.view(-1, self.tp_ep_group.size()).T.ravel()

    def start_dispatch(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        meter: ExchangeMeter | None = None,
    ) -> DispatchState:
        """Permute the tokens by expert and launch their exchange.

        Args:
            hidden_states: what the routed experts read, [s, b, h].
            probs: router weights, zero where not routed, [T, E].
            routing_map: [T, E], bool.
            meter: collects the times of both exchanges, forward and backward.
        """
        if self.config.moe_router_padding_for_quantization:
            routing_map = pad_routing_map(routing_map, get_align_size_for_quantization(self.config))
        # [EP, ETP, E], also on the CPU: the splits of a collective are host values.
        device_counts = self._count_rows(routing_map)
        counts = device_counts.cpu()
        if not self.config.moe_permute_fusion:
            device_counts = counts
        ep_rank, tp_rank = self.ep_group.rank(), self.tp_group.rank()
        sent = counts[ep_rank, tp_rank]
        received = counts[:, :, self.local_experts]
        plan = AllToAllPlan(
            group=self.ep_group,
            input_splits=sent.view(self.ep_group.size(), -1).sum(dim=1).tolist(),
            output_splits=received[:, tp_rank].sum(dim=1).tolist(),
            meter=meter,
        )
        rows, row_probs, permutation, _, _ = permute(
            hidden_states.view(-1, hidden_states.shape[-1]),
            routing_map,
            probs=probs,
            num_out_tokens=int(sent.sum()),
            fused=self.config.moe_permute_fusion,
            drop_and_pad=self.config.moe_pad_expert_input_to_capacity,
        )
        return DispatchState(
            hidden_shape=hidden_states.shape,
            permutation=permutation,
            routing_map=routing_map,
            probs_dtype=probs.dtype,
            plan=plan,
            tokens_per_expert=received.sum(dim=(0, 1)),
            # The gather over expert tensor parallel ranks puts their blocks one after another.
            chunk_sizes=device_counts[:, :, self.local_experts].transpose(0, 1).flatten(0, 1),
            rows_per_tp_rank=received.sum(dim=(0, 2)).tolist(),
            # The small exchange first: with CUDA_DEVICE_MAX_CONNECTIONS=1 work that is enqueued
            # behind a second exchange would wait for the first one.
            handle=start(plan, row_probs, rows),
        )

    def wait_dispatch(self, state: DispatchState) -> ExpertInput:
        """The rows of this rank's experts, sorted by expert."""
        probs, rows = state.handle.wait()
        if self.tp_group.size() > 1:
            rows, probs = (
                gather_from_sequence_parallel_region(
                    tensor, group=self.tp_group, output_split_sizes=state.rows_per_tp_rank
                )
                for tensor in (rows, probs)
            )
        if self.num_local_experts > 1:
            rows, probs = self._sort(rows, state.chunk_sizes, self._by_expert, probs)
        return ExpertInput(rows, probs, state.tokens_per_expert)

    def start_combine(self, expert_output: Tensor, state: DispatchState) -> DispatchState:
        """Launch the exchange that brings the experts' outputs back.

        Args:
            expert_output: [R, h], sorted by expert, already weighted by the router.
        """
        rows = expert_output
        if self.num_local_experts > 1:
            rows, _ = self._sort(rows, state.chunk_sizes.T, self._by_rank)
        if self.tp_group.size() > 1:
            rows = reduce_scatter_to_sequence_parallel_region(
                rows.to(state.probs_dtype),
                group=self.tp_group,
                input_split_sizes=state.rows_per_tp_rank,
            ).to(rows.dtype)
        return replace(state, handle=start(state.plan.mirrored(), rows))

    def wait_combine(self, state: DispatchState) -> Tensor:
        """Sum over the K experts of each token, [s, b, h]."""
        (rows,) = state.handle.wait()
        output = unpermute(
            rows,
            state.permutation,
            restore_shape=torch.Size((state.routing_map.shape[0], state.hidden_shape[-1])),
            routing_map=state.routing_map,
            fused=self.config.moe_permute_fusion,
            drop_and_pad=self.config.moe_pad_expert_input_to_capacity,
        )
        return output.view(state.hidden_shape)

    def _count_rows(self, routing_map: Tensor) -> Tensor:
        """Rows from every rank for every expert, [EP, ETP, E], int64."""
        ep, tp = self.ep_group.size(), self.tp_group.size()
        num_tokens, num_experts = routing_map.shape
        if self.config.moe_pad_expert_input_to_capacity:
            capacity = get_capacity(
                num_tokens=num_tokens * self.config.moe_router_topk,
                num_experts=num_experts,
                capacity_factor=self.config.moe_expert_capacity_factor,
            )
            shape = (ep, tp, num_experts)
            return torch.full(shape, capacity, dtype=torch.int64, device=routing_map.device)
        counts = routing_map.sum(dim=0)
        if ep * tp > 1:
            counts = gather_from_sequence_parallel_region(counts, group=self.tp_ep_group)
        return counts.view(ep, tp, num_experts)

    def _sort(
        self, rows: Tensor, chunk_sizes: Tensor, order: Tensor, probs: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        return sort_chunks_by_idxs(
            rows, chunk_sizes.ravel(), order, probs=probs, fused=self.config.moe_permute_fusion
        )
