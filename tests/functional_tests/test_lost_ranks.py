"""A rank that dies or stalls: the others stop in time, and one line names it and a collective.

The ranks are forked and have no launcher, so that nobody but they themselves ends them. Killed,
stopped and stalled; in training, at start and while saving; in an expert group and in a pipeline;
also the one that holds the store. An error keeps its traceback.
"""

import importlib
import multiprocessing
import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.functional_tests.forked import start_ranks
from tests.functional_tests.launch import TINY_MODEL, TINY_MOE

TIMEOUT_S = 5
MARGIN_S = 20  # less than what is left of the minute that the host would wait
START_S = 150

OPTIONS = shlex.split(
    "--mock-data --scmoe-shortcut-position pos2 --expert-model-parallel-size 2 "
    "--train-iters 1000 --eval-interval 1000 --distributed-timeout-minutes 1 "
    f"--distributed-timeout-seconds-after-init {TIMEOUT_S}"
)
ONE_UNIT = ["--moe-layer-freq", "[0,1]"]
TWO_STAGES = shlex.split(
    "--num-layers 4 --moe-layer-freq [0,1,0,1] --pipeline-model-parallel-size 2"
)
GET_BATCH = "pretrain_gpt_scmoe.get_batch"


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def stall() -> None:
    time.sleep(600)


def fail() -> None:
    raise ValueError("a bug of this rank")


