"""Runs of test_cases/, in the form of Megatron-LM's functional tests, judged by two lanes.

    python -m tests.functional_tests.cases [CASE ...] [--platform h100] [--lane exact] [--record]

approximate    losses within 1e-4, relative, of the case's golden values: also on another image
exact          the case twice on this machine: every curve bit for bit

A case is test_cases/CASE/model_config.yaml with its golden_values_PLATFORM.json; PLATFORM.yaml is
what all cases share there. A case of TEST_TYPE ckpt-resume loses its last checkpoint, runs again
from the middle (with MODEL_ARGS_2 if it has them) and has to come to the same curves: bit for bit,
at another layout within 1e-4. There are no golden values of times or of memory.

On the platform cpu the ranks are forked, elsewhere torchrun starts them; under srun, one task a
node, all nodes run the same cases and the first one judges. Prints a table, writes junit.xml, logs
and curves to --output. Exit code 1 if a case fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from megatron_scmoe import recipe
from megatron_scmoe.words import table
from tests.functional_tests.forked import launch_forked
from tests.functional_tests.launch import REPOSITORY, SCRIPT, Run, read_scalars
from tests.functional_tests.text import write_text

FOLDER = Path(__file__).with_name("test_cases")
LANES = ("approximate", "exact")
GOLDEN_TOLERANCE = 1e-4  # relative: other processors sum in another order
LOSS = "lm loss"
CURVES = (LOSS, "load_balancing_loss", "grad-norm")
LIMIT_S = 1800  # of one run
SECOND = "MODEL_ARGS_2"  # of the run that goes on, if it has options of its own

Curves = dict[str, dict[int, float]]
Launch = Callable[[list[str], Path], Run]


class CaseError(Exception):
    """What is wrong with a case."""


@dataclass(frozen=True)
class GoldenCase:
    """What a model_config.yaml says, on one platform."""

    name: str
    platform: str = "cpu"

    @property
    def file(self) -> Path:
        return FOLDER / self.name / "model_config.yaml"

    @property
    def golden(self) -> Path:
        return self.file.with_name(f"golden_values_{self.platform}.json")

    @cached_property
    def content(self) -> dict[str, Any]:
        return recipe.load(self.file)

    @property
    def resumes(self) -> bool:
        kind = self.content.get("TEST_TYPE")
        if kind not in ("regular", "ckpt-resume"):
            raise CaseError(f"TEST_TYPE {kind} is not known")
        return kind == "ckpt-resume"

    @property
    def reshards(self) -> bool:
        return SECOND in self.content

    def options(self, folder: Path, data: Path, second: bool = False) -> list[str]:
        """The command line of a run that writes to a folder.

        Args:
            data: the prefix of the training data.
            second: of the run that goes on.
        """
        paths = {
            "DATA_PATH": data,
            "DATA_CACHE_PATH": data.parent / "cache",
            "TENSORBOARD_PATH": folder / ("resumed" if second else "tensorboard"),
            "CHECKPOINT_SAVE_PATH": folder / "checkpoints",
            "CHECKPOINT_LOAD_PATH": folder / "checkpoints",
        }
        variables = {name: str(path) for name, path in paths.items()}
        key = SECOND if second and self.reshards else recipe.OPTIONS
        return recipe.options(self.file, key, {**variables, "PLATFORM": self.platform})


def all_cases() -> list[str]:
    return sorted(file.parent.name for file in FOLDER.glob("*/model_config.yaml"))


# One case. --------------------------------------------------------------------------------------


def train(
    case: GoldenCase, folder: Path, data: Path, launch: Launch, second: bool = False
) -> Curves:
    """The curves of a run in full float32.

    Raises:
        CaseError: it failed.
    """
    run = launch(case.options(folder, data, second), folder / ("2" if second else "1"))
    if run.returncode:
        output = f"{run.stdout}\n{run.stderr}".strip()
        last_line = output.splitlines()[-1]
        raise CaseError(f"exit code {run.returncode}: {last_line}\n{output[-3000:]}")
    events = folder / ("resumed" if second else "tensorboard")
    return {tag: read_scalars(events, tag) for tag in CURVES} if is_first_node() else {}


def goes_on(case: GoldenCase, whole: Curves, folder: Path, data: Path, launch: Launch) -> None:
    """Lose the last checkpoint of a run and go on from the one in its middle.

    Raises:
        CaseError: to other curves.
    """
    checkpoints = folder / "checkpoints"
    if is_first_node():  # the others' ranks wait for its ranks
        *_, middle, last = sorted(checkpoints.glob("iter_*[0-9]"))
        shutil.rmtree(last)
        middle_iteration = int(middle.name.removeprefix("iter_"))
        tracker = checkpoints / "latest_checkpointed_iteration.txt"
        tracker.write_text(str(middle_iteration))
    curves = train(case, folder, data, launch, second=True)
    if not is_first_node():
        return
    rest = {
        tag: {step: value for step, value in whole[tag].items() if step > middle_iteration}
        for tag in CURVES
    }
    if case.reshards:
        compare(curves[LOSS], rest[LOSS], GOLDEN_TOLERANCE, "after the checkpoint")
    elif curves != rest:
        raise CaseError("the curves after the checkpoint are not bitwise those before it was lost")


def compare(losses: dict[int, float], golden: dict[int, float], limit: float, where: str) -> None:
    """Raise CaseError where losses differ by more than a relative limit, or their steps do."""
    if losses.keys() != golden.keys():
        raise CaseError(f"{where}: steps {sorted(losses)}, not {sorted(golden)}")
    step = max(golden, key=lambda step: abs(losses[step] / golden[step] - 1))
    # A loss that is no number is no better than a wrong one.
    if not abs(losses[step] / golden[step] - 1) <= limit:
        raise CaseError(f"{where}: loss {losses[step]} at step {step}, not {golden[step]}")


def judge(case: GoldenCase, lane: str, folder: Path, data: Path, launch: Launch) -> Curves:
    """Run a case by the rules of a lane.

    Returns:
        the curves of its first run.

    Raises:
        CaseError: what is wrong.
    """
    curves = train(case, folder / "once", data, launch)
    if case.resumes:
        goes_on(case, curves, folder / "once", data, launch)
    if lane == "exact":
        if train(case, folder / "twice", data, launch) != curves:
            raise CaseError("the second run is not bitwise the first")
    elif is_first_node():
        compare_with_golden(case, curves)
    return curves


def compare_with_golden(case: GoldenCase, curves: Curves) -> None:
    """Raise CaseError where the losses are not the recorded ones."""
    compare(curves[LOSS], read_golden(case), GOLDEN_TOLERANCE, "golden values")


def read_golden(case: GoldenCase) -> dict[int, float]:
    """The recorded losses by step.

    Raises:
        CaseError: there are none.
    """
    if not case.golden.exists():
        raise CaseError(f"no {case.golden.name}: record it with --record")
    return {
        int(step): loss
        for step, loss in json.loads(case.golden.read_text())[LOSS]["values"].items()
    }


def write_golden(case: GoldenCase, losses: dict[int, float]) -> None:
    """In Megatron-LM's form."""
    steps = sorted(losses)
    interval = steps[1] - steps[0] if len(steps) > 1 else 1
    content = {
        LOSS: {
            "start_step": steps[0],
            "end_step": steps[-1],
            "step_interval": interval,
            "values": {str(step): round(losses[step], 7) for step in steps},
        }
    }
    case.golden.write_text(json.dumps(content, indent=4) + "\n")


