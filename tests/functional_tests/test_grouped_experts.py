"""--moe-grouped-gemm without Transformer Engine: the same training, the same checkpoints."""

import shlex
from pathlib import Path

import pytest

from .layouts import CHECKPOINT_LAYOUTS, DISTRIBUTED, TOLERANCE, Curves, Layout, Runs, deviation

OPTIONS = shlex.split(f"{DISTRIBUTED} --train-iters 10 --scmoe-shortcut-position pos2")
SEQUENTIAL, GROUPED = "", "--moe-grouped-gemm"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(Path(tmp_path_factory.mktemp("grouped")))


def train(runs: Runs, layout: str, experts: str, name: str, *options: str) -> Curves:
    base = CHECKPOINT_LAYOUTS[layout]
    layout_with = Layout(name, base.ranks, f"{base.options} {experts}")
    return runs.train(layout_with, name, *OPTIONS, *options)


def test_choice_of_experts_changes_no_curve(runs: Runs) -> None:
    """From one seed: no weight differs; later only the gradient norm's sum is in another order."""
    sequential = train(runs, "EP2", SEQUENTIAL, "sequential")
    grouped = train(runs, "EP2", GROUPED, "grouped")
    assert grouped["lm loss"][1] == sequential["lm loss"][1]
    assert max(deviation(grouped, sequential)) <= TOLERANCE


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("EP2", SEQUENTIAL), [("EP2", GROUPED), ("ETP2xEP2", GROUPED)]),
        (("ETP2xEP2", GROUPED), [("EP2", SEQUENTIAL), ("1", SEQUENTIAL), ("1", GROUPED)]),
    ],
    ids=["sequential to grouped", "grouped to sequential"],
)
def test_checkpoints_are_interchangeable(
    runs: Runs, saved: tuple[str, str], loaded: list[tuple[str, str]]
) -> None:
    """Optimizer included: the other experts go on as those that saved would have."""
    name = "-".join(saved)
    folder = str(runs.folder / f"checkpoint{name}")
    whole = train(runs, *saved, f"saved{name}", "--save", folder, "--save-interval", "5")
    rest = {tag: {i: v for i, v in curve.items() if i > 5} for tag, curve in whole.items()}
    for layout, experts in loaded:
        load = ["--load", folder, "--ckpt-step", "5"]
        curves = train(runs, layout, experts, f"{name}to{layout}{experts}", *load)
        assert max(deviation(curves, rest)) <= TOLERANCE, f"{saved} to {layout} {experts}"
