"""The benchmark's slow memory, and what it reads off the caches."""

import time
from argparse import Namespace
from dataclasses import replace

import torch

from megatron_scmoe.inference.offload import OffloadPlan
from megatron_scmoe.planner.fetch import FetchTimes
from tools.benchmarks import offload


def test_a_slow_memory_takes_its_time_and_copies() -> None:
    """10 kB at 1 MB/s: a lower bound, which no busy machine can break."""
    home = torch.arange(2 * 2500.0).view(2, 2500)
    slots = torch.zeros(1, 2500)
    fetch = offload.slow(rate=1e6)
    cache = offload.WatchedCache(1, lambda expert, slot: fetch([slots[slot]], [home[expert]]))
    cache.announce([1])
    time.sleep(0.005)  # dense work
    ((expert, slot),) = cache.take([1])
    assert (expert, slot) == (1, 0) and torch.equal(slots[0], home[1])
    list(cache.take([1]))  # it is there
    totals = offload.Fetched.of([cache])
    assert (totals.asked, totals.fetched) == (2, 1)
    assert totals.in_flight >= 0.0099 and 0 <= totals.exposed <= totals.in_flight
    assert totals.hidden == 1 - totals.exposed / totals.in_flight
    # Only the step that was announced had one.
    assert totals.window >= 0.0049
    assert totals.of_layer(2) == (totals.window / 2, totals.in_flight / 2)


def test_a_row_has_what_the_device_and_the_host_hold_and_what_was_planned() -> None:
    """Of two layers of eight experts of 1 kB, all weights 20 kB; a GPU allocates 500 B beside."""
    times = FetchTimes(0.002, 0.004)
    turn = offload.ArmTurn(0.1, 5.0, 1e3, 0.5, 0.03, 0.9, 0.99, times, times, 500, [[1]])
    plan = OffloadPlan("cpu", layers=2, experts=8, expert_bytes=1000, slots=4)

    def row(name: str, slots: int, plan: OffloadPlan = plan) -> dict[str, str]:
        args = Namespace(max_new_tokens=4)
        planned = FetchTimes(0.001, 0.0)
        return offload.row_of(name, slots, [turn, turn], args, plan, planned, 20_000)

    found = row("both", 2)
    assert (found["device memory"], found["of experts"]) == ("8.50 kB", "4.00 kB")
    assert found["host memory"] == "16.0 kB" and found["waited, ms a step"] == "10.0"
    assert (found["window planned, ms"], found["window, ms"]) == ("1.0", "2.0")
    assert (found["transfer planned, ms"], found["transfer, ms"]) == ("-", "4.0")
    assert row("both", 2, replace(plan, tier="disk"))["host memory"] == "0 B"
    resident = row(offload.RESIDENT, 8)
    assert (resident["device memory"], resident["host memory"]) == ("20.5 kB", "0 B")


def test_the_speed_of_products_is_a_model_s_own() -> None:
    """Of the first weights of its dense MLPs and shared experts, not of routed experts."""
    model = torch.nn.ModuleDict(
        {
            "mlp": torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(4, 6)}),
            "experts": torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(5, 6)}),
        }
    )
    model = torch.nn.ModuleDict({"layer": model})
    assert offload.reached_flops(model, rows=3) > 0  # 5 inputs would not fit
    assert offload.weight_bytes(model) == 4 * (4 * 6 + 6 + 5 * 6 + 6)
