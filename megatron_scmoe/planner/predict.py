"""Times of a pair of layers -> what every position and slot is worth.

A pair is a MoE layer and the dense layer in front of it, or the MoE layer alone where no dense
layer stands in front. It is compared with two stock layouts of the same pair that wait for every
exchange where it starts: top-(K+1) without a shared expert, which has the expert FLOPs of ScMoE
with top-K where shared and routed experts are of one size, and top-K with a shared expert.

The time of a unit is `overlap.measure.cost`'s.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_scmoe.overlap.measure.cost import (
    RoutedTimes,
    SlotCost,
    UnitTimes,
    best_slots,
    slot_seconds_of_routes,
)
from megatron_scmoe.overlap.recorder import Direction
from megatron_scmoe.overlap.schedule import MOE_LAYER, PAIR, Route, Slots, Step, window

DENSE_LAYER = tuple(step for step in PAIR if step not in MOE_LAYER)
"""Operators of the dense layer in front of it."""


@dataclass(frozen=True)
class PassTimes:
    """Seconds of a pair's parts on one rank, for one micro-batch in one direction."""

    dense: Mapping[Step, float]
    """Every operator of PAIR that the model has."""
    routed: RoutedTimes
    """With top-K."""
    wider: RoutedTimes
    """With top-(K+1)."""

    def unit(self, position: str, further: int = 0) -> UnitTimes:
        """With one routed branch and `further` ones, which take as long."""
        dense = tuple(self.dense[step] for step in window(position))
        return UnitTimes(dense, *self.routed, (self.routed,) * further)


@dataclass(frozen=True)
class Model:
    """What surrounds the routed experts of a model.

    Attributes:
        passes: forward and backward; the forward pass twice where it is recomputed.
        paired: whether a dense layer stands in front of every MoE layer.
        rest: seconds of all passes outside the pairs, for each MoE layer.
        further: routed branches of a unit beside that of its position.
    """

    passes: Sequence[PassTimes]
    paired: bool
    rest: float = 0.0
    further: tuple[Route, ...] = ()

    def units(self, position: str) -> list[UnitTimes]:
        """Of every pass."""
        return [times.unit(position, len(self.further)) for times in self.passes]

    @property
    def operators(self) -> tuple[Step, ...]:
        return PAIR if self.paired else MOE_LAYER

    def slots_of_passes(self, slots: Slots) -> list[tuple[int, Direction]]:
        """Slot and direction of every pass; a recomputed forward pass has the forward slot."""
        forward: tuple[int, Direction] = (slots.forward, "forward")
        return [*[forward] * (len(self.passes) - 1), (slots.backward, "backward")]


@dataclass(frozen=True)
class Prediction:
    """A position at its slots. Seconds are of all passes of a pair, for one micro-batch."""

    position: str
    slots: Slots
    passes: tuple[SlotCost, ...]
    seconds: float
    hidden_share: float
    """Of the communication; 1 where there is none."""
    over_wider: float
    """Speed-up of the pair over top-(K+1)."""
    over_shared: float
    """Speed-up of the pair over top-K and a shared expert."""
    model_over_wider: float
    """Speed-up over top-(K+1) with the rest of the model counted."""

    @property
    def exposed(self) -> float:
        """Seconds for which compute waits for communication."""
        return math.fsum(cost.exposed for cost in self.passes)

    @property
    def fits(self) -> bool:
        """Whether nothing waits for communication."""
        return self.exposed == 0


def predict(model: Model, position: str, slots: Slots) -> Prediction:
    """One position at one slot for each direction.

    Raises:
        ValueError: a slot lies outside the window.
    """
    units = model.units(position)
    costs = tuple(
        slot_seconds_of_routes(times, slot, position, model.further, direction)
        for times, (slot, direction) in zip(units, model.slots_of_passes(slots), strict=True)
    )
    outside = [step for step in model.operators if step not in window(position)]
    seconds = math.fsum(
        cost.seconds + math.fsum(times.dense[step] for step in outside)
        for cost, times in zip(costs, model.passes, strict=True)
    )
    communication = math.fsum(times.communication for times in units)
    exposed = math.fsum(cost.exposed for cost in costs)
    wider = stock_seconds(model, wider=True, shared_expert=False)
    return Prediction(
        position=position,
        slots=slots,
        passes=costs,
        seconds=seconds,
        hidden_share=1 - exposed / communication if communication else 1.0,
        over_wider=wider / seconds,
        over_shared=stock_seconds(model, wider=False, shared_expert=True) / seconds,
        model_over_wider=(wider + model.rest) / (seconds + model.rest),
    )


def predict_best(model: Model, position: str) -> Prediction:
    """The best slot of each direction."""
    units = model.units(position)
    forward = best_slots(units[0], position, model.further, "forward")
    backward = best_slots(units[-1], position, model.further, "backward")
    return predict(model, position, Slots(forward[0], backward[0]))


def stock_seconds(model: Model, wider: bool, shared_expert: bool) -> float:
    """Seconds of all passes of a pair that waits for every exchange where it starts.

    Args:
        wider: top-(K+1) in place of top-K.
        shared_expert: whether there is one.
    """
    operators = [
        step for step in model.operators if shared_expert or step is not Step.SHARED_EXPERT
    ]
    return math.fsum(
        math.fsum(times.dense[step] for step in operators)
        + (times.wider if wider else times.routed).total
        for times in model.passes
    )
