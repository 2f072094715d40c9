"""Kill a training run again and again: what it loses, and what it comes back with.

    python -m tests.functional_tests.crash [KILLS [SEED]]

A run of two ranks that saves every third iteration, every other attempt with --async-save, is
killed KILLS times (20) and started again with the same command: SIGKILL to rank 0, rank 1 or both,
half of the time while a checkpoint is being written, otherwise at any moment. The survivor goes on
for up to a second, as it does until a launcher notices.

After each kill
  - what the tracker names is whole, every byte of it, and so is the newest checkpoint that counts
    as complete;
  - nothing that the dead ranks had started is left;
  - the next attempt goes on from the newest complete checkpoint;
  - every loss and gradient norm that any attempt has logged is bitwise that of a run that never
    stopped, and the last attempt reaches the end.

Prints a line a kill and a summary; exit code 1 if anything differs.
"""

import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_scmoe.run.checkpoint import contents
from tests.functional_tests.forked import Hook, flush_curves, processes_of, start_ranks
from tests.functional_tests.launch import LOSS_LINE, read_scalars
from tests.functional_tests.layouts import CURVES, EP2, MODEL
from tests.functional_tests.text import write_text

ITERATIONS = 40
ATTEMPT_S = 300
ORPHANS_S = 60
TRAIN = [*shlex.split(f"{MODEL} {EP2} --use-distributed-optimizer"), "--save-interval", "3"]
TRAIN += [
    "--micro-batch-size",
    "4",
    "--scmoe-shortcut-position",
    "pos2",
    "--tensorboard-log-interval",
    "1",
]
LOADED = re.compile(r"successfully loaded checkpoint .* at iteration (\d+)")


@dataclass(frozen=True)
class Kill:
    """Which ranks die, and when."""

    ranks: tuple[int, ...]
    survive: float
    """Seconds that the other one goes on."""
    save: int
    """The attempt's n-th save that it waits for; 0 for any moment of the run."""
    delay: float
    """Seconds, from the start of that save or from the first loss."""


