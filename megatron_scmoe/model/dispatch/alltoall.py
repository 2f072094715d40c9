"""Each token goes to the ranks of its experts, as rows sorted by expert.

Shapes: s sequence / TP, b batch, h hidden, T = s*b local tokens (of a chunk), E experts, e local
experts, K top-k, N rows sent (T*K without dropping), R rows for this rank's experts
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
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

from megatron_scmoe.model.dispatch.passage import Passage
from megatron_scmoe.model.dispatch.row_counts import KnownRowCounts, RowCounts
from megatron_scmoe.model.dispatch.trip import Chunk, Dispatcher, ExpertInput, Trip
from megatron_scmoe.overlap.collectives import Collective


class AllToAllDispatcher(Dispatcher):
    """Each token is sent to the ranks of its experts."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, local_experts: slice
    ) -> None:
        super().__init__(config, pg_collection, local_experts)
        # The fused permutation reads its order on the device.
        device = torch.cuda.current_device() if config.moe_permute_fusion else "cpu"
        num_local_experts = local_experts.stop - local_experts.start
        chunks = torch.arange(self.tp_ep_group.size() * num_local_experts, device=device)
        # Received chunks lie rank by rank, each rank's by expert; experts want the opposite.
        self.by_expert = chunks.view(self.tp_ep_group.size(), -1).T.ravel()
        self.by_rank = chunks.view(-1, self.tp_ep_group.size()).T.ravel()

    def prepare(self, chunks: list[Chunk], host_waited: Callable[[float], None]) -> Sequence[Trip]:
        """Permute the tokens by expert and ask the other ranks for their numbers of rows."""
        config = self.config
        chunks = self.padded(chunks)
        maps = [chunk.routing_map for chunk in chunks]
        if config.moe_pad_expert_input_to_capacity:
            num_tokens, num_experts = maps[0].shape
            shape = (self.tp_ep_group.size(), len(maps), num_experts)
            counts: RowCounts = KnownRowCounts(shape, self._capacity(num_tokens), maps[0].device)
        else:
            counts = RowCounts(maps, self.tp_ep_group, host_waited)
        return [AllToAllTrip(self, chunk, counts, index) for index, chunk in enumerate(chunks)]

    def padded(self, chunks: list[Chunk]) -> list[Chunk]:
        """With rows of no weight where the experts' precision wants multiples of a number."""
        if not self.config.moe_router_padding_for_quantization:
            return chunks
        multiple = get_align_size_for_quantization(self.config)
        return [
            replace(chunk, routing_map=pad_routing_map(chunk.routing_map, multiple))
            for chunk in chunks
        ]

    def most_rows(self, chunk: Chunk) -> int:
        """Rows that a chunk may have; all that it has if they are padded to capacity."""
        config = self.config
        num_tokens, num_experts = chunk.routing_map.shape
        if config.moe_pad_expert_input_to_capacity:
            return num_experts * self._capacity(num_tokens)
        rows = num_tokens * (chunk.rows_per_token or config.moe_router_topk)
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


