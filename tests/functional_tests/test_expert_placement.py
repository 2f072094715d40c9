"""Runs whose experts lie where a file says: the losses of those without, from one checkpoint."""

import pytest

from megatron_scmoe.c2r import placement
from megatron_scmoe.c2r.placement import Placement

from .layouts import CHECKPOINT_LAYOUTS, DISTRIBUTED, EXPERT_BIAS, Curves, Layout, Runs

TOLERANCE = 1e-6
SAVED, ENDS = 3, 6
EXPERTS, MOE_LAYERS = 8, (2, 4, 6, 8)
OPTIONS = f"{EXPERT_BIAS} {DISTRIBUTED} --scmoe-shortcut-position pos2".split()
RANKS = {"EP2": 2, "EP4": 4, "TP2xEP2": 2}
AT = CHECKPOINT_LAYOUTS | {"EP4": Layout("EP 4", 4, "--expert-model-parallel-size 4")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("placed"))


@pytest.fixture(scope="module")
def placed(runs: Runs) -> Curves:
    """A run with a placement, saved on its way."""
    save = ["--save", str(runs.folder / "checkpoint"), "--save-interval", str(SAVED)]
    return train(runs, "EP2", 1, *save)


def train(runs: Runs, layout: str, step: int | None, *options: str) -> Curves:
    """A run whose experts lie in order, or by a step in the numbers of neighbours, coprime to 8."""
    own = list(options)
    if step is not None:
        ranks = RANKS[layout]
        path = runs.folder / f"{layout}-{step}.json"
        layers = {}
        for layer in MOE_LAYERS:
            order = [(layer + 3 * step * place) % EXPERTS for place in range(EXPERTS)]
            each = EXPERTS // ranks
            layers[layer] = tuple(tuple(order[i : i + each]) for i in range(0, EXPERTS, each))
        placement.write(path, Placement(EXPERTS, ranks, ranks, layers))
        own += ["--scmoe-expert-placement", str(path)]
    name = f"{layout} {step} {len(options)}"
    return runs.train(AT[layout], name, *OPTIONS, "--train-iters", str(ENDS), *own)


def assert_same(curves: Curves, others: Curves) -> None:
    for tag, values in others.items():
        assert curves[tag] == pytest.approx(
            {i: value for i, value in values.items() if i in curves[tag]}, rel=TOLERANCE
        )


@pytest.mark.parametrize(
    ("layout", "step"),
    [
        ("EP2", None),
        pytest.param("TP2xEP2", 3, marks=pytest.mark.slow),
        pytest.param("EP4", 5, marks=pytest.mark.slow),
    ],
)
def test_any_placement_goes_on_from_any_checkpoint(
    runs: Runs, placed: Curves, layout: str, step: int | None
) -> None:
    """Weights, state of the distributed optimizer and expert bias."""
    load = ["--load", str(runs.folder / "checkpoint"), "--ckpt-step", str(SAVED)]
    curves = train(runs, layout, step, *load)
    assert sorted(curves["lm loss"]) == list(range(SAVED + 1, ENDS + 1))
    assert_same(curves, placed)


@pytest.mark.slow
def test_stock_layers_and_placed_ones_go_on_from_each_other(runs: Runs) -> None:
    """Without a shortcut a placement makes units of stock layers, with a norm of another name."""
    none = ["--scmoe-shortcut-position", "none"]
    folders = [str(runs.folder / name) for name in ("of-stock", "of-units")]
    save = ["--save-interval", str(SAVED)]
    whole = train(runs, "EP2", None, *none, "--save", folders[0], *save)
    load = ["--load", folders[0], "--ckpt-step", str(SAVED)]
    there = train(runs, "EP2", 1, *none, *load, "--save", folders[1], "--save-interval", "1")
    assert_same(there, whole)
    load = ["--load", folders[1], "--ckpt-step", str(SAVED + 1)]
    assert_same(train(runs, "EP2", None, *none, *load), whole)
