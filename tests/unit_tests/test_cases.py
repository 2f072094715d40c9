"""The runner of test_cases/ sees what its lanes are for; every case is sound on every platform."""

import ast
import multiprocessing.forkserver
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_scmoe.planner.plan_arguments import parse_command_line
from tests.functional_tests import cases
from tests.functional_tests.cases import CaseError, GoldenCase, attempt, judge, junit
from tests.functional_tests.launch import REPOSITORY, Run

SCMOE, RESUME, RESHARD = map(GoldenCase, ("pos2_alltoall", "resume", "reshard"))


class Trainer:
    """Writes what a run leaves behind: golden losses times `factors` of its runs, in turn."""

    def __init__(self, *factors: float) -> None:
        self.factors = [1.0, *factors]

    def __call__(self, options: list[str], folder: Path) -> Run:
        where = dict(option.split("=", 1) for option in options if "=" in option)
        start = 0
        checkpoints = Path(where.get("--save", where.get("--load", "nowhere")))
        if (tracker := checkpoints / "latest_checkpointed_iteration.txt").exists():
            start = int(tracker.read_text())
        elif "--save" in where:
            for iteration in (5, 10):
                (checkpoints / f"iter_{iteration:07}").mkdir(parents=True)
            tracker.write_text("10")
        factor = self.factors.pop(0)
        with SummaryWriter(where["--tensorboard-dir"]) as writer:
            for step, loss in cases.read_golden(SCMOE).items():
                if step > start:
                    for tag in cases.CURVES:
                        writer.add_scalar(tag, loss * factor, step)
        return Run(0, "", "")


@pytest.mark.parametrize(
    ("case", "lane", "factor", "expected"),
    [
        (SCMOE, "exact", 1.0, None),
        (SCMOE, "exact", 1 + 1e-6, "not bitwise the first"),
        (RESUME, "approximate", 1.0, None),
        (RESUME, "approximate", 1 + 1e-6, "not bitwise those before"),
        (RESHARD, "approximate", 1 + 5e-5, None),
        (RESHARD, "approximate", 1 + 2e-4, "after the checkpoint: loss"),
        (RESHARD, "approximate", float("nan"), "after the checkpoint: loss nan"),
    ],
)
def test_a_second_run_is_judged(
    case: GoldenCase, lane: str, factor: float, expected: str | None, tmp_path: Path
) -> None:
    if expected is None:
        judge(case, lane, tmp_path, tmp_path, Trainer(factor))
    else:
        with pytest.raises(CaseError, match=expected):
            judge(case, lane, tmp_path, tmp_path, Trainer(factor))


@pytest.mark.parametrize(("factor", "good"), [(1 + 5e-5, True), (1 - 2e-4, False)])
def test_golden_values_have_a_tolerance(factor: float, good: bool, tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.factors = [factor]
    outcome = attempt(SCMOE, "approximate", tmp_path, tmp_path, trainer, record=False)
    assert (outcome.error == "") is good


def test_a_run_that_fails_and_one_without_golden_values(tmp_path: Path) -> None:
    failing = attempt(
        SCMOE,
        "approximate",
        tmp_path / "failing",
        tmp_path,
        lambda *_: Run(2, "a\nerror: no such option\n", ""),
        record=False,
    )
    never_run = attempt(
        GoldenCase("pos2_alltoall", "h100"),
        "approximate",
        tmp_path,
        tmp_path,
        Trainer(),
        record=False,
    )
    assert failing.row[1:3] == ("FAILED", "-")
    assert failing.row[4] == "exit code 2: error: no such option"
    assert "record it with --record" in never_run.error
    suite = ElementTree.fromstring(junit([failing, never_run], "cpu.approximate"))
    assert suite.get("failures") == suite.get("tests") == "2"
    messages = [child.get("message") for child in suite.iter("failure")]
    assert messages == [failing.row[4], never_run.row[4]]


def test_what_is_recorded_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = cases.read_golden(SCMOE)
    shutil.copytree(cases.FOLDER / SCMOE.name, tmp_path / SCMOE.name)
    monkeypatch.setattr(cases, "FOLDER", tmp_path)
    cases.write_golden(SCMOE, golden)
    assert cases.read_golden(SCMOE) == golden
    assert set(cases.all_cases()) == {SCMOE.name}


@pytest.fixture
def own_algorithms() -> Iterator[None]:
    """The host switches torch to deterministic ones while it validates --deterministic-mode."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("own_algorithms")
@pytest.mark.parametrize("name", cases.all_cases())
def test_the_planner_takes_every_case_on_a_node_of_eight(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be refused on H100s is found without one."""
    case = GoldenCase(name, "h100")
    assert GoldenCase(name).golden.exists()
    shares = [f"--cluster-{of}-efficiency=0.5" for of in ("flops", "bandwidth")]
    cluster = ["--cluster-preset", "h100-infiniband", "--cluster-nodes", "1", *shares]
    for second in {False, case.reshards}:
        options = case.options(tmp_path, tmp_path, second)
        monkeypatch.setattr(sys, "argv", ["plan_overlap.py", *options, *cluster])
        args, _, _ = parse_command_line()
        assert args.world_size == 8


def imported(file: Path) -> list[str]:
    """Modules that a file names in its imports; of `from tests import x` also tests.x."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_an_image_without_pytest_runs_the_cases() -> None:
    """With all that the server of forked ranks imports."""
    preloaded = multiprocessing.forkserver._forkserver._preload_modules  # type: ignore[attr-defined]
    modules, seen = [cases.__name__, *preloaded], set[str]()
    while modules:
        module = modules.pop()
        file = REPOSITORY / f"{module.replace('.', '/')}.py"
        if module in seen or not module.startswith("tests.") or not file.exists():
            continue
        seen.add(module)
        modules += (names := imported(file))
        assert not {"pytest", "hypothesis"} & {name.split(".")[0] for name in names}, file
    assert {"tests.limits", "tests.forkserver", "tests.models"} <= seen
