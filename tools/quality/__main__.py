"""Train every contender on the same real text, and print the table beside the papers'.

    python -m tools.quality --scale smoke|laptop|gpu --output DIR

A run that is there is not done again: the same command goes on where the last one stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_scmoe.say import one_line, say
from megatron_scmoe.words import read_json, write_whole
from tools.benchmarks.provenance import REPOSITORY
from tools.quality import corpus
from tools.quality.contenders import CONTENDERS
from tools.quality.runs import (
    Result,
    RunError,
    Runner,
    chosen_rate,
    number_of_runs,
    rate_tasks,
    seed_tasks,
)
from tools.quality.scales import SCALES, Scale


class Progress:
    """A line for each run, with the time that is left: runs to do, by iterations."""

    def __init__(self, scale: Scale) -> None:
        self._began = time.monotonic()
        self.total = number_of_runs(scale)
        self.before = 0
        self._done = 0

    def __call__(self, result: Result, seconds: float) -> None:
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


def run_all(runner: Runner, jobs: int) -> None:
    """Main contenders first, all their seeds in turn; then everybody else."""
    scale = runner.scale
    for main in (True, False):
        group = [each for each in CONTENDERS if each.main == main]
        tasks = [rate_tasks(each, scale) for each in group]
        found = iter(runner.all([task for some in tasks for task in some], jobs))
        by_contender = []
        for contender, some in zip(group, tasks, strict=True):
            rate = chosen_rate(contender, scale, [next(found) for _ in some])
            by_contender.append(seed_tasks(contender, scale, rate))
        # Seed by seed, so that an early end leaves whole comparisons.
        runner.all([task for seed in zip(*by_contender, strict=True) for task in seed], jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--scale", choices=SCALES, required=True, help="Sizes of model, text and runs."
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="Text, logs and results."
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="Runs at a time.")
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
    try:
        claim(folder, args.scale, scale)
        print("text: one moment", flush=True)
        text = corpus.write(folder / "text", scale)
        progress = Progress(scale)
        runner = Runner(folder, scale, text, progress)
        progress.before = len(list((folder / "runs").glob("*.json")))
        run_all(runner, args.jobs or scale.jobs)
    except subprocess.CalledProcessError as error:
        say(f"the text could not be made: {(error.stderr or '').strip().splitlines()[-1:]}")
        return 2
    except (OSError, ValueError, RunError) as error:
        say(one_line(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
