"""The benchmark's slow memory, and what it reads off the caches."""

import pytest
import torch

from megatron_scmoe.model.experts.offload.cache import ExpertCache
from tools.benchmarks import offload


def test_a_slow_memory_takes_its_time_and_copies() -> None:
    """10 kB at 1 MB/s: a lower bound, which no busy machine can break."""
    home = torch.arange(2 * 2500.0).view(2, 2500)
    slots = torch.zeros(1, 2500)
    fetch = offload.slow(rate=1e6)
    cache = ExpertCache(1, lambda expert, slot: fetch([slots[slot]], [home[expert]]))
    cache.account.keeps_arrivals = True
    cache.announce([1])
    ((expert, slot),) = cache.take([1])
    assert (expert, slot) == (1, 0) and torch.equal(slots[0], home[1])
    list(cache.take([1]))  # it is there
    asked, fetched, in_flight, blocked = offload.totals([cache.account])
    assert (asked, fetched) == (2, 1)
    assert in_flight >= 0.0099 and 0 <= blocked <= in_flight
    assert in_flight == pytest.approx(
        sum(end - begin for begin, end, _ in [cache.account.arrivals[0].times(None)])
    )
