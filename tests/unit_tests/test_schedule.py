"""The order of steps in a unit."""

import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_scmoe.model.dispatch.trip import Trip
from megatron_scmoe.model.moe import RoutedChunk, RoutedTokens, ScMoELayer
from megatron_scmoe.model.unit import ShortcutLayer
from megatron_scmoe.overlap.branch import Leg, RoutedBranch
from megatron_scmoe.overlap.schedule import (
    POSITIONS,
    Route,
    Slots,
    Step,
    Task,
    build_schedule,
    format_schedule,
    window,
)
from tests.models import Case, build_block

DOCS = Path(__file__).parents[2] / "docs"
DENSE_ATTENTION = [Step.DENSE_QKV, Step.DENSE_CORE_ATTENTION, Step.DENSE_PROJECTION]
ATTENTION = [Step.QKV, Step.CORE_ATTENTION, Step.PROJECTION]
# The paper's windows (section 3.1), attention as three operators, and what stands before the tap.
WINDOWS = {
    "pos1": [*ATTENTION, Step.SHARED_EXPERT],
    "pos2": [Step.DENSE_MLP, *ATTENTION, Step.SHARED_EXPERT],
    "pos3": [*DENSE_ATTENTION, Step.DENSE_MLP, *ATTENTION, Step.SHARED_EXPERT],
}
BEFORE_TAP = {"pos1": [], "pos2": DENSE_ATTENTION, "pos3": []}
# (start, wait) of each exchange.
EXCHANGES = [
    (Step.START_DISPATCH, Step.WAIT_DISPATCH),
    (Step.START_COMBINE, Step.WAIT_COMBINE),
]
WAITS = {wait for _, wait in EXCHANGES}
ROUTED = [
    Step.ROUTE,
    Step.PREPARE_DISPATCH,
    Step.START_DISPATCH,
    Step.WAIT_DISPATCH,
    Step.EXPERTS,
    Step.START_COMBINE,
    Step.WAIT_COMBINE,
    Step.MERGE,
]
SLOTS = [
    (position, Slots(forward, backward))
    for position in POSITIONS
    for forward in range(len(WINDOWS[position]) + 1)
    for backward in range(len(WINDOWS[position]) + 1)
]

each_slot = pytest.mark.parametrize(("position", "slots"), SLOTS)
each_order = pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "sequential"])


def steps_of(position: str, slots: Slots, overlap: bool = True, **options: Any) -> list[Step]:
    return [task.step for task in build_schedule(position, slots, overlap, **options)]


@pytest.mark.parametrize("position", POSITIONS)
def test_window(position: str) -> None:
    assert list(window(position)) == WINDOWS[position]


def test_default_slots_leave_work_on_both_sides_of_the_experts() -> None:
    assert {position: POSITIONS[position].default_slot for position in POSITIONS} == {
        "pos1": 3,
        "pos2": 1,
        "pos3": 4,
    }
    for position in POSITIONS:
        assert 0 < POSITIONS[position].default_slot < len(window(position))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("beyond", [-1, 1], ids=["below", "above"])
def test_slots_outside_the_window_are_refused(position: str, beyond: int, direction: str) -> None:
    slot = -1 if beyond < 0 else len(WINDOWS[position]) + 1
    with pytest.raises(ValueError, match=rf"expert slot {slot} is outside 0\.\..* for {position}"):
        build_schedule(position, Slots(1, 1)._replace(**{direction: slot}), overlap=True)


@each_order
@each_slot
def test_every_step_once_and_both_branches_in_order(
    position: str, slots: Slots, overlap: bool
) -> None:
    steps = steps_of(position, slots, overlap)
    dense = BEFORE_TAP[position] + WINDOWS[position]
    assert [step for step in steps if step in dense] == dense
    assert [step for step in steps if step not in dense and step is not Step.TURN] == ROUTED
    assert len(steps) == len(dense) + len(ROUTED) + 1
    assert steps[len(BEFORE_TAP[position])] is Step.ROUTE
    assert steps[-1] is Step.MERGE


