"""Same seed, same layout: bitwise the same run, and after a restart too, with dropout on. Across
layouts: the same data in the same order. docs/reproducibility.md says where more cannot hold.

Dropout, load-balancing loss and expert bias; EP 2 x DP 2 overlapped, PP 2 interleaved, TP 2 x EP 2;
the samples and their order from the start and from another layout's checkpoint.
"""

import hashlib
import os
import shlex
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from .forked import Hook, launch_forked
from .launch import read_scalars
from .layouts import CURVES, EP2, EXPERT_BIAS, MODEL, PP2, TP2, Curves
from .text import write_text

SLOW = pytest.mark.slow  # other layouts of the same test
BATCH = 16  # samples of an iteration
# The expert bias is a buffer that training changes.
TRAIN = shlex.split(
    f"{MODEL} {EXPERT_BIAS} --use-distributed-optimizer --scmoe-shortcut-position pos2 "
    f"--global-batch-size {BATCH} --train-iters 6 --tensorboard-log-interval 1"
)
# Depends on which tokens a rank has.
DROPOUT = shlex.split(
    "--attention-dropout 0.1 --hidden-dropout 0.1 --micro-batch-size 2 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
)
INTERLEAVED = f"{PP2} --num-layers-per-virtual-pipeline-stage 2"
TP2_EP2 = f"{TP2} --expert-tensor-parallel-size 1 {EP2}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    return ["--data-path", str(write_text(folder)), "--data-cache-path", str(folder / "cache")]


def train(folder: Path, ranks: int, *options: str, hook: Hook | None = None) -> Curves:
    arguments = [*TRAIN, *options, "--tensorboard-dir", str(folder)]
    run = launch_forked(arguments, ranks, folder, hook=hook)
    assert run.returncode == 0, run.stdout[-3000:]
    return {tag: read_scalars(folder, tag) for tag in CURVES}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(4, f"{EP2} --overlap-grad-reduce --overlap-param-gather", marks=SLOW),
        (2, INTERLEAVED),
        pytest.param(2, TP2_EP2, marks=SLOW),
    ],
    ids=["EP 2, expert DP 2", "PP 2, interleaved", "TP 2, EP 2"],
)
def test_twice_and_after_a_restart_bitwise(
    data: list[str], tmp_path: Path, ranks: int, layout: str
) -> None:
    options = [*data, *DROPOUT, *shlex.split(layout)]
    checkpoints = str(tmp_path / "checkpoints")
    once = train(tmp_path / "once", ranks, *options, "--save", checkpoints, "--save-interval", "3")
    assert train(tmp_path / "twice", ranks, *options) == once

    load = ["--load", checkpoints, "--ckpt-step", "3"]
    rest = {tag: {i: value for i, value in once[tag].items() if i > 3} for tag in CURVES}
    assert train(tmp_path / "resumed", ranks, *options, *load) == rest
    if layout == INTERLEAVED:  # without the random state dropout drops something else
        assert train(tmp_path / "fresh", ranks, *options, *load, "--no-load-rng") != rest


def record_batches(folder: Path) -> None:
    """A hook: every rank writes what it trains on, a line a sample: data rank, digest."""
    from megatron.core import parallel_state

    import pretrain_gpt_scmoe as script

    get_batch = script.get_batch

    def recording(*args: object) -> script.Batch:
        batch = get_batch(*args)
        for key in ("tokens", "labels"):  # of the first and of the last pipeline stage
            samples: Tensor | None = batch[key]
            if samples is None:
                continue
            tensor_rank = parallel_state.get_tensor_model_parallel_rank()
            data_rank = parallel_state.get_data_parallel_rank()
            with (folder / f"{key} {tensor_rank} {data_rank}").open("a") as file:
                for sample in samples.numpy():
                    file.write(hashlib.sha256(sample.tobytes()).hexdigest() + "\n")
        return batch

    script.get_batch = recording


def samples_in_order(folder: Path, key: str, tensor_rank: int, micro_batch: int) -> list[str]:
    """The samples of all data ranks: a micro-batch of each in turn."""
    names = sorted(
        folder.glob(f"{key} {tensor_rank} *"), key=lambda path: int(path.name.split()[2])
    )
    ranks = [path.read_text().split() for path in names]
    assert ranks, sorted(os.listdir(folder))
    assert len({len(samples) for samples in ranks}) == 1
    steps = range(0, len(ranks[0]), micro_batch)
    return [sample for i in steps for samples in ranks for sample in samples[i : i + micro_batch]]


def train_on(
    folder: Path, ranks: int, micro_batch: int, *options: str, tensor_ranks: int = 1
) -> tuple[list[str], list[str]]:
    """Digests of the tokens and of the labels of a run, in the order of training."""
    batches = folder / "batches"
    batches.mkdir(parents=True)
    size = ["--micro-batch-size", str(micro_batch)]
    train(folder, ranks, *options, *size, hook=partial(record_batches, batches))
    tokens, labels = (
        [samples_in_order(batches, key, rank, micro_batch) for rank in range(tensor_ranks)]
        for key in ("tokens", "labels")
    )
    assert all(other == tokens[0] for other in tokens)
    assert all(other == labels[0] for other in labels)
    return tokens[0], labels[0]


@pytest.fixture(scope="module")
def one_process(
    data: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[list[str], list[str]]]:
    """Checkpoints and batches of a run on one rank, with a whole batch at once."""
    folder = tmp_path_factory.mktemp("one")
    save = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
    tokens, labels = train_on(folder, 1, BATCH, *data, *save)
    assert len(set(tokens)) == len(tokens) == len(labels) == 6 * BATCH
    return folder / "checkpoints", (tokens, labels)


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "layout"),
    [
        pytest.param(1, 2, "", marks=SLOW),
        (2, 2, EP2),
        pytest.param(2, 1, TP2_EP2, marks=SLOW),
        pytest.param(4, 2, f"{INTERLEAVED} {EP2}", marks=SLOW),
    ],
    ids=["gradient accumulation", "DP 2, EP 2", "TP 2, EP 2", "PP 2, interleaved, DP 2"],
)
def test_every_layout_trains_on_the_same_samples_in_the_same_order(
    data: list[str],
    one_process: tuple[Path, tuple[list[str], list[str]]],
    tmp_path: Path,
    ranks: int,
    micro_batch: int,
    layout: str,
) -> None:
    """From the start, and from the checkpoint of another layout."""
    checkpoints, (tokens, labels) = one_process
    options = [*data, *shlex.split(layout)]
    split = {"tensor_ranks": 2 if TP2 in layout else 1}
    whole = train_on(tmp_path / "whole", ranks, micro_batch, *options, **split)
    assert whole == (tokens, labels)
    load = ["--load", str(checkpoints), "--ckpt-step", "3"]
    rest = train_on(tmp_path / "rest", ranks, micro_batch, *options, *load, **split)
    assert rest == (tokens[3 * BATCH :], labels[3 * BATCH :])
