"""Parts of the proof on a GPU, rehearsed on the CPU, in an environment that has what travels.

It sees the standard library, torch with what torch needs, the packages of the bundle and the
project: what is missing in the list is missing here.
"""

import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from megatron_scmoe.overlap.collectives import PerTensor
from tools.gpu_proof.bundle import PACKAGES, TRANSFORMER_ENGINE
from tools.gpu_proof.environment import make
from tools.gpu_proof.parts import PARTS
from tools.gpu_proof.results import ProofFinding, read_findings

from .launch import REPOSITORY

# tests/unit_tests/test_gpu_proof.py runs the same program on toys.
pytestmark = pytest.mark.slow

ENGINE = [name.partition("==")[0] for name in TRANSFORMER_ENGINE]
ENGINE += ["transformer-engine-cu13", "transformer-engine-torch"]


def installed(names: list[str]) -> bool:
    return not set(names) - {
        (package.name or "").lower().replace("_", "-") for package in metadata.distributions()
    }


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [python, *arguments], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("environment"), names=PACKAGES)


def rehearse(python: Path, output: Path, part: str) -> list[ProofFinding]:
    done = run(
        python, "-m", "tools.gpu_proof", "--device", "cpu", "--only", part, "--output", output
    )
    log = output / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-3000:]
    return read_findings(output)


def test_everything_imports(python: Path) -> None:
    modules = {f"tools.gpu_proof.{part.module or name}" for name, part in PARTS.items()}
    names = ", ".join(["pretrain_gpt_scmoe", *sorted(modules)])
    done = run(python, "-c", f"import {names}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(python, "-c", "import tensorboard").returncode != 0  # it is empty otherwise


@pytest.mark.skipif(
    not installed(ENGINE), reason="the wheels of Transformer Engine are not at hand"
)
def test_transformer_engine_imports(tmp_path: Path) -> None:
    python = make(tmp_path, names=[*PACKAGES, *ENGINE])
    code = "import torch, transformer_engine.pytorch"
    done = run(python, "-c", code)
    assert done.returncode == 0, done.stderr[-3000:]


def test_several_ranks(python: Path, tmp_path: Path) -> None:
    findings = {finding.name: finding for finding in rehearse(python, tmp_path / "out", "ranks")}
    for layout in ("EP 2", "EP 4", "EP 2, all-gather"):
        compared = findings[f"{layout}: losses of the CPU"]
        assert compared.outcome == "passed"
        assert compared.values["losses"] == 8
        assert compared.values["relative_difference"] < 1e-6
        assert findings[f"{layout}: uneven splits"].outcome == "passed"


def test_main_job(python: Path, tmp_path: Path) -> None:
    findings = rehearse(python, tmp_path / "out", "main_job")
    passed = {finding.name for finding in findings if finding.outcome == "passed"}
    assert {
        "local: losses fall",
        "async save changes nothing",
        "resume is bitwise",
        "resume from an async save is bitwise",
        "two gates: losses fall",
        "experts at home: losses fall",
    } <= passed
    if hasattr(PerTensor, "moves"):
        assert {"exchanges that travel change nothing", "slots are measured"} <= passed
    waits = [finding.note for finding in findings if finding.name == "host wait"]
    assert any("megatron/core/timers.py" in site for site in waits), waits