@each_order
@each_slot
def test_slots_are_numbers_of_dense_operators_in_front(
    position: str, slots: Slots, overlap: bool
) -> None:
    steps = steps_of(position, slots, overlap)
    for place, slot in ((Step.EXPERTS, slots.forward), (Step.TURN, slots.backward)):
        between = steps[steps.index(Step.ROUTE) : steps.index(place)]
        assert [step for step in between if step in WINDOWS[position]] == WINDOWS[position][:slot]
    assert steps.index(Step.TURN) > steps.index(Step.PREPARE_DISPATCH)


@each_slot
def test_overlapped_exchanges_span_the_dense_work(position: str, slots: Slots) -> None:
    """Nothing but dense work lies between a start and its wait, and all of the window does."""
    steps = [step for step in steps_of(position, slots) if step is not Step.TURN]
    spanned = [list(steps[steps.index(a) + 1 : steps.index(b)]) for a, b in EXCHANGES]
    assert spanned == [WINDOWS[position][: slots.forward], WINDOWS[position][slots.forward :]]


@each_slot
def test_sequential_is_overlapped_with_the_waits_moved_up(position: str, slots: Slots) -> None:
    overlapped = steps_of(position, slots, overlap=True)
    sequential = steps_of(position, slots, overlap=False)
    for start, wait in EXCHANGES:
        assert sequential.index(wait) == sequential.index(start) + 1
    without_waits = [
        [step for step in steps if step not in WAITS] for steps in (overlapped, sequential)
    ]
    assert without_waits[0] == without_waits[1]


@pytest.mark.parametrize("operators", [1, 2])
@each_slot
def test_a_host_that_runs_ahead_enqueues_operators_before_it_waits(
    position: str, slots: Slots, operators: int
) -> None:
    """As many as the slot leaves in front of the experts; nothing else moves."""
    ahead, plain = (steps_of(position, slots, operators_ahead=n) for n in (operators, 0))
    start = Step.START_DISPATCH
    assert [s for s in ahead if s is not start] == [s for s in plain if s is not start]
    in_front = ahead[ahead.index(Step.ROUTE) : ahead.index(start)]
    dense = [step for step in in_front if step in WINDOWS[position]]
    assert dense == list(WINDOWS[position][: min(operators, slots.forward)])
    sequential = steps_of(position, slots, False)
    assert steps_of(position, slots, False, operators_ahead=operators) == sequential


@each_order
def test_chunks(overlap: bool) -> None:
    """One after the other in every step that is done chunk by chunk."""
    tasks = build_schedule("pos2", Slots(1, 3), overlap, num_chunks=3)
    for step in (Step.WAIT_DISPATCH, Step.EXPERTS, Step.START_COMBINE):
        assert [task.number for task in tasks if task.step is step] == [0, 1, 2]
    if overlap:
        first = tasks.index(Task(Step.WAIT_DISPATCH, 0))
        steps = [Step.WAIT_DISPATCH, Step.EXPERTS, Step.START_COMBINE]
        expected = [Task(step, chunk) for chunk in range(3) for step in steps]
        assert list(tasks[first : first + 9]) == expected
        assert "wait_dispatch[2] > experts[2]" in format_schedule(tasks)


@pytest.mark.usefixtures("single_rank")
def test_a_unit_does_every_step() -> None:
    (unit,) = build_block(Case(num_layers=2)).layers
    assert unit._steps().keys() == set(Step)


