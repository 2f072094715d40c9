"""Who is at fault, from hand-made reports; which errors are another rank's doing."""

import pytest
import torch

from megatron_scmoe.run.watch import lost_peer
from megatron_scmoe.run.watch.account import CollectiveCall, Report
from megatron_scmoe.run.watch.peers import is_late
from megatron_scmoe.run.watch.verdict import Alarm, culprits, verdict

EP, DP, PP = "EXPERT_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP", "PIPELINE_MODEL_PARALLEL_GROUP"


def waits(group: str, ranks: list[int], number: int, seconds: float = 5.0) -> CollectiveCall:
    return CollectiveCall("all_to_all", group, f"{group}{ranks}", ranks, number, seconds, False)


def entered(group: str, ranks: list[int], number: int) -> CollectiveCall:
    return CollectiveCall("all_to_all", group, f"{group}{ranks}", ranks, number, 60.0, True)


def report(*collectives: CollectiveCall) -> Report:
    return Report("somewhere.py:7 (work)", 12, collectives)


def test_who_has_not_entered_is_at_fault() -> None:
    reports = {0: report(waits(EP, [0, 1], 8)), 1: report(entered(EP, [0, 1], 7))}
    assert culprits(reports, 2) == [1]


def test_all_to_all_that_all_have_entered_blames_nobody() -> None:
    """It is in flight behind dense work."""
    reports = {0: report(waits(EP, [0, 1], 8)), 1: report(waits(EP, [0, 1], 8))}
    assert culprits(reports, 2) == []
    reports[1] = report(entered(EP, [0, 1], 8))  # nor if one is through already
    assert culprits(reports, 2) == []


def test_end_of_a_chain_is_at_fault() -> None:
    """0 and 1 wait for 2 and 3 in one group, 2 for 3 in another, and 3 for nobody."""
    reports = {
        0: report(waits(DP, [0, 2], 3)),
        1: report(waits(DP, [1, 3], 3)),
        2: report(entered(DP, [0, 2], 2), waits(EP, [2, 3], 8)),
        3: report(entered(DP, [1, 3], 2), entered(EP, [2, 3], 7)),
    }
    assert culprits(reports, 4) == [3]


def test_pipeline_neighbours() -> None:
    """A message has no number, and from one side only its neighbours are known."""
    reports = {
        rank: report(waits(PP, sorted({(rank - 1) % 4, rank, (rank + 1) % 4}), 0))
        for rank in (0, 1, 3)
    } | {2: report()}
    assert culprits(reports, 4) == [2]


def test_who_does_not_answer_is_at_fault() -> None:
    reports = {0: report(waits(EP, [0, 1], 8)), 1: report(entered(EP, [0, 1], 7))}
    assert culprits(reports, 3) == [2]


HOSTS = {0: "a, pid 1", 1: "a, pid 2"}


@pytest.mark.parametrize(
    ("cause", "state"),
    [
        ("gone", "is gone"),
        ("terminated", "is gone"),
        ("late", "does not answer: it is stopped, or its host is gone"),
    ],
)
def test_line(cause: str, state: str) -> None:
    """It names the collective that the lost rank belongs to, though another one is older."""
    reports = {0: report(waits(DP, [0, 2], 3, 9.0), waits(EP, [0, 1], 8))}
    line = verdict(Alarm(0, cause), reports, HOSTS, 30.0)
    assert line == (
        f"rank 1 (a, pid 2) {state}; rank 0 waited in iteration 12 in all_to_all of "
        "EXPERT_MODEL_PARALLEL_GROUP (ranks 0, 1), 5.0 s. The job stops."
        + (" The time-out is 30 s." if cause == "late" else "")
    )


def test_line_of_a_rank_that_stands_still() -> None:
    reports = {0: report(waits(EP, [0, 1], 8)), 1: report()}
    line = verdict(Alarm(0, "late"), reports, HOSTS, 30.0)
    assert line.startswith("rank 1 (a, pid 2) stands still at somewhere.py:7 (work); rank 0 waited")


def test_line_of_a_circle() -> None:
    """Rank 0 is in one collective, rank 1 in another: a mismatch in the program."""
    reports = {0: report(waits(EP, [0, 1], 8)), 1: report(waits(DP, [0, 1], 3))}
    line = verdict(Alarm(0, "late"), reports, HOSTS, 30.0)
    assert line.startswith("the ranks wait for each other: rank 0 in all_to_all of EXPERT")
    assert "; rank 1 in all_to_all of DATA_PARALLEL_GROUP (ranks 0, 1), 5.0 s." in line


def test_report_travels() -> None:
    sent = report(waits(EP, [0, 1], 8))
    received = Report.from_json(sent.to_json())
    assert (received.where, received.iteration) == (sent.where, sent.iteration)
    assert list(received.collectives) == list(sent.collectives)


def test_lost_peer() -> None:
    closed = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:14764")
    late = RuntimeError("Timed out waiting 6000ms for send operation to complete")
    wrapped = Exception("failed to build")
    wrapped.__cause__ = closed
    assert lost_peer(wrapped) is closed and not is_late(closed)
    assert lost_peer(late) is late and is_late(late)
    assert lost_peer(torch.distributed.DistStoreError("wait timeout after 6000ms"))
    assert lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_peer(ValueError("Timed out waiting")) is None
