"""Runs of the entry script, as a user would call it, and what is kept of each: one JSON file."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_scmoe.words import read_json, write_whole
from tools.benchmarks.provenance import REPOSITORY, describe
from tools.quality.contenders import CONTENDERS, LISTS, QualityContender
from tools.quality.corpus import Text
from tools.quality.scales import Scale

LOSS_LINE = re.compile(r"iteration +(\d+)/ *\d+ \|(.*)")
FIELD = re.compile(r" ([\w ()-]+): +([-+0-9.Ee]+)(%?)[^|]*\|")
VALIDATION = re.compile(
    r"validation loss at iteration \d+ on validation set \| lm loss value: (\S+)"
)
KEPT_LINES = 15
EXTRAS = {"gates agree", "routed per token", "slots at home", "dropped"}
LAST = 5
"""Lines of the log over which those are averaged."""


class RunError(Exception):
    """A run ended with an error; the message has its last lines."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be there."""

    contender: QualityContender
    seed: int
    rate: float
    iterations: int
    chooses_rate: bool = False

    def evaluation(self, scale: Scale) -> int:
        """Batches of held-out text behind it; to choose a rate a part is enough."""
        return max(1, scale.eval_iterations // 4) if self.chooses_rate else scale.eval_iterations

    @property
    def name(self) -> str:
        last = f"rate-{self.rate:g}" if self.chooses_rate else f"seed-{self.seed}"
        return f"{self.contender.name}.{last}"


@dataclass(frozen=True)
class RunResult:
    """What a run has shown."""

    contender: str
    seed: int
    rate: float
    validation: float
    """Cross-entropy of the held-out text behind the last iteration, nats per token."""
    losses: list[tuple[int, float]]
    """Of training: iteration, mean loss since the one before."""
    extras: dict[str, float]
    seconds: float
    command: str
    commit: str
    machine: dict[str, Any]
    digest: str
    """Of the text."""
    options: list[str] = field(default_factory=list)
    """The contender's own."""

    @classmethod
    def read(cls, path: Path) -> "RunResult":
        """What an earlier run has left.

        Raises:
            ValueError: the file is no result; one line.
        """
        try:
            content = read_json(path)
            result = cls(**content)
            losses = [(int(at), float(loss)) for at, loss in result.losses]
            return dataclasses.replace(result, losses=losses, validation=float(result.validation))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no result of this program ({error}): remove it to repeat it."
            ) from error


