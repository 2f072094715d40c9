"""The host's router, whose selection or whose balancing losses see something else than the host's.

Shapes: T tokens, E experts
"""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

Best = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The host's choice: the K largest of some scores, [T, E], and their experts, [T, K] each."""


class Selection:
    """A stand-in for the replay of recorded routings (router_replay.py): the one place where a
    selection can change and everything behind it stays.

    Args:
        choose: from scores, [T, E], and the host's choice, as that one.
    """

    def __init__(self, choose: Callable[[Tensor, Best], tuple[Tensor, Tensor]]) -> None:
        self._choose = choose

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, host_topk: Any
    ) -> tuple[Tensor, Tensor]:
        """Scores and experts, [T, K] each, from all scores, [T, E]."""
        return self._choose(scores, lambda seen: host_topk(seen, topk, num_groups, group_topk))


class RouterWithLosses(TopKRouter):
    """Every balancing loss of the host's goes through `for_losses`."""

    def for_losses(self, scores: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and map that the losses are computed from, [T, E] each.

        Args:
            scores: the host's, [T, E].
            routing_map: the K largest of them, bool, without tokens of padding, [T, E].
        """
        raise NotImplementedError

    def _apply_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        seen = self.for_losses(scores, routing_map)
        return super()._apply_aux_loss(probs, *seen, *others, **named)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        seen = self.for_losses(scores, routing_map)
        return super()._apply_seq_aux_loss(probs, *seen, *others, **named)

    def _apply_global_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        seen = self.for_losses(scores, routing_map)
        return super()._apply_global_aux_loss(probs, *seen, *others, **named)
