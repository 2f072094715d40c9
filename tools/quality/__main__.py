"""Train every contender on the same real text, and print the table beside the papers'.

    python -m tools.quality --scale smoke|laptop|gpu --output DIR
    python -m tools.quality --scale laptop --output DIR --table     # of what is there, nothing runs

A run that is there is not done again: the same command goes on where the last one stopped. Writes
quality.md and two pictures to --output.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_scmoe.say import one_line, say
from megatron_scmoe.words import read_json, write_whole
from tools.benchmarks.provenance import REPOSITORY
from tools.quality import corpus, plots, report
from tools.quality.contenders import BY_NAME, CONTENDERS, LISTS, QualityContender
from tools.quality.runs import (
    RunError,
    RunQueue,
    RunResult,
    alone,
    chosen_rate,
    number_of_runs,
    rate_tasks,
    seed_tasks,
)
from tools.quality.scales import SCALES, Scale


class RunsProgress:
    """A line for each run, with the time that is left: runs to do, by iterations."""

    def __init__(self, scale: Scale) -> None:
        self._began = time.monotonic()
        self.total = number_of_runs(scale)
        self.before = 0
        self._done = 0

    def __call__(self, result: RunResult, seconds: float) -> None:
        self._done += 1
        number = self.before + self._done
        left = (time.monotonic() - self._began) / self._done * (self.total - number)
        print(
            f"[{number}/{self.total}] {result.contender} seed {result.seed} rate {result.rate:g}: "
            f"held out {result.validation:.4f}, {seconds:.0f} s; about {left / 60:.0f} min left",
            flush=True,
        )


def claim(folder: Path, name: str, scale: Scale) -> None:
    """Make the folder this scale's.

    Raises:
        ValueError: it is another scale's.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / "scale.json", {"scale": name, **scale.as_json()}
    if path.exists():
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}: choose another --output.") from error
        if found != wanted:
            differing = sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k))
            raise ValueError(
                f"{folder} has results of another scale ({', '.join(differing)} differ): choose "
                "another --output."
            )
    else:
        write_whole(path, json.dumps(wanted, indent=1) + "\n")


def run_all(runner: RunQueue, jobs: int) -> None:
    """Main contenders first, all their seeds in turn; then everybody else."""
    scale = runner.scale
    for main in (True, False):
        group = [each for each in CONTENDERS if each.main == main]
        if any(LISTS in each.options for each in group):
            find_partners(runner)
        tasks = [rate_tasks(each, scale) for each in group]
        found = iter(runner.all([task for some in tasks for task in some], jobs))
        by_contender = []
        for contender, some in zip(group, tasks, strict=True):
            rate = chosen_rate(contender, scale, [next(found) for _ in some])
            by_contender.append(seed_tasks(contender, scale, rate))
        # Seed by seed, so that an early end leaves whole comparisons.
        runner.all([task for seed in zip(*by_contender, strict=True) for task in seed], jobs)


def find_partners(runner: RunQueue) -> None:
    """Partners of every expert (C2R) from the model that top-2's first seed has left.

    Raises:
        ValueError: that model is gone.
    """
    if runner.partners.exists():
        return
    (first, *_) = seed_tasks(BY_NAME["top2"], runner.scale, 0)
    checkpoint = runner.checkpoint(first)
    if not checkpoint.exists():
        raise ValueError(
            f"{checkpoint} is gone, from which C2R's partners are made: remove "
            f"{runner.stored(first)}, and that run is repeated."
        )
    runner.partners.parent.mkdir(exist_ok=True)
    counts = str(runner.partners.with_name("counts.json"))
    text = str(runner.folder / "text" / "train.jsonl")
    c2r = "megatron_scmoe.commands.c2r"
    _program(c2r, "profile", "--load", str(checkpoint), "--text", text, "--output", counts)
    _program(c2r, "lists", "--matrix", counts, "--output", str(runner.partners))


def train(folder: Path, name: str, scale: Scale, jobs: int) -> None:
    """Text, sizes, runs, and what is asked of the saved models.

    Raises:
        ValueError, OSError, RunError: in one line; of a run, with its last lines.
        subprocess.CalledProcessError: a program of ours failed; `stderr` says why.
    """
    print("text: one moment", flush=True)
    text = corpus.write(folder / "text", scale)
    write_whole(folder / "corpus.json", (folder / "text" / "corpus.json").read_bytes())
    write_whole(folder / "sizes.json", _program("tools.quality.sizes", "--scale", name))
    progress = RunsProgress(scale)
    runner = RunQueue(folder, scale, text, progress)
    progress.before = sum(1 for _ in (folder / "runs").glob("*.json"))
    run_all(runner, jobs)
    for each in CONTENDERS:
        study(runner, each)


def study(runner: RunQueue, contender: QualityContender) -> None:
    """Ask the saved model of a contender what claims.py asks, unless it was asked."""
    path = runner.folder / "claims" / f"{contender.name}.json"
    (first, *_) = seed_tasks(contender, runner.scale, 0)
    checkpoint = runner.checkpoint(first)
    if path.exists() or not checkpoint.exists():
        return
    path.parent.mkdir(exist_ok=True)
    _program(
        *("tools.quality.claims", "--load", str(checkpoint), "--found", str(path)),
        *("--text", str(runner.folder / "text")),
        *("--sequences", str(runner.scale.eval_iterations * runner.scale.batch)),
    )


def _program(*words: str) -> str:
    """Output of a module of ours, in a process of its own: the host is imported there."""
    command = [sys.executable, "-W", "ignore", "-m", *words]
    return subprocess.run(command, env=alone(), check=True, capture_output=True, text=True).stdout


def publish(folder: Path, name: str, scale: Scale) -> None:
    """Write the page and the pictures of what is there."""
    found = report.read(folder)
    text = report.page(found, scale, name, read_json(folder / "corpus.json"))
    write_whole(folder / "quality.md", text)
    print(text, end="")
    try:
        for path in plots.draw(found, folder):
            print(f"written: {path}", file=sys.stderr)
    except ImportError:
        print("no pictures: pip install 'megatron-scmoe[plot]'", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--scale", choices=SCALES, required=True, help="Sizes of model, text and runs."
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="Text, logs and results."
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="Runs at a time.")
    parser.add_argument(
        "--table", action="store_true", help="Write the page of the results that are there."
    )
    args = parser.parse_args()
    scale = SCALES[args.scale]
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs} runs nothing: it must be at least 1.")
    folder = args.output.resolve()
    if folder.is_relative_to(REPOSITORY):
        folder = folder.relative_to(
            REPOSITORY
        )  # commands are recorded, and need no machine's paths
    os.chdir(REPOSITORY)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if args.table and not (folder / "scale.json").exists():
            raise ValueError(f"{folder} has no results: run it without --table first.")
        claim(folder, args.scale, scale)
        if not args.table:
            train(folder, args.scale, scale, args.jobs or scale.jobs)
        publish(folder, args.scale, scale)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        say(f"{' '.join(error.cmd[1:4])} failed: {' '.join(last)}")
        return 2
    except (OSError, ValueError, RunError) as error:
        say(str(error) if isinstance(error, RunError) else one_line(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