class RunQueue:
    """A queue of the runs that are not done yet.

    Args:
        folder: of results, a file for each run, and of the logs.
        announce: called with the line of a finished run.
    """

    def __init__(
        self, folder: Path, scale: Scale, text: Text, announce: Callable[[RunResult, float], None]
    ) -> None:
        self.folder = folder
        self.scale = scale
        self._text = text
        self._announce = announce
        self._environment = describe()
        self._running: set[subprocess.Popen] = set()

    def stored(self, task: PlannedRun) -> Path:
        return self.folder / "runs" / f"{task.name}.json"

    def done(self, task: PlannedRun) -> RunResult | None:
        """An earlier result.

        Raises:
            ValueError: it is damaged, or of another text or other options.
        """
        path = self.stored(task)
        if not path.exists():
            return None
        result = RunResult.read(path)
        if result.digest != self._text.digest:
            raise ValueError(
                f"{path} was trained on other text ({result.digest}, here is {self._text.digest}; "
                "another version of Python has other sources): choose another --output."
            )
        if result.options != task.contender.command_line(self.scale) or result.rate != task.rate:
            raise ValueError(
                f"{path} is of other options than {task.contender.name} has now: remove it, and "
                "the run is repeated."
            )
        return result

    def all(self, tasks: Iterable[PlannedRun], jobs: int) -> list[RunResult]:
        """Results in the order of the tasks; those that are missing are run, some at a time.

        Raises:
            RunError: a run failed; others that run beside it are ended.
        """
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(self._one, task) for task in tasks]
            try:
                return [each.result() for each in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    process.terminate()
                raise

    def command(self, task: PlannedRun) -> list[str]:
        """Paths as they are from the repository, where it runs."""
        return [
            *("python", "pretrain_gpt_scmoe.py"),
            *self.scale.model_options(),
            *(
                str(self.partners) if word == LISTS else word
                for word in task.contender.command_line(self.scale)
            ),
            *self.scale.schedule(
                task.iterations, task.rate, task.seed, task.evaluation(self.scale)
            ),
            *self._text.options(),
            *(self._saving(task) if self._is_studied(task) else ()),
        ]

    def _saving(self, task: PlannedRun) -> list[str]:
        return ["--save", str(self.checkpoint(task)), "--save-interval", str(task.iterations)]

    @property
    def partners(self) -> Path:
        return self.folder / "c2r" / "lists.json"

    def checkpoint(self, task: PlannedRun) -> Path:
        return self.folder / "logs" / task.name / "checkpoint"

    def _is_studied(self, task: PlannedRun) -> bool:
        first = task.seed == self.scale.seeds[0] and not task.chooses_rate
        return first and task.contender.studied

    def _one(self, task: PlannedRun) -> RunResult:
        result = self.done(task)
        if result is not None:
            return result
        logs = self.folder / "logs" / task.name
        logs.mkdir(parents=True, exist_ok=True)
        # Of a run that was interrupted.
        shutil.rmtree(self.checkpoint(task), ignore_errors=True)
        words = self.command(task)
        began = time.monotonic()
        with (logs / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *words[1:]],
                cwd=REPOSITORY,
                env=alone(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
        seconds = time.monotonic() - began
        if code:
            lines = (logs / "log.txt").read_text(errors="replace").splitlines()[-KEPT_LINES:]
            raise RunError(
                f"{task.name} ended with exit code {code}; its output is in "
                f"{logs / 'log.txt'}, the last lines are:\n" + "\n".join(lines)
            )
        printed = TrainingLog.read(logs / "log.txt")
        if printed.validation is None:
            raise RunError(f"{task.name} evaluated nothing; its output is in {logs / 'log.txt'}")
        result = RunResult(
            contender=task.contender.name,
            seed=task.seed,
            rate=task.rate,
            validation=printed.validation,
            losses=printed.losses,
            extras={name: fmean(values[-LAST:]) for name, values in printed.extras.items()},
            seconds=round(seconds, 1),
            command=" ".join(words),
            commit=self._environment["commit"],
            machine=self._environment["machine"] | self._environment["versions"],
            digest=self._text.digest,
            options=task.contender.command_line(self.scale),
        )
        self.stored(task).parent.mkdir(exist_ok=True)
        write_whole(self.stored(task), json.dumps(dataclasses.asdict(result)) + "\n")
        self._announce(result, seconds)
        return result


def rate_tasks(contender: QualityContender, scale: Scale) -> list[PlannedRun]:
    """The short runs that choose its learning rate; none where there is one to choose from."""
    if len(scale.rates) == 1:
        return []
    return [
        PlannedRun(contender, scale.rate_seed, rate, scale.rate_iterations, chooses_rate=True)
        for rate in scale.rates
    ]


def seed_tasks(contender: QualityContender, scale: Scale, rate: float) -> list[PlannedRun]:
    """The full runs at its rate, one for each of its seeds."""
    return [
        PlannedRun(contender, seed, rate, scale.iterations)
        for seed in scale.seeds_of(contender.main)
    ]


def chosen_rate(contender: QualityContender, scale: Scale, results: Iterable[RunResult]) -> float:
    """That of the least held-out loss."""
    if len(scale.rates) == 1:
        return scale.rates[0]
    return min(results, key=lambda result: result.validation).rate


def number_of_runs(scale: Scale) -> int:
    """Of all contenders, those that choose a rate included."""
    return sum(
        len(rate_tasks(each, scale)) + len(seed_tasks(each, scale, 0)) for each in CONTENDERS
    )


@dataclass
class TrainingLog:
    """What a run has printed. Not TensorBoard's file: its last value, the held-out loss, may be
    missing when the process ends."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """Iteration, mean training loss since the line before."""
    validation: float | None = None
    extras: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "TrainingLog":
        log = cls()
        for line in path.read_text(errors="replace").splitlines():
            if match := LOSS_LINE.search(line):
                fields = {
                    name.strip(): float(value) / (100 if percent else 1)
                    for name, value, percent in FIELD.findall(match[2])
                }
                log.losses.append((int(match[1]), fields["lm loss"]))
                for name in EXTRAS & fields.keys():
                    log.extras.setdefault(name, []).append(fields[name])
            elif match := VALIDATION.search(line):
                log.validation = float(match[1])
        return log


def alone() -> dict[str, str]:
    """The environment of one rank with one thread, whatever job this process is a rank of."""
    of_a_job = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    own = {name: value for name, value in os.environ.items() if name not in of_a_job}
    return own | {"OMP_NUM_THREADS": "1"}
