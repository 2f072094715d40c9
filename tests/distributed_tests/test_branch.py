"""A routed branch is its exchanges and what is computed between them: values, gradients, any number
in flight, and its meter."""

import gc
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from megatron_scmoe.overlap.branch import RoutedBranch
from megatron_scmoe.overlap.collectives import (
    AllGather,
    AllToAll,
    Collective,
    ReduceScatter,
    Transfer,
)
from megatron_scmoe.overlap.recorder import Activity, UnitRecorder
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


def all_to_all_of(rows: list[list[int]]) -> AllToAll:
    rank = dist.get_rank()
    return AllToAll(dist.group.WORLD, rows[rank], [row[rank] for row in rows])


def random_rows(num_rows: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(num_rows, *shape, dtype=torch.float64).to(dtype)


def blocking(collective: AllToAll, tensor: Tensor) -> Tensor:
    """What torch.distributed itself makes of the same splits."""
    output = tensor.new_empty(sum(collective.output_splits), *tensor.shape[1:])
    splits = collective.output_splits, collective.input_splits
    dist.all_to_all_single(output, tensor.contiguous(), *splits, group=collective.group)
    return output


def leaves(collective: AllToAll, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A matrix and a vector with a row for every row sent."""
    num_rows = sum(collective.input_splits)
    tokens, probs = random_rows(num_rows, dtype, WIDTH), random_rows(num_rows, dtype)
    return tokens.requires_grad_(), probs.requires_grad_()


def expert(tokens: Tensor, probs: Tensor) -> Tensor:
    """Nonlinear in both, [R, w], [R] -> [R, w]."""
    return tokens.sin() * probs[:, None]


Work = Callable[..., Tensor]


def round_trip(
    cargo: list[tuple[Tensor, ...]],
    collectives: list[Collective],
    work: Work = expert,
    overlap: bool = True,
    recorder: UnitRecorder | None = None,
) -> tuple[Tensor, ...]:
    """Every chunk there, through the work and back; the turn stands where the work runs."""
    branch = RoutedBranch(overlap, recorder)
    legs = branch.depart(cargo)
    for leg, collective in zip(legs, collectives, strict=True):
        leg.send(collective)
    for leg, collective in zip(legs, collectives, strict=True):
        leg.send_back(collective.mirrored(), work(*leg.receive()))
    branch.wait()
    return branch.arrive()


def expected_trip(
    collective: AllToAll, tensors: tuple[Tensor, ...], grad: Tensor, work: Work = expert
) -> tuple[Tensor, ...]:
    """The result and the gradients of what was sent, by blocking exchanges."""
    received = [blocking(collective, x.detach()).requires_grad_() for x in tensors]
    output = work(*received)
    output.backward(blocking(collective, grad))
    back = collective.mirrored()
    zeros = [torch.zeros_like(x) if x.grad is None else x.grad for x in received]
    return blocking(back, output.detach()), *(blocking(back, x) for x in zeros)


# The checks; every rank runs them in this order. ------------------------------------------------


def transfers_are_the_collectives() -> None:
    """And a transfer by the mirrored collective is the transposed one."""
    for rows in ROWS[dist.get_world_size()].values():
        collective = all_to_all_of(rows)
        for dtype in DTYPES:
            for tensor in leaves(collective, dtype):
                (there,) = Transfer(collective, [tensor.detach()]).complete()
                assert torch.equal(there, blocking(collective, tensor.detach()))
                (back,) = Transfer(collective.mirrored(), [there]).complete()
                assert torch.equal(back, tensor)

    world, rank = dist.get_world_size(), dist.get_rank()
    own = random_rows(3, torch.float64, WIDTH)
    (gathered,) = Transfer(AllGather(dist.group.WORLD), [own]).complete()
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own)
    assert torch.equal(gathered, torch.cat(parts))
    # Another summand on every rank.
    (summed,) = Transfer(ReduceScatter(dist.group.WORLD), [gathered * (rank + 1)]).complete()
    torch.testing.assert_close(summed, own * sum(range(1, world + 1)))


def equals_blocking() -> None:
    for rows in ROWS[dist.get_world_size()].values():
        collective = all_to_all_of(rows)
        for dtype in DTYPES:
            for overlap in (True, False):
                sent = leaves(collective, dtype)
                (result,) = round_trip([sent], [collective], overlap=overlap)
                grad = torch.randn_like(result)
                result.backward(grad)
                found = (result, *(tensor.grad for tensor in sent))
                for mine, expected in zip(
                    found, expected_trip(collective, sent, grad), strict=True
                ):
                    assert torch.equal(mine, expected)


def several_in_flight() -> None:
    """Two branches of two chunks; backward runs through them in either order."""
    names = ("uneven", "zero rows to some")
    collectives = [all_to_all_of(ROWS[dist.get_world_size()][name]) for name in names]
    for order in ([0, 1], [1, 0]):
        sent = [[leaves(collective) for collective in collectives] for _ in range(2)]
        results = [round_trip(cargo, collectives) for cargo in sent]
        grads = [tuple(map(torch.randn_like, result)) for result in results]
        for i in order:
            torch.autograd.backward(results[i], grads[i])
        for cargo, result, grad in zip(sent, results, grads, strict=True):
            for chunk, collective in enumerate(collectives):
                expected = expected_trip(collective, cargo[chunk], grad[chunk])
                found = (result[chunk], *(tensor.grad for tensor in cargo[chunk]))
                assert all(map(torch.equal, found, expected))


def the_gate_decides_when_the_work_runs_backward() -> None:
    """Between the backward passes of the operators in front of it and behind it."""
    order: list[str] = []

    def note(name: str, tensor: Tensor) -> Tensor:
        tensor.register_hook(lambda _: order.append(name))
        return tensor

    def noted_expert(tokens: Tensor, probs: Tensor) -> Tensor:
        return note("experts", expert(tokens, probs))

    collective = all_to_all_of(ROWS[dist.get_world_size()]["uneven"])
    for place in range(4):
        sent = leaves(collective)
        branch = RoutedBranch()
        (leg,) = branch.depart([sent])
        leg.send(collective)
        leg.send_back(collective.mirrored(), noted_expert(*leg.receive()))
        dense = torch.ones(3, dtype=torch.float64, requires_grad=True) * 1
        for operator in range(4):
            if operator == place:
                (dense,) = branch.turn((dense,))
            if operator < 3:
                dense = note(f"dense {operator}", dense * 2)
        branch.wait()
        (result,) = branch.arrive()
        order.clear()
        (result.sum() + dense.sum()).backward()
        expected = [f"dense {operator}" for operator in (2, 1, 0)]
        expected.insert(3 - place, "experts")
        assert order == expected


def only_the_work_is_trained() -> None:
    """What departs needs no gradient; the experts' weight gets one."""
    collective = all_to_all_of(ROWS[dist.get_world_size()]["uneven"])
    tokens, probs = leaves(collective)
    weight = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    cargo = (tokens.detach(), probs.detach())
    (result,) = round_trip([cargo], [collective], lambda x, p: expert(x, p) * weight)
    result.sum().backward()
    received = blocking(collective, tokens.detach()), blocking(collective, probs.detach())
    torch.testing.assert_close(weight.grad, expert(*received).sum(dim=0))


def gradients_that_do_not_come() -> None:
    """A received tensor that the work does not use; integers have no gradient at all."""
    collective = all_to_all_of(ROWS[dist.get_world_size()]["uneven"])
    tokens, probs = leaves(collective)
    numbers = torch.arange(tokens.shape[0])
    cargo = [(tokens, probs, numbers)]
    (result,) = round_trip(cargo, [collective], lambda x, p, n: x * n[:, None])
    result.sum().backward()
    received = blocking(collective, numbers)
    expected = blocking(collective.mirrored(), received[:, None].expand(-1, WIDTH).double())
    assert torch.equal(tokens.grad, expected)
    assert torch.equal(probs.grad, torch.zeros_like(probs))


def results_that_nobody_uses() -> None:
    """Neither blocks the backward pass of the rest, and no rank waits for another."""
    collective = all_to_all_of(ROWS[dist.get_world_size()]["uneven"])
    tokens, probs = leaves(collective)
    branch = RoutedBranch()
    (leg,) = branch.depart([(tokens, probs)])
    leg.send(collective)
    leg.send_back(collective.mirrored(), expert(*leg.receive()))
    (dense,) = branch.turn((tokens * 2,))
    branch.wait()
    branch.arrive()
    dense.sum().backward()
    assert torch.equal(tokens.grad, torch.full_like(tokens, 2))


def without_gradients() -> None:
    collective = all_to_all_of(ROWS[dist.get_world_size()]["uneven"])
    sent = leaves(collective)
    with torch.no_grad():
        (result,) = round_trip([sent], [collective])
    assert not result.requires_grad
    expected = expected_trip(collective, sent, torch.zeros_like(result))[0]
    assert torch.equal(result, expected)


def a_second_backward_pass_is_refused() -> None:
    collective = all_to_all_of(ROWS[dist.get_world_size()]["even"])
    (result,) = round_trip([leaves(collective)], [collective])
    result.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        result.sum().backward()


def one_rank_moves_nothing() -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    collective = AllToAll(groups[dist.get_rank()], [3], [3])
    sent = leaves(collective)
    (result,) = round_trip([sent], [collective])
    assert torch.equal(result, expert(*sent))
    (2 * result).sum().backward()
    assert torch.equal(sent[0].grad, 2 * sent[0].cos() * sent[1][:, None])


def every_exchange_is_on_record() -> None:
    recorder = UnitRecorder()
    rows = ROWS[dist.get_world_size()]["uneven"]
    collective = all_to_all_of(rows)
    cargo = [leaves(collective), leaves(collective)]
    results = round_trip(cargo, [collective, collective], recorder=recorder)
    sum(result.sum() for result in results).backward()
    record = recorder.take()
    assert [exchange.activity for exchange in record.exchanges] == [
        Activity("dispatch", "forward", 0),
        Activity("dispatch", "forward", 1),
        Activity("combine", "forward", 0),
        Activity("combine", "forward", 1),
        Activity("combine", "backward", 1),
        Activity("combine", "backward", 0),
        Activity("dispatch", "backward", 0),
        Activity("dispatch", "backward", 1),
    ]
    rank = dist.get_rank()
    out = sum(rows[rank]) - rows[rank][rank]
    back = sum(row[rank] for row in rows) - rows[rank][rank]
    for exchange in record.exchanges:
        # A float64 matrix, beside a vector on the way to the experts; or a result.
        forth = exchange.activity.name == "dispatch"
        moved = out if forth == (exchange.activity.direction == "forward") else back
        assert exchange.bytes == moved * 8 * (WIDTH + forth)
        assert exchange.begin < exchange.end
        assert 0 <= exchange.blocked <= exchange.end - exchange.begin
    assert record.steps == []  # not wanted
    assert recorder.take().exchanges == []


def bytes_that_leave_a_rank() -> None:
    size = dist.get_world_size()
    for rows in ROWS[size].values():
        collective = all_to_all_of(rows)
        tensor = torch.ones(sum(collective.input_splits), WIDTH, dtype=torch.bfloat16)
        moved = sum(collective.input_splits) - collective.input_splits[dist.get_rank()]
        assert collective.bytes_sent([tensor]) == moved * WIDTH * 2
    tensor = torch.ones(3 * size, WIDTH)
    assert AllGather(dist.group.WORLD).bytes_sent([tensor]) == (size - 1) * 3 * size * WIDTH * 4
    assert ReduceScatter(dist.group.WORLD).bytes_sent([tensor]) == (size - 1) * 3 * WIDTH * 4


CHECKS: tuple[Callable[[], None], ...] = (
    transfers_are_the_collectives,
    equals_blocking,
    several_in_flight,
    the_gate_decides_when_the_work_runs_backward,
    only_the_work_is_trained,
    gradients_that_do_not_come,
    results_that_nobody_uses,
    without_gradients,
    a_second_backward_pass_is_refused,
    one_rank_moves_nothing,
    every_exchange_is_on_record,
    bytes_that_leave_a_rank,
)


def run_checks() -> None:
    torch.manual_seed(dist.get_rank())
    for check in CHECKS:
        check()


@pytest.mark.parametrize("world_size", [2, 4])
def test_branch(world_size: int) -> None:
    run_distributed(run_checks, world_size)


def read_late_peer() -> dict[bool, tuple[float, float, float]]:
    """{whether rank 0 works meanwhile: (in flight, blocked, until the wait)}; rank 1 is late.

    Barriers on another group fix the order: rank 0 starts, rank 1 sleeps and starts. Without work
    rank 0 waits at once; its work lasts until long after rank 1 is through.
    """
    group = dist.new_group([0, 1])
    readings = {}
    for works in (False, True):
        recorder = UnitRecorder()
        log = recorder, Activity("dispatch", "forward")
        collective = AllToAll(group, [1, 1], [1, 1])
        tokens = torch.ones(2, WIDTH)
        started = time.perf_counter()
        if dist.get_rank() == 0:
            transfer = Transfer(collective, [tokens], log)
            dist.barrier()
            if works:
                dist.barrier()
                time.sleep(2 * DELAY_S)
            waited = time.perf_counter()
            transfer.complete()
            if not works:
                dist.barrier()
        else:
            dist.barrier()
            time.sleep(DELAY_S)
            waited = time.perf_counter()
            Transfer(collective, [tokens], log).complete()
            dist.barrier()
        (exchange,) = recorder.take().exchanges
        readings[works] = (exchange.end - exchange.begin, exchange.blocked, waited - started)
    return readings


def test_recorder_tells_waiting_from_hiding() -> None:
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


def branch_outlives_its_graph() -> bool:
    """Without the cycle collector, which cannot see through the graph's and gloo's C++ objects."""
    gc.disable()
    collective = all_to_all_of([[2, 2], [2, 2]])
    x = torch.ones(4, WIDTH, requires_grad=True)
    branch = RoutedBranch()
    (leg,) = branch.depart([(x * 2, x.sum(dim=1))])
    leg.send(collective)
    leg.send_back(collective.mirrored(), expert(*leg.receive()))
    branch.wait()
    (result,) = branch.arrive()
    (result * result).sum().backward()
    watched = weakref.ref(branch)
    del x, branch, result
    return watched() is not None


def test_nothing_outlives_its_graph() -> None:
    """A branch kept alive by what it carries would leak the graph of every exchange."""
    assert run_distributed(branch_outlives_its_graph, 2) == [False, False]