class SentTrip:
    """Tokens permuted to rows, which are sent and come back.

    How many rows there are the host need not know to permute them: it permutes as many as there can
    be, real ones first, and sends those.

    Args:
        index: of the chunk, in the counts.
        sent: where each token has a row, [T, ...], bool.
        padded: whether rows are padded to a capacity of each expert.
    """

    tokens_per_expert: Tensor
    _cargo: tuple[Tensor, ...]
    _permutation: Tensor

    def __init__(
        self,
        dispatcher: AllToAllDispatcher,
        chunk: Chunk,
        counts: RowCounts,
        index: int,
        sent: Tensor,
        padded: bool = False,
    ) -> None:
        self._dispatcher = dispatcher
        self._fused = dispatcher.config.moe_permute_fusion
        self._shape = chunk.hidden_states.shape
        self._counts, self._index = counts, index
        self._most_rows = dispatcher.most_rows(chunk)
        self._sent, self._padded = sent, padded

    def cargo(self) -> tuple[Tensor, ...]:
        """Router weights, [N, ...], and rows, [N, h]."""
        cargo, self._cargo = self._cargo, ()
        return cargo

    def collective(self) -> Collective:
        """Splits from everybody's numbers of rows.

        Raises:
            RuntimeError: the router chose more than K experts for some token.
        """
        counts = self._by_rank(self._counts.on_host())
        self.tokens_per_expert = counts[:, :, self._dispatcher.local_experts].sum(dim=(0, 1))
        self._passage = self._passage_of(counts)
        self._num_rows = self._passage.rows
        if self._num_rows > self._most_rows:
            raise RuntimeError(
                f"the router selected {self._num_rows} rows, {self._most_rows} at most fit"
            )
        self._collective = self._passage.collective()
        return self._collective

    def restore(self, rows: Tensor) -> Tensor:
        """The sum over the rows of each token, in the order of the tokens."""
        return unpermute(
            rows,
            # A fused permutation lists places of tokens, another one tokens of rows.
            self._permutation if self._fused else self._permutation[: self._num_rows],
            restore_shape=self._shape,
            routing_map=self._sent,
            fused=self._fused,
            drop_and_pad=self._padded,
        )

    def _by_rank(self, counts: Tensor) -> Tensor:
        """Those of this chunk, [EP, ETP, ...]."""
        own = self._dispatcher
        return counts[:, self._index].unflatten(0, (own.ep_group.size(), own.tp_group.size()))

    def _passage_of(self, counts: Tensor) -> Passage:
        """What travels, from [EP, ETP, ...]."""
        raise NotImplementedError


class AllToAllTrip(SentTrip):
    """Rows sorted by expert, sent to the ranks of the experts and back."""

    def __init__(
        self, dispatcher: AllToAllDispatcher, chunk: Chunk, counts: RowCounts, index: int
    ) -> None:
        padded = dispatcher.config.moe_pad_expert_input_to_capacity
        super().__init__(dispatcher, chunk, counts, index, chunk.routing_map, padded)
        self._probs_dtype = chunk.probs.dtype
        rows, row_probs, self._permutation, _, _ = permute(
            chunk.hidden_states,
            chunk.routing_map,
            probs=chunk.probs,
            num_out_tokens=self._most_rows,
            fused=self._fused,
            drop_and_pad=padded,
        )
        # The small exchange first: with CUDA_DEVICE_MAX_CONNECTIONS=1 work that is enqueued behind
        # a second exchange would wait for the first one.
        self._cargo = row_probs, rows

    def _passage_of(self, counts: Tensor) -> Passage:
        own = self._dispatcher
        sent = counts[own.ep_group.rank(), own.tp_group.rank()]
        received = counts[:, :, own.local_experts]
        # Rows from each (expert tensor parallel, expert parallel) rank for each local expert,
        # [ETP * EP, e]: the gather over expert tensor parallel ranks puts their blocks one after
        # another. A fused permutation reads them on the device.
        sizes = received
        if self._fused:
            sizes = self._by_rank(self._counts.on_device())[:, :, own.local_experts]
        self._chunk_sizes = sizes.transpose(0, 1).flatten(0, 1)
        return Passage(
            own.ep_group,
            own.tp_group,
            sent=sent.view(own.ep_group.size(), -1).sum(dim=1),
            received=received.sum(dim=2),
        )

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """The rows of all expert tensor parallel ranks, sorted by expert."""
        probs, rows = self._passage.gathered(received)
        if self._several_experts():
            rows, probs = self._sort(rows, self._chunk_sizes, self._dispatcher.by_expert, probs)
        return ExpertInput(rows, probs, self.tokens_per_expert)

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """Each row to the rank it came from; expert tensor parallel parts are summed before, in
        the router's precision."""
        rows = expert_output
        if self._several_experts():
            rows, _ = self._sort(rows, self._chunk_sizes.T, self._dispatcher.by_rank)
        rows = self._passage.summed(rows, self._probs_dtype)
        return self._collective.mirrored(), rows

    def _several_experts(self) -> bool:
        return self.tokens_per_expert.numel() > 1

    def _sort(
        self, rows: Tensor, chunk_sizes: Tensor, order: Tensor, probs: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        return sort_chunks_by_idxs(rows, chunk_sizes.ravel(), order, probs=probs, fused=self._fused)
