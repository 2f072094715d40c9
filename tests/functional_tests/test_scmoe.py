"""Whole training runs: golden losses, overlap changes no bit, `none` is stock Megatron.

The golden losses are those of test_cases/; `python -m tests.functional_tests.cases --record`
records them anew.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from . import stock_pretrain
from .cases import CURVES, Curves, GoldenCase, all_cases, compare_with_golden, forked, judge
from .forked import launch_forked
from .launch import TINY_MODEL, TINY_MOE, read_scalars
from .text import write_text

SCMOE = GoldenCase("pos2_alltoall")
POSITION = "--scmoe-shortcut-position=pos2"
# Of positions and dispatchers a part, which sees the same mistakes; `resume` is a test below.
BY_COMMAND_ONLY = {"pos1_allgather", "pos2_allgather", "pos3_alltoall", "resume"}
NOT_SLOW = {"moepp", "reshard"}  # what the others leave out: experts at home, another layout
OTHERS = [
    pytest.param(name, marks=[] if name in NOT_SLOW else pytest.mark.slow)
    for name in all_cases()
    if name not in BY_COMMAND_ONLY | {SCMOE.name}
]


@pytest.fixture(scope="module")
def text_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def train(folder: Path, *options: str, main: Callable[[], None] | None = None) -> Curves:
    """Curves of a run on two ranks, in full float32, by name and iteration."""
    writer = ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
    arguments = [*options, "--data-cache-path", str(folder / "cache"), *writer]
    run = launch_forked(arguments, 2, folder, main=main)
    assert run.returncode == 0, run.stdout[-3000:]
    return {tag: read_scalars(folder, tag) for tag in CURVES}


@pytest.fixture(scope="module")
def overlapped_run(text_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    folder = tmp_path_factory.mktemp("overlapped")
    return train(folder, *SCMOE.options(folder, text_prefix))


def test_golden_loss(overlapped_run: Curves) -> None:
    """Recorded losses; a change of numerics must change the file."""
    compare_with_golden(SCMOE, overlapped_run)


@pytest.mark.parametrize("name", OTHERS)
def test_case(name: str, text_prefix: Path, tmp_path: Path) -> None:
    judge(GoldenCase(name), "approximate", tmp_path, text_prefix, forked(2))


def test_overlap_changes_no_bit(overlapped_run: Curves, text_prefix: Path, tmp_path: Path) -> None:
    options = [*SCMOE.options(tmp_path, text_prefix), "--no-scmoe-overlap"]
    assert train(tmp_path, *options) == overlapped_run


def test_resume_is_exact_and_restores_our_options(
    overlapped_run: Curves, text_prefix: Path, tmp_path: Path
) -> None:
    """Stopped after 5 iterations and gone on from the checkpoint's options: bit for bit the curve
    of the run that never stopped."""
    checkpoints = str(tmp_path / "checkpoints")
    options = SCMOE.options(tmp_path, text_prefix)
    train(tmp_path / "stopped", *options, "--save", checkpoints, "--exit-interval", "5")

    options.remove(POSITION)
    load = ["--load", checkpoints, "--use-checkpoint-args"]
    resumed = train(tmp_path / "resumed", *options, "--num-layers", "6", *load)
    for tag in CURVES:
        assert resumed[tag] == {i: v for i, v in overlapped_run[tag].items() if i > 5}
    said = (tmp_path / "resumed" / "rank0.txt").read_text()
    (overruled,) = re.findall("--use-checkpoint-args overrules (.*)", said)
    assert "--num-layers 6 by " in overruled and "--hidden-size" not in overruled


def test_none_is_stock_megatron(data_prefix: Path, tmp_path: Path) -> None:
    """Same seed, same options: the same curves, bit for bit. With grouped experts, which stock
    Megatron's local layers do not have, see test_grouped_experts.py."""
    options = [*TINY_MODEL, *TINY_MOE, "--data-path", str(data_prefix), "--split", "80,10,10"]
    options.remove("--moe-grouped-gemm")
    options += shlex.split(
        "--moe-shared-expert-intermediate-size 48 --expert-model-parallel-size 2 "
        "--attention-dropout 0.1 --hidden-dropout 0.1"
    )
    ours = train(tmp_path / "ours", *options, "--scmoe-shortcut-position", "none")
    stock = train(tmp_path / "stock", *options, main=stock_pretrain.main)
    assert ours == stock
