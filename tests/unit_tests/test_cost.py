"""The cost of expert slots against a simulation of the unit's schedule."""

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scmoe.overlap.measure.cost import (
    RoutedTimes,
    UnitTimes,
    best_slot,
    best_slots,
    slot_seconds,
    walk,
)
from megatron_scmoe.overlap.schedule import (
    POSITIONS,
    Route,
    Slots,
    Step,
    build_schedule,
    window,
)

seconds = st.floats(0, 10, allow_nan=False)
TRAVEL = {
    Step.START_DISPATCH: (Step.WAIT_DISPATCH, "dispatch"),
    Step.START_COMBINE: (Step.WAIT_COMBINE, "combine"),
}


@st.composite
def units(draw: st.DrawFn) -> tuple[str, UnitTimes]:
    position = draw(st.sampled_from(list(POSITIONS)))
    dense = tuple(draw(seconds) for _ in window(position))
    return position, UnitTimes(dense, draw(seconds), draw(seconds), draw(seconds))


def run_clock(position: str, times: UnitTimes, slot: int, overlap: bool, backward: bool) -> float:
    """Walk through the steps that the layer executes, with a clock; no formula.

    Backward walks the list from right to left, where a wait's gradient starts the exchange and a
    start's gradient waits for it.
    """
    duration = dict(zip(window(position), times.dense, strict=True))
    duration[Step.EXPERTS] = times.experts
    flights = {
        (wait if backward else start): (start if backward else wait, getattr(times, name))
        for start, (wait, name) in TRAVEL.items()
    }
    steps = [task.step for task in build_schedule(position, Slots(slot, slot), overlap)]
    clock, arrival = 0.0, dict[Step, float]()
    for step in reversed(steps) if backward else steps:
        if step in flights:
            end, travel = flights[step]
            arrival[end] = clock + travel
        elif step in arrival:
            clock = max(clock, arrival[step])
        else:
            clock += duration.get(step, 0.0)
    return clock


@given(units())
def test_every_slot_takes_what_the_schedule_takes(unit: tuple[str, UnitTimes]) -> None:
    position, times = unit
    for slot in range(len(times.dense) + 1):
        cost = slot_seconds(times, slot)
        for backward in (False, True):
            assert math.isclose(
                cost.seconds, run_clock(position, times, slot, True, backward), abs_tol=1e-9
            )
            assert math.isclose(
                times.sequential, run_clock(position, times, slot, False, backward), abs_tol=1e-9
            )
        assert math.isclose(cost.exposed, cost.seconds - times.window - times.experts, abs_tol=1e-9)
        assert math.isclose(cost.hidden, times.sequential - cost.seconds, abs_tol=1e-9)
        assert -1e-9 <= cost.hidden <= times.communication


@settings(deadline=None)  # schedules are built once
@given(units())
def test_a_walk_with_one_route_is_the_formula(unit: tuple[str, UnitTimes]) -> None:
    position, times = unit
    for slot in range(len(times.dense) + 1):
        cost = slot_seconds(times, slot).seconds
        assert math.isclose(walk(times, (slot,), position, (), "forward"), cost, abs_tol=1e-9)
        assert math.isclose(walk(times, (slot,), position, (), "backward"), cost, abs_tol=1e-9)


# In front of the shared expert; its own slots do not count.
CURRENT = (Route(7, Slots(0, 0)),)


