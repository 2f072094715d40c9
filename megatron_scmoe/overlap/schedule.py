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
    """What a unit does; the value is its name in traces, logs and files of measured times."""

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


class Task(NamedTuple):
    """A step, and which of several."""

    step: Step
    number: int = 0
    """The chunk of the tokens that it is for; of a mark, the number of dense operators of the
    window in front of it."""
    route: int = 0
    """The routed branch that it belongs to."""


class Slots(NamedTuple):
    """Dense operators of the window between the tap and the routed experts."""

    forward: int
    """That run before the experts."""
    backward: int
    """Whose backward runs after that of the experts."""

    def __str__(self) -> str:
        """As --scmoe-expert-slot takes it."""
        return ",".join(map(str, dict.fromkeys(self)))


class Route(NamedTuple):
    """One routed branch of a unit: where it reads, and where its experts run."""

    tap: int
    """Dense operators of the pair before its tap."""
    slots: Slots


class Position(NamedTuple):
    """Where the routed experts read, a value of --scmoe-shortcut-position."""

    reads: str
    """In the help text."""
    tap: int
    """Dense operators of the pair before the tap."""
    default_slot: int
    """Where the experts run before anything was measured. It leaves work on both sides of them:
    behind the MLP is the paper's example for Pos-2 (figure 7), the middle of the window otherwise.
    """
    norm: str
    """The unit's norm by which the main branch reads the same tensor."""
    is_pair: bool = True
    """Whether the dense layer in front is a part of the unit. Otherwise the unit is one layer that
    taps its own input: what stands before its tap is no part of it."""


POSITIONS = {
    "pos1": Position(
        "the input of the MoE layer's attention", 4, 3, "input_layernorm", is_pair=False
    ),
    "pos2": Position(
        "between attention and MLP of the dense layer in front",
        3,
        1,
        "dense_layer.pre_mlp_layernorm",
    ),
    "pos3": Position("the input of that dense layer", 0, 4, "dense_layer.input_layernorm"),
}

# By the value of the option; without a shortcut the experts read what stock Megatron's do.
TAPS = {
    **POSITIONS,
    "none": Position("its own attention's output", 7, 1, "pre_mlp_layernorm", is_pair=False),
}

PAIR = (
    Step.DENSE_QKV,
    Step.DENSE_CORE_ATTENTION,
    Step.DENSE_PROJECTION,
    Step.DENSE_MLP,
    Step.QKV,
    Step.CORE_ATTENTION,
    Step.PROJECTION,
    Step.SHARED_EXPERT,
)
"""Dense operators of a dense layer and the MoE layer behind it, in order."""
MOE_LAYER = PAIR[PAIR.index(Step.QKV) :]
"""Dense operators of the MoE layer."""


def window(position: str) -> tuple[Step, ...]:
    """The dense operators that may run while tokens travel, in order (section 3.1)."""
    return PAIR[TAPS[position].tap :]


def default_slots(position: str) -> Slots:
    """The expert slots before anything was measured."""
    slot = TAPS[position].default_slot
    return Slots(slot, slot)


@lru_cache
def build_schedule(
    position: str,
    slots: Slots,
    overlap: bool,
    num_chunks: int = 1,
    operators_ahead: int = 0,
    marked: bool = False,
    further: tuple[Route, ...] = (),
) -> tuple[Task, ...]:
    """Order the steps of one unit.

    Args:
        position: a key of TAPS.
        slots: where the experts stand, forward and backward.
        overlap: launch the exchanges early and wait late; otherwise wait at once.
        num_chunks: parts of the tokens that are exchanged one by one.
        operators_ahead: where the host enqueues work for a device, dense operators that it
            enqueues before it waits for the numbers of rows, without which no exchange can be
            launched. No more than there are in front of the experts.
        marked: with marks between the operators of the window, by which the backward pass is timed.
        further: routed branches beside that of the position, each with a tap and slots of its own.

    Raises:
        ValueError: a slot lies outside the window of its route, or a further route taps in front
            of the first.
    """
    first = TAPS[position]
    if any(route.tap < first.tap for route in further):
        raise ValueError(f"a further route taps in front of {position}, outside what is measured")
    routes = [Route(first.tap, slots), *further]
    # What stands between the operators: places[p] in front of the operator p of the pair.
    places: list[list[Task]] = [[] for _ in range(len(PAIR) + 1)]
    for number, route in enumerate(routes):
        for slot in route.slots:
            if not 0 <= slot <= len(PAIR) - route.tap:
                raise ValueError(
                    f"expert slot {slot} is outside 0..{len(PAIR) - route.tap} for {position}"
                )
        for place, tasks in _routed(route, number, overlap, num_chunks, operators_ahead).items():
            places[place] += tasks
    if marked:
        for operators, here in enumerate(places[first.tap :]):
            here.append(Task(Step.MARK, operators))
    for number, route in enumerate(routes):
        places[route.tap + route.slots.backward].append(Task(Step.TURN, route=number))
    if overlap:
        places[-1] += [Task(Step.WAIT_COMBINE, route=number) for number in range(len(routes))]
    places[-1].append(Task(Step.MERGE))
    begin = 0 if first.is_pair else PAIR.index(MOE_LAYER[0])
    tasks = [*places[begin]]
    for operator, behind in zip(PAIR[begin:], places[begin + 1 :], strict=True):
        tasks += [Task(operator), *behind]
    return tuple(tasks)


def _routed(
    route: Route, number: int, overlap: bool, num_chunks: int, operators_ahead: int
) -> dict[int, list[Task]]:
    """The steps of one routed branch, by their place among the operators of the pair."""

    def each(step: Step) -> list[Task]:
        return [Task(step, chunk, number) for chunk in range(num_chunks)]

    tap, experts = route.tap, route.tap + route.slots.forward
    launch = tap + (min(operators_ahead, route.slots.forward) if overlap else 0)
    wait, compute = each(Step.WAIT_DISPATCH), each(Step.EXPERTS)
    send = each(Step.START_COMBINE)
    steps = [
        (tap, [Task(Step.ROUTE, route=number), Task(Step.PREPARE_DISPATCH, route=number)]),
        (launch, [Task(Step.START_DISPATCH, route=number)]),
    ]
    if overlap:
        chunks = zip(wait, compute, send, strict=True)
        steps += [(experts, [task for chunk in chunks for task in chunk])]
    else:
        back = [Task(Step.WAIT_COMBINE, route=number)]
        steps += [(tap, wait), (experts, [*compute, *send, *back])]
    placed: dict[int, list[Task]] = {}
    for place, tasks in steps:
        placed.setdefault(place, []).extend(tasks)
    return placed


def format_schedule(tasks: tuple[Task, ...]) -> str:
    """The steps with arrows between them; chunks are numbered if there are several, and so are the
    routes after the first."""
    several = any(task.number for task in tasks)
    return " > ".join(
        task.step.value
        + (f"[{task.number}]" if several and task.step in PER_CHUNK else "")
        + (f"/{task.route}" if task.route else "")
        for task in tasks
    )


if __name__ == "__main__":
    for name in POSITIONS:
        for slot in range(len(window(name)) + 1):
            mark = "*" if slot == POSITIONS[name].default_slot else " "
            tasks = build_schedule(name, Slots(slot, slot), overlap=True)
            print(f"{name} slot {slot}{mark} {format_schedule(tasks)}")
