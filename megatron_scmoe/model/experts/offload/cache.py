"""Which experts of a layer are on the device: the order of fetching, keeping and giving up.

Exact: only experts that tokens have been routed to are fetched, each once for a step, so that no
more is read than on demand. What a step needs is announced as soon as the gate has spoken; until it
is computed with, it is not given up for anything else.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Arrival(Protocol):
    """An expert on its way."""

    def wait(self) -> object:
        """All later work of the caller is ordered behind it."""

    def times(self, clock: Any) -> tuple[float, float, float]:
        """(start, completion, blocked), in seconds of a clock; only after `wait`."""


@dataclass
class Account:
    """What was asked of a layer's cache, and what came of it."""

    asked: int = 0
    """Experts that steps needed."""
    fetched: int = 0
    """Of those, what was not there; each is one copy."""
    arrivals: list[Arrival] = field(default_factory=list)
    """Those waited for, if they are to be kept."""
    keeps_arrivals: bool = False


def travelled(accounts: Iterable[Account], clock: Any) -> tuple[float, float]:
    """Seconds for which experts were in flight, and for which compute stood still for them.

    They travel one behind the other, those of all layers: what waits for its turn is not in flight.

    Args:
        accounts: that have kept their arrivals.
        clock: of `Arrival.times`.
    """
    in_flight = stood_still = last = 0.0
    times = (arrival.times(clock) for account in accounts for arrival in account.arrivals)
    for begin, end, blocked in sorted(times):
        in_flight += max(0.0, end - max(begin, last))
        stood_still += blocked
        last = max(last, end)
    return in_flight, stood_still


class ExpertCache:
    """The slots of one layer.

    Args:
        slots: experts that fit on the device.
        fetch: start to copy an expert into a slot.
        keeps: give up experts only for others; otherwise all, as soon as they are computed with.
    """

    def __init__(
        self, slots: int, fetch: Callable[[int, int], Arrival], keeps: bool = True
    ) -> None:
        self.account = Account()
        self._fetch = fetch
        self._keeps = keeps
        self._free = list(range(slots))
        self._slots: OrderedDict[int, int] = OrderedDict()  # by expert, least recently used first
        self._coming: dict[int, Arrival] = {}
        self._needed: Counter[int] = Counter()  # steps that are still to compute with an expert
        self._announced: deque[tuple[int, ...]] = deque()

    def announce(self, experts: Sequence[int]) -> None:
        """A step will need these: start to fetch those that are not here, as many as have room."""
        self._announced.append(tuple(experts))
        self._expect(experts)

    def take(self, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Each expert of a step with its slot, once it is there; the order is the cache's.

        An expert is given up no earlier than the next one is asked for.

        Args:
            experts: of a step that was announced or not.
        """
        step = tuple(experts)
        if step in self._announced:
            self._announced.remove(step)
        else:
            self._expect(step)
        self.account.asked += len(step)
        left = list(step)
        while left:
            # Those that are here first, then those that come, in the order in which they were sent.
            expert = next((e for e in left if e in self._slots and e not in self._coming), None)
            if expert is None:
                expert = next((e for e in self._coming if e in left), None)
            if expert is None:
                expert = left[0]
                if not self._start(expert):
                    self._give_up(next(iter(self._slots)))
                    self._start(expert)
            left.remove(expert)
            if arrival := self._coming.pop(expert, None):
                arrival.wait()
                if self.account.keeps_arrivals:
                    self.account.arrivals.append(arrival)
            self._slots.move_to_end(expert)
            yield expert, self._slots[expert]
            self._needed[expert] -= 1
            if not self._keeps and not self._needed[expert]:
                self._give_up(expert)
            self._start_missing(left)

    def _expect(self, experts: Sequence[int]) -> None:
        self._needed.update(experts)
        self._start_missing(experts)

    def _start_missing(self, experts: Sequence[int]) -> None:
        for expert in experts:
            if expert not in self._slots and not self._start(expert):
                return

    def _start(self, expert: int) -> bool:
        """Fetch an expert, unless every slot holds one that is needed."""
        if not self._free:
            idle = next((other for other in self._slots if not self._needed[other]), None)
            if idle is None:
                return False
            self._give_up(idle)
        slot = self._free.pop()
        self._slots[expert] = slot
        self._coming[expert] = self._fetch(expert, slot)
        self.account.fetched += 1
        return True

    def _give_up(self, expert: int) -> None:
        if arrival := self._coming.pop(expert, None):
            arrival.wait()  # nobody may write into a slot after it has another owner
        self._free.append(self._slots.pop(expert))