@pytest.mark.parametrize(
    ("slots", "forward", "backward"),
    [
        # Forward, the other route's dispatch leaves as the first one's results arrive, at 9.
        # Backward, the first one's dispatch outlasts the MLP, to 17.
        ((1, 0), 9 + 1 + 2 + 5, 5 + 2 + 1 + 3 + 2 + 4),
        ((1, 1), 9 + 5 + 2 + 2, 2 + 2 + 5 + 3 + 2 + 4),
        # One link: the other route's dispatch waits behind the first one's combine, from 6 to 9.
        ((4, 0), 4 + 2 + 3 + 1 + 2 + 5, 5 + 2 + 1 + 2 + 4),
    ],
)
def test_two_routes_by_hand(slots: tuple[int, int], forward: float, backward: float) -> None:
    """Dense 1, then an attention of 3, shared expert 5; routes with experts, dispatch, combine."""
    times = UnitTimes((1.0, 1.0, 1.0, 1.0, 5.0), 2.0, 4.0, 3.0, (RoutedTimes(2.0, 1.0, 2.0),))
    assert walk(times, slots, "pos2", CURRENT, "forward") == forward
    assert walk(times, slots, "pos2", CURRENT, "backward") == backward


@settings(deadline=None)  # schedules are built once
@given(units(), st.tuples(seconds, seconds, seconds))
def test_the_best_slots_of_two_routes(
    unit: tuple[str, UnitTimes], current: tuple[float, float, float]
) -> None:
    """No pair is faster; a further route that costs nothing leaves the first its best slot's time,
    and one alone gets the slot that it always got."""
    position, times = unit
    assert best_slots(times, position, (), "forward") == (best_slot(times),)
    both = replace(times, further=(RoutedTimes(*current),))
    for direction in ("forward", "backward"):
        slots = best_slots(both, position, CURRENT, direction)
        least = walk(both, slots, position, CURRENT, direction)
        for other in product(range(len(times.dense) + 1), range(2)):
            assert least <= walk(both, other, position, CURRENT, direction) * (1 + 1e-8)
        free = replace(times, further=(RoutedTimes(0.0, 0.0, 0.0),))
        slots = best_slots(free, position, CURRENT, direction)
        alone = slot_seconds(times, best_slot(times)).seconds
        assert walk(free, slots, position, CURRENT, direction) >= alone * (1 - 1e-8)


@given(units())
def test_the_best_slot_also_minimises_the_papers_mismatch(unit: tuple[str, UnitTimes]) -> None:
    """Equation (11) measures |T_pre - T_disp| + |T_post - T_comb|."""

    def mismatch(slot: int) -> float:
        return abs(sum(times.dense[:slot]) - times.dispatch) + abs(
            sum(times.dense[slot:]) - times.combine
        )

    _, times = unit
    least = min(mismatch(slot) for slot in range(len(times.dense) + 1))
    assert math.isclose(mismatch(best_slot(times)), least, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("dense", "dispatch", "combine", "slot"),
    [
        ((1.0, 2.0, 1.0), 3.0, 1.0, 2),
        ((1.0, 2.0, 1.0), 1.0, 3.0, 1),
        ((1.0, 2.0, 1.0), 4.0, 0.0, 3),
        ((1.0, 2.0, 1.0), 0.0, 4.0, 0),
        # Ties: nothing travels, or so much that all the window hides at any slot.
        ((1.0, 2.0, 1.0), 0.0, 0.0, 1),
        ((1.0, 2.0), 0.0, 0.0, 1),
        ((1.0, 2.0, 1.0, 1.0), 9.0, 9.0, 2),
        # Sums whose rounding differs from slot to slot.
        ((0.1, 0.2, 0.3, 0.7), 9.1, 9.3, 2),
        ((), 1.0, 1.0, 0),
    ],
)
def test_best_slot(dense: tuple[float, ...], dispatch: float, combine: float, slot: int) -> None:
    assert best_slot(UnitTimes(dense, 5.0, dispatch, combine)) == slot


@pytest.mark.parametrize("slot", [-1, 3])
def test_slots_outside_the_window_are_refused(slot: int) -> None:
    with pytest.raises(ValueError, match=rf"expert slot {slot} is outside 0\.\.2"):
        slot_seconds(UnitTimes((1.0, 1.0), 1.0, 1.0, 1.0), slot)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_impossible_times_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="a time of"):
        UnitTimes((1.0, wrong), 1.0, 1.0, 1.0)
