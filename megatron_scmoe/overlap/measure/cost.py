"""How long one shortcut unit takes at each expert slot, from the times of its parts.

With T_pre and T_post the dense work of the window before and after the experts
(arXiv:2404.05019, section 3.2):

    T = max(T_pre, T_dispatch) + T_experts + max(T_post, T_combine)

The backward pass mirrors the forward pass: the combine's gradient travels first, beside the dense
work that stands after the experts. Its T is the same sum in another order, so that one formula
serves both directions and every list of operators is given in forward order.

Assumed, as in the paper: compute operators do not run beside each other, an exchange runs at full
speed beside compute, and routing and merging take no time.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

# Slots whose times differ by less than rounding are equally good.
_RELATIVE_TIE = 1e-9


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of a unit's parts, in one direction.

    Attributes:
        dense: the dense operators of the window, in forward order (schedule.window).
        experts: the routed experts.
        dispatch: the exchange between routing and experts; in backward, that of its gradient.
        combine: the exchange between experts and merge; in backward, that of its gradient.

    Raises:
        ValueError: a time is negative or not finite.
    """

    dense: tuple[float, ...]
    experts: float
    dispatch: float
    combine: float

    def __post_init__(self) -> None:
        for seconds in (*self.dense, self.experts, self.dispatch, self.combine):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"a time of {seconds} s in {self}")

    @property
    def window(self) -> float:
        """Seconds of dense work that can hide communication."""
        return math.fsum(self.dense)

    @property
    def communication(self) -> float:
        """Seconds of both exchanges."""
        return self.dispatch + self.combine

    @property
    def sequential(self) -> float:
        """Seconds of the unit when every exchange is awaited where it starts."""
        return self.window + self.experts + self.communication


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
