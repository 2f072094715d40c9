"""The router of LongCat-Flash (arXiv:2509.01322): a bias steers how many routed experts tokens get.

    g_i = R(z)_i  where R(z)_i + b_i is among the K largest of all, R the softmax               (1)
    Delta b_i = mu (K_e / K 1 / N - T_i / (K T))  for routed experts, 0 for those at home        (2)
    L = alpha sum_j f_j P_j,  P_j the mean score of group j                                 (3)-(5)
    f_j = D / (K_e T) T_j  for the D groups of routed experts,  1 / ((K - K_e) T) T_j  at home

T_i slots of T tokens chose expert i, T_j one of group j: counts, so that every f_j is 1 where the
shares are those wanted. The bias learns from the tokens of all ranks and micro-batches of a step.

Shapes: T tokens, N routed experts, H experts at home
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class LongCatRouter(TopKRouter):
    """The host's router with another selection, bias and loss; the last columns are those at home.

    Args:
        at_home: H.
        routed_topk: K_e; None for K N / (N + H).
        groups: D.
        scales_at_home: whether --moe-router-topk-scaling-factor is for experts at home too.
    """

    def __init__(
        self,
        *args: Any,
        at_home: int,
        routed_topk: float | None,
        groups: int,
        scales_at_home: bool,
        **others: Any,
    ) -> None:
        super().__init__(*args, **others)
        columns = self.config.num_moe_experts
        assert columns is not None
        self._routed = columns - at_home
        proportional = self.topk * self._routed / columns
        self._routed_topk = proportional if routed_topk is None else routed_topk
        self._groups = groups
        self._scales_at_home = scales_at_home
        self._factor = self.config.moe_router_topk_scaling_factor

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and map, [T, N + H], from logits, [s, b, N + H]; see the host's."""
        logits = logits.view(-1, logits.shape[-1])
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        scores = logits.detach().softmax(dim=-1, dtype=torch.float32)
        chosen = (scores + self.expert_bias).topk(self.topk, dim=-1).indices
        probs, routing_map = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=True,
            scaling_factor=self._factor if self._scales_at_home else None,
            precomputed_indices=chosen,
        )
        self._apply_expert_bias(
            routing_map, None if padding_mask is None else padding_mask.unsqueeze(-1)
        )
        selected = routing_map
        if self._factor and not self._scales_at_home:
            routed, at_home = probs.split([self._routed, probs.shape[1] - self._routed], dim=1)
            probs = torch.cat([routed * self._factor, at_home], dim=1)
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            _, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, "softmax", padding_mask=padding_mask
            )
            if padding_mask is not None:
                selected = selected & ~padding_mask.unsqueeze(-1)
            probs = self._apply_aux_loss(probs, scores, selected, padding_mask is not None)
        return probs, routing_map

    def _apply_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the loss (3)-(5) of this micro-batch to the weights, [T, N + H]."""
        counts, local_tokens, tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map,
            reduce_group=self.tp_cp_group,
            topk=self.topk,
            with_padding_mask=with_padding_mask,
        )
        frequency = self._by_group(counts) / tokens
        wanted = torch.full_like(frequency, self._routed_topk / self._groups)
        wanted[self._groups :].fill_(self.topk - self._routed_topk)
        mean_scores = self._by_group(scores_for_aux_loss.sum(dim=0)) / tokens
        coefficient = self.get_aux_loss_coeff("aux_loss")
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            coefficient * (frequency / wanted * mean_scores).sum(),
            "load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=local_tokens,
        )

    def _by_group(self, of_experts: Tensor) -> Tensor:
        """Sums over the D groups of routed experts and, if there are any, those at home."""
        routed, at_home = of_experts.split([self._routed, len(of_experts) - self._routed])
        sums = routed.view(self._groups, -1).sum(dim=1)
        return torch.cat([sums, at_home.sum(dim=0, keepdim=True)]) if len(at_home) else sums

    def bias_increment(self, counts: Tensor) -> Tensor:
        """Delta b / mu (2), [N + H].

        Args:
            counts: slots of every expert, of all tokens of the step, [N + H].
        """
        wanted = self._routed_topk / (self.topk * self._routed)
        increment = wanted - counts / counts.sum().clamp(min=1)
        increment[self._routed :] = 0
        return increment


@torch.no_grad()
def update_biases(modules: Sequence[torch.nn.Module], rate: float) -> None:
    """Move the biases of all such routers after a step, and count anew.

    Args:
        modules: model chunks of this rank.
        rate: mu.
    """
    routers = [
        module
        for chunk in modules
        for module in chunk.modules()
        if isinstance(module, LongCatRouter) and module.training and not module.frozen_expert_bias
    ]
    if not routers:
        return
    counts = torch.stack([router.local_tokens_per_expert for router in routers])
    torch.distributed.all_reduce(counts, group=routers[0].tp_dp_cp_group)
    for router, of_router in zip(routers, counts, strict=True):
        router.expert_bias += rate * router.bias_increment(of_router)
        router.local_tokens_per_expert.zero_()
