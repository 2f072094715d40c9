"""Router weights and inputs whose routing is known beforehand: four cases for every router.

    balanced      every expert is selected equally often (to within one token)
    skewed        expert 0 by half of the tokens, expert 1 by a quarter, ... as first choice;
                  further choices go to the lowest-numbered experts. From T = 2^(E-1) on
                  every expert is visited
    empty_expert  balanced over all experts but the last, which gets nothing
    all_to_one    every token selects expert 0 first (K > 1: experts 0..K-1); the rest get nothing

A case is a plan, "token t selects these experts, best first", from which logits are made, and from
the logits a router weight. Selection is meant before any capacity limit.

Shapes: T tokens, E experts, K top-k, h hidden
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import Parameters, ReferenceConfig, trace_unit

CASES = ("balanced", "skewed", "empty_expert", "all_to_one")


@dataclass(frozen=True)
class RoutingCase:
    """tokens: router input, (T, h)          router_weight: (E, h)
    logits: tokens @ router_weight.T, (T, E)
    selection: experts of each token, best first, T lists of K
    """

    tokens: Tensor
    router_weight: Tensor
    logits: Tensor
    selection: list[list[int]]


def plan_selection(case: str, num_tokens: int, num_experts: int, topk: int) -> list[list[int]]:
    """The experts each token shall select, best first: T lists of K distinct experts."""
    if case == "balanced":
        return _round_robin(num_tokens, num_experts, topk)
    if case == "empty_expert":
        if topk > num_experts - 1:
            raise ValueError("with top-k equal to the number of experts none can be empty")
        return _round_robin(num_tokens, num_experts - 1, topk)
    if case == "all_to_one":
        return [list(range(topk)) for _ in range(num_tokens)]
    if case == "skewed":
        selection = []
        for t in range(num_tokens):
            first = 0
            while first < num_experts - 1 and t >= num_tokens * (1 - 0.5 ** (first + 1)):
                first += 1
            others = [e for e in range(num_experts) if e != first]
            selection.append([first, *others[: topk - 1]])
        return selection
    raise ValueError(f"unknown case {case!r}, not one of {CASES}")


def planned_logits(
    selection: list[list[int]], num_experts: int, generator: torch.Generator
) -> Tensor:
    """Random logits in [-1, 1] that rise above it, in order, where selected; float64, (T, E)."""
    logits = 2 * torch.rand(len(selection), num_experts, generator=generator, dtype=torch.float64)
    logits -= 1
    for t, experts in enumerate(selection):
        for rank, e in enumerate(reversed(experts)):
            # 0.7 apart plus at most 0.5 of noise: distinct, and in the planned order.
            noise = 0.5 * torch.rand((), generator=generator, dtype=torch.float64)
            logits[t, e] = 1.2 + 0.7 * rank + noise
    return logits


def routing_case(
    case: str, num_tokens: int, num_experts: int, topk: int, hidden_size: int, seed: int = 0
) -> RoutingCase:
    """Router weight with orthonormal rows and tokens that hit the planned logits; float64.

    Scaling a token (RMSNorm with weight 1) keeps its selection. Needs hidden_size >= num_experts.
    """
    if hidden_size < num_experts:
        raise ValueError("orthonormal router rows need hidden_size >= num_experts")
    generator = torch.Generator().manual_seed(seed)
    selection = plan_selection(case, num_tokens, num_experts, topk)
    planned = planned_logits(selection, num_experts, generator)
    basis = torch.randn(hidden_size, hidden_size, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(basis).Q.T
    rest = torch.randn(
        num_tokens, hidden_size - num_experts, generator=generator, dtype=torch.float64
    )
    tokens = torch.cat([planned, rest], dim=1) @ rows
    router_weight = rows[:num_experts].contiguous()
    return RoutingCase(tokens, router_weight, tokens @ router_weight.T, selection)


def with_routing(
    params: Parameters, hidden_states: Tensor, config: ReferenceConfig, case: str, seed: int = 0
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """A unit's parameters with a router weight that routes hidden_states as planned.

    The routed input z does not depend on the router, so the weight solves z W^T = logits exactly
    while the tokens are linearly independent, hence no more than the hidden size (LayerNorm: one
    less). An expert_bias is not taken into account.

    hidden_states: (s, b, h). Returns the parameters and the planned selection, T lists of K.
    """
    with torch.no_grad():
        tokens = trace_unit(params, hidden_states, config).routed_input
        tokens = tokens.reshape(-1, config.hidden_size)
        generator = torch.Generator().manual_seed(seed)
        selection = plan_selection(
            case, tokens.shape[0], config.num_moe_experts, config.moe_router_topk
        )
        logits = planned_logits(selection, config.num_moe_experts, generator).to(tokens.dtype)
        weight = (torch.linalg.pinv(tokens) @ logits).T.contiguous()
        if not torch.allclose(tokens @ weight.T, logits, rtol=0, atol=1e-2):
            raise ValueError("the tokens are not linearly independent: the plan cannot be met")
    return {**params, "mlp.router.weight": weight.requires_grad_()}, selection


def _round_robin(num_tokens: int, num_experts: int, topk: int) -> list[list[int]]:
    return [[(t * topk + j) % num_experts for j in range(topk)] for t in range(num_tokens)]
