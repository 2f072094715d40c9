"""What the first iterations of a run measure, and what follows from it.

    warm-up    2 iterations
    beside     3 iterations: every operator of a unit and every exchange is timed
    alone      3 iterations: the same, and every exchange is awaited where it starts

The times are averaged over units and ranks, so that all ranks conclude the same. From those of
"beside" the expert slots are chosen (arXiv:2404.05019, section 3.2): the ones with the least
`max(T_pre, T_dispatch) + T_experts + max(T_post, T_combine)` stay for the rest of the run. Both
together say how much slower dense compute is beside exchanges than alone. No iteration differs from
another in any bit of its results (tests/unit_tests/test_layer.py).
"""

import math
from collections.abc import Sequence
from itertools import batched
from statistics import median
from typing import NamedTuple

import torch

from megatron_scmoe.overlap.measure.cost import (
    RoutedTimes,
    UnitTimes,
    best_slots,
    slot_seconds,
    walk,
)
from megatron_scmoe.overlap.recorder import Direction, UnitRecord
from megatron_scmoe.overlap.schedule import Route, Slots, Step, window

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def unit_times(
    record: UnitRecord, direction: Direction, position: str, num_routes: int = 1
) -> UnitTimes:
    """Seconds of the parts of a unit in one direction: the mean over its passes.

    Args:
        num_routes: routed branches of the unit.

    Raises:
        ValueError: no pass with all its steps is on record.
    """
    steps = [span for span in record.steps if span.activity.direction == direction]
    passes = sum(
        span.activity.name == Step.EXPERTS.value
        and span.activity.chunk == 0
        and span.activity.route == 0
        for span in steps
    )
    if passes == 0:
        raise ValueError(f"no {direction} pass on record")

    def of_step(step: Step, route: int = 0) -> float:
        mine = (s for s in steps if (s.activity.name, s.activity.route) == (step.value, route))
        return sum(span.end - span.begin for span in mine) / passes

    def of_exchange(name: str, route: int) -> float:
        """From the first chunk's start to the last one's completion."""
        mine = [
            exchange
            for exchange in record.exchanges
            if exchange.activity.name == name
            and exchange.activity.direction == direction
            and exchange.activity.route == route
        ]
        chunks = len(mine) // passes
        groups = [mine[start : start + chunks] for start in range(0, len(mine), chunks or 1)]
        spans = (max(x.end for x in group) - min(x.begin for x in group) for group in groups)
        return sum(spans) / passes

    first, *further = (
        RoutedTimes(
            of_step(Step.EXPERTS, route),
            of_exchange("dispatch", route),
            of_exchange("combine", route),
        )
        for route in range(num_routes)
    )
    return UnitTimes(tuple(of_step(step) for step in window(position)), *first, tuple(further))


class Phase(NamedTuple):
    """Iterations that are alike."""

    iterations: int
    records_steps: bool
    overlap: bool


WARM_UP = Phase(2, records_steps=False, overlap=True)
BESIDE = Phase(3, records_steps=True, overlap=True)
ALONE = Phase(3, records_steps=True, overlap=False)