# All of them. -----------------------------------------------------------------------------------


def is_first_node() -> bool:
    return os.environ.get("SLURM_NODEID", "0") == "0"


def forked(ranks: int) -> Launch:
    return lambda options, folder: launch_forked(options, ranks, folder)


def by_torchrun(ranks: int) -> Launch:
    """With the nodes that Slurm names, or on this one."""

    def launch(options: list[str], folder: Path) -> Run:
        get: Mapping[str, str] = os.environ
        nodes = ["--nnodes", get.get("SLURM_NNODES", "1"), "--nproc-per-node", str(ranks)]
        nodes += ["--node-rank", get.get("SLURM_NODEID", "0")]
        nodes += ["--master-addr", get.get("MASTER_ADDR", "localhost")]
        nodes += ["--master-port", get.get("MASTER_PORT", "29500")]
        command = [sys.executable, "-m", "torch.distributed.run", *nodes, SCRIPT, *options]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S
        )
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"node{get.get('SLURM_NODEID', '0')}.txt"
        log.write_text(done.stdout + done.stderr)
        return Run(done.returncode, done.stdout, done.stderr)

    return launch


@dataclass
class CaseOutcome:
    """How a case went."""

    case: str
    seconds: float = 0.0
    error: str = ""
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def row(self) -> tuple[str, str, str, str]:
        loss = f"{list(self.losses.values())[-1]:.6f}" if self.losses else "-"
        what = self.error.splitlines()[0] if self.error else ""
        return self.case, "FAILED" if self.error else "passed", loss, f"{self.seconds:.1f}", what


