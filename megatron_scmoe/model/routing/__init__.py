"""How experts are chosen, by the value of --scmoe-router."""

import copy
from fractions import Fraction
from typing import Any

from megatron.core.transformer.moe.moe_layer import RouterBuilder
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.routing.heterogeneous import HeterogeneousRouter
from megatron_scmoe.model.variant import Variant


class Router(Variant):
    """A value of --scmoe-router."""

    @classmethod
    def builder(cls, host: RouterBuilder, at_home: int, tau: float) -> RouterBuilder:
        """What builds the module: z, [s, b, h], to weights and map, [T, E + H].

        Args:
            host: what builds the host's, by the host's spec.
            at_home: H, experts at home, the last columns.
            tau: --scmoe-tau.
        """
        raise NotImplementedError

    @classmethod
    def routed_share(cls, routed: int, at_home: int, tau: float) -> Fraction:
        """Of all slots, those of routed experts, where the balancing loss has its least value."""
        return Fraction(routed, routed + at_home)

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        assert config.num_moe_experts is not None
        return config.num_moe_experts * config.hidden_size


class TopK(Router):
    """Megatron's router: the K largest scores"""

    @classmethod
    def builder(cls, host: RouterBuilder, at_home: int, tau: float) -> RouterBuilder:
        return host


class Heterogeneous(Router):
    """Megatron's router with MoE++'s balancing loss, in which experts at home weigh --scmoe-tau"""

    refusals = (
        Refusal(
            lambda config, scmoe: not scmoe.at_home,
            "--scmoe-router heterogeneous has nothing to weigh",
            "add experts at home, such as --scmoe-num-zero-experts 1",
        ),
        Refusal(
            lambda config, scmoe: not 0 < scmoe.scmoe_tau <= 1,
            "--scmoe-tau {scmoe_tau} is not above 0 and at most 1",
        ),
        Refusal(
            lambda config, scmoe: config.moe_router_load_balancing_type in ("none", "sinkhorn"),
            "--scmoe-router heterogeneous weighs a balancing loss, and "
            "--moe-router-load-balancing-type is {moe_router_load_balancing_type}",
            "use aux_loss with --moe-aux-loss-coeff",
        ),
    )

    @classmethod
    def builder(cls, host: RouterBuilder, at_home: int, tau: float) -> RouterBuilder:
        def build(**arguments: Any) -> Any:
            return HeterogeneousRouter(**arguments, at_home=at_home, tau=tau)

        return build

    @classmethod
    def routed_share(cls, routed: int, at_home: int, tau: float) -> Fraction:
        weighted = Fraction(tau).limit_denominator(1000) * routed
        return weighted / (weighted + at_home)


ROUTERS: dict[str, type[Router]] = {"topk": TopK, "heterogeneous": Heterogeneous}


def with_columns(config: TransformerConfig, further: int) -> TransformerConfig:
    """A config for a router that also chooses among `further` experts at home: the host takes the
    shapes of its weight, losses and expert bias from the number of experts."""
    if further == 0:
        return config
    wide = copy.copy(config)
    assert wide.num_moe_experts is not None
    wide.num_moe_experts += further
    return wide


def wide_builder(build: RouterBuilder, further: int) -> RouterBuilder:
    """What builds a router with `further` columns behind those of the routed experts."""

    def wide(*, config: TransformerConfig, **others: Any) -> Any:
        return build(config=with_columns(config, further), **others)

    return wide
