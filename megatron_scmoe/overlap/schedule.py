"""The order of steps inside one shortcut unit, as data.

A unit is the routed experts and the dense operators between the shortcut's tap and the point where
shared and routed outputs meet (arXiv:2404.05019, figure 5 and section 3.2). The layer executes the
list from left to right; `python -m megatron_scmoe.overlap.schedule` prints the lists that
docs/overlap.md shows.

With dense operators D1..Dn in the window and expert slot K (the number of them before the experts):

    overlapped   route start-dispatch D1..DK wait-dispatch experts start-combine DK+1..Dn
                 wait-combine merge
    sequential   the same with every wait moved next to its start
"""

from enum import Enum


class Step(Enum):
    """What a unit does; the value is the name of the layer's method."""

    DENSE_ATTENTION = "dense_attention"
    DENSE_MLP = "dense_mlp"
    ATTENTION = "attention"
    SHARED_EXPERT = "shared_expert"
    ROUTE = "route"
    START_DISPATCH = "start_dispatch"
    WAIT_DISPATCH = "wait_dispatch"
    EXPERTS = "experts"
    START_COMBINE = "start_combine"
    WAIT_COMBINE = "wait_combine"
    MERGE = "merge"


POSITIONS = ("pos1", "pos2", "pos3")

# Dense operators of the pair, in order, and how many of them stand before the tap.
_PAIR = (Step.DENSE_ATTENTION, Step.DENSE_MLP, Step.ATTENTION, Step.SHARED_EXPERT)
_BEFORE_TAP = {"pos1": 2, "pos2": 1, "pos3": 0}

# One slot that leaves work on both sides of the experts: the paper's example for Pos-2
# (figure 7), the middle of the window otherwise.
_DEFAULT_SLOT = {"pos1": 1, "pos2": 1, "pos3": 2}


def window(position: str) -> tuple[Step, ...]:
    """The dense operators that may run while tokens travel, in order (section 3.1)."""
    return _PAIR[_BEFORE_TAP[position] :]


def default_slot(position: str) -> int:
    """The expert slot used when none is asked for."""
    return _DEFAULT_SLOT[position]


def build_schedule(position: str, expert_slot: int, overlap: bool) -> tuple[Step, ...]:
    """Order the steps of one unit.

    Args:
        position: pos1, pos2 or pos3. A Pos-1 unit is a single layer: what stands before its tap
            is no part of it.
        expert_slot: dense operators of the window before the routed experts.
        overlap: launch the exchanges early and wait late; otherwise wait at once.

    Raises:
        ValueError: the slot lies outside the window.
    """
    dense = window(position)
    if not 0 <= expert_slot <= len(dense):
        raise ValueError(f"expert slot {expert_slot} is outside 0..{len(dense)} for {position}")
    before_tap = () if position == "pos1" else _PAIR[: _BEFORE_TAP[position]]
    early, late = dense[:expert_slot], dense[expert_slot:]
    dispatch = _exchange(Step.START_DISPATCH, early, Step.WAIT_DISPATCH, overlap)
    combine = _exchange(Step.START_COMBINE, late, Step.WAIT_COMBINE, overlap)
    return (*before_tap, Step.ROUTE, *dispatch, Step.EXPERTS, *combine, Step.MERGE)


def _exchange(start: Step, dense: tuple[Step, ...], wait: Step, overlap: bool) -> tuple[Step, ...]:
    return (start, *dense, wait) if overlap else (start, wait, *dense)


if __name__ == "__main__":
    for name in POSITIONS:
        for slot in range(len(window(name)) + 1):
            mark = "*" if slot == default_slot(name) else " "
            steps = " > ".join(step.value for step in build_schedule(name, slot, overlap=True))
            print(f"{name} slot {slot}{mark} {steps}")
