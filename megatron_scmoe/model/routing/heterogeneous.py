"""The balancing loss of MoE++: experts that cost nothing take more of the tokens.

    L_b = sum_i eta_i f_i P_i,  eta_i = 1 (routed) | tau (at home)       [arXiv:2410.07348, (7)]

f_i is the share of tokens that select expert i, P_i its mean score. The host's switch loss is the
same sum times E / K, without eta, and linear in the scores: they are weighted before it sees them.
It is least where a routed expert gets tau times the tokens of one at home.

Shapes: T tokens, E routed experts, H experts at home
"""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class HeterogeneousRouter(TopKRouter):
    """The host's router with eta in its losses; the last columns are those of experts at home.

    Args:
        at_home: H.
        tau: their weight, in (0, 1].
    """

    def __init__(self, *args: Any, at_home: int, tau: float, **others: Any) -> None:
        super().__init__(*args, **others)
        self._at_home = at_home
        self._tau = tau

    def _weighted(self, scores: Tensor) -> Tensor:
        """eta_i times the scores, [T, E + H]."""
        eta = torch.ones(scores.shape[-1], dtype=scores.dtype, device=scores.device)
        eta[-self._at_home :] = self._tau
        return scores * eta

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        weighted = self._weighted(scores_for_aux_loss)
        return super()._apply_aux_loss(probs, weighted, *others, **named)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        weighted = self._weighted(scores_for_aux_loss)
        return super()._apply_seq_aux_loss(probs, weighted, *others, **named)

    def _apply_global_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, *others: Any, **named: Any
    ) -> Tensor:
        weighted = self._weighted(scores_for_aux_loss)
        return super()._apply_global_aux_loss(probs, weighted, *others, **named)
