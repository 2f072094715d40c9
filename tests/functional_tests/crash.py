"""Kill a training run again and again: what it loses, and what it comes back with.

    python -m tests.functional_tests.crash [KILLS [SEED]]

A run of two ranks that saves every third iteration, every other attempt with --async-save, is
killed (SIGKILL, one rank or both) at random moments, saves included, and started again with the
same command, KILLS times (20). After each kill the newest complete checkpoint must be whole and
load, and in the end every value of the curves that any attempt has logged must be bitwise that of
a run that never stopped. Prints a line a kill; exit code 1 if anything differs.
"""

import os
import random
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from megatron_scmoe.checkpoint import contents
from tests.functional_tests.forked import start_ranks
from tests.functional_tests.launch import LOSS_LINE, read_scalars
from tests.functional_tests.layouts import CURVES, EP2, MODEL
from tests.functional_tests.text import write_text

ITERATIONS = 40
SAVE = ["--save-interval", "3", "--train-iters", str(ITERATIONS)]
ATTEMPT_S = 120


class CrashTest:
    """One interrupted run and the uninterrupted one that it is compared with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.random = random.Random(seed)
        self.mismatches: list[str] = []
        write_text(folder)
        _, self.seconds = self._attempt("whole", ["--save", str(folder / "whole-checkpoints")])
        self.reference = {tag: read_scalars(folder / "whole", tag) for tag in CURVES}

    def run(self, kills: int) -> bool:
        """Kill, check, start again; whether all went well."""
        for kill in range(kills):
            moment = self.random.uniform(0.2, 0.9) * self.seconds
            victims = self.random.choice([[0], [1], [0, 1]])
            name = f"attempt {kill}"
            killed, _ = self._attempt(name, self._options(kill), moment, victims)
            what = f"ranks {victims} killed after {moment:.1f} s" if killed else "finished"
            print(f"{name}: {what}; {self._check(name)}", flush=True)
            if not killed:
                # Start over: later kills need something to kill.
                self.checkpoints.rename(self.folder / f"finished {kill}")
        killed, _ = self._attempt("last", self._options(kills))
        print(f"last attempt: {self._check('last')}")
        done = not killed and max(read_scalars(self.folder / "last", "lm loss")) == ITERATIONS
        return done and not self.mismatches

    def _options(self, attempt: int) -> list[str]:
        where = ["--save", str(self.checkpoints), "--load", str(self.checkpoints)]
        return [*where, "--async-save"] if attempt % 2 else where

    def _attempt(
        self, name: str, options: list[str], moment: float = 0, victims: list[int] | None = None
    ) -> tuple[bool, float]:
        """Train until the end or the kill; whether it was killed, and seconds from the first loss.

        `moment` counts from the start of training, so that kills hit iterations and saves.
        """
        folder = self.folder / name
        folder.mkdir()
        arguments = [*shlex.split(f"{MODEL} {EP2} --use-distributed-optimizer"), *SAVE, *options]
        arguments += ["--micro-batch-size", "4", "--scmoe-shortcut-position", "pos2"]
        arguments += ["--data-path", str(self.folder / "license")]
        arguments += ["--data-cache-path", str(self.folder / "cache")]
        arguments += ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
        outputs = [folder / f"rank{rank}.txt" for rank in range(2)]
        ranks = start_ranks(arguments, outputs)
        started: float | None = None
        deadline = time.monotonic() + ATTEMPT_S
        try:
            while any(rank.exitcode is None for rank in ranks):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{name} hangs: {outputs[0].read_text()[-2000:]}")
                if started is None and self._trains(outputs[1]):
                    started = time.monotonic()
                if victims and started is not None and time.monotonic() > started + moment:
                    for rank in victims:
                        os.kill(ranks[rank].pid, signal.SIGKILL)
                    return True, moment
                time.sleep(0.02)
        finally:
            for rank in ranks:  # what a launcher does when one is gone
                rank.kill()
                rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"{name} failed: {outputs[0].read_text()[-3000:]}")
        return False, time.monotonic() - (started or 0)

    @staticmethod
    def _trains(output: Path) -> bool:
        return output.exists() and LOSS_LINE.search(output.read_text(errors="replace")) is not None

    def _check(self, name: str) -> str:
        """The newest complete checkpoint is whole; what was logged is what was expected."""
        tracked = (
            contents.tracked_iteration(self.checkpoints) if self.checkpoints.exists() else None
        )
        if isinstance(tracked, int):
            folder = contents.iteration_folder(self.checkpoints, tracked)
            self.mismatches += contents.defects(folder)
        steps: dict[int, float] = {}
        for tag in CURVES:
            try:
                steps = read_scalars(self.folder / name, tag)
            except KeyError:  # killed before the writer wrote
                continue
            self.mismatches += [
                f"{name}: {tag} at {step} is {value!r}, not {self.reference[tag][step]!r}"
                for step, value in steps.items()
                if value != self.reference[tag][step]
            ]
        logged = f"iterations {min(steps)}-{max(steps)}" if steps else "no iteration"
        return f"logged {logged}, checkpoint {tracked}, {len(self.mismatches)} mismatches"


def main(kills: int = 20, seed: int = 0) -> bool:
    """Run the program; whether all went well."""
    with tempfile.TemporaryDirectory() as name:
        test = CrashTest(Path(name), seed)
        good = test.run(kills)
        print(*test.mismatches, sep="\n")
        print(f"{kills} kills, {len(test.mismatches)} mismatches: {'passed' if good else 'FAILED'}")
        return good


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
