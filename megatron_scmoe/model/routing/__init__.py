"""How experts are chosen, by the value of --scmoe-router."""

import copy
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

from megatron.core.transformer.moe.moe_layer import RouterBuilder
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.checks.refusal import Found, Refusal
from megatron_scmoe.model.routing.heterogeneous import INNER, HeterogeneousRouter
from megatron_scmoe.model.routing.longcat import LongCatRouter
from megatron_scmoe.model.routing.partners import (
    BUFFER,
    CollaborationRouter,
    moe_layers,
    read_lists,
)
from megatron_scmoe.model.routing.router_options import RouterOptions
from megatron_scmoe.model.variant import Variant

CHOOSES_OTHERWISE = Refusal(
    lambda config, scmoe: config.moe_router_num_groups or config.moe_router_fusion,
    "--scmoe-router {scmoe_router} works neither with --moe-router-num-groups nor with "
    "--moe-router-fusion",
    "drop them",
)


class Router(Variant):
    """A value of --scmoe-router."""

    implied: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    """Options of the host that it sets: by dest, the value and the reason."""
    options: ClassVar[tuple[str, ...]] = ()
    """Fields of ScMoEConfig that it alone reads."""

    @classmethod
    def builder(
        cls, host: RouterBuilder, at_home: int, options: RouterOptions, first: bool
    ) -> RouterBuilder:
        """What builds the module: z, [s, b, h], to weights and map, [T, E + H].

        Args:
            host: what builds the host's, by the host's spec.
            at_home: H, experts at home, the last columns.
            options: ours.
            first: whether no MoE layer stands in front.
        """
        raise NotImplementedError

    @classmethod
    def parameters(cls, config: TransformerConfig, options: RouterOptions, first: bool) -> int:
        """Of the gate of one layer; every one is in one product and sum.

        Args:
            config: with experts at home.
            options: ours.
            first: whether no MoE layer stands in front.
        """
        return cls.weights(config)

    @classmethod
    def routed_share(
        cls, config: TransformerConfig, at_home: int, options: RouterOptions
    ) -> Fraction:
        """Of all slots, those of routed experts, where the router is balanced.

        Args:
            config: without experts at home.
            at_home: H.
            options: ours.
        """
        assert config.num_moe_experts is not None
        return Fraction(config.num_moe_experts, config.num_moe_experts + at_home)

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        assert config.num_moe_experts is not None
        return config.num_moe_experts * config.hidden_size


class TopK(Router):
    """Megatron's router: the K largest scores"""

    @classmethod
    def builder(
        cls, host: RouterBuilder, at_home: int, options: RouterOptions, first: bool
    ) -> RouterBuilder:
        return host


class Heterogeneous(Router):
    """MoE++'s, which gives a routed expert --scmoe-tau times the tokens of one at home"""

    names_on_disk = ("mlp.router.residual_weight", "mlp.router.inner_weight")
    options = (
        "scmoe_tau",
        "scmoe_gating_residual",
        "scmoe_capacity_of",
        "scmoe_renormalise",
        "scmoe_gate_layers",
    )
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
        Refusal(
            lambda config, scmoe: scmoe.scmoe_gate_layers not in (1, 2),
            "--scmoe-gate-layers {scmoe_gate_layers} is neither 1 nor 2",
        ),
        Refusal(
            lambda config, scmoe: (
                scmoe.scmoe_gating_residual and config.pipeline_model_parallel_size > 1
            ),
            "--scmoe-gating-residual does not work with --pipeline-model-parallel-size "
            "{pipeline_model_parallel_size}",
            "drop one of them",
            "between stages travel hidden states alone, and no scores",
        ),
    )

    @classmethod
    def builder(
        cls, host: RouterBuilder, at_home: int, options: RouterOptions, first: bool
    ) -> RouterBuilder:
        build: Any = HeterogeneousRouter
        return partial(build, at_home=at_home, options=options, first=first)

    @classmethod
    def parameters(cls, config: TransformerConfig, options: RouterOptions, first: bool) -> int:
        columns = config.num_moe_experts
        assert columns is not None
        inner = INNER * columns
        two = options.scmoe_gate_layers == 2
        gate = inner * (config.hidden_size + columns) if two else cls.weights(config)
        return gate + (columns**2 if options.scmoe_gating_residual and not first else 0)

    @classmethod
    def routed_share(
        cls, config: TransformerConfig, at_home: int, options: RouterOptions
    ) -> Fraction:
        assert config.num_moe_experts is not None
        weighted = Fraction(options.scmoe_tau).limit_denominator(1000) * config.num_moe_experts
        return weighted / (weighted + at_home)


