"""start and wait are one all-to-all: values, gradients, any number in flight, and its meter."""

import gc
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from megatron_scmoe.overlap.all_to_all import AllToAllPlan, start
from megatron_scmoe.overlap.meter import ExchangeMeter
from tests.distributed_utils import run_distributed

# Rows sent from each rank (row of the table) to each rank (column).
ROWS = {
    2: {
        "even": [[3, 3], [3, 3]],
        "uneven": [[1, 4], [2, 5]],
        "zero rows to some": [[0, 3], [2, 0]],
        "a rank sends nothing": [[0, 0], [2, 3]],
        "a rank receives nothing": [[0, 3], [0, 2]],
        "nothing at all": [[0, 0], [0, 0]],
    },
    4: {
        "even": [[2] * 4] * 4,
        "uneven": [[1, 4, 2, 3], [5, 2, 1, 1], [2, 2, 6, 1], [3, 1, 4, 2]],
        "zero rows to some": [[0, 4, 0, 3], [5, 0, 1, 0], [0, 2, 0, 1], [3, 0, 0, 2]],
        "a rank sends nothing": [[1, 0, 2, 3], [0, 0, 0, 0], [2, 1, 0, 1], [3, 1, 4, 2]],
        "a rank receives nothing": [[1, 0, 2, 3], [5, 0, 1, 1], [2, 0, 6, 1], [0, 0, 4, 2]],
        "nothing at all": [[0] * 4] * 4,
    },
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
WIDTH = 5
DELAY_S = 0.2


def plan_of(rows: list[list[int]], meter: ExchangeMeter | None = None) -> AllToAllPlan:
    rank = dist.get_rank()
    return AllToAllPlan(dist.group.WORLD, rows[rank], [row[rank] for row in rows], meter)


def random_rows(num_rows: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(num_rows, *shape, dtype=torch.float64).to(dtype)


def blocking(plan: AllToAllPlan, tensor: Tensor) -> Tensor:
    """What torch.distributed itself makes of the same splits."""
    output = tensor.new_empty(sum(plan.output_splits), *tensor.shape[1:])
    splits = plan.output_splits, plan.input_splits
    dist.all_to_all_single(output, tensor.contiguous(), *splits, group=plan.group)
    return output


def transposed(plan: AllToAllPlan) -> AllToAllPlan:
    return AllToAllPlan(plan.group, plan.output_splits, plan.input_splits)


def leaves(plan: AllToAllPlan, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A matrix and a vector with a row for every row sent."""
    num_rows = sum(plan.input_splits)
    tokens, probs = random_rows(num_rows, dtype, WIDTH), random_rows(num_rows, dtype)
    return tokens.requires_grad_(), probs.requires_grad_()


def check_received(plan: AllToAllPlan, sent: tuple[Tensor, ...], received: tuple[Tensor, ...]):
    """Received tensors and, after a backward pass with random gradients, the senders' gradients."""
    grads = tuple(torch.randn_like(tensor) for tensor in received)
    torch.autograd.backward(received, grads)
    for tensor, output, grad in zip(sent, received, grads, strict=True):
        assert torch.equal(output, blocking(plan, tensor.detach()))
        assert torch.equal(tensor.grad, blocking(transposed(plan), grad))


# The checks; every rank runs them in this order. ------------------------------------------------


def equals_blocking() -> None:
    for rows in ROWS[dist.get_world_size()].values():
        plan = plan_of(rows)
        for dtype in DTYPES:
            sent = leaves(plan, dtype)
            check_received(plan, sent, start(plan, *sent).wait())


def two_in_flight() -> None:
    """Waited in either order; backward runs through them in the opposite one."""
    plans = [plan_of(ROWS[dist.get_world_size()][name]) for name in ("uneven", "zero rows to some")]
    for order in ([0, 1], [1, 0]):
        sent = [leaves(plan) for plan in plans]
        handles = [start(plan, *tensors) for plan, tensors in zip(plans, sent, strict=True)]
        received = {index: handles[index].wait() for index in order}
        grads = {i: tuple(map(torch.randn_like, received[i])) for i in order}
        torch.autograd.backward([*received[0], *received[1]], [*grads[0], *grads[1]])
        for i, plan in enumerate(plans):
            for tensor, output, grad in zip(sent[i], received[i], grads[i], strict=True):
                assert torch.equal(output, blocking(plan, tensor.detach()))
                assert torch.equal(tensor.grad, blocking(transposed(plan), grad))


def gradients_that_are_not_wanted() -> None:
    plan = plan_of(ROWS[dist.get_world_size()]["uneven"])
    tokens, probs = leaves(plan)
    received = start(plan, tokens.detach(), probs).wait()
    check_received(plan, (probs,), received[1:])

    received = start(plan, tokens.detach(), probs.detach()).wait()
    assert not any(tensor.requires_grad for tensor in received)
    with torch.no_grad():
        received = start(plan, tokens, probs).wait()
    assert not any(tensor.requires_grad for tensor in received)
    assert torch.equal(received[0], blocking(plan, tokens.detach()))


def gradients_that_do_not_come() -> None:
    """One of two outputs unused: its gradient is zero. A broadcast gradient is no plain buffer."""
    plan = plan_of(ROWS[dist.get_world_size()]["uneven"])
    tokens, probs = leaves(plan)
    start(plan, tokens, probs).wait()[0].sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))
    assert torch.equal(probs.grad, torch.zeros_like(probs))


def wait_outside_the_loss() -> None:
    """Neither an output that nobody uses nor a handle that nobody waits for blocks backward."""
    plan = plan_of(ROWS[dist.get_world_size()]["uneven"])
    tokens, probs = leaves(plan)
    unused = start(plan, tokens).wait()
    handle = start(plan, probs)
    (tokens.sum() + probs.sum()).backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))
    assert torch.equal(unused[0], blocking(plan, tokens.detach()))
    assert torch.equal(handle.wait()[0], blocking(plan, probs.detach()))


