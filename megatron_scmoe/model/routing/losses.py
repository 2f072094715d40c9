"""The host's router, whose balancing losses see something else than the host's.

Shapes: T tokens, E experts
"""

from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


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