class FirstIterations:
    """What watches the first iterations of a run; see `observe`.

    Args:
        position: a key of TAPS.
        num_routes: routed branches of a unit.
    """

    def __init__(self, position: str, num_routes: int = 1) -> None:
        self._position = position
        self._num_routes = num_routes
        self._phases = [WARM_UP, BESIDE, ALONE]
        self._iterations = 0
        self._samples: list[list[float]] = []

    @property
    def phase(self) -> Phase | None:
        """Of the next iteration; None when all is measured."""
        return self._phases[0] if self._phases else None

    def observe(self, records: Sequence[UnitRecord]) -> tuple[UnitTimes, UnitTimes] | None:
        """Count an iteration of the present phase; call it on every rank.

        Args:
            records: of this rank's units; none on a pipeline stage without one.

        Returns:
            Forward and backward times, the same on every rank, at the end of "beside" and at the
            end of "alone"; else None.
        """
        phase = self._phases[0]
        if phase.records_steps and records:
            self._samples.append(self._mean_over_units(records))
        self._iterations += 1
        if self._iterations < phase.iterations:
            return None
        del self._phases[0]
        self._iterations = 0
        return self._mean_over_ranks() if phase.records_steps else None

    def _mean_over_units(self, records: Sequence[UnitRecord]) -> list[float]:
        units = [
            [seconds for direction in DIRECTIONS for seconds in self._seconds(record, direction)]
            for record in records
        ]
        return [sum(column) / len(units) for column in zip(*units, strict=True)]

    def _seconds(self, record: UnitRecord, direction: Direction) -> list[float]:
        try:
            return _as_list(unit_times(record, direction, self._position, self._num_routes))
        except ValueError:  # nothing of the unit is trained
            return [0.0] * self._parts

    @property
    def _parts(self) -> int:
        """Times of a unit in one direction."""
        return len(window(self._position)) + len(RoutedTimes._fields) * self._num_routes

    def _mean_over_ranks(self) -> tuple[UnitTimes, UnitTimes]:
        size = len(DIRECTIONS) * self._parts
        # One slow iteration does not count.
        samples, self._samples = self._samples, []
        own = [median(column) for column in zip(*samples, strict=True)] or [0.0] * size
        device = torch.cuda.current_device()
        sums = torch.tensor([*own, bool(samples)], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        *values, ranks = sums.tolist()
        means = [value / ranks for value in values]
        operators = len(window(self._position))
        forward, backward = means[: self._parts], means[self._parts :]
        return _from_list(forward, operators), _from_list(backward, operators)


def choose_routes(
    position: str, further: tuple[Route, ...], forward: UnitTimes, backward: UnitTimes
) -> tuple[Slots, tuple[Route, ...]]:
    """The best slots of each direction: of the position's route, and in the further ones."""
    slots = zip(
        best_slots(forward, position, further, "forward"),
        best_slots(backward, position, further, "backward"),
        strict=True,
    )
    first, *others = (Slots(*pair) for pair in slots)
    routes = (route._replace(slots=own) for route, own in zip(further, others, strict=True))
    return first, tuple(routes)


def describe_routes(
    position: str,
    chosen: tuple[Slots, tuple[Route, ...]],
    forward: UnitTimes,
    backward: UnitTimes,
) -> str:
    """One line a direction for units with several routes: the choice and its numbers."""
    first, further = chosen
    lines = []
    for direction, times, slots in zip(
        DIRECTIONS,
        (forward, backward),
        zip(first, *(route.slots for route in further), strict=True),
        strict=True,
    ):
        dense = zip(window(position), times.dense, strict=True)
        measured = [f"{step.value} {seconds * 1e3:.2f}" for step, seconds in dense]
        for number, route in enumerate(times.routes):
            measured += [
                f"{name}/{number} {seconds * 1e3:.2f}" for name, seconds in route._asdict().items()
            ]
        seconds = walk(times, slots, position, further, direction)
        lines.append(
            f"expert slots {', '.join(map(str, slots))} {direction} (ms: {', '.join(measured)}): "
            f"predicted {seconds * 1e3:.2f}"
        )
    return "\n".join(lines)


class SlowDown(NamedTuple):
    """Time of the dense operators beside exchanges, as a multiple of their time alone.

    On a GPU the forward pass without overlap is slowed down by the host, which waits for numbers of
    rows with nothing enqueued; the backward pass never waits for the host.
    """

    forward: float
    backward: float
    """NaN if no dense operator of any unit has a backward pass."""


def slow_down(beside: tuple[UnitTimes, UnitTimes], alone: tuple[UnitTimes, UnitTimes]) -> SlowDown:
    """From the forward and backward times of both phases."""
    return SlowDown(
        *(x.window / y.window if y.window else math.nan for x, y in zip(beside, alone, strict=True))
    )


def describe_choice(
    position: str, slots: Slots, before: Slots, forward: UnitTimes, backward: UnitTimes
) -> str:
    """One line a direction: the choice and the numbers behind it, in milliseconds."""
    lines = []
    for direction, times, slot, default in (
        ("forward", forward, slots.forward, before.forward),
        ("backward", backward, slots.backward, before.backward),
    ):
        parts = {step.value: s for step, s in zip(window(position), times.dense, strict=True)}
        parts |= {"experts": times.experts}
        parts |= {"dispatch": times.dispatch, "combine": times.combine}
        measured = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in parts.items())
        chosen, was = slot_seconds(times, slot), slot_seconds(times, default)
        lines.append(
            f"expert slot {slot} {direction} (ms: {measured}): predicted {chosen.seconds * 1e3:.2f}"
            f" with {chosen.exposed * 1e3:.2f} exposed; slot {default}, so far: "
            f"{was.seconds * 1e3:.2f}, {was.exposed * 1e3:.2f}"
        )
    return "\n".join(lines)


def _as_list(times: UnitTimes) -> list[float]:
    return [*times.dense, *(seconds for route in times.routes for seconds in route)]


def _from_list(values: list[float], operators: int) -> UnitTimes:
    routes = batched(values[operators:], len(RoutedTimes._fields))
    first, *further = (RoutedTimes(*route) for route in routes)
    return UnitTimes(tuple(values[:operators]), *first, tuple(further))
