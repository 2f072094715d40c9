"""MoE++ through the entry script: 60 routed, 1 zero, 1 copy, 2 constant experts, PP 4 x EP 2.

The loss's shares and the equations: unit_tests/test_moepp.py. Layouts: test_layouts.py.
"""

import shlex
from pathlib import Path

import pytest

from .forked import launch_forked
from .layouts import DISTRIBUTED, MODEL, MOEPP
from .text import write_text

OPTIONS = shlex.split(
    f"{MODEL} {MOEPP} {DISTRIBUTED} --num-experts 60 --scmoe-router heterogeneous "
    "--scmoe-tau 0.75 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
    "--micro-batch-size 2 --pipeline-model-parallel-size 4 --expert-model-parallel-size 2 "
    "--scmoe-shortcut-position pos2 --train-iters 64"
)


@pytest.mark.slow  # four ranks do the same in test_layouts.py
def test_sixty_four_experts_on_eight_ranks_train(tmp_path: Path) -> None:
    data = ["--data-path", str(write_text(tmp_path)), "--data-cache-path", str(tmp_path / "cache")]
    run = launch_forked([*OPTIONS, *data], 8, tmp_path)
    assert run.returncode == 0, run.stdout[-3000:]
    losses = [values["lm loss"] for values in run.log.values()]
    assert len(losses) == 64 and losses[-1] < 0.75 * losses[0]
