"""Whose schedule and constants a resumed run follows: a table against runs without a stop.

A run of six iterations is saved after three. It goes on with another value of one option: with the
checkpoint's schedule every later iteration equals the run that was not stopped, with the new one it
runs at the values of a run that had it from the start, and with neither it is refused, or told.
"""

import math
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .forked import launch_forked
from .launch import TINY_MODEL, TINY_MOE, Run, read_scalars
from .test_checkpoints import NO_DROPOUT, PAIR, error_line, succeeded

# Embedding and output layer have a group of their own, and weight decay grows.
SCHEDULE = shlex.split(
    "--lr 1e-3 --min-lr 1e-5 --decoupled-lr 1e-2 --decoupled-min-lr 1e-4 --lr-warmup-iters 2 "
    "--lr-warmup-init 1e-6 --lr-decay-style WSD --lr-wsd-decay-iters 3 --lr-wsd-decay-style linear "
    "--start-weight-decay 0.01 --end-weight-decay 0.3 --weight-decay-incr-style linear "
    "--adam-beta1 0.8 --adam-beta2 0.9 --adam-eps 1e-6 --train-iters 6"
)
# Another value, and the curve that shows it. What has none is the optimizer's own: the loss does.
OTHER = {
    "--lr 2e-4": "learning-rate",
    "--min-lr 1e-6": "learning-rate",
    "--lr-warmup-iters 5": "learning-rate",
    "--lr-warmup-init 1e-4 --lr-warmup-iters 5": "learning-rate",
    "--lr-decay-style cosine": "learning-rate",
    "--lr-wsd-decay-iters 2": "learning-rate",
    "--lr-wsd-decay-style cosine": "learning-rate",
    "--decoupled-lr 1e-4": None,
    "--decoupled-min-lr 1e-5": None,
    "--start-weight-decay 0.1": None,
    "--end-weight-decay 0.9": None,
    "--weight-decay-incr-style cosine": None,
    "--adam-beta1 0.5": None,
    "--adam-beta2 0.99": None,
    "--adam-eps 1e-2": None,
}
CONSTANTS = ("--adam-beta1 0.5", "--adam-beta2 0.99", "--adam-eps 1e-2")
TWO_RANKS = ("--lr 2e-4", "--decoupled-lr 1e-4")  # of OTHER, the parameter groups' own
OLD = "--use-checkpoint-opt_param-scheduler"
NEW = "--override-opt_param-scheduler"


def train(data: Path, folder: Path, *options: str, ranks: int = 1) -> Run:
    parallel = ["--expert-model-parallel-size", str(ranks)]
    parallel += ["--use-distributed-optimizer"] if ranks > 1 else []
    arguments = [*TINY_MODEL, *TINY_MOE, *PAIR, *NO_DROPOUT, *parallel, *SCHEDULE]
    arguments += ["--data-path", str(data), "--split", "100,0,0"]
    arguments += ["--data-cache-path", str(data.parent / "cache")]
    arguments += ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
    return launch_forked([*arguments, *options], ranks, folder)


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Of the iterations behind the stop."""
    found = {name: read_scalars(folder, name) for name in ("learning-rate", "lm loss")}
    return {
        name: {step: value for step, value in curve.items() if step > 3}
        for name, curve in found.items()
    }


WholeRun = Callable[[int], Path]


@pytest.fixture(scope="module")
def whole(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """The folder of a run on so many ranks that nothing stopped. Each is made once."""

    @cache
    def run(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        save = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
        succeeded(train(data_prefix, folder, *save, ranks=ranks))
        return folder

    return run


on_ranks = pytest.mark.parametrize("ranks", [1, 2], ids=["EP1", "EP2, distributed optimizer"])


@on_ranks
def test_every_option_goes_on_as_in_the_checkpoint(
    whole: WholeRun, data_prefix: Path, tmp_path: Path, ranks: int
) -> None:
    folder = whole(ranks)
    load = ["--load", str(folder / "checkpoints"), "--ckpt-step", "3"]
    every = [part for other in OTHER for part in shlex.split(other)]
    run = succeeded(train(data_prefix, tmp_path, *load, *every, OLD, ranks=ranks))
    assert curves(tmp_path) == curves(folder)
    (note,) = [line for line in run.stdout.splitlines() if " sets --lr " in line]
    for option in ("--lr 0.001", "--decoupled-lr 0.01", "--adam-beta2 0.9", "--end-weight-decay"):
        assert option in note


@pytest.mark.parametrize(
    ("ranks", "other"), [*((1, other) for other in OTHER), *((2, other) for other in TWO_RANKS)]
)
def test_one_option_is_followed_or_refused(
    whole: WholeRun, data_prefix: Path, tmp_path: Path, ranks: int, other: str
) -> None:
    folder = whole(ranks)
    load = ["--load", str(folder / "checkpoints"), "--ckpt-step", "3", *shlex.split(other)]
    asked = [] if other in CONSTANTS else [NEW]
    if asked:
        line = error_line(train(data_prefix, tmp_path / "refused", *load, ranks=ranks))
        assert "has another schedule: " in line and "Add --override-opt-param-scheduler" in line
    run = succeeded(train(data_prefix, tmp_path, *load, *asked, ranks=ranks))
    here, there = curves(tmp_path), curves(folder)
    assert here["lm loss"] != there["lm loss"]
    if OTHER[other] is None:
        assert here["learning-rate"] == there["learning-rate"]
        if other in CONSTANTS:
            option, value = other.split()
            there_and_here = rf"{option} \S+ there, {float(value)} here"
            assert re.search(rf"differs: .*{there_and_here}", run.stdout)
        return
    from_the_start = tmp_path / "whole"
    succeeded(train(data_prefix, from_the_start, *shlex.split(other), ranks=ranks))
    for step, rate in curves(from_the_start)["learning-rate"].items():
        assert math.isclose(here["learning-rate"][step], rate, rel_tol=1e-6)


@on_ranks
def test_a_longer_run_decays_its_weights_as_the_checkpoint_says(
    whole: WholeRun, data_prefix: Path, tmp_path: Path, ranks: int
) -> None:
    """From the first iteration on: the host takes the step before the schedule."""
    folder = whole(ranks)
    load = ["--load", str(folder / "checkpoints"), "--ckpt-step", "3", "--train-iters", "12"]
    succeeded(train(data_prefix, tmp_path, *load, OLD, "--exit-interval", "6", ranks=ranks))
    assert curves(tmp_path) == curves(folder)
