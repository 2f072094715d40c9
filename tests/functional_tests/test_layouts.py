"""Part of `python -m tests.functional_tests.layouts`: layouts compute and resume as one process."""

from pathlib import Path

import pytest

from .layouts import (
    DGMOE,
    EXPERT_BIAS,
    LAYOUTS,
    LONGCAT,
    MOEPP,
    TOLERANCE,
    Runs,
    compare_checkpoints,
    compare_layouts,
)

SLOW = pytest.mark.slow
# What is wrong at all is wrong in the second step; the tables have ten.
STEPS = 4
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(Path(tmp_path_factory.mktemp("layouts")), STEPS)


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("MoE++, TP 2, expert TP 2, EP 2", "pos2"),
        ("LongCat-Flash, TP 2, EP 2", "pos2"),
        pytest.param("LongCat-Flash, EP 4, expert DP 2", "none", marks=SLOW),
        pytest.param(
            "LongCat-Flash, PP 2 interleaved, EP 2, full recomputation", "pos3", marks=SLOW
        ),
        ("DGMoE, TP 2, expert TP 1, EP 2", "pos2"),
        pytest.param("DGMoE, PP 2 interleaved, EP 2, full recomputation", "pos1", marks=SLOW),
        pytest.param("MoE++, EP 2, 3 chunks, all-gather", "pos3", marks=SLOW),
        pytest.param("MoE++, PP 2 interleaved, EP 2, full recomputation", "pos1", marks=SLOW),
        # The parts of these have tests of their own in tests/distributed_tests.
        pytest.param("TP 2, expert TP 1, EP 2", "pos1", marks=SLOW),
        pytest.param("PP 2, 2 + 6 layers", "pos2", marks=SLOW),
        pytest.param("TP 1, expert TP 2, EP 2", "pos1", marks=SLOW),
        pytest.param("TP 2, expert TP 2, EP 2, all-gather", "pos2", marks=SLOW),
        pytest.param("PP 2 interleaved, TP 2, EP 2, expert DP 2", "pos2", marks=SLOW),
        pytest.param("EP 4, distributed optimizer", "pos3", marks=SLOW),
        pytest.param("PP 2, EP 2, untied embeddings", "pos3", marks=SLOW),
    ],
)
def test_layout_trains_as_one_process(runs: Runs, name: str, position: str) -> None:
    ((_, _, loss, norm),) = compare_layouts(runs, (BY_NAME[name],), (position,))
    assert max(loss, norm) <= TOLERANCE


@pytest.mark.slow  # test_pretrain.py resumes at two other layouts
@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (("EP2", "PP2xVPP2", "TP2xEP2"), EXPERT_BIAS),
        # Each run starts processes that write.
        (("EP2", "PP2xVPP2"), f"{EXPERT_BIAS} --async-save"),
        (("TP2xEP2", "PP2xVPP2"), f"{EXPERT_BIAS} {MOEPP}"),
        (("TP2xEP2", "PP2xVPP2"), LONGCAT),
        (("TP2xEP2", "PP2xVPP2"), f"{EXPERT_BIAS} {DGMOE}"),
    ],
    ids=["sync", "async", "moepp", "longcat", "dgmoe"],
)
def test_checkpoint_goes_on_at_any_layout(
    tmp_path: Path, names: tuple[str, ...], variant: str
) -> None:
    """Optimizer state, expert bias and data position included; bitwise at the same layout."""
    for saved, loaded, loss, norm in compare_checkpoints(Runs(tmp_path, STEPS), names, variant):
        assert max(loss, norm) <= (0 if saved == loaded else TOLERANCE), f"{saved} to {loaded}"
