"""How long one shortcut unit takes at each expert slot, from the times of its parts.

With T_pre and T_post the dense work of the window before and after the experts
(arXiv:2404.05019, section 3.2):

    T = max(T_pre, T_dispatch) + T_experts + max(T_post, T_combine)

The backward pass mirrors the forward pass: the combine's gradient travels first, beside the dense
work that stands after the experts. Its T is the same sum in another order, so that one formula
serves both directions and every list of operators is given in forward order.

Assumed, as in the paper: compute operators do not run beside each other, an exchange runs at full
speed beside compute, and routing and merging take no time. Exchanges of several routes share a link
and travel one behind the other.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from megatron_scmoe.overlap.recorder import Direction
from megatron_scmoe.overlap.schedule import (
    TAPS,
    Route,
    Slots,
    Step,
    build_schedule,
    window,
)

# Slots whose times differ by less than rounding are equally good.
_RELATIVE_TIE = 1e-9


class RoutedTimes(NamedTuple):
    """Seconds of a routed branch, in one direction."""

    experts: float
    dispatch: float
    combine: float

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of a unit's parts, in one direction.

    Attributes:
        dense: the dense operators of the window, in forward order (schedule.window).
        experts: the routed experts.
        dispatch: the exchange between routing and experts; in backward, that of its gradient.
        combine: the exchange between experts and merge; in backward, that of its gradient.
        further: the same three of each further route.

    Raises:
        ValueError: a time is negative or not finite.
    """

    dense: tuple[float, ...]
    experts: float
    dispatch: float
    combine: float
    further: tuple[RoutedTimes, ...] = ()

    def __post_init__(self) -> None:
        routed = (seconds for route in self.routes for seconds in route)
        for seconds in (*self.dense, *routed):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"a time of {seconds} s in {self}")

    @property
    def routes(self) -> tuple[RoutedTimes, ...]:
        """Of every routed branch."""
        return RoutedTimes(self.experts, self.dispatch, self.combine), *self.further

    @property
    def window(self) -> float:
        """Seconds of dense work that can hide communication."""
        return math.fsum(self.dense)

    @property
    def communication(self) -> float:
        """Seconds of all exchanges."""
        return sum(route.dispatch + route.combine for route in self.routes)

    @property
    def sequential(self) -> float:
        """Seconds of the unit when every exchange is awaited where it starts."""
        return self.window + sum(route.experts for route in self.routes) + self.communication


class SlotCost(NamedTuple):
    """What a unit costs at one slot, in seconds.

    `exposed` is the communication for which compute stands still, `hidden` the rest of it.
    """

    seconds: float
    exposed: float
    hidden: float


def slot_seconds(times: UnitTimes, slot: int) -> SlotCost:
    """Cost of a unit with `slot` dense operators before the routed experts, in one direction.

    Raises:
        ValueError: the slot lies outside 0..len(times.dense).
    """
    if not 0 <= slot <= len(times.dense):
        raise ValueError(f"expert slot {slot} is outside 0..{len(times.dense)}")
    before, after = math.fsum(times.dense[:slot]), math.fsum(times.dense[slot:])
    exposed = max(0.0, times.dispatch - before) + max(0.0, times.combine - after)
    return SlotCost(
        seconds=max(before, times.dispatch) + times.experts + max(after, times.combine),
        exposed=exposed,
        hidden=times.communication - exposed,
    )


def data_parallel_bytes(
    parameters: float, ranks: int, gradient_bytes: int, gathered_bytes: int | None
) -> float:
    """What a rank sends in an iteration for parameters that `ranks` hold alike, in rings.

    Args:
        gradient_bytes: of one parameter.
        gathered_bytes: of one parameter, with the distributed optimizer: gradients are
            reduce-scattered and parameters gathered. None without: gradients are all-reduced, which
            is a reduce-scatter and an all-gather of them.
    """
    back = gradient_bytes if gathered_bytes is None else gathered_bytes
    return parameters * (gradient_bytes + back) * (ranks - 1) / ranks


