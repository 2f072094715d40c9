"""The router of MoE++ (arXiv:2410.07348): experts at home take more of the tokens.

    G(z^j) = W^j z^j + W_g^j G(z^{j-1})                        j > 1, the gating residual       (6)
    L_b = sum_i eta_i f_i P_i,  eta_i = 1 (routed) | tau (at home)                              (7)
    C_i = gamma eta_i' K T / (tau N + H),  eta_i' = tau (routed) | 1 (at home)                  (8)

f_i is the share of tokens that select expert i, P_i its mean score. The host's switch loss is the
same sum times (N + H) / K, without eta, and linear in the scores: they are weighted before it sees
them. It is least where a routed expert gets tau times the tokens of one at home. The paper prints
(8) without the factor K, so that the capacities of all experts sum up to gamma T for K T slots;
gamma is --moe-expert-capacity-factor.

The released code differs: its gate has two layers, Linear(h, 8 (N + H)), Tanh, Linear; and a zero
expert that is chosen gives its weight to the others, whose sum is then 1.

Shapes: s sequence / TP, b batch, h hidden, T tokens, N routed experts, H experts at home
"""

import copy
import math
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_biased_logits,
    apply_random_logits,
    router_gating_linear,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.model.routing.losses import RouterWithLosses
from megatron_scmoe.model.routing.router_options import RouterOptions

INNER = 8
"""Width of the inner layer of a gate of two, times the number of experts."""


class HeterogeneousRouter(RouterWithLosses):
    """The host's router with eta in its losses; the last columns are those of experts at home.

    Args:
        config: the host's, whose number of experts is N + H.
        at_home: H.
        options: ours.
        first: whether no MoE layer stands in front, whose logits would be handed on.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        at_home: int,
        options: RouterOptions,
        first: bool,
        **others: Any,
    ) -> None:
        # The host would give every expert the same capacity.
        self._gamma = config.moe_expert_capacity_factor
        config = copy.copy(config)
        config.moe_expert_capacity_factor = None
        super().__init__(config, *args, **others)
        columns = config.num_moe_experts
        assert columns is not None
        self._at_home = at_home
        self._tau = options.scmoe_tau
        self._slots = self.topk if options.scmoe_capacity_of == "slots" else 1
        self._renormalises = options.scmoe_renormalise
        kinds = [kind for kind, number in options.at_home.items() for _ in range(number)]
        begin = columns - at_home + (kinds.index("zero") if "zero" in kinds else 0)
        # Of one kind in a row, and no list: the host would wait until it is on the device.
        self._zero = slice(begin, begin + kinds.count("zero"))
        self.inner_weight: torch.nn.Parameter | None = None
        if options.scmoe_gate_layers == 2:
            self.inner_weight = self._matrix(INNER * columns, config.hidden_size)
            self.weight = self._matrix(columns, INNER * columns)
        self.carries = options.scmoe_gating_residual
        self.residual_weight = (
            self._matrix(columns, columns) if self.carries and not first else None
        )

    def _matrix(self, *shape: int) -> torch.nn.Parameter:
        """One more like the host's `weight`, [N + H, h]."""
        matrix = torch.nn.Parameter(torch.empty(shape, dtype=torch.float32))
        if self.config.perform_initialization:
            self.config.init_method(matrix)
        matrix.data = matrix.data.to(self.config.params_dtype)
        matrix.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return matrix

    def gating(self, input: Tensor) -> Tensor:
        """Logits, [s, b, N + H], from [s, b, h]."""
        if self.inner_weight is None:
            return super().gating(input)
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(
            self.config.moe_router_dtype or "", input.dtype
        )
        inner = router_gating_linear(input, self.inner_weight, None, dtype).tanh()
        return router_gating_linear(inner, self.weight, None, dtype)

    def forward_with_logits(
        self, z: Tensor, padding_mask: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and map, [T, N + H], and the logits that are handed on, [s, b, N + H].

        Args:
            z: [s, b, h].
            padding_mask: [s, b], True for padding.
            before: logits of the MoE layer in front, [s, b, N + H].
        """
        self._maintain_float32_expert_bias()
        logits = self.gating(self.apply_input_jitter(z))
        if self.residual_weight is not None:
            assert before is not None
            logits = logits + torch.nn.functional.linear(
                before.to(logits.dtype), self.residual_weight.to(logits.dtype)
            )
        chosen_by = logits
        if self.config.moe_router_force_load_balancing:
            chosen_by = apply_random_logits(logits)
        if self.config.moe_router_force_biased is not None:
            chosen_by = apply_biased_logits(
                logits, self.config.moe_router_force_biased, self.layer_number
            )
        probs, routing_map = self.routing(chosen_by, padding_mask=padding_mask)
        return probs, routing_map, logits

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and map, [T, N + H], from logits, [s, b, N + H]; see the host's."""
        probs, routing_map = super().routing(logits, padding_mask)
        if self._renormalises:
            probs = self._without_zero(probs)
        if self._gamma is not None:
            routing_map = self._within_capacity(probs, routing_map)
            probs = probs * routing_map
        return probs, routing_map

    def _without_zero(self, probs: Tensor) -> Tensor:
        """The weight of chosen zero experts goes to the others."""
        keep = torch.ones_like(probs)
        keep[:, self._zero].fill_(0)
        probs = probs * keep
        total = probs.sum(dim=-1, keepdim=True)
        return probs / total.clamp(min=torch.finfo(probs.dtype).tiny)

    def _within_capacity(self, probs: Tensor, routing_map: Tensor) -> Tensor:
        """What is left of the map, [T, N + H], where every expert keeps its first C_i tokens, by
        weight or by position (--moe-token-drop-policy)."""
        of_routed, *_, of_home = self.capacities(len(probs))
        # Filled where the tokens are: the host would wait for a copy.
        capacities = torch.full((probs.shape[1],), of_home, device=probs.device)
        capacities[: probs.shape[1] - self._at_home].fill_(of_routed)
        if self.config.moe_token_drop_policy == "position":
            place = routing_map.cumsum(dim=0) - 1
        else:
            weights = probs.detach().masked_fill(~routing_map, -1)
            order = weights.argsort(dim=0, descending=True, stable=True)
            numbers = torch.arange(len(probs), device=probs.device)[:, None].expand_as(order)
            place = torch.empty_like(order).scatter_(0, order, numbers)
        return routing_map & (place < capacities)

    def capacities(self, tokens: int) -> list[int]:
        """C_i of every expert for T tokens of this rank (8)."""
        columns = self.config.num_moe_experts
        assert self._gamma is not None and columns is not None
        routed = columns - self._at_home
        of_home = self._gamma * self._slots * tokens / (self._tau * routed + self._at_home)
        shares = [self._tau * of_home] * routed + [of_home] * self._at_home
        return [math.ceil(round(share, 6)) for share in shares]  # no rounding error is a token

    def for_losses(self, scores: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """eta_i times the scores, [T, N + H]."""
        eta = torch.ones(scores.shape[-1], dtype=scores.dtype, device=scores.device)
        eta[-self._at_home :].fill_(self._tau)
        return scores * eta, routing_map
