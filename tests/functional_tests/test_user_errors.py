"""A mistake on the command line ends in one line from one rank, before any rank waits."""

from pathlib import Path

import pytest

from .forked import launch_forked
from .launch import SCRIPT, TINY_MODEL, launch

MOCK = [*TINY_MODEL, "--mock-data"]


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(f"{SCRIPT}: error: ")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([*MOCK, "--no-such-option"], "unrecognized arguments: --no-such-option"),
        ([*TINY_MODEL, "--data-path", "/nowhere/corpus"], "no dataset /nowhere/corpus.bin"),
        ([*MOCK, "--global-batch-size", "3"], "use for example --global-batch-size 4"),
        (
            [*MOCK, "--num-attention-heads", "5"],
            "check --hidden-size, --num-attention-heads",
        ),
        (
            [
                *MOCK,
                "--tokenizer-type",
                "GPTSentencePieceTokenizer",
                "--tokenizer-model",
                "/no.model",
            ],
            "/no.model",
        ),
    ],
)
def test_one_line(options: list[str], expected: str, tmp_path: Path) -> None:
    run = launch_forked(options, 1, tmp_path)
    assert run.returncode == 2, run.stdout
    assert "Traceback" not in run.stdout
    (line,) = error_lines(run.stdout)
    assert expected in line


def test_empty_split(data_prefix: Path, tmp_path: Path) -> None:
    """The host would count epochs of nothing forever."""
    options = [*TINY_MODEL, "--data-path", str(data_prefix), "--split", "98,1,1"]
    run = launch_forked(options, 1, tmp_path)
    assert run.returncode == 2, run.stdout
    (line,) = error_lines(run.stdout)
    assert "--split 98,1,1 leaves the" in line


@pytest.mark.slow  # the line has its case in unit_tests/test_every_refusal.py
def test_too_few_ranks() -> None:
    """Under torchrun: both ranks leave, one of them speaks."""
    run = launch([*MOCK, "--num-layers", "4", "--pipeline-model-parallel-size", "4"], nproc=2)
    assert run.returncode != 0
    # On a machine so busy that rank 0 comes 20 s after rank 1 both say it.
    (line,) = set(error_lines(run.stderr))
    assert "The number of ranks, 2, is no multiple" in line
