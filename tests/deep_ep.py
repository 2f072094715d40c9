"""What DeepEP and HybridEP do, in torch.distributed: behind the host's own calls, for tests.

The interfaces are those that megatron.core.transformer.moe.fused_a2a calls. Received rows lie rank
by rank (DeepEP) or expert by expert, ranks in order (HybridEP).

Shapes: T tokens, h hidden, E experts, e experts of a rank, n ranks, R received rows
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.moe import fused_a2a, token_dispatcher
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

PATCHED = (
    "fused_dispatch",
    "fused_combine",
    "set_deepep_num_sms",
    "hybrid_ep_dispatch",
    "hybrid_ep_combine",
)
calls: list[str] = []
"""What was called, in order."""
rows_leaving: list[int] = []
"""Rows for other ranks in every DeepEP dispatch, forward."""


def install() -> None:
    """Make the host believe that DeepEP and HybridEP are installed, in this process."""
    module = ModuleType("deep_ep")
    module.Buffer = Buffer  # type: ignore[attr-defined]
    module.HybridEPBuffer = HybridEPBuffer  # type: ignore[attr-defined]
    utils = ModuleType("deep_ep.utils")
    utils.EventHandle = utils.EventOverlap = object  # type: ignore[attr-defined]
    sys.modules |= {"deep_ep": module, "deep_ep.utils": utils}
    importlib.reload(fused_a2a)
    for name in PATCHED:
        setattr(token_dispatcher, name, getattr(fused_a2a, name))
    # HybridEP's manager keeps a counter on the GPU.
    zeros = torch.zeros
    torch.zeros = lambda *sizes, device=None, **options: zeros(*sizes, **options)  # type: ignore


class _Way:
    """Rows of tokens to other ranks, repeatable, and the sums of what comes back."""

    def __init__(self, group: ProcessGroup, tokens: Tensor, counts: list[int], size: int) -> None:
        """tokens: which rows are sent, rank by rank; counts: how many to each; size: T."""
        self.group, self.tokens, self.counts, self.size = group, tokens, counts, size
        received = torch.tensor(counts)
        distributed.all_to_all_single(received, torch.tensor(counts), group=group)
        self.received = received.tolist()

    def there(self, rows: Tensor) -> Tensor:
        """[sent rows, ...] -> [R, ...]."""
        result = rows.new_empty(sum(self.received), *rows.shape[1:])
        splits = self.received, self.counts
        distributed.all_to_all_single(result, rows.contiguous(), *splits, group=self.group)
        return result

    def back(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [sent rows, ...]."""
        result = rows.new_empty(sum(self.counts), *rows.shape[1:])
        splits = self.counts, self.received
        distributed.all_to_all_single(result, rows.contiguous(), *splits, group=self.group)
        return result

    def summed(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [T, ...]."""
        back = self.back(rows)
        return back.new_zeros(self.size, *back.shape[1:]).index_add_(0, self.tokens, back)


class Buffer:
    """DeepEP."""

    num_nvl_bytes = num_rdma_bytes = 0

    def __init__(self, group: ProcessGroup, _nvl_bytes: int, _rdma_bytes: int) -> None:
        self.group = group

    @staticmethod
    def set_num_sms(_count: int) -> None:
        pass

    @staticmethod
    def get_dispatch_config(_ranks: int) -> Any:
        def no_bytes(*_: int) -> int:
            return 0

        return SimpleNamespace(
            get_nvl_buffer_size_hint=no_bytes, get_rdma_buffer_size_hint=no_bytes
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> Any:
        self._experts = num_experts // self.group.size()
        ranks = topk_idx.div(self._experts, rounding_mode="floor")  # -1 stays
        in_rank = torch.stack([(ranks == rank).any(1) for rank in range(self.group.size())], 1)
        return in_rank.sum(0), None, None, in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: _Way | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        **_: Any,
    ) -> Any:
        calls.append("dispatch")
        if handle is not None:
            return handle.there(x[handle.tokens]), None, None, None, None, None
        assert topk_idx is not None and topk_weights is not None and is_token_in_rank is not None
        ranks, tokens = is_token_in_rank.T.nonzero(as_tuple=True)
        way = _Way(self.group, tokens, is_token_in_rank.sum(0).tolist(), len(x))
        rows_leaving.append(len(tokens) - way.counts[self.group.rank()])
        expert = topk_idx[tokens] - ranks[:, None] * self._experts
        theirs = (expert >= 0) & (expert < self._experts)
        indices = way.there(expert.where(theirs, -1))
        weights = way.there(topk_weights[tokens] * theirs)
        counts = indices[indices >= 0].bincount(minlength=self._experts).tolist()
        return way.there(x[tokens]), indices, weights, counts, way, None

    def combine(
        self, x: Tensor, handle: _Way, topk_weights: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        calls.append("combine")
        return handle.summed(x), None if topk_weights is None else handle.summed(topk_weights), None


class _Sorted(_Way):
    """The same with rows sorted by expert when they have arrived."""

    def __init__(self, group: ProcessGroup, routing_map: Tensor, experts: int) -> None:
        self.experts, tokens = routing_map.T.nonzero(as_tuple=True)
        counts = routing_map.view(len(routing_map), group.size(), experts).sum((0, 2)).tolist()
        super().__init__(group, tokens, counts, len(routing_map))
        arrived = super().there(self.experts % experts)
        self.order = arrived.argsort(stable=True)
        self.tokens_per_expert = arrived.bincount(minlength=experts)

    def there(self, rows: Tensor) -> Tensor:
        return super().there(rows)[self.order]

    def back(self, rows: Tensor) -> Tensor:
        return super().back(rows[self.order.argsort()])


class HybridEPBuffer:
    """HybridEP."""

    def __init__(self, group: ProcessGroup, **_: Any) -> None:
        self.group = group

    def dispatch_with_permute(
        self,
        hidden: Tensor,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        handle: _Sorted | None = None,
        num_of_experts_per_rank: int = 0,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None, Tensor, _Sorted]:
        calls.append("dispatch")
        if handle is None:
            assert routing_map is not None
            handle = _Sorted(self.group, routing_map, num_of_experts_per_rank)
        rows = handle.there(hidden[handle.tokens])
        weights = None if probs is None else handle.there(probs[handle.tokens, handle.experts])
        return rows, weights, None, handle.tokens_per_expert, handle

    def combine_with_unpermute(
        self, hidden: Tensor, handle: _Sorted, probs: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        calls.append("combine")
        if probs is None:
            return handle.summed(hidden), None
        num_experts = self.group.size() * len(handle.tokens_per_expert)
        weights = probs.new_zeros(handle.size, num_experts)
        weights[handle.tokens, handle.experts] = handle.back(probs)
        return handle.summed(hidden), weights
