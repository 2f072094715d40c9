"""What examples/recipes/README.md says is what the planner says of every recipe; run.sh's words."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scmoe.recipe import options
from megatron_scmoe.words import markdown_table

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"

spec = importlib.util.spec_from_file_location("recipes_plan", RECIPES / "plan.py")
assert spec is not None and spec.loader is not None
plan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan)


def run(arguments: str) -> subprocess.CompletedProcess[str]:
    command = [RECIPES / "run.sh", *shlex.split(arguments)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", plan.names())
def test_the_page_says_what_the_planner_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py"])
    page = (RECIPES / "README.md").read_text().splitlines()
    header, _, row = markdown_table(plan.HEADER, [plan.row(name)])
    assert header in page and row in page


@pytest.mark.parametrize("name", plan.names())
def test_a_twin_is_its_baseline_and_a_few_options(name: str) -> None:
    """One that changes no width, depth or batch."""
    baseline = options(RECIPES / name / "baseline.yaml")
    twin = options(RECIPES / name / "scmoe.yaml")
    assert twin[: len(baseline)] == baseline
    added = {option.split("=")[0] for option in twin[len(baseline) :]}
    allowed = {"--moe-router-topk", "--moe-router-bias-update-rate"}
    allowed |= {"--moe-shared-expert-intermediate-size"}
    assert {option for option in added if not option.startswith("--scmoe-")} <= allowed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "no recipe is named: one of gpt3-moe-xl"),
        ("gpt5", "no recipe gpt5: one of gpt3-moe-xl"),
        ("llama2-moe", "--data is missing"),
        ("llama2-moe --data", "--data has no value"),
        ("llama2-moe --data x", "--tokenizer is missing"),
        ("llama2-moe --data x --tokenizer y --nodes no", "--nodes no is no number of nodes"),
    ],
)
def test_mistakes_are_one_line(arguments: str, expected: str) -> None:
    done = run(arguments)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"run.sh: error: {expected}")


@pytest.mark.slow  # the planner is asked above; here by the script
def test_a_dry_run_shows_command_plan_and_machine() -> None:
    done = run("llama2-moe --data DATA --tokenizer DIR --nodes 2 --dry-run --lr 1e-4")
    assert done.returncode == 0, done.stderr
    command = next(line for line in done.stdout.splitlines() if "pretrain_gpt_scmoe.py" in line)
    assert "--nnodes 2 --nproc-per-node 8" in command and command.endswith("--lr 1e-4")
    assert "Best    pos1" in done.stdout and "GPUs 16" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 errors")
