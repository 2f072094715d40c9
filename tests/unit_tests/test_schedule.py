"""The order of steps in a unit."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scmoe.overlap.schedule import (
    POSITIONS,
    Step,
    build_schedule,
    default_slot,
    window,
)
from megatron_scmoe.shortcut_layer import ShortcutLayer

# The paper's windows (section 3.1) and the dense operators in front of the tap.
WINDOWS = {
    "pos1": [Step.ATTENTION, Step.SHARED_EXPERT],
    "pos2": [Step.DENSE_MLP, Step.ATTENTION, Step.SHARED_EXPERT],
    "pos3": [Step.DENSE_ATTENTION, Step.DENSE_MLP, Step.ATTENTION, Step.SHARED_EXPERT],
}
BEFORE_TAP = {"pos1": [], "pos2": [Step.DENSE_ATTENTION], "pos3": []}
# (start, wait) of each exchange.
EXCHANGES = [
    (Step.START_DISPATCH, Step.WAIT_DISPATCH),
    (Step.START_COMBINE, Step.WAIT_COMBINE),
]
WAITS = {wait for _, wait in EXCHANGES}
ROUTED = [
    Step.ROUTE,
    Step.START_DISPATCH,
    Step.WAIT_DISPATCH,
    Step.EXPERTS,
    Step.START_COMBINE,
    Step.WAIT_COMBINE,
    Step.MERGE,
]
SLOTS = [(position, slot) for position in POSITIONS for slot in range(len(WINDOWS[position]) + 1)]

each_slot = pytest.mark.parametrize(("position", "slot"), SLOTS)
each_order = pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "sequential"])


@pytest.mark.parametrize("position", POSITIONS)
def test_window(position: str) -> None:
    assert list(window(position)) == WINDOWS[position]


def test_default_slots_leave_work_on_both_sides_of_the_experts() -> None:
    assert {position: default_slot(position) for position in POSITIONS} == {
        "pos1": 1,
        "pos2": 1,
        "pos3": 2,
    }
    for position in POSITIONS:
        assert 0 < default_slot(position) < len(window(position))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("beyond", [-1, 1], ids=["below", "above"])
def test_slots_outside_the_window_are_refused(position: str, beyond: int) -> None:
    slot = -1 if beyond < 0 else len(WINDOWS[position]) + 1
    with pytest.raises(ValueError, match=rf"expert slot {slot} is outside 0\.\..* for {position}"):
        build_schedule(position, slot, overlap=True)


@each_order
@each_slot
def test_every_step_once_and_both_branches_in_order(
    position: str, slot: int, overlap: bool
) -> None:
    steps = build_schedule(position, slot, overlap)
    dense = BEFORE_TAP[position] + WINDOWS[position]
    assert [step for step in steps if step in dense] == dense
    assert [step for step in steps if step not in dense] == ROUTED
    assert len(steps) == len(dense) + len(ROUTED)
    assert steps[len(BEFORE_TAP[position])] is Step.ROUTE
    assert steps[-1] is Step.MERGE


@each_order
@each_slot
def test_slot_is_the_number_of_dense_operators_before_the_experts(
    position: str, slot: int, overlap: bool
) -> None:
    steps = build_schedule(position, slot, overlap)
    between = steps[steps.index(Step.ROUTE) : steps.index(Step.EXPERTS)]
    assert [step for step in between if step in WINDOWS[position]] == WINDOWS[position][:slot]


@each_slot
def test_overlapped_exchanges_span_the_dense_work(position: str, slot: int) -> None:
    """Nothing but dense work lies between a start and its wait, and all of the window does."""
    steps = build_schedule(position, slot, overlap=True)
    spanned = [list(steps[steps.index(a) + 1 : steps.index(b)]) for a, b in EXCHANGES]
    assert spanned == [WINDOWS[position][:slot], WINDOWS[position][slot:]]


@each_slot
def test_sequential_is_overlapped_with_the_waits_moved_up(position: str, slot: int) -> None:
    overlapped = build_schedule(position, slot, overlap=True)
    sequential = build_schedule(position, slot, overlap=False)
    for start, wait in EXCHANGES:
        assert sequential.index(wait) == sequential.index(start) + 1
    without_waits = [
        [step for step in steps if step not in WAITS] for steps in (overlapped, sequential)
    ]
    assert without_waits[0] == without_waits[1]


def test_every_step_is_a_method_of_the_layer() -> None:
    for step in Step:
        assert callable(getattr(ShortcutLayer, step.value))


def test_command_prints_the_overlapped_schedules() -> None:
    command = [sys.executable, "-m", "megatron_scmoe.overlap.schedule"]
    repository = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    lines = run.stdout.splitlines()
    assert len(lines) == len(SLOTS)
    assert [line.split()[0] for line in lines if "*" in line] == list(POSITIONS)
    assert lines[4] == (
        "pos2 slot 1* dense_attention > route > start_dispatch > dense_mlp > wait_dispatch > "
        "experts > start_combine > attention > shared_expert > wait_combine > merge"
    )