def test_two_routes() -> None:
    """Each with its steps in order, one launch of experts for each chunk, and a turn of its own."""
    for slots, second, overlap in product(
        [Slots(0, 5), Slots(1, 3), Slots(5, 0)], product((0, 1), (0, 1)), (True, False)
    ):
        further = (Route(7, Slots(*second)),)
        tasks = build_schedule("pos2", slots, overlap, num_chunks=2, further=further)
        alone = build_schedule("pos2", slots, overlap, num_chunks=2)
        assert tuple(task for task in tasks if task.route == 0) == alone
        own = [task._replace(route=0) for task in tasks if task.route == 1]
        steps = {*ROUTED, Step.TURN} - {Step.MERGE}
        assert set(own) == {task for task in alone if task.step in steps}
        at = {(task.step, task.number): index for index, task in enumerate(own)}
        for chunk in range(2):
            assert at[Step.ROUTE, 0] < at[Step.PREPARE_DISPATCH, 0] < at[Step.START_DISPATCH, 0]
            assert at[Step.START_DISPATCH, 0] < at[Step.WAIT_DISPATCH, chunk]
            assert at[Step.WAIT_DISPATCH, chunk] < at[Step.EXPERTS, chunk]
            assert at[Step.EXPERTS, chunk] < at[Step.START_COMBINE, chunk]
            assert at[Step.START_COMBINE, chunk] < at[Step.WAIT_COMBINE, 0]
        shared = tasks.index(Task(Step.SHARED_EXPERT))
        experts, turn = (tasks.index(Task(step, 0, 1)) for step in (Step.EXPERTS, Step.TURN))
        assert (shared < experts, shared < turn) == (second[0] == 1, second[1] == 1)
        assert tasks.index(Task(Step.PROJECTION)) < tasks.index(Task(Step.ROUTE, 0, 1)) < shared
    with pytest.raises(ValueError, match="expert slot 2 is outside"):
        build_schedule("pos2", Slots(1, 1), True, further=(Route(7, Slots(2, 0)),))
    with pytest.raises(ValueError, match="taps in front of pos1"):
        build_schedule("pos1", Slots(1, 1), True, further=(Route(3, Slots(0, 0)),))


def test_turns_at_one_place_run_in_reverse_order() -> None:
    """Of the routes; backward goes from right to left. The documentation shows this schedule."""
    further = (Route(7, Slots(0, 0)),)
    tasks = build_schedule("pos2", Slots(4, 4), True, further=further)
    assert [task.route for task in tasks if task.step is Step.TURN] == [0, 1]
    shown = format_schedule(build_schedule("pos2", Slots(1, 1), True, further=further))
    assert shown in " ".join((DOCS / "overlap.md").read_text().split())


def test_the_picture_of_the_way_is_true() -> None:
    """docs/architecture.md: a line for each step, in order, and what does it exists."""
    picture = (DOCS / "architecture.md").read_text().split("## The way of hidden_states")[1]
    lines = picture.split("```")[1].splitlines()
    steps = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    schedule = build_schedule("pos2", Slots(1, 1), overlap=True)
    assert steps == [task.step.value for task in schedule]
    owners = ShortcutLayer, ScMoELayer, RoutedChunk, RoutedTokens, RoutedBranch, Leg, Trip
    by_name = {owner.__name__: owner for owner in owners}
    named = re.findall(r"([A-Z]\w+)\.(\w+)", picture.split("```")[1])
    assert {owner for owner, _ in named} == set(by_name)
    for owner, name in named:
        assert hasattr(by_name[owner], name), f"{owner}.{name}"


def test_command_prints_the_overlapped_schedules() -> None:
    command = [sys.executable, "-m", "megatron_scmoe.overlap.schedule"]
    repository = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    lines = run.stdout.splitlines()
    assert len(lines) == sum(len(WINDOWS[position]) + 1 for position in POSITIONS)
    assert [line.split()[0] for line in lines if "*" in line] == list(POSITIONS)
    assert lines[6] == (
        "pos2 slot 1* dense_qkv > dense_core_attention > dense_projection > route > "
        "prepare_dispatch > start_dispatch > dense_mlp > wait_dispatch > experts > start_combine > "
        "turn > qkv > core_attention > projection > shared_expert > wait_combine > merge"
    )