class LongCat(Router):
    """LongCat-Flash's, whose selection a bias steers to the wanted number of routed experts"""

    names_on_disk = ("mlp.router.expert_bias",)
    options = (
        "scmoe_routed_topk",
        "scmoe_bias_decay",
        "scmoe_balance_groups",
        "scmoe_scaled_experts",
    )
    implied: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "moe_router_pre_softmax": (True, "its weights are scores of all experts")
    }
    refusals = (
        Refusal(
            lambda config, scmoe: config.moe_router_score_function != "softmax",
            "--scmoe-router longcat takes a softmax, and --moe-router-score-function is "
            "{moe_router_score_function}",
            "drop it",
        ),
        Refusal(
            lambda config, scmoe: not config.moe_router_pre_softmax,
            "--scmoe-router longcat takes the softmax of all experts",
            "add --moe-router-pre-softmax",
        ),
        Refusal(
            lambda config, scmoe: config.moe_router_load_balancing_type not in ("none", "aux_loss"),
            "--scmoe-router longcat has a balancing loss of its own, and "
            "--moe-router-load-balancing-type is {moe_router_load_balancing_type}",
            "use aux_loss, or none",
        ),
        CHOOSES_OTHERWISE,
        Refusal(
            lambda config, scmoe: scmoe.scmoe_routed_topk is not None and not scmoe.at_home,
            "--scmoe-routed-topk leaves slots to experts at home, and there are none",
            "add --scmoe-num-copy-experts",
        ),
        Refusal(
            lambda config, scmoe: (
                scmoe.scmoe_routed_topk is not None
                and not 0 < scmoe.scmoe_routed_topk < config.moe_router_topk
            ),
            "--scmoe-routed-topk {scmoe_routed_topk} is not between 0 and --moe-router-topk "
            "{moe_router_topk}",
        ),
        Refusal(
            lambda config, scmoe: (
                scmoe.scmoe_balance_groups is not None
                and (
                    scmoe.scmoe_balance_groups < 1
                    or config.num_moe_experts % scmoe.scmoe_balance_groups
                )
            ),
            "--scmoe-balance-groups {scmoe_balance_groups} does not divide --num-experts "
            "{num_moe_experts}",
        ),
    )

    @classmethod
    def builder(
        cls, host: RouterBuilder, at_home: int, options: RouterOptions, first: bool
    ) -> RouterBuilder:
        def build(*, config: TransformerConfig, **others: Any) -> Any:
            # The host has the bias, but no softmax with it: its router is made with both, behind
            # the check, and counts what is selected.
            config = copy.copy(config)
            config.moe_router_enable_expert_bias = True
            return LongCatRouter(
                config=config,
                **others,
                at_home=at_home,
                routed_topk=options.scmoe_routed_topk,
                groups=options.scmoe_balance_groups or config.expert_model_parallel_size,
                scales_at_home=options.scmoe_scaled_experts == "all",
            )

        return build

    @classmethod
    def routed_share(
        cls, config: TransformerConfig, at_home: int, options: RouterOptions
    ) -> Fraction:
        if options.scmoe_routed_topk is None:
            return super().routed_share(config, at_home, options)
        return Fraction(options.scmoe_routed_topk / config.moe_router_topk).limit_denominator(1000)


def _wrong_lists(config: TransformerConfig, scmoe: RouterOptions) -> Found:
    """What is wrong with the file of --scmoe-c2r-lists, if one is given."""
    file = scmoe.scmoe_c2r_lists
    if file is None:
        return False
    try:
        why = read_lists(file).complaint(config.num_moe_experts or 0, moe_layers(config))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
    return why is not None and {"why": why}


class C2R(Router):
    """C2R's, which takes a token's other experts from the best partners of its first"""

    names_on_disk = (BUFFER,)
    options = ("scmoe_c2r_lists", "scmoe_c2r_top_t")
    refusals = (
        Refusal(
            lambda config, scmoe: scmoe.at_home,
            "--scmoe-router c2r does not work with experts at home",
            "drop them",
            "its lists are of routed experts",
        ),
        Refusal(
            lambda config, scmoe: (
                config.moe_router_load_balancing_type in ("sinkhorn", "quantile_balancing")
            ),
            "--scmoe-router c2r does not work with --moe-router-load-balancing-type "
            "{moe_router_load_balancing_type}",
            "use aux_loss, seq_aux_loss or global_aux_loss",
            "it chooses by something else than scores",
        ),
        CHOOSES_OTHERWISE,
        Refusal(
            lambda config, scmoe: config.moe_enable_routing_replay,
            "--scmoe-router c2r does not work with the replay of routings",
            "set moe_enable_routing_replay to False",
            "its rule stands in its place",
        ),
        Refusal(
            lambda config, scmoe: scmoe.scmoe_c2r_top_t is None,
            "--scmoe-router c2r lets a token's experts be the T best partners of the first one",
            "add --scmoe-c2r-top-t",
        ),
        Refusal(
            lambda config, scmoe: (
                not (
                    max(1, config.moe_router_topk - 1)
                    <= scmoe.scmoe_c2r_top_t
                    < config.num_moe_experts
                )
                and {
                    "least": max(1, config.moe_router_topk - 1),
                    "most": config.num_moe_experts - 1,
                }
            ),
            "--scmoe-c2r-top-t {scmoe_c2r_top_t} is not in {least}..{most}",
            reason="a token of --moe-router-topk {moe_router_topk} takes all but its first expert "
            "from so many partners",
        ),
        Refusal(
            _wrong_lists,
            "--scmoe-c2r-lists {scmoe_c2r_lists}: {why}",
            "write lists of this model with tools/c2r.py lists",
        ),
    )

    @classmethod
    def builder(
        cls, host: RouterBuilder, at_home: int, options: RouterOptions, first: bool
    ) -> RouterBuilder:
        build: Any = CollaborationRouter
        file = options.scmoe_c2r_lists
        given = None if file is None else read_lists(file)
        return partial(build, top_t=options.scmoe_c2r_top_t, given=given)


ROUTERS: dict[str, type[Router]] = {
    "topk": TopK,
    "heterogeneous": Heterogeneous,
    "longcat": LongCat,
    "c2r": C2R,
}


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
