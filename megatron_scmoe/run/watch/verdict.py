"""Who is at fault, from what the ranks report of themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_scmoe.run.watch.account import CollectiveCall, Report


@dataclass(frozen=True)
class Alarm:
    """Why the job stops: what the first rank that noticed has seen."""

    rank: int
    cause: str
    """"gone": a connection was closed; "late": a collective took too long; "terminated": SIGTERM;
    "error": the rank itself failed, with `message`; "refused": the same, but a user's error."""
    message: str = ""
    code: int = 1
    """The exit code of all ranks."""


def culprits(reports: Mapping[int, Report], world_size: int) -> list[int]:
    """The ranks for which, in the end, all others wait.

    They are those that do not answer or, if all do, those that others wait for and that wait for
    nobody: a rank in a collective waits for the ranks of its group that have not entered it. Empty
    if the ranks wait for each other in a circle.
    """
    silent = [rank for rank in range(world_size) if rank not in reports]
    if silent:
        return silent
    blockers = {rank: _blockers(rank, reports) for rank in reports}
    awaited = set().union(*blockers.values())
    return sorted(rank for rank in awaited if not blockers[rank])


def verdict(
    alarm: Alarm, reports: Mapping[int, Report], hosts: Mapping[int, str], timeout: float | None
) -> str:
    """The line for the user.

    Args:
        reports: of the ranks that answered, the speaking one first.
        hosts: host and process of every rank.
        timeout: the time-out of collectives in seconds, if there are any.
    """
    advice = f" The time-out is {timeout:g} s." if alarm.cause == "late" and timeout else ""
    lost = culprits(reports, len(hosts))
    if not lost:
        waits = [f"rank {rank} in {_wait(report, ())}" for rank, report in reports.items()]
        return f"the ranks wait for each other: {'; '.join(waits[:4])}. The job stops.{advice}"
    rank = lost[0]
    if rank in reports:
        state = f"stands still at {reports[rank].where}"
    elif alarm.cause == "late":
        state = "does not answer: it is stopped, or its host is gone"
    else:
        state = "is gone"
    what = f"rank {rank} ({hosts[rank]}) {state}"
    if len(lost) > 1:
        what += f", ranks {_numbers(lost[1:])} too"
    witness = _witness(lost, reports)
    if witness is not None:
        what += f"; {waiting(witness, reports[witness], lost)}"
    return f"{what}. The job stops.{advice}"


def waiting(rank: int, report: Report, lost: Sequence[int]) -> str:
    """What a rank waited in, if possible for one of the lost ranks."""
    return f"rank {rank} waited {moment(report)} in {_wait(report, lost)}"


def moment(report: Report) -> str:
    """When, as a user counts."""
    if report.iteration is None:
        return "before the first iteration"
    return f"in iteration {report.iteration}"


def _blockers(rank: int, reports: Mapping[int, Report]) -> set[int]:
    """The ranks for which a rank waits."""
    found: set[int] = set()
    for pending in reports[rank].collectives:
        if not pending.done:
            found |= {
                peer
                for peer in pending.ranks
                if peer != rank and not _entered(reports[peer], pending)
            }
    return found


def _entered(report: Report, pending: CollectiveCall) -> bool:
    """Whether a rank has entered the collective too. Messages have no number: never."""
    return any(
        other.key == pending.key and other.number >= pending.number > 0
        for other in report.collectives
    )


def _witness(lost: Sequence[int], reports: Mapping[int, Report]) -> int | None:
    """A rank that waited for the lost one itself, or else the first."""
    direct = [
        rank
        for rank, report in reports.items()
        if rank not in lost and any(_concerns(c, lost) and not c.done for c in report.collectives)
    ]
    others = [rank for rank in reports if rank not in lost]
    return next(iter(direct + others), None)


def _concerns(collective: CollectiveCall, lost: Sequence[int]) -> bool:
    return not set(lost).isdisjoint(collective.ranks)


def _wait(report: Report, lost: Sequence[int]) -> str:
    """The collective in which a rank waits: one that a lost rank belongs to, if possible, the
    oldest that is pending or else the newest."""
    if not report.collectives:
        return report.where
    best = min(
        report.collectives,
        key=lambda c: (not _concerns(c, lost), c.done, c.seconds if c.done else -c.seconds),
    )
    return f"{best}, {best.seconds:.1f} s"


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
