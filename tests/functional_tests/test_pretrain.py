"""The entry script trains, saves and resumes on the CPU backend.

Resumed bitwise, with and without the distributed optimizer. One run is under torchrun, the others
are forked.
"""

import shlex
from pathlib import Path

import pytest

from .forked import launch_forked
from .launch import TINY_MODEL, TINY_MOE, Run, launch, read_scalars

CURVES = ("lm loss", "grad-norm")


def options(data: Path, folder: Path, *more: str) -> list[str]:
    """A tiny MoE run on the test data that writes its curves under `folder`."""
    data_options = ["--data-path", str(data), "--split", "80,10,10"]
    caches = ["--data-cache-path", str(data.parent / "cache")]
    writer = ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
    return [*TINY_MODEL, *TINY_MOE, *data_options, *caches, *writer, *more]


def train(data: Path, folder: Path, *more: str, nproc: int = 1) -> None:
    run = launch_forked(options(data, folder, *more), nproc, folder)
    assert run.returncode == 0, run.stdout[-3000:]


def curves(folder: Path, first: int = 1) -> dict[str, dict[int, float]]:
    """The curves from iteration `first` on.

    Not the loss lines: the host's second line of a run averages its first two iterations.
    """
    return {
        tag: {step: value for step, value in read_scalars(folder, tag).items() if step >= first}
        for tag in CURVES
    }


NO_DROPOUT = ["--attention-dropout", "0", "--hidden-dropout", "0"]
DISTRIBUTED = shlex.split(
    "--expert-model-parallel-size 2 --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather"
)


@pytest.fixture(scope="module")
def distributed_run(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory):
    """Six iterations on two ranks with everything overlapped, saved after three."""
    folder = tmp_path_factory.mktemp("distributed")
    logging = ["--log-throughput", "--log-memory-to-tensorboard", "--log-timers-to-tensorboard"]
    save = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
    run = launch(options(data_prefix, folder, *DISTRIBUTED, *logging, *save), nproc=2)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run, folder


@pytest.fixture(scope="module")
def single_run(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations on one rank, saved after three; no dropout, which differs by layout."""
    folder = tmp_path_factory.mktemp("single")
    save = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
    train(data_prefix, folder, *NO_DROPOUT, *save)
    return folder


def test_training_learns_and_reports(distributed_run: tuple[Run, Path]) -> None:
    run, folder = distributed_run
    assert sorted(run.log) == [1, 2, 3, 4, 5, 6]
    assert run.log[6]["lm loss"] < run.log[1]["lm loss"] - 0.5
    assert run.stdout.count("No CUDA device: CPU backend.") == 1
    assert "validation loss at iteration 3" in run.stdout
    assert "throughput per GPU (TFLOP/s/GPU)" in run.stdout
    for tag in ("mem-allocated-bytes", "throughput", "iteration-time"):
        assert read_scalars(folder, tag)[2] > 0


def test_nothing_but_the_host_talks(distributed_run: tuple[Run, Path]) -> None:
    """No tracebacks at exit, none of the messages that the table calls noise."""
    run, _ = distributed_run
    output = run.stdout + run.stderr
    for unwanted in ("Traceback", "not installed", "CPU RNG", "DEPRECATED", "destroy_process"):
        assert unwanted not in output


def test_resume_with_distributed_optimizer_is_exact(
    distributed_run: tuple[Run, Path], data_prefix: Path, tmp_path: Path
) -> None:
    folder = distributed_run[1]
    load = ["--load", str(folder / "checkpoints"), "--ckpt-step", "3"]
    train(data_prefix, tmp_path, *DISTRIBUTED, *load, nproc=2)
    assert curves(tmp_path) == curves(folder, first=4)


def test_resume_without_distributed_optimizer_is_exact(
    single_run: Path, data_prefix: Path, tmp_path: Path
) -> None:
    load = ["--load", str(single_run / "checkpoints"), "--ckpt-step", "3"]
    train(data_prefix, tmp_path, *NO_DROPOUT, *load)
    assert curves(tmp_path) == curves(single_run, first=4)


def test_two_pipeline_stages_continue_as_one(
    single_run: Path, data_prefix: Path, tmp_path: Path
) -> None:
    """The same checkpoint, with its optimizer, resharded over two stages."""
    load = ["--load", str(single_run / "checkpoints"), "--ckpt-step", "3"]
    parallel = [*NO_DROPOUT, "--pipeline-model-parallel-size", "2"]
    train(data_prefix, tmp_path, *load, *parallel, nproc=2)
    expected = curves(single_run, first=4)
    for tag in CURVES:
        assert curves(tmp_path)[tag] == pytest.approx(expected[tag], rel=1e-5)


def test_two_expert_ranks_compute_as_one(
    single_run: Path, data_prefix: Path, tmp_path: Path
) -> None:
    """One step from the same weights. Without the optimizer: from EP 1 to EP 2 the host splits it
    in two (dense and expert) and cannot load the one that was saved (optimizer.py:1578)."""
    load = ["--load", str(single_run / "checkpoints"), "--ckpt-step", "3", "--no-load-optim"]
    parallel = [*NO_DROPOUT, "--expert-model-parallel-size", "2", "--exit-interval", "4"]
    train(data_prefix, tmp_path, *load, *parallel, nproc=2)
    expected = curves(single_run, first=4)
    for tag in CURVES:
        assert curves(tmp_path)[tag] == pytest.approx({4: expected[tag][4]}, rel=1e-5)
