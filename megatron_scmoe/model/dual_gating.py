"""A unit with two gates, DGMoE: one reads the shortcut, the other the current representation.

    H_{l+1} = H_{l+1}^MH + [norm] ( G(z)_i E_i(z) + G(x)_j E_j(x) ),  i != j
                                                          [arXiv:2404.05019, (23)]

Both send their tokens to the same experts, so that two dispatches of one unit are in flight. The
preceding route, z, overlaps as in ScMoE; the current route, x, starts behind the attention, where
only the experts of the other route are left to hide it. There is no shared expert.

Shapes: s sequence / TP, b batch, h hidden
"""

from dataclasses import replace
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.moe import ScMoELayer
from megatron_scmoe.model.routing.choice import Routing
from megatron_scmoe.model.routing.dual import DistinctRouter
from megatron_scmoe.model.unit import ShortcutLayer, UnitPass
from megatron_scmoe.overlap.schedule import PAIR, Route, Slots, Step, Task

PRECEDING, CURRENT = 0, 1
"""The routes by number: what the shortcut taps, and the current representation."""


class DualGatingMoE(ScMoELayer):
    """One pool of experts and two gates: `router`, and `current_router` if it has own weights."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        scmoe: ScMoEConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        **others: Any,
    ) -> None:
        gates = replace(submodules, router=DistinctRouter)
        super().__init__(config, gates, scmoe, pg_collection, is_mtp_layer, **others)
        self._distinct = scmoe.scmoe_distinct_experts
        self.current_router = (
            DistinctRouter(self.config, pg_collection, is_mtp_layer)
            if scmoe.scmoe_dual_gating == "separate"
            else None
        )
        if self.current_router is not None:
            watched = self.choices.watching(self.current_router.routing)
            self.current_router.routing = watched  # type: ignore[method-assign]

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        if self.current_router is not None:
            self.current_router.set_layer_number(layer_number)

    def choose_of_route(
        self, z: Tensor, padding_mask: Tensor | None, preceding: Routing | None
    ) -> Routing:
        """The gate of one route, and its expert of every token.

        Args:
            z: what the route reads, [s, b, h].
            padding_mask: [s, b], True for padding.
            preceding: what the preceding route has chosen; None for that route itself.
        """
        if preceding is None:
            probs, routing_map, choice = self.router.choose(z, padding_mask)
            return Routing(probs, routing_map, chosen=choice.chosen)
        taken = preceding.chosen
        assert taken is not None
        router = self.router if self.current_router is None else self.current_router
        distinct = taken if self._distinct else None
        probs, routing_map, choice = router.choose(z, padding_mask, distinct)
        if self.training:
            self.recorder.gates_chose(choice.first == taken)
        return Routing(probs, routing_map, chosen=choice.chosen)


class DualGatingLayer(ShortcutLayer):
    """A unit with the preceding route of its position and the current route."""

    further_routes = (Route(PAIR.index(Step.SHARED_EXPERT), Slots(1, 1)),)

    def tapped_norm(self, tapped: Tensor, route: int) -> Tensor:
        """The current route reads what a shared expert would read, x."""
        if route == PRECEDING:
            return super().tapped_norm(tapped, route)
        return self._forward_pre_mlp_layernorm(tapped)

    def choose_experts(
        self, run: UnitPass, task: Task, z: Tensor, padding_mask: Tensor | None
    ) -> Routing:
        preceding = None if task.route == PRECEDING else run.taps[PRECEDING].routing
        return self.mlp.choose_of_route(z, padding_mask, preceding)
