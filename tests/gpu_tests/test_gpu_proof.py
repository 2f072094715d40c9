"""The parts of the proof that say whether the package is right, as tests: `make test-gpu`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu_proof.parts import PARTS
from tools.gpu_proof.results import read_findings

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("part", [name for name, part in PARTS.items() if part.correctness])
def test_part(part: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu_proof", "--only", part, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    findings = read_findings(tmp_path)
    failed = [finding.line() for finding in findings if finding.outcome == "failed"]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
    assert any(finding.outcome == "passed" for finding in findings)
