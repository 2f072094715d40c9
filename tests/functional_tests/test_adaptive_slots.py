"""A run chooses its expert slots, keeps them in its checkpoint, and loses no bit by it.

The slots follow from times that all ranks share. tools/overlap_report.py prints the hidden share of
the log.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_scmoe.commands import overlap_report
from megatron_scmoe.words import percent

from .forked import launch_forked
from .launch import TINY_MODEL, TINY_MOE, Run, read_scalars

CURVES = ("lm loss", "grad-norm")
CHOICE = "expert slot "
SLOW_DOWN = "dense compute beside exchanges"


def train(data: Path, folder: Path, *options: str) -> Run:
    arguments = [*TINY_MODEL, *TINY_MOE, "--moe-layer-freq", "([0,1]*1)", "--eval-iters", "0"]
    arguments += ["--scmoe-shortcut-position", "pos2", "--data-path", str(data)]
    arguments += ["--data-cache-path", str(data.parent / "cache"), "--split", "100,0,0"]
    arguments += ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
    arguments += shlex.split("--expert-model-parallel-size 2 --train-iters 8 --save-interval 8")
    run = launch_forked([*arguments, *options], 2, folder)
    assert run.returncode == 0, run.stdout[-3000:]
    return run


def choices(run: Run) -> list[str]:
    return [line for line in run.stdout.splitlines() if line.startswith(CHOICE)]


@pytest.fixture(scope="module")
def chosen(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("chosen")
    trace = ["--scmoe-trace-dir", str(folder / "traces"), "--profile-step-start", "7"]
    save = ["--save", str(folder / "checkpoints"), "--profile-step-end", "9"]
    return train(data_prefix, folder, *trace, *save), folder


def slots_of(folder: Path) -> list[dict[int, float]]:
    tags = ("expert-slot-forward", "expert-slot-backward")
    return [read_scalars(folder, tag) for tag in tags]


def test_choice_is_made_once_and_said_once(chosen: tuple[Run, Path]) -> None:
    run, folder = chosen
    assert [" ".join(line.split()[:4]) for line in choices(run)] == [
        f"{CHOICE}{slots[8]:.0f} {direction}"
        for slots, direction in zip(slots_of(folder), ("forward", "backward"), strict=True)
    ]
    for slots in slots_of(folder):
        assert slots[1] == slots[4] == 1  # before
        assert len({slots[i] for i in (5, 6, 7, 8)}) == 1


def test_metrics_and_trace(chosen: tuple[Run, Path]) -> None:
    run, folder = chosen
    tags = ("a2a-seconds", "a2a-hidden-seconds", "a2a-exposed-seconds")
    total, hidden, exposed = (read_scalars(folder, tag)[8] for tag in tags)
    assert total == pytest.approx(hidden + exposed, rel=1e-5) and total > 0
    assert read_scalars(folder, "a2a-host-wait-seconds")[8] > 0
    # The traced iterations 7 and 8 are not those that run without overlap.
    assert SLOW_DOWN not in run.stdout
    assert read_scalars(folder, "expert-load-imbalance")[8] >= 1
    assert run.stdout.count("expert load imbalance: ") == 8
    for rank in range(2):
        trace = json.loads((folder / "traces" / f"rank-{rank:05d}.json").read_text())
        steps = [event["args"] for event in trace["traceEvents"] if event["ph"] == "X"]
        assert {step["iteration"] for step in steps} == {7, 8}
        assert {"dispatch", "combine", "experts", "core_attention"} <= {s["step"] for s in steps}


def test_report_of_a_real_trace(
    chosen: tuple[Run, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's share is that of the log, over the traced iterations."""
    _, folder = chosen
    assert overlap_report.main([str(folder / "traces")]) == 0
    said = capsys.readouterr().out
    in_flight, hidden = (
        sum(read_scalars(folder, tag)[iteration] for iteration in (7, 8))
        for tag in ("a2a-seconds", "a2a-hidden-seconds")
    )
    # Times of a trace are whole quarters of a microsecond.
    shares = (percent(hidden / in_flight + error) for error in (-1e-3, 0, 1e-3))
    assert any(said.startswith(f"Hidden      {share} of") for share in shares)
    assert re.search(r"^Gradients +data parallelism sends .* kB are the shared", said, re.MULTILINE)


def test_no_bit_is_lost(chosen: tuple[Run, Path], data_prefix: Path, tmp_path: Path) -> None:
    """Against fixed slots and no tracing; iterations 6 to 8 run without overlap."""
    run = train(data_prefix, tmp_path, "--scmoe-expert-slot", "5,0")
    assert choices(run) == []
    (said,) = (line for line in run.stdout.splitlines() if line.startswith(SLOW_DOWN))
    slow_down = read_scalars(tmp_path, "a2a-compute-slowdown")
    assert list(slow_down) == [8] and slow_down[8] > 0
    assert said.startswith(f"{SLOW_DOWN} takes {slow_down[8]:.3f} of its time alone backward")
    # They are no part of what the run shows.
    assert list(read_scalars(tmp_path, "a2a-hidden-share")) == [1, 2, 3, 4, 5]
    assert [slots[8] for slots in slots_of(tmp_path)] == [5, 0]
    for tag in CURVES:
        assert read_scalars(tmp_path, tag) == read_scalars(chosen[1], tag)


def test_checkpoint_keeps_the_choice(
    chosen: tuple[Run, Path], data_prefix: Path, tmp_path: Path
) -> None:
    load = ["--load", str(chosen[1] / "checkpoints"), "--train-iters", "14"]
    run = train(data_prefix, tmp_path / "resumed", *load)
    forward, backward = (slots[8] for slots in slots_of(chosen[1]))
    assert f"measured, {forward:.0f} forward and {backward:.0f} backward" in run.stdout
    assert choices(run) == []
    assert [slots[9] for slots in slots_of(tmp_path / "resumed")] == [forward, backward]
    again = train(data_prefix, tmp_path / "again", *load, "--scmoe-remeasure-slot")
    assert len(choices(again)) == 2
