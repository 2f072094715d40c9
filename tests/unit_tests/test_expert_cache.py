"""What is fetched, kept and given up; no step reads more than on demand would."""

import random
from collections.abc import Sequence

import pytest

from megatron_scmoe.model.experts.offload.cache import Account, ExpertCache, travelled


class Memory:
    """Slots of a device, and copies that arrive when they are waited for."""

    def __init__(self, slots: int) -> None:
        self.slots: list[int | None] = [None] * slots
        self.log: list[int] = []

    def fetch(self, expert: int, slot: int) -> "Copy":
        self.log.append(expert)
        self.slots[slot] = None  # overwritten from now on
        return Copy(self, expert, slot)


class Copy:
    def __init__(self, memory: Memory, expert: int, slot: int) -> None:
        self.memory, self.expert, self.slot = memory, expert, slot

    def wait(self) -> None:
        self.memory.slots[self.slot] = self.expert


def run(cache: ExpertCache, memory: Memory, experts: Sequence[int]) -> list[int]:
    """Compute with the experts of a step; the order."""
    order = []
    for expert, slot in cache.take(experts):
        assert memory.slots[slot] == expert
        order.append(expert)
    assert sorted(order) == sorted(experts)
    return order


def test_what_is_announced_is_fetched_at_once_and_computed_as_it_comes() -> None:
    memory = Memory(3)
    cache = ExpertCache(3, memory.fetch)
    cache.announce([0, 2])
    assert memory.log == [0, 2]
    run(cache, memory, [0, 2])
    cache.announce([1, 2])
    assert memory.log == [0, 2, 1]  # 2 is here
    assert run(cache, memory, [1, 2]) == [2, 1]
    assert (cache.account.asked, cache.account.fetched) == (4, 3)


def test_the_least_recently_used_is_given_up_but_nothing_that_is_needed() -> None:
    memory = Memory(2)
    cache = ExpertCache(2, memory.fetch)
    run(cache, memory, [0])
    run(cache, memory, [1])
    run(cache, memory, [0])
    run(cache, memory, [2])  # in the place of 1
    cache.announce([0, 3])  # 0 is here and needed: in the place of 2
    assert memory.log == [0, 1, 2, 3] and 0 in memory.slots
    run(cache, memory, [0, 3])
    assert memory.log == [0, 1, 2, 3]


def test_more_than_fit_come_one_behind_the_other() -> None:
    memory = Memory(2)
    cache = ExpertCache(2, memory.fetch)
    run(cache, memory, [4, 5])
    cache.announce(range(8))
    assert memory.log == [4, 5]  # both are needed: no room
    assert run(cache, memory, range(8))[:2] == [4, 5]
    assert len(memory.log) == 8 and cache.account.fetched == 8


def test_two_steps_may_be_announced() -> None:
    """Of two routes, or of two chunks; in any order."""
    memory = Memory(2)
    cache = ExpertCache(2, memory.fetch)
    cache.announce([0, 1])
    cache.announce([1, 2])
    run(cache, memory, [1, 2])
    assert memory.log == [0, 1, 2]
    run(cache, memory, [0, 1])


def test_nothing_is_kept_if_it_is_not_to_be() -> None:
    memory = Memory(2)
    cache = ExpertCache(2, memory.fetch, keeps=False)
    for _ in range(3):
        run(cache, memory, [1])
    assert memory.log == [1, 1, 1]


@pytest.mark.parametrize("announces", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_no_more_is_read_than_on_demand(slots: int, announces: bool) -> None:
    """Against an LRU cache that meets one expert at a time."""
    generator = random.Random(slots)
    memory, on_demand = Memory(slots), 0
    cache = ExpertCache(slots, memory.fetch)
    recent: list[int] = []
    for _ in range(500):
        step = sorted(generator.sample(range(8), generator.choice([1, 2, 3, 8])))
        for expert in step:
            on_demand += expert not in recent
            recent = [*(e for e in recent if e != expert), expert][-slots:]
        if announces:
            cache.announce(step)
        run(cache, memory, step)
    assert cache.account.fetched == len(memory.log) <= on_demand


class Travelled:
    """An arrival whose times are known."""

    def __init__(self, *times: float) -> None:
        self._times = times

    def wait(self) -> None: ...

    def times(self, clock: object) -> tuple[float, ...]:
        return self._times


def test_what_waits_for_its_turn_is_not_in_flight() -> None:
    """Two of one layer, sent at once, share the link with one of another; then it is idle."""
    one = Account(arrivals=[Travelled(0, 2, 1), Travelled(0, 4, 2)])
    other = Account(arrivals=[Travelled(3, 6, 0), Travelled(7, 8, 1)])
    assert travelled([other, one], None) == (7, 4)