def best_slot(times: UnitTimes) -> int:
    """The slot at which a unit takes the least time in one direction.

    Equally good slots: the one nearest the middle of the window, of two such the earlier. Equal
    times give equal answers on every rank.
    """
    operators = len(times.dense)
    seconds = [slot_seconds(times, slot).seconds for slot in range(operators + 1)]
    limit = min(seconds) * (1 + _RELATIVE_TIE)
    fastest = [slot for slot, cost in enumerate(seconds) if cost <= limit]
    return min(fastest, key=lambda slot: (abs(2 * slot - operators), slot))


def walk(
    times: UnitTimes,
    slots: tuple[int, ...],
    position: str,
    further: tuple[Route, ...],
    direction: Direction,
) -> float:
    """Seconds of a unit by its schedule, step by step; with one route, those of slot_seconds.

    Args:
        slots: of every route, in one direction.
        further: the routes beside that of the position; their own slots do not count.
    """
    first, *others = (Slots(slot, slot) for slot in slots)
    routes = (route._replace(slots=own) for route, own in zip(further, others, strict=True))
    tasks = build_schedule(position, first, overlap=True, further=tuple(routes))
    starts = {Step.START_DISPATCH: "dispatch", Step.START_COMBINE: "combine"}
    waits = {Step.WAIT_DISPATCH: "dispatch", Step.WAIT_COMBINE: "combine"}
    if direction == "backward":  # a wait's gradient starts the exchange
        tasks, starts, waits = tasks[::-1], waits, starts
    dense = dict(zip(window(position), times.dense, strict=True))
    clock = link = 0.0
    arrival: dict[tuple[str, int], float] = {}
    for step, _, route in tasks:
        if (name := starts.get(step)) is not None:
            link = max(clock, link) + getattr(times.routes[route], name)
            arrival[name, route] = link
        elif (name := waits.get(step)) is not None:
            clock = max(clock, arrival[name, route])
        elif step is Step.EXPERTS:
            clock += times.routes[route].experts
        else:
            clock += dense.get(step, 0.0)
    return clock


def slot_seconds_of_routes(
    times: UnitTimes,
    slot: int,
    position: str,
    further: tuple[Route, ...],
    direction: Direction,
) -> SlotCost:
    """Cost of a unit with `slot` dense operators before the experts of its first route, in one
    direction; the experts of further routes stand at their best slots.

    Raises:
        ValueError: the slot lies outside the window.
    """
    if not further:
        return slot_seconds(times, slot)
    rest = product(*(range(n + 1) for n in _operators(times, position, further)[1:]))
    seconds = min(walk(times, (slot, *others), position, further, direction) for others in rest)
    compute = times.sequential - times.communication
    waiting = seconds - compute
    exposed = waiting if waiting > _RELATIVE_TIE * seconds else 0.0
    return SlotCost(seconds, exposed, times.communication - exposed)


def _operators(times: UnitTimes, position: str, further: tuple[Route, ...]) -> list[int]:
    """Dense operators in the window of every route."""
    tap = TAPS[position].tap
    return [len(times.dense), *(len(times.dense) - (route.tap - tap) for route in further)]


def best_slots(
    times: UnitTimes, position: str, further: tuple[Route, ...], direction: Direction
) -> tuple[int, ...]:
    """The slots of all routes at which a unit takes the least time in one direction.

    Equally good: those nearest the middles of the windows, of such the earlier.
    """
    if not further:
        return (best_slot(times),)
    operators = _operators(times, position, further)
    candidates = list(product(*(range(n + 1) for n in operators)))
    seconds = [walk(times, slots, position, further, direction) for slots in candidates]
    limit = min(seconds) * (1 + _RELATIVE_TIE)

    def off_the_middle(slots: tuple[int, ...]) -> int:
        return sum(abs(2 * slot - n) for slot, n in zip(slots, operators, strict=True))

    fastest = [slots for slots, cost in zip(candidates, seconds, strict=True) if cost <= limit]
    return min(fastest, key=lambda slots: (off_the_middle(slots), slots))
