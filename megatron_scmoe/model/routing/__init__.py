"""How experts are chosen, by the value of --scmoe-router."""

import copy
from typing import Any

from megatron.core.transformer.moe.moe_layer import RouterBuilder
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.model.variant import Variant


class Router(Variant):
    """A value of --scmoe-router."""

    @classmethod
    def builder(cls, host: RouterBuilder) -> RouterBuilder:
        """What builds the module: z, [s, b, h], to weights and map, [T, E].

        Args:
            host: what builds the host's, by the host's spec.
        """
        raise NotImplementedError

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        assert config.num_moe_experts is not None
        return config.num_moe_experts * config.hidden_size


class TopK(Router):
    """Megatron's router: the K largest scores"""

    @classmethod
    def builder(cls, host: RouterBuilder) -> RouterBuilder:
        return host


ROUTERS: dict[str, type[Router]] = {"topk": TopK}


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
