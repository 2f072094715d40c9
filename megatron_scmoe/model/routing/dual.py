"""Two gates over one pool of experts, by the value of --scmoe-dual-gating: DGMoE.

    H_{l+1} = H_{l+1}^MH + sum_i [ G(x)_i E_i(x) + G(z)_i E_i(z) ]   [arXiv:2404.05019, (23)]

z is what the shortcut taps, x the current representation; each gate chooses one expert. The gate on
z chooses first. Where the gate on x would choose the same expert it takes its second one: the
distinct-expert rule (appendix A.2), which changes the selection and no score.

Shapes: s sequence / TP, b batch, h hidden, T = s*b tokens, E experts
"""

from typing import Any, ClassVar, NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.routing.losses import Best, RouterWithLosses, Selection
from megatron_scmoe.model.variant import Variant


class Gating(Variant):
    """A value of --scmoe-dual-gating; `weights` are those of the gates beside the first."""

    gates: ClassVar[int] = 1
    """How many choose --moe-router-topk experts each."""


class OneGate(Gating):
    """One gate, on what the shortcut taps (ScMoE)"""


class SharedWeights(Gating):
    """DGMoE, a second top-1 gate on the current representation in place of a shared expert, with
    the weights of the first, as (23) prints it"""

    gates = 2
    refusals = (
        Refusal(
            lambda config, scmoe: config.moe_router_topk != 1,
            "--scmoe-dual-gating {scmoe_dual_gating} has two gates of one expert each, and "
            "--moe-router-topk is {moe_router_topk}",
            "use --moe-router-topk 1",
        ),
        Refusal(
            lambda config, scmoe: config.moe_shared_expert_intermediate_size is not None,
            "--scmoe-dual-gating {scmoe_dual_gating} has no shared expert, and "
            "--moe-shared-expert-intermediate-size is {moe_shared_expert_intermediate_size}",
            "drop it",
            "the second gate is in its place",
        ),
        Refusal(
            lambda config, scmoe: scmoe.scmoe_combine != "add",
            "--scmoe-combine {scmoe_combine} weighs a shared expert, and --scmoe-dual-gating "
            "{scmoe_dual_gating} has none",
            "use add",
        ),
        Refusal(
            lambda config, scmoe: scmoe.at_home or scmoe.scmoe_router != "topk",
            "--scmoe-dual-gating {scmoe_dual_gating} does not work with experts at home or "
            "--scmoe-router {scmoe_router}",
            "drop them",
            "its gates choose one of the routed experts each",
        ),
        Refusal(
            lambda config, scmoe: (
                config.moe_router_load_balancing_type in ("sinkhorn", "quantile_balancing")
            ),
            "--scmoe-dual-gating {scmoe_dual_gating} does not work with "
            "--moe-router-load-balancing-type {moe_router_load_balancing_type}",
            "use aux_loss",
            "it chooses by something else than scores, and the second gate needs its second expert",
        ),
        Refusal(
            lambda config, scmoe: config.moe_router_fusion,
            "--scmoe-dual-gating {scmoe_dual_gating} does not work with --moe-router-fusion",
            "drop it",
            "the kernel knows no expert that is taken",
        ),
        Refusal(
            lambda config, scmoe: config.moe_enable_routing_replay,
            "--scmoe-dual-gating {scmoe_dual_gating} does not work with the replay of routings",
            "set moe_enable_routing_replay to False",
            "the rule of distinct experts stands in its place",
        ),
        Refusal(
            lambda config, scmoe: scmoe.scmoe_distinct_experts and config.num_moe_experts == 1,
            "--scmoe-dual-gating {scmoe_dual_gating} sends a token to two experts, and "
            "--num-experts is 1",
            "add experts, or --no-scmoe-distinct-experts",
        ),
    )


class SeparateWeights(SharedWeights):
    """The same with weights of its own"""

    names_on_disk = ("mlp.current_router.",)

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        assert config.num_moe_experts is not None
        return config.num_moe_experts * config.hidden_size


GATINGS: dict[str, type[Gating]] = {
    "none": OneGate,
    "shared": SharedWeights,
    "separate": SeparateWeights,
}


class Choice(NamedTuple):
    """Which expert a gate has chosen for every token, before any is dropped."""

    chosen: Tensor
    """[T, 1]"""
    first: Tensor
    """The one with the best score, taken or not, [T, 1]."""


class _Chooser(Selection):
    """The choice of another expert than those that are taken.

    Args:
        taken: an expert of every token that it may not choose, [T, 1]; None for none.
    """

    def __init__(self, taken: Tensor | None) -> None:
        super().__init__(self.chosen)
        self.taken = taken
        self.choice: Choice | None = None

    def chosen(self, scores: Tensor, best_of: Best) -> tuple[Tensor, Tensor]:
        """Scores and experts, each [T, 1], from all scores, [T, E]."""
        best, first = best_of(scores)
        if self.taken is None:
            self.choice = Choice(first, first)
            return best, first
        others = scores.detach().scatter(1, self.taken, -torch.inf)
        _, chosen = best_of(others)
        self.choice = Choice(chosen, first)
        return scores.gather(1, chosen), chosen


class DistinctRouter(RouterWithLosses):
    """The host's router, for one expert a token, which may be told that some are taken.

    Its balancing losses count what it chooses among the experts that are not.
    """

    def choose(
        self, z: Tensor, padding_mask: Tensor | None, taken: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Choice]:
        """G(z), its map, and what was chosen.

        Args:
            z: [s, b, h].
            padding_mask: [s, b], True for padding.
            taken: an expert of every token that it may not choose, [T, 1].

        Returns:
            weights [T, E], map [T, E], both after dropping, and the choice before it.
        """
        chooser = _Chooser(taken)
        self.router_replay: Any = chooser  # for this call only
        try:
            probs, routing_map = self(z, padding_mask)
        finally:
            self.router_replay = None
        assert chooser.choice is not None
        return probs, routing_map, chooser.choice

    def for_losses(self, scores: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """The best score that is not taken, of tokens that count."""
        taken = self.router_replay.taken
        if taken is None:
            return scores, routing_map
        best = scores.detach().scatter(1, taken, -torch.inf).argmax(dim=1, keepdim=True)
        chosen = torch.zeros_like(routing_map).scatter(1, best, True)
        return scores, chosen & routing_map.any(dim=1, keepdim=True)
