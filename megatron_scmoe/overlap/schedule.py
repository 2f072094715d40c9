"""The order of steps inside one shortcut unit, as data.

A unit is the routed experts and the dense operators between the shortcut's tap and the point where
shared and routed outputs meet (arXiv:2404.05019, figure 5 and section 3.2). The layer executes the
list from left to right; `python -m megatron_scmoe.overlap.schedule` prints the lists that
docs/overlap.md shows.

With dense operators D1..Dn in the window and expert slot K (the number of them before the experts):

    overlapped   route start-dispatch D1..DK wait-dispatch experts start-combine DK+1..Dn
                 wait-combine merge
    sequential   the same with every wait moved next to its start

Attention is three operators, so that experts may run in the middle of it. The turn stands where the
experts run in the backward pass; its slot is counted in the same way, from the tap.
"""

from enum import Enum
from functools import lru_cache
from typing import NamedTuple


class Step(Enum):
    """What a unit does; the value is the name of the layer's method."""

    DENSE_QKV = "dense_qkv"
    DENSE_CORE_ATTENTION = "dense_core_attention"
    DENSE_PROJECTION = "dense_projection"
    DENSE_MLP = "dense_mlp"
    QKV = "qkv"
    CORE_ATTENTION = "core_attention"
    PROJECTION = "projection"
    SHARED_EXPERT = "shared_expert"
    ROUTE = "route"
    PREPARE_DISPATCH = "prepare_dispatch"
    START_DISPATCH = "start_dispatch"
    WAIT_DISPATCH = "wait_dispatch"
    EXPERTS = "experts"
    START_COMBINE = "start_combine"
    WAIT_COMBINE = "wait_combine"
    MARK = "mark"
    TURN = "turn"
    MERGE = "merge"


PER_CHUNK = (Step.WAIT_DISPATCH, Step.EXPERTS, Step.START_COMBINE)
# No work of the unit: where its backward pass is watched, or told to run the experts.
PLACES = (Step.MARK, Step.TURN)


class Task(NamedTuple):
    """A step, and which of several."""

    step: Step
    number: int = 0
    """The chunk of the tokens that it is for; of a mark, the number of dense operators of the
    window in front of it."""


class Slots(NamedTuple):
    """Dense operators of the window between the tap and the routed experts."""

    forward: int
    """That run before the experts."""
    backward: int
    """Whose backward runs after that of the experts."""

    def __str__(self) -> str:
        """As --scmoe-expert-slot takes it."""
        return ",".join(map(str, dict.fromkeys(self)))


POSITIONS = ("pos1", "pos2", "pos3")

# Dense operators of the pair, in order, and how many of them stand before the tap.
_PAIR = (
    Step.DENSE_QKV,
    Step.DENSE_CORE_ATTENTION,
    Step.DENSE_PROJECTION,
    Step.DENSE_MLP,
    Step.QKV,
    Step.CORE_ATTENTION,
    Step.PROJECTION,
    Step.SHARED_EXPERT,
)
_BEFORE_TAP = {"pos1": 4, "pos2": 3, "pos3": 0}

# Slots that leave work on both sides of the experts: behind the MLP is the paper's example for
# Pos-2 (figure 7), the middle of the window otherwise.
_DEFAULT_SLOT = {"pos1": 3, "pos2": 1, "pos3": 4}


def window(position: str) -> tuple[Step, ...]:
    """The dense operators that may run while tokens travel, in order (section 3.1)."""
    return _PAIR[_BEFORE_TAP[position] :]


def default_slot(position: str) -> int:
    """The expert slot before anything was measured."""
    return _DEFAULT_SLOT[position]


@lru_cache
def build_schedule(
    position: str,
    slots: Slots,
    overlap: bool,
    num_chunks: int = 1,
    operators_ahead: int = 0,
    marked: bool = False,
) -> tuple[Task, ...]:
    """Order the steps of one unit.

    Args:
        position: pos1, pos2 or pos3. A Pos-1 unit is a single layer: what stands before its tap
            is no part of it.
        slots: where the experts stand, forward and backward.
        overlap: launch the exchanges early and wait late; otherwise wait at once.
        num_chunks: parts of the tokens that are exchanged one by one.
        operators_ahead: where the host enqueues work for a device, dense operators that it
            enqueues before it waits for the numbers of rows, without which no exchange can be
            launched. No more than there are in front of the experts.
        marked: with marks between the operators of the window, by which the backward pass is timed.

    Raises:
        ValueError: a slot lies outside the window.
    """
    dense = window(position)
    for slot in slots:
        if not 0 <= slot <= len(dense):
            raise ValueError(f"expert slot {slot} is outside 0..{len(dense)} for {position}")
    chunks = range(num_chunks)
    # Slots count dense operators; places among them do not.
    places: list[list[Task]] = [
        [Task(Step.MARK, slot)] if marked else [] for slot in range(len(dense) + 1)
    ]
    places[slots.backward].append(Task(Step.TURN))
    operators = [[*place, Task(step)] for place, step in zip(places, dense, strict=False)]
    early = [task for operator in operators[: slots.forward] for task in operator]
    late = [task for operator in operators[slots.forward :] for task in operator] + places[-1]

    start = [Task(Step.START_DISPATCH)]
    ahead = min(operators_ahead, slots.forward)
    if ahead and overlap:
        fed = early.index(Task(dense[ahead - 1])) + 1
        start, early = [*early[:fed], *start], early[fed:]
    wait = [Task(Step.WAIT_DISPATCH, chunk) for chunk in chunks]
    back = [Task(Step.WAIT_COMBINE)]
    if overlap:
        routed = [
            task
            for chunk in chunks
            for task in (wait[chunk], Task(Step.EXPERTS, chunk), Task(Step.START_COMBINE, chunk))
        ]
        middle = [*start, *early, *routed, *late, *back]
    else:
        experts = [Task(Step.EXPERTS, chunk) for chunk in chunks]
        combine = [Task(Step.START_COMBINE, chunk) for chunk in chunks]
        middle = [*start, *wait, *early, *experts, *combine, *back, *late]
    before_tap = () if position == "pos1" else _PAIR[: _BEFORE_TAP[position]]
    tap = (*before_tap, Step.ROUTE, Step.PREPARE_DISPATCH)
    return (*map(Task, tap), *middle, Task(Step.MERGE))


def format_schedule(tasks: tuple[Task, ...]) -> str:
    """The steps with arrows between them; chunks are numbered if there are several."""
    several = any(task.number for task in tasks)
    return " > ".join(
        f"{task.step.value}[{task.number}]"
        if several and task.step in PER_CHUNK
        else task.step.value
        for task in tasks
    )


if __name__ == "__main__":
    for name in POSITIONS:
        for slot in range(len(window(name)) + 1):
            mark = "*" if slot == default_slot(name) else " "
            tasks = build_schedule(name, Slots(slot, slot), overlap=True)
            print(f"{name} slot {slot}{mark} {format_schedule(tasks)}")
