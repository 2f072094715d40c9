"""--moe-grouped-gemm without Transformer Engine: the same training, the same checkpoints.

Either goes on from the other's checkpoint, optimizer included, alone, at EP 2, and at expert TP 2 x
EP 2.
"""

import shlex
from pathlib import Path

import pytest

from .layouts import CHECKPOINT_LAYOUTS, DISTRIBUTED, TOLERANCE, Curves, Layout, Runs, deviation

OPTIONS = shlex.split(f"{DISTRIBUTED} --train-iters 4 --scmoe-shortcut-position pos2")
EXPERTS = {"sequential": "", "grouped": "--moe-grouped-gemm"}
SAVED_AFTER = 2


class Experiment:
    """Runs with either kind of experts."""

    def __init__(self, folder: Path) -> None:
        self.runs = Runs(folder)
        self.saved = {kind: self.train("EP2", kind, *self.save(kind)) for kind in EXPERTS}

    def checkpoint(self, kind: str) -> str:
        return str(self.runs.folder / f"checkpoint-{kind}")

    def save(self, kind: str) -> list[str]:
        return ["--save", self.checkpoint(kind), "--save-interval", str(SAVED_AFTER)]

    def train(self, layout_name: str, kind: str, *options: str) -> Curves:
        base = CHECKPOINT_LAYOUTS[layout_name]
        layout = Layout(base.name, base.ranks, f"{base.options} {EXPERTS[kind]}")
        name = f"{layout_name}-{kind}-{len(list(self.runs.folder.iterdir()))}"
        return self.runs.train(layout, name, *OPTIONS, *options)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return Experiment(Path(tmp_path_factory.mktemp("experts")))


def test_choice_changes_no_curve(experiment: Experiment) -> None:
    """From one seed: the same weights; later only the gradient norm's sum is in another order."""
    sequential, grouped = experiment.saved["sequential"], experiment.saved["grouped"]
    assert grouped["lm loss"][1] == sequential["lm loss"][1]
    assert max(deviation(grouped, sequential)) <= TOLERANCE


def test_choice_changes_no_curve_without_a_shortcut(experiment: Experiment) -> None:
    """`none` is stock Megatron with SequentialMLP, and the same up to that sum with ours."""
    curves = [experiment.train("1", kind, "--scmoe-shortcut-position", "none") for kind in EXPERTS]
    assert max(deviation(*curves)) <= TOLERANCE


@pytest.mark.parametrize(
    ("saved", "loaded", "layout"),
    [
        ("sequential", "grouped", "EP2"),
        pytest.param("sequential", "grouped", "ETP2xEP2", marks=pytest.mark.slow),
        pytest.param("grouped", "sequential", "ETP2xEP2", marks=pytest.mark.slow),
        ("grouped", "sequential", "1"),
    ],
)
def test_checkpoints_are_interchangeable(
    experiment: Experiment, saved: str, loaded: str, layout: str
) -> None:
    """Optimizer included: the other experts go on as those that saved."""
    load = ["--load", experiment.checkpoint(saved), "--ckpt-step", str(SAVED_AFTER)]
    curves = experiment.train(layout, loaded, *load)
    rest = {
        tag: {step: value for step, value in curve.items() if step > SAVED_AFTER}
        for tag, curve in experiment.saved[saved].items()
    }
    assert max(deviation(curves, rest)) <= TOLERANCE


def test_buffers_of_other_experts_are_refused(experiment: Experiment) -> None:
    """A checkpoint that holds the optimizer's buffers as they lay, in one line."""
    options = ["--no-dist-ckpt-optim-fully-reshardable", "--train-iters", "2"]
    folder = str(experiment.runs.folder / "buffers")
    experiment.train("1", "sequential", *options, "--save", folder, "--save-interval", "2")
    with pytest.raises(RuntimeError, match="--moe-grouped-gemm False there, True here") as refusal:
        experiment.train("1", "grouped", *options, "--load", folder)
    assert "Traceback" not in str(refusal.value)
