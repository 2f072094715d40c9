"""Whole training runs: golden losses, overlap changes no bit, `none` is stock Megatron.

`python -m tests.functional_tests.test_scmoe` records the golden losses anew.
"""

import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from . import stock_pretrain
from .forked import launch_forked
from .launch import REPOSITORY, TINY_MODEL, TINY_MOE, read_scalars
from .text import write_text

GOLDEN = REPOSITORY / "tests" / "golden" / "license_pos2_ep2.txt"
GOLDEN_TOLERANCE = 1e-4  # relative: other processors sum in another order
CURVES = ("lm loss", "load_balancing_loss", "grad-norm")

# Real text, one token per byte; dense layer first in every pair.
TEXT_MODEL = shlex.split(
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 "
    "--seq-length 64 --max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 16 "
    "--lr 5e-3 --train-iters 10 --log-interval 1 --eval-interval 10 --eval-iters 1 "
    "--num-workers 0 --tokenizer-type NullTokenizer --vocab-size 256 "
    "--make-vocab-size-divisible-by 64 --seed 7 --split 90,5,5"
)
TEXT_MOE = shlex.split(
    "--num-experts 8 --moe-layer-freq ([0,1]*2) --moe-ffn-hidden-size 48 --moe-router-topk 1 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
    "--moe-token-dispatcher-type alltoall --expert-model-parallel-size 2 "
    "--use-distributed-optimizer"
)


@pytest.fixture(scope="module")
def text_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def train(
    folder: Path, *options: str, main: Callable[[], None] | None = None
) -> dict[str, dict[int, float]]:
    """Curves of a run on two ranks, in full float32, by name and iteration."""
    writer = ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
    arguments = [*options, "--data-cache-path", str(folder / "cache"), *writer]
    run = launch_forked(arguments, 2, folder, main=main)
    assert run.returncode == 0, run.stdout[-3000:]
    return {tag: read_scalars(folder, tag) for tag in CURVES}


def scmoe_options(text_prefix: Path) -> list[str]:
    options = [*TEXT_MODEL, *TEXT_MOE, "--data-path", str(text_prefix)]
    return [*options, "--scmoe-shortcut-position", "pos2"]


@pytest.fixture(scope="module")
def overlapped_run(
    text_prefix: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[int, float]]:
    return train(tmp_path_factory.mktemp("overlapped"), *scmoe_options(text_prefix))


def test_golden_loss(overlapped_run: dict[str, dict[int, float]]) -> None:
    """Recorded losses, `step loss` a line; a change of numerics must change this file."""
    recorded = dict(line.split() for line in GOLDEN.read_text().splitlines())
    golden = {int(step): float(loss) for step, loss in recorded.items()}
    assert overlapped_run["lm loss"] == pytest.approx(golden, rel=GOLDEN_TOLERANCE)


def test_overlap_changes_no_bit(
    overlapped_run: dict[str, dict[int, float]], text_prefix: Path, tmp_path: Path
) -> None:
    options = [*scmoe_options(text_prefix), "--no-scmoe-overlap"]
    assert train(tmp_path, *options) == overlapped_run


def test_resume_is_exact_and_restores_our_options(
    overlapped_run: dict[str, dict[int, float]], text_prefix: Path, tmp_path: Path
) -> None:
    """Stopped after 5 iterations and gone on from the checkpoint's options: bit for bit the curve
    of the run that never stopped."""
    checkpoints = str(tmp_path / "checkpoints")
    stopped = ["--save", checkpoints, "--save-interval", "5", "--exit-interval", "5"]
    train(tmp_path / "stopped", *scmoe_options(text_prefix), *stopped)

    options = [*TEXT_MODEL, *TEXT_MOE, "--data-path", str(text_prefix), "--num-layers", "6"]
    resumed = train(tmp_path / "resumed", *options, "--load", checkpoints, "--use-checkpoint-args")
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        prefix = write_text(Path(name))
        losses = train(Path(name) / "run", *scmoe_options(prefix))["lm loss"]
    GOLDEN.write_text("".join(f"{step} {loss:.7f}\n" for step, loss in losses.items()))