@dataclass(frozen=True)
class Fault:
    """What happens to a rank when it calls a function for the `call`-th time."""

    rank: int
    action: Callable[[], None]
    function: str = GET_BATCH
    call: int = 9  # in the second iteration or later, with the time-out that holds from then on

    @property
    def alive(self) -> bool:
        """Whether the rank still answers."""
        return self.action in (stall, fail, TERMINATED)

    def install(self, happened: Path) -> None:
        if os.environ["RANK"] != str(self.rank):
            return
        module, name = self.function.rsplit(".", 1)
        owner = importlib.import_module(module)
        original, calls = getattr(owner, name), iter(range(1, 1000))

        def replacement(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                happened.touch()
                self.action()
            return original(*args, **kwargs)

        setattr(owner, name, replacement)


KILLED = partial(send, signal.SIGKILL)
STOPPED = partial(send, signal.SIGSTOP)
TERMINATED = partial(send, signal.SIGTERM)
Ranks = list[multiprocessing.context.ForkServerProcess]


def run(
    fault: Fault,
    nproc: int,
    options: list[str],
    folder: Path,
    launcher: Callable[[Ranks], None] = lambda ranks: None,
) -> tuple[str, list[int | None]]:
    """What the ranks print, and their exit codes; those alive must end in time, and not with 0.

    Args:
        launcher: called when the fault has happened.
    """
    outputs = [folder / f"rank{rank}.txt" for rank in range(nproc)]
    happened = folder / "happened"
    ranks = start_ranks(
        [*TINY_MODEL, *TINY_MOE, *OPTIONS, *options],
        outputs,
        hook=partial(fault.install, happened),
    )
    alive = [rank for number, rank in enumerate(ranks) if number != fault.rank or fault.alive]
    try:
        wait(happened.exists, START_S)
        launcher(ranks)
        wait(lambda: all(rank.exitcode is not None for rank in alive), TIMEOUT_S + MARGIN_S)
        codes = [rank.exitcode for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
        text = "".join(output.read_text(errors="replace") for output in outputs)
        print(text)
    assert all(code != 0 for code in codes), codes
    return text, codes


def wait(condition: Callable[[], bool], limit: float) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {limit} s"
        time.sleep(0.05)


def error_line(text: str) -> str:
    lines = [line for line in text.splitlines() if ": error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


def assert_line(text: str, lost: str, iteration: str = r"in iteration \d") -> None:
    """One line of one rank that says who is lost and who waited when and in what, and no more."""
    waited = rf"rank \d waited {iteration} in [\w/]+ of [\w ]+ \(ranks [\d, ]+\), [\d.]+ s"
    assert re.search(rf"error: {lost}; {waited}\. The job stops\.", error_line(text))
    assert "Traceback" not in text


def test_killed(tmp_path: Path) -> None:
    text, _ = run(Fault(2, KILLED), 4, ONE_UNIT, tmp_path)
    assert_line(text, r"rank 2 \(.*, pid \d+\) is gone")


def test_killed_under_a_launcher(tmp_path: Path) -> None:
    """It sends SIGTERM to the others at once, as torchrun does."""

    def terminate(ranks: Ranks) -> None:
        wait(lambda: ranks[1].exitcode is not None, TIMEOUT_S)
        ranks[0].terminate()

    text, _ = run(Fault(1, KILLED), 2, ONE_UNIT, tmp_path, terminate)
    assert_line(text, r"rank 1 \(.*, pid \d+\) is gone")


def test_terminated(tmp_path: Path) -> None:
    """By itself, as a job that is cancelled."""
    text, codes = run(Fault(1, TERMINATED), 2, ONE_UNIT, tmp_path)
    assert re.search(r"error: rank 1 \(.*\) received SIGTERM in iteration \d\.", error_line(text))
    assert codes == [128 + signal.SIGTERM] * 2


def test_stopped(tmp_path: Path) -> None:
    """Ranks 0 and 1 wait in point-to-point messages, which the host's time-out does not reach."""
    text, _ = run(Fault(2, STOPPED), 4, TWO_STAGES, tmp_path)
    assert_line(text, r"rank 2 \(.*, pid \d+\) does not answer: it is stopped, or its host is gone")


def test_stalled(tmp_path: Path) -> None:
    """It is alive and says where it stands."""
    text, codes = run(Fault(1, stall), 2, ONE_UNIT, tmp_path)
    assert_line(text, r"rank 1 \(.*\) stands still at test_lost_ranks.py:\d+ \(stall\)")
    assert codes == [1, 1]


def test_stalled_in_a_pipeline(tmp_path: Path) -> None:
    """Nobody is in a collective with it: all wait for messages, one for the other's."""
    options = [*TWO_STAGES, "--expert-model-parallel-size", "1"]
    text, _ = run(Fault(1, stall), 2, options, tmp_path)
    assert_line(text, r"rank 1 \(.*\) stands still at test_lost_ranks.py:\d+ \(stall\)")


@pytest.mark.parametrize(
    ("action", "state"),
    [(KILLED, "is gone"), (STOPPED, "does not answer")],
    ids=["gone", "stopped"],
)
def test_rank_that_holds_the_store(action: Callable[[], None], state: str, tmp_path: Path) -> None:
    text, _ = run(Fault(0, action), 2, ONE_UNIT, tmp_path)
    assert_line(text, rf"rank 0 \(localhost:\d+\) {state}")


def test_own_error_keeps_its_traceback(tmp_path: Path) -> None:
    text, codes = run(Fault(1, fail), 2, ONE_UNIT, tmp_path)
    assert text.count("Traceback") == 1
    assert "ValueError: a bug of this rank\n" in text
    assert re.search(
        r"error: rank 1 \(.*\) failed in iteration \d: ValueError: a bug of this rank\.",
        error_line(text),
    )
    assert codes == [1, 1]


def test_killed_at_start(tmp_path: Path) -> None:
    fault = Fault(1, KILLED, "pretrain_gpt_scmoe.train_valid_test_datasets_provider", 1)
    text, _ = run(fault, 2, ONE_UNIT, tmp_path)
    assert_line(text, r"rank 1 \(.*, pid \d+\) is gone", "before the first iteration")


def test_killed_while_saving(tmp_path: Path) -> None:
    """The failure of the save itself says nothing."""
    fault = Fault(1, KILLED, "megatron.training.checkpointing.generate_state_dict", 1)
    saving = [*ONE_UNIT, "--save", str(tmp_path / "checkpoints"), "--save-interval", "2"]
    text, _ = run(fault, 2, saving, tmp_path)
    assert_line(text, r"rank 1 \(.*, pid \d+\) is gone", "in iteration 2")