def attempt(
    case: GoldenCase, lane: str, folder: Path, data: Path, launch: Launch, record: bool
) -> CaseOutcome:
    """Judge or record a case, whatever happens in it."""
    outcome = CaseOutcome(case.name)
    start = time.monotonic()
    try:
        if record:
            outcome.losses = train(case, folder / "once", data, launch).get(LOSS, {})
            write_golden(case, outcome.losses)
        else:
            outcome.losses = judge(case, lane, folder, data, launch).get(LOSS, {})
    except CaseError as error:
        outcome.error = str(error)
    except Exception as error:  # one case must not cost the others
        outcome.error = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    outcome.seconds = time.monotonic() - start
    return outcome


def junit(outcomes: list[CaseOutcome], suite: str) -> bytes:
    """The report that CI systems read."""
    failures = sum(bool(outcome.error) for outcome in outcomes)
    counts = {"tests": len(outcomes), "failures": failures, "errors": 0}
    time_s = f"{sum(outcome.seconds for outcome in outcomes):.3f}"
    attributes = {"name": suite, "time": time_s, **{k: str(v) for k, v in counts.items()}}
    element = ElementTree.Element("testsuite", attributes)
    for outcome in outcomes:
        where = {"classname": suite, "name": outcome.case, "time": f"{outcome.seconds:.3f}"}
        child = ElementTree.SubElement(element, "testcase", where)
        if outcome.error:
            message = {"message": outcome.error.splitlines()[0]}
            ElementTree.SubElement(child, "failure", message).text = outcome.error
    return ElementTree.tostring(element, encoding="utf-8", xml_declaration=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = all_cases()
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}")
    platforms = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    parser.add_argument("--platform", choices=platforms, default="cpu", help="the models' size")
    parser.add_argument("--lane", choices=LANES, default=LANES[0], help="how cases are judged")
    parser.add_argument("--record", action="store_true", help="write golden values, judge nothing")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for junit.xml, logs and curves"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - set(names):
        parser.error(f"no case {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    args.cases = args.cases or names
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    args = parse_args(argv)
    platform: dict[str, Any] = recipe.load(FOLDER / f"{args.platform}.yaml")
    os.environ.update(platform.get("ENV_VARS", {}))
    ranks = int(platform["RANKS_PER_NODE"])
    launch = forked(ranks) if args.platform == "cpu" else by_torchrun(ranks)
    with tempfile.TemporaryDirectory() as scratch:
        output = (args.output or Path(scratch)).absolute()
        output.mkdir(parents=True, exist_ok=True)
        data = write_text(output) if is_first_node() else output / "license"
        outcomes = []
        for name in args.cases:
            case = GoldenCase(name, args.platform)
            folder = output / name
            outcomes.append(attempt(case, args.lane, folder, data, launch, args.record))
            print(" ".join(outcomes[-1].row), flush=True)
        if is_first_node():
            suite = f"{args.platform}.{'record' if args.record else args.lane}"
            (output / "junit.xml").write_bytes(junit(outcomes, suite))
            header = ("case", "result", "last loss", "s", "")
            print(
                "", table(header, [outcome.row for outcome in outcomes], words=(0, 1, 4)), sep="\n"
            )
    return 1 if any(outcome.error for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
