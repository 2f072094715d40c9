"""How fast the expert parallel groups exchange, and which rank is slow.

Two questions, two measurements. How long a group's all-to-all takes every rank of the group says
alike: it ends when the slowest has sent. So the slow rank is looked for with exchanges between two
ranks at a time, in rounds in which everybody has another partner: the slow rank is slow with
everybody, the others with that one only.
"""

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch

from megatron_scmoe.run.doctor.findings import Finding, name_ranks

BYTES_PER_PEER = 1 << 20  # of the measurement of the bandwidth
REPETITIONS = 10
WARM_UPS = 2
SLOW = 2.0  # times the median, from which a slow rank is worth a warning

Group = torch.distributed.ProcessGroup
PairTimes = dict[tuple[int, int], float]


class MeasuredAllToAll(NamedTuple):
    """One group's all-to-all, median of the repetitions."""

    ranks: tuple[int, ...]
    latency: float  # seconds, one element for every rank
    seconds: float  # with BYTES_PER_PEER for every rank

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a rank sends to the others."""
        return BYTES_PER_PEER * (len(self.ranks) - 1) / self.seconds


class Slowest(NamedTuple):
    """The rank whose exchanges take longest."""

    rank: int
    ratio: float  # to the median of the ranks


def measure(
    group: Group, gather: Callable[[object], list], timeout: timedelta
) -> tuple[list[MeasuredAllToAll], list[PairTimes]]:
    """Call it on every rank of the job with its own group.

    Args:
        gather: collects what every rank passes, by rank.
        timeout: of a collective in the groups that are made here.

    Returns:
        Every group's all-to-all, and for every block of groups the exchanges of its pairs.
    """
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    groups = sorted(set(gather(ranks)))
    every_block = blocks(groups)
    of_block = group
    for members in every_block:
        if members not in groups:
            made = torch.distributed.new_group(list(members), timeout)
            of_block = made if torch.distributed.get_rank() in members else of_block
    all_to_alls: dict[tuple[int, ...], MeasuredAllToAll] = {}
    pairs = {members: PairTimes() for members in every_block}
    for exchange, of_rank in gather((measure_all_to_all(group), measure_pairs(of_block))):
        slower = all_to_alls.get(exchange.ranks, exchange)
        all_to_alls[exchange.ranks] = MeasuredAllToAll(
            exchange.ranks,
            max(exchange.latency, slower.latency),
            max(exchange.seconds, slower.seconds),
        )
        for pair, seconds in of_rank.items():
            times = next(pairs[members] for members in every_block if pair[0] in members)
            times[pair] = max(seconds, times.get(pair, 0.0))  # the end that waited knows
    return [all_to_alls[ranks] for ranks in groups], list(pairs.values())


def judge(
    all_to_alls: list[MeasuredAllToAll], pairs: list[PairTimes], hosts: dict[int, str]
) -> list[Finding]:
    """A finding for every group and one of the nodes, a warning where a rank or a node is slow."""
    findings = []
    for number, exchange in enumerate(all_to_alls):
        times = next(times for times in pairs if any(exchange.ranks[0] in pair for pair in times))
        seen = (
            f"expert parallel group {number}, {name_ranks(exchange.ranks)}: latency "
            f"{exchange.latency * 1e3:.3g} ms, {exchange.bandwidth / 1e9:.3g} GB/s a rank; "
        )
        slow = slowest(times, exchange.ranks)
        if slow is None:
            seen += "of two ranks nobody can say which one is slower"
            findings.append(Finding("ok", seen))
            continue
        seen += f"slowest rank {slow.rank} on {hosts[slow.rank]}, {slow.ratio:.2f} x the median"
        if slow.ratio < SLOW:
            findings.append(Finding("ok", seen))
        else:
            findings.append(Finding("warning", seen, "look at its link, GPU and other processes"))
    return [*findings, *judge_nodes(pairs, hosts)]


def judge_nodes(pairs: list[PairTimes], hosts: dict[int, str]) -> list[Finding]:
    """What every node reaches to the others, beside what its ranks reach among themselves.

    Nothing on one node. A warning names a node that is slow to all others, which takes three.
    """
    between: dict[str, list[float]] = {}
    inside: dict[str, list[float]] = {}
    for block in pairs:
        for (one, other), seconds in block.items():
            ends = {hosts[one], hosts[other]}
            for host in ends:
                (between if len(ends) == 2 else inside).setdefault(host, []).append(seconds)
    if not between:
        return []
    own = {host: statistics.median_low(times) for host, times in between.items()}
    said = ", ".join(
        f"{host} {_gigabytes(own[host])}"
        + (f" ({_gigabytes(statistics.median_low(inside[host]))} inside)" if host in inside else "")
        for host in sorted(own)
    )
    seen = f"bandwidth of a rank to other nodes, GB/s: {said}"
    worst = max(own, key=lambda host: own[host])
    ratio = own[worst] / statistics.median(own.values())
    if len(own) < 3 or ratio < SLOW:
        return [Finding("ok", seen)]
    remedy = f"look at the adapter and the cable of {worst}, {ratio:.2f} x slower than the median"
    return [Finding("warning", seen, remedy)]


def _gigabytes(seconds: float) -> str:
    return f"{BYTES_PER_PEER / seconds / 1e9:.3g}"


def blocks(groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Groups joined until each has three ranks: of two ranks nobody can say which one is slow."""
    joined: list[tuple[int, ...]] = []
    for group in groups:
        if joined and len(joined[-1]) < 3:
            joined[-1] += group
        else:
            joined.append(group)
    if len(joined) > 1 and len(joined[-1]) < 3:
        joined[-2:] = [joined[-2] + joined[-1]]
    return joined


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of 0..count-1 in rounds: everybody meets everybody once, and once a round at most.

    The circle method of tournaments: one place stays, the others move on by one. With an odd
    count somebody rests in every round.
    """
    places = list(range(count + count % 2))
    schedule = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        schedule.append([pair for pair in pairs if max(pair) < count])
        places = [places[0], places[-1], *places[1:-1]]
    return schedule


def slowest(pairs: PairTimes, ranks: tuple[int, ...]) -> Slowest | None:
    """The rank among `ranks` that is slow with everybody; None where it cannot be told.

    A rank's own time is the median of its pairs, the lower one of two, so that a single slow
    partner does not count.

    Args:
        pairs: seconds of an exchange, for every two ranks of a block.
    """
    of_rank: dict[int, list[float]] = {}
    for pair, seconds in pairs.items():
        for rank in pair:
            of_rank.setdefault(rank, []).append(seconds)
    if len(of_rank) < 3:
        return None
    own = {rank: statistics.median_low(times) for rank, times in of_rank.items()}
    worst = max(ranks, key=lambda rank: own[rank])
    return Slowest(worst, own[worst] / statistics.median(own.values()))


def measure_all_to_all(group: Group) -> MeasuredAllToAll:
    """Call it on every rank of the group; each gets its own times."""
    ranks = torch.distributed.get_process_group_ranks(group)
    times = []
    for elements in (1, BYTES_PER_PEER // 4):
        sent, received = (_buffer(elements * len(ranks)) for _ in range(2))

        def exchange(received: torch.Tensor = received, sent: torch.Tensor = sent) -> None:
            torch.distributed.all_to_all_single(received, sent, group=group)

        times.append(_median(exchange, group))
    return MeasuredAllToAll(tuple(ranks), *times)


def measure_pairs(block: Group) -> PairTimes:
    """Call it on every rank of a block.

    Returns:
        Seconds of this rank's exchanges, by pairs of global ranks, the smaller one first.
    """
    ranks = torch.distributed.get_process_group_ranks(block)
    me = torch.distributed.get_rank()
    sent, received = (_buffer(BYTES_PER_PEER // 4) for _ in range(2))
    times: PairTimes = {}
    for pairs in rounds(len(ranks)):
        mine = next((pair for pair in pairs if me in (ranks[pair[0]], ranks[pair[1]])), None)
        if mine is None:
            _median(lambda: None, block)
            continue
        one, other = ranks[mine[0]], ranks[mine[1]]
        peer = other if me == one else one
        seconds = _median(partial(exchange_with, peer, sent, received, block), block)
        times[min(one, other), max(one, other)] = seconds
    return times


def exchange_with(peer: int, sent: torch.Tensor, received: torch.Tensor, group: Group) -> None:
    """Send to a global rank and receive from it, [N] each."""
    operations = [
        torch.distributed.P2POp(torch.distributed.isend, sent, peer, group),
        torch.distributed.P2POp(torch.distributed.irecv, received, peer, group),
    ]
    for work in torch.distributed.batch_isend_irecv(operations):
        work.wait()


def _buffer(elements: int) -> torch.Tensor:
    return torch.zeros(elements, dtype=torch.float32, device=torch.cuda.current_device())


def _median(exchange: Callable[[], None], group: Group) -> float:
    """Seconds of one call, after a barrier each time, so that being late counts as slow."""
    times = []
    for _ in range(WARM_UPS + REPETITIONS):
        torch.distributed.barrier(group)
        torch.cuda.synchronize()
        start = time.perf_counter()
        exchange()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UPS:])
