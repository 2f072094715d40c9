"""Runs that end before their time, under torchrun, and what becomes of them.

A rank is killed and the launcher starts again; a node is lost and half of the ranks go on; a
cluster asks the job to leave. --max-restarts goes on by itself, bitwise; elastic agents go from 4
ranks to 2 with the same global batch, losses within 1e-5; SIGTERM with --exit-signal-handler, to
the launcher and to everybody, with and without --async-save: saved, no traceback, gone on with
bitwise.
"""

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_scmoe.run.checkpoint import contents
from megatron_scmoe.run.checkpoint.record import read_record

from .forked import launch_forked, processes_of
from .launch import Launcher, free_port, read_scalars
from .layouts import CURVES, EP2, MODEL, TOLERANCE
from .text import write_text

# Their parts have cheap tests: a rank that dies test_lost_ranks.py, the store of a new attempt
# unit_tests/test_attempt.py, fewer ranks test_checkpoints.py, signals to writers
# unit_tests/test_writer.py.
pytestmark = pytest.mark.slow

ITERATIONS = 60
# The small model of the table of layouts, whose losses do not depend on near ties.
TRAIN = shlex.split(
    f"{MODEL} --num-layers 2 --moe-layer-freq ([0,1]*1) --micro-batch-size 2 {EP2} "
    f"--use-distributed-optimizer --scmoe-shortcut-position pos2 --train-iters {ITERATIONS} "
    "--save-interval 4 --tensorboard-log-interval 1"
)
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
ELASTIC = shlex.split(
    "--nnodes 1:2 --nproc-per-node 2 --max-restarts 3 --rdzv-backend c10d --rdzv-id job "
    "--local-addr localhost --rdzv-conf"
)
QUICKLY = "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=5"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    return ["--data-path", str(write_text(folder)), "--data-cache-path", str(folder / "cache")]


@pytest.fixture(scope="module")
def uninterrupted(
    data: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[int, float]]:
    """Curves with dropout, so that a random state that is lost is seen."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return go_on([*TRAIN, *DROPOUT, *data], folder)


def options(data: list[str], folder: Path, *more: str) -> list[str]:
    where = str(folder / "checkpoints")
    return [
        *TRAIN,
        *data,
        "--tensorboard-dir",
        str(folder),
        "--save",
        where,
        "--load",
        where,
        *more,
    ]


def go_on(arguments: list[str], folder: Path) -> dict[str, dict[int, float]]:
    """Curves of a run on two ranks until its end."""
    run = launch_forked([*arguments, "--tensorboard-dir", str(folder)], 2, folder)
    assert run.returncode == 0, run.stdout[-3000:]
    return {tag: read_scalars(folder, tag) for tag in CURVES}


def wait_for(what: str, condition: Callable[[], bool], *launchers: Launcher) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        for launcher in launchers:
            assert launcher.poll() is None, f"ended before {what}: {launcher.output()[-3000:]}"
        assert time.monotonic() < deadline, f"no {what}: {launchers[0].output()[-3000:]}"
        time.sleep(0.02)


def saved(folder: Path, world_size: int = 2) -> bool:
    """A checkpoint of that many ranks is finished."""
    try:
        iteration = contents.tracked_iteration(folder / "checkpoints")
    except ValueError:
        return False
    if not isinstance(iteration, int):
        return False
    record = read_record(folder / "checkpoints", iteration)
    return record is not None and record["options"]["world_size"] == world_size


def loaded(output: str) -> list[int]:
    """The iterations that a run went on from, in turn."""
    lines = [line for line in output.splitlines() if "successfully loaded checkpoint" in line]
    return [int(line.split("at iteration ")[1]) for line in lines]


def test_launcher_restarts_the_job_by_itself(
    data: list[str], uninterrupted: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    with Launcher(launcher, options(data, tmp_path, *DROPOUT), tmp_path / "output.txt") as job:
        wait_for("a checkpoint", lambda: saved(tmp_path), job)
        os.kill(job.ranks()[1], signal.SIGKILL)
        assert job.wait() == 0, job.output()[-3000:]
    (last,) = loaded(job.output())
    for tag in CURVES:
        curve = read_scalars(tmp_path, tag)
        assert set(range(last + 1, ITERATIONS + 1)) <= set(curve)
        assert curve == {step: uninterrupted[tag][step] for step in curve}


def test_half_of_the_ranks_go_on_with_the_same_global_batch(
    data: list[str], tmp_path: Path
) -> None:
    whole = go_on([*TRAIN, *data], tmp_path / "whole")
    # The node that the others meet at has to stay.
    here, there = (
        [*ELASTIC, f"{QUICKLY},is_host={host}", "--rdzv-endpoint", f"localhost:{port}"]
        for port in [free_port()]
        for host in (1, 0)
    )
    command = options(data, tmp_path)
    with (
        Launcher(here, command, tmp_path / "stays.txt") as stays,
        Launcher(there, command, tmp_path / "leaves.txt") as leaves,
    ):
        wait_for("a checkpoint of 4 ranks", lambda: saved(tmp_path, 4), stays, leaves)
        leaves.kill()
        assert stays.wait() == 0, stays.output()[-3000:]
    assert saved(tmp_path, world_size=2)
    output = stays.output() + leaves.output()  # rank 0 may have been on either
    last = loaded(output)[-1]
    assert last < ITERATIONS
    curve = read_scalars(tmp_path, "lm loss")
    assert set(range(last + 1, ITERATIONS + 1)) <= set(curve)
    # Rounding differences grow from step to step, as they do between any two layouts.
    steps = range(last + 1, min(last + 20, ITERATIONS) + 1)
    for step in steps:
        assert curve[step] == pytest.approx(whole["lm loss"][step], rel=TOLERANCE)


@pytest.mark.parametrize("how", ["launcher, async", "everybody, sync"])
def test_job_that_is_asked_to_leave_saves_first(
    data: list[str], uninterrupted: dict[str, dict[int, float]], tmp_path: Path, how: str
) -> None:
    """The signal goes to the launcher, which passes it on to all processes of its ranks, or to all
    processes as Slurm sends it, with a launcher that ignores it."""
    launcher = ["--standalone", "--nproc-per-node", "2"]
    more = [*DROPOUT, "--exit-signal-handler"]
    deaf = how.startswith("everybody")
    if deaf:
        launcher.append("--signals-to-handle=SIGINT")
    else:
        more.append("--async-save")
    output = tmp_path / "output.txt"
    with Launcher(launcher, options(data, tmp_path, *more), output, deaf) as job:
        wait_for("a checkpoint", lambda: saved(tmp_path), job)
        os.kill(job.pid, signal.SIGTERM)
        if deaf:
            for rank in job.ranks():
                os.killpg(rank, signal.SIGTERM)
        code = job.wait()
    assert "exiting program after receiving SIGTERM" in job.output(), job.output()[-3000:]
    # The launcher that obeys ends with a traceback of its own.
    assert (code, job.output().count("Traceback")) == ((0, 0) if deaf else (1, 1))
    assert f"{job.pid} got signal" in job.output() or deaf
    wait_for("end of the writers", lambda: not processes_of(output))

    checkpoints = tmp_path / "checkpoints"
    last = contents.tracked_iteration(checkpoints)
    assert (
        last == contents.newest_complete(checkpoints) == contents.saved_iterations(checkpoints)[-1]
    )
    assert max(read_scalars(tmp_path, CURVES[0])) == last < ITERATIONS
    curves = go_on(options(data, tmp_path, *DROPOUT), tmp_path / "again")
    for tag in CURVES:
        assert curves[tag] == {i: v for i, v in uninterrupted[tag].items() if i > last}