def one_rank_moves_nothing() -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    plan = AllToAllPlan(groups[dist.get_rank()], [3], [3])
    tokens = random_rows(3, torch.float64, WIDTH).requires_grad_()
    (received,) = start(plan, tokens).wait()
    (2 * received).sum().backward()
    assert received is tokens
    assert torch.equal(tokens.grad, torch.full_like(tokens, 2))


class CountingMeter(ExchangeMeter):
    count = 0

    def add(self, flight) -> None:
        self.count += 1
        super().add(flight)


def meter_counts_both_directions() -> None:
    meter = CountingMeter()
    plan = plan_of(ROWS[dist.get_world_size()]["uneven"], meter)
    sent = leaves(plan)
    received = start(plan, *sent).wait()
    assert meter.count == 1
    readings = [meter.read()]
    torch.autograd.backward(received, tuple(map(torch.randn_like, received)))
    assert meter.count == 2
    readings.append(meter.read())
    for in_flight, blocked in readings:
        assert 0 <= blocked <= in_flight
        assert in_flight > 0
    assert meter.read() == (0, 0)


CHECKS: tuple[Callable[[], None], ...] = (
    equals_blocking,
    two_in_flight,
    gradients_that_are_not_wanted,
    gradients_that_do_not_come,
    wait_outside_the_loss,
    one_rank_moves_nothing,
    meter_counts_both_directions,
)


def run_checks() -> None:
    torch.manual_seed(dist.get_rank())
    for check in CHECKS:
        check()


@pytest.mark.parametrize("world_size", [2, 4])
def test_start_and_wait_are_one_exchange(world_size: int) -> None:
    run_distributed(run_checks, world_size)


def read_late_peer() -> dict[bool, tuple[float, float, float]]:
    """{whether rank 0 works meanwhile: (in flight, blocked, until the wait)}; rank 1 is late.

    Barriers on another group fix the order: rank 0 starts, rank 1 sleeps and starts. Without work
    rank 0 waits at once; its work lasts until long after rank 1 is through.
    """
    group = dist.new_group([0, 1])
    readings = {}
    for works in (False, True):
        meter = ExchangeMeter()
        plan = AllToAllPlan(group, [1, 1], [1, 1], meter)
        tokens = torch.ones(2, WIDTH)
        started = time.perf_counter()
        if dist.get_rank() == 0:
            handle = start(plan, tokens)
            dist.barrier()
            if works:
                dist.barrier()
                time.sleep(2 * DELAY_S)
            waited = time.perf_counter()
            handle.wait()
            if not works:
                dist.barrier()
        else:
            dist.barrier()
            time.sleep(DELAY_S)
            waited = time.perf_counter()
            start(plan, tokens).wait()
            dist.barrier()
        readings[works] = (*meter.read(), waited - started)
    return readings


def test_meter_tells_waiting_from_hiding() -> None:
    readings = run_distributed(read_late_peer, 2)[0]
    (idle_flight, idle_blocked, _), (busy_flight, busy_blocked, worked) = (
        readings[False],
        readings[True],
    )
    assert min(idle_flight, busy_flight) > DELAY_S
    assert idle_flight / 2 < idle_blocked <= idle_flight
    assert 0 <= busy_blocked < busy_flight / 2
    # The flight ended with the exchange, not with the work that ran on.
    assert busy_flight < worked - DELAY_S


def handle_outlives_its_graph() -> bool:
    """Without the cycle collector, which cannot see through the graph's and gloo's C++ objects."""
    gc.disable()
    x = torch.ones(4, WIDTH, requires_grad=True)
    handle = start(plan_of([[2, 2], [2, 2]]), x * 2)
    (received,) = handle.wait()
    (received * received).sum().backward()
    watched = weakref.ref(handle)
    del x, handle, received
    return watched() is not None


def test_nothing_outlives_its_graph() -> None:
    """A handle kept alive by what it carries would leak the graph of every exchange."""
    assert run_distributed(handle_outlives_its_graph, 2) == [False, False]
