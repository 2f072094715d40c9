"""Counts of experts that are chosen together, while a model runs.

A watched router is the host's or one of ours: what it answers is counted on its device, and nothing
waits for it. With a capacity it is what was kept; experts at home do not count.

Shapes: T tokens, N routed experts, H experts at home, K top-k
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.c2r.collaboration import NOBODY, Collaboration, LayerCounts

SET_TOKENS = 65_536
"""Tokens of a layer and a rank whose sets of experts are kept: the last ones."""


class _Layer:
    """Counts of one router since the last `take`."""

    def __init__(self, experts: int, topk: int) -> None:
        self._experts, self._topk = experts, topk
        self._tokens: Tensor | int = 0
        self._together: Tensor | None = None
        self._sets: list[Tensor] = []

    def add(self, routing_map: Tensor, padding_mask: Tensor | None) -> None:
        """Count one pass.

        Args:
            routing_map: [T, N + H], bool.
            padding_mask: [s, b], True for padding, which does not count.
        """
        chosen = routing_map[:, : self._experts]
        counts = torch.ones_like(chosen[:, 0]) if padding_mask is None else ~padding_mask.flatten()
        chosen = chosen & counts[:, None]
        ones = chosen.float()  # sums of fewer than 2^24 tokens are exact
        together = (ones.T @ ones).long()
        self._together = together if self._together is None else self._together + together
        self._tokens = self._tokens + counts.sum()
        if self._topk > 2:
            numbers = torch.arange(self._experts, device=chosen.device)
            ordered = torch.where(chosen, numbers, self._experts).sort(dim=1).values
            # A token that does not count is below zero as a whole.
            sets = torch.where(counts[:, None], ordered[:, : self._topk], NOBODY)
            self._sets.append(sets.short())
            while sum(map(len, self._sets[1:])) >= SET_TOKENS:
                del self._sets[0]

    def take(self) -> LayerCounts:
        """What was counted, on the host."""
        if self._together is None:
            whole = np.zeros((self._experts, self._experts), np.int64)
        else:
            whole = self._together.cpu().numpy()
        chosen = whole.diagonal().copy()
        np.fill_diagonal(whole, 0)
        found = LayerCounts(int(self._tokens), chosen, whole)
        if self._topk > 2:
            rows = [sets.cpu().numpy().astype(np.int64) for sets in self._sets]
            all_rows = np.concatenate([np.zeros((0, self._topk), np.int64), *rows])
            all_rows = all_rows[all_rows[:, 0] != NOBODY]
            all_rows[all_rows == self._experts] = NOBODY
            found.sets, found.set_tokens = _united(all_rows, np.ones(len(all_rows), np.int64))
        self._tokens, self._together, self._sets = 0, None, []
        return found


class Collector:
    """Counts of all MoE layers of a model.

    Args:
        modules: model chunks of this rank.
        is_counted: asked at every pass.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], is_counted: Callable[[], bool]) -> None:
        self._is_counted = is_counted
        self._layers: dict[int, _Layer] = {}
        self._topk = 0
        for moe in (module for chunk in modules for module in chunk.modules()):
            if not isinstance(moe, MoELayer):
                continue
            router: Any = moe.router
            experts = moe.config.num_moe_experts  # without those at home, which its router has
            assert experts is not None
            self._topk = router.topk
            layer = self._layers[router.layer_number] = _Layer(experts, router.topk)
            router.routing = self._watched(router.routing, layer)

    def _watched(self, routing: Callable[..., Any], layer: _Layer) -> Callable[..., Any]:
        def watched(logits: Tensor, padding_mask: Tensor | None = None) -> Any:
            probs, routing_map = routing(logits, padding_mask=padding_mask)
            if self._is_counted():
                with torch.no_grad():
                    layer.add(routing_map, padding_mask)
            return probs, routing_map

        return watched

    def gather(self) -> Collaboration | None:
        """The sum over all ranks since the last time, on the first rank; every rank has to call."""
        own = self._topk, {number: layer.take() for number, layer in self._layers.items()}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        is_first = torch.distributed.get_rank() == 0
        torch.distributed.gather_object(own, ranks if is_first else None)
        if not is_first:
            return None
        layers: dict[int, LayerCounts] = {}
        for _, of_rank in ranks:
            for number, layer in of_rank.items():
                layers[number] = _sum(layers[number], layer) if number in layers else layer
        experts = max(len(layer.chosen) for layer in layers.values())
        return Collaboration(experts, max(topk for topk, _ in ranks), dict(sorted(layers.items())))


def _sum(one: LayerCounts, other: LayerCounts) -> LayerCounts:
    """Of two ranks."""
    found = LayerCounts(
        one.tokens + other.tokens, one.chosen + other.chosen, one.together + other.together
    )
    if one.sets is not None and other.sets is not None:
        assert one.set_tokens is not None and other.set_tokens is not None
        found.sets, found.set_tokens = _united(
            np.concatenate([one.sets, other.sets]),
            np.concatenate([one.set_tokens, other.set_tokens]),
        )
    return found


def _united(sets: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every different set once, [S, K], and its tokens, [S]."""
    found, places = np.unique(sets, axis=0, return_inverse=True)
    return found, np.bincount(places.ravel(), tokens, len(found)).astype(np.int64)


_of_run: Collector | None = None


def watch_run(modules: Sequence[torch.nn.Module]) -> None:
    """Count what this training run chooses, where gradients are: neither evaluation nor what is
    recomputed counts."""
    global _of_run
    _of_run = Collector(modules, torch.is_grad_enabled)


def of_run() -> Collector | None:
    """The collector of this run; None without --scmoe-collaboration-dir."""
    return _of_run
