"""Whatever tests start sees no GPU, also where there is one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed_utils import run_distributed

from .forked import launch_forked
from .launch import REPOSITORY, Launcher, launch, launch_rank

VARIABLE = "CUDA_VISIBLE_DEVICES"
PRINT = f"import os; print('sees', repr(os.environ.get({VARIABLE!r})))"


def devices() -> tuple[str | None, bool]:
    return os.environ.get(VARIABLE), torch.cuda.is_available()


def print_devices() -> None:
    print("sees", repr(devices()[0]))


@pytest.mark.parametrize(
    ("module", "gpu_tests", "expected"),
    [
        ("tests", None, "sees ''"),
        ("tests", "0", "sees ''"),
        ("tests", "1", "sees '0,1'"),
        ("tests.conftest", None, "sees ''"),
    ],
)
def test_devices_are_hidden_before_torch_is_imported(
    monkeypatch: pytest.MonkeyPatch, module: str, gpu_tests: str | None, expected: str
) -> None:
    """Unless the tests of the GPU are asked for."""
    monkeypatch.setenv(VARIABLE, "0,1")  # as Slurm sets it
    monkeypatch.delenv("SCMOE_GPU_TESTS", raising=False)
    if gpu_tests is not None:
        monkeypatch.setenv("SCMOE_GPU_TESTS", gpu_tests)
    before = "import sys, tests; assert 'torch' not in sys.modules\n"
    command = [sys.executable, "-c", f"{before}import {module}\n{PRINT}"]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert expected in done.stdout


def test_this_process() -> None:
    assert devices() == ("", False)


def test_ranks_of_a_test() -> None:
    assert run_distributed(devices, 2) == [("", False)] * 2


def test_forked_ranks_of_the_entry_script(tmp_path: Path) -> None:
    run = launch_forked([], 2, tmp_path, main=print_devices)
    assert run.stdout.count("sees ''") == 2


def by_torchrun(script: Path) -> str:
    return launch([], 1, str(script)).stdout


def by_itself(script: Path) -> str:
    return launch_rank([], script=str(script)).stdout


def in_the_background(script: Path) -> str:
    log = script.with_suffix(".log")
    options = ["--standalone", "--nproc-per-node", "1"]
    with Launcher(options, [], log, script=str(script)) as job:
        assert job.wait() == 0
    return log.read_text()


@pytest.mark.parametrize("start", [by_torchrun, by_itself, in_the_background])
def test_launched_ranks(start: Callable[[Path], str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRINT)
    assert "sees ''" in start(script)
