"""What a run prints about its size: parameters, memory, FLOPs.

Parameters of every stage, throughput in the log.
"""

import re
import shlex
from pathlib import Path

import pytest

from .forked import launch_forked
from .launch import TINY_MODEL, TINY_MOE, read_scalars

SIZE = re.compile(r"Theoretical model size: ([\d,]+) parameters, ([\d,]+) activated per token")
STAGE = re.compile(
    r"Theoretical memory footprints: weight and optimizer=([\d.]+) MB, activation=([\d.]+) MB, "
    r"total=([\d.]+) MB \(pipeline rank (\d), ([\d,]+) parameters\)"
)
BUILT = re.compile(r"number of parameters on .* model parallel rank \(0, \d+, (\d)\): (\d+)")


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_run_reports_its_size(data_prefix: Path, tmp_path: Path) -> None:
    """Six layers on two uneven stages: what is printed equals what was built, and the throughput
    is that of the model's matrix products."""
    options = shlex.split(
        "--num-layers 6 --moe-layer-freq ([0,1]*3) --scmoe-shortcut-position pos2 "
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2 "
        "--expert-model-parallel-size 2 --use-distributed-optimizer --bf16 --train-iters 3 "
        "--eval-iters 0 --log-throughput --log-timers-to-tensorboard --tensorboard-log-interval 1 "
        f"--tensorboard-dir {tmp_path} --data-path {data_prefix} --split 100,0,0"
    )
    run = launch_forked([*TINY_MODEL, *TINY_MOE, *options], 4, tmp_path / "output")
    assert run.returncode == 0, run.stdout[-3000:]

    built = {int(stage): int(count) for stage, count in BUILT.findall(run.stdout)}
    printed = {int(row[3]): number(row[4]) for row in STAGE.findall(run.stdout)}
    assert printed == built and sorted(built) == [0, 1]

    expert, copied = 3 * 32 * 32, 32 * 64  # the last stage has a copy of the tied embedding
    elsewhere = 3 * (4 // 2) * expert  # the experts of the other expert parallel rank
    parameters = sum(built.values()) - copied + elsewhere
    activated = parameters - 3 * (4 - 2) * expert
    assert {tuple(map(number, row)) for row in SIZE.findall(run.stdout)} == {
        (parameters, activated)
    }

    # Columns: six attentions (projections, half of the scores for queries and for values), three
    # dense MLPs, three MoEs with two routed experts and a shared one, logits.
    attention = 4 * 32 + 2 * 32 // 2
    dense, moe = 3 * 64, 2 * 3 * 32 + 3 * 64
    products = 32 * (6 * attention + 3 * dense + 3 * moe + 64)
    throughput = read_scalars(tmp_path, "throughput")[3]
    seconds = read_scalars(tmp_path, "iteration-time")[3]
    tokens, forward_and_backward, ranks = 8 * 32, 3, 4
    flops = 2 * products * tokens * forward_and_backward
    assert throughput * 1e12 * ranks * seconds == pytest.approx(flops, rel=1e-6)