class Saves:
    """Watches a folder: the saves that began since it was made, and how long they took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.earlier = self._folders()
        self.began: dict[int, float] = {}  # inode, seconds
        self.took: list[float] = []

    def look(self) -> str:
        """Where the save in progress stands, empty if there is none."""
        now = time.monotonic()
        tracked = _tracked(self.folder)
        for inode, iteration in self._folders().items():
            if inode in self.earlier:
                continue
            if inode not in self.began:
                self.began[inode] = now
            if iteration == tracked:
                self.earlier[inode] = iteration
                self.took.append(now - self.began[inode])
            elif (contents.iteration_folder(self.folder, iteration) / "metadata.json").exists():
                return "complete but not yet tracked"
            else:
                return "half written"
        return ""

    def _folders(self) -> dict[int, int]:
        found = {}
        for iteration in contents.saved_iterations(self.folder):
            with suppress(FileNotFoundError):  # removed meanwhile, to be saved again
                found[contents.iteration_folder(self.folder, iteration).stat().st_ino] = iteration
        return found


def _tracked(folder: Path) -> int | None:
    """The tracked iteration; the file may be empty for a moment, or for good after a kill."""
    try:
        tracked = contents.tracked_iteration(folder)
    except ValueError:
        return None
    return tracked if isinstance(tracked, int) else None


class CrashTest:
    """One interrupted run and the uninterrupted one that it is compared with."""

    def __init__(
        self, folder: Path, seed: int, iterations: int = ITERATIONS, hook: Hook = flush_curves
    ) -> None:
        self.folder = folder
        self.iterations = iterations
        self.checkpoints = folder / "checkpoints"
        self.hook = hook
        self.random = random.Random(seed)
        self.mismatches: list[str] = []
        self.fell: Counter[str] = Counter()
        write_text(folder)
        saves, self.seconds = self._attempt("whole", folder / "whole-checkpoints", [])[1:]
        self.save_seconds = median(saves.took)
        self.reference = {tag: read_scalars(folder / "whole", tag) for tag in CURVES}

    def run(self, kills: int) -> bool:
        """Kill, check, start again; whether all went well."""
        done = attempts = 0
        while done < kills:
            name = f"attempt {attempts}"
            attempts += 1
            kill = self._draw(done)
            state, _, _ = self._attempt(name, self.checkpoints, self._mode(done), kill)
            what = self._check(name)
            if state is None:  # the run ended first: start over
                print(f"{name} reached the end; {what}", flush=True)
                self.checkpoints.rename(self.folder / f"{name}, finished")
                continue
            done += 1
            mode = "async" if self._mode(done - 1) else "sync"
            ranks = "rank " + " and ".join(map(str, kill.ranks))
            where = f"in a save, {state}" if state else "between saves"
            self.fell.update([f"{mode}, {where}", ranks])
            print(f"kill {done}: {mode}, {ranks}, {where}; {what}", flush=True)
        self._attempt("last", self.checkpoints, self._mode(kills))
        print(f"last attempt: {self._check('last')}")
        reached = max(read_scalars(self.folder / "last", CURVES[0])) == self.iterations
        return reached and not self.mismatches

    def _draw(self, kill: int) -> Kill:
        ranks = self.random.choice([(0,), (1,), (0, 1)])
        survive = self.random.uniform(0, 1)
        if kill % 4 < 2:  # sync and async in turn, so that both have both
            save = self.random.randint(1, 3)
            return Kill(ranks, survive, save, self.random.uniform(0, self.save_seconds))
        return Kill(ranks, survive, 0, self.random.uniform(0, self.seconds))

    @staticmethod
    def _mode(attempt: int) -> list[str]:
        return ["--async-save"] if attempt % 2 else []

    def _attempt(
        self, name: str, checkpoints: Path, mode: list[str], kill: Kill | None = None
    ) -> tuple[str | None, Saves, float]:
        """Train until the end or the kill.

        Returns:
            Where the save stood that the kill hit ("" between saves, None at the end of the run),
            all saves, and seconds from the first loss.
        """
        folder = self.folder / name
        folder.mkdir()
        arguments = [*TRAIN, *mode, "--train-iters", str(self.iterations)]
        arguments += ["--save", str(checkpoints), "--load", str(checkpoints)]
        arguments += ["--data-path", str(self.folder / "license")]
        arguments += ["--data-cache-path", str(self.folder / "cache")]
        arguments += ["--tensorboard-dir", str(folder), *self._newest(name, checkpoints)]
        outputs = [folder / f"rank{rank}.txt" for rank in range(2)]
        saves = Saves(checkpoints)
        ranks = start_ranks(arguments, outputs, hook=self.hook)
        started = 0.0
        state: str | None = None
        deadline = time.monotonic() + ATTEMPT_S
        try:
            while state is None and any(rank.exitcode is None for rank in ranks):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{name} hangs: {outputs[0].read_text()[-2000:]}")
                if not started and self._trains(outputs[1]):
                    started = time.monotonic()
                saves.look()
                if kill is not None and self._due(kill, saves, started):
                    state = saves.look()
                    for rank in kill.ranks:
                        os.kill(ranks[rank].pid, signal.SIGKILL)
                    time.sleep(kill.survive)
                time.sleep(0.005)
        finally:
            for rank in ranks:  # what a launcher does when one is gone
                rank.kill()
                rank.join()
        if state is None and any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"{name} failed: {outputs[0].read_text()[-3000:]}")
        return state, saves, time.monotonic() - started

    @staticmethod
    def _due(kill: Kill, saves: Saves, started: float) -> bool:
        if not kill.save:
            return bool(started) and time.monotonic() >= started + kill.delay
        began = list(saves.began.values())
        return len(began) >= kill.save and time.monotonic() >= began[-1] + kill.delay

    @staticmethod
    def _trains(output: Path) -> bool:
        return output.exists() and LOSS_LINE.search(output.read_text(errors="replace")) is not None

    def _newest(self, name: str, checkpoints: Path) -> list[str]:
        """Ask for the newest complete checkpoint where the kill came before the tracker's turn."""
        newest = contents.newest_complete(checkpoints)
        self.expected = newest or 0
        if newest is None or newest == _tracked(checkpoints):
            return []
        return ["--ckpt-step", str(newest)]

    def _check(self, name: str) -> str:
        """What is on disk is whole; the attempt went on where it should and as it should."""
        before = len(self.mismatches)
        self._check_disk(name)
        outputs = [self.folder / name / f"rank{rank}.txt" for rank in range(2)]
        deadline = time.monotonic() + ORPHANS_S
        while orphans := [pid for output in outputs for pid in processes_of(output)]:
            if time.monotonic() > deadline:
                self.mismatches.append(f"{name} left processes {orphans}")
                break
            time.sleep(0.2)
        loaded = LOADED.search(outputs[0].read_text(errors="replace"))
        if int(loaded[1] if loaded else 0) != self.expected:
            self.mismatches.append(f"{name} loaded {loaded and loaded[1]}, not {self.expected}")
        steps: list[int] = []
        for tag in CURVES:
            try:
                curve = read_scalars(self.folder / name, tag)
            except KeyError:  # killed before the first iteration
                continue
            steps = sorted(curve)
            if steps != list(range(self.expected + 1, steps[-1] + 1)):
                self.mismatches.append(f"{name}: {tag} at {steps}, after {self.expected}")
            self.mismatches += [
                f"{name}: {tag} at {step} is {value!r}, not {self.reference[tag][step]!r}"
                for step, value in curve.items()
                if value != self.reference[tag][step]
            ]
        logged = f"iterations {steps[0]}-{steps[-1]}" if steps else "no iteration"
        return f"logged {logged}, {len(self.mismatches) - before} mismatches"

    def _check_disk(self, name: str) -> None:
        if not self.checkpoints.exists():
            return
        tracked = _tracked(self.checkpoints)
        newest = contents.newest_complete(self.checkpoints)
        if tracked is not None and (newest is None or newest < tracked):
            self.mismatches.append(f"{name}: {tracked} is tracked, {newest} the newest complete")
        for iteration in {tracked, newest} - {None}:
            folder = contents.iteration_folder(self.checkpoints, iteration)
            found = contents.defects(folder) or contents.corrupt_files(folder)
            self.mismatches += [f"{name}: {what}" for what in found]


def main(kills: int = 20, seed: int = 0) -> bool:
    """Run the program; whether all went well."""
    with tempfile.TemporaryDirectory() as name:
        test = CrashTest(Path(name), seed)
        print(f"{test.seconds:.1f} s without a kill, a save takes {test.save_seconds:.2f} s")
        good = test.run(kills)
        print(*test.mismatches, sep="\n")
        for what, count in sorted(test.fell.items()):
            print(f"{count:4} {what}")
        print(f"{kills} kills, {len(test.mismatches)} mismatches: {'passed' if good else 'FAILED'}")
        return good


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
