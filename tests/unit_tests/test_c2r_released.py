"""The matrices that are drawn to resemble C2R's published ones."""

import numpy as np
import pytest

from megatron_scmoe.c2r.closeness import closeness
from tools.benchmarks.c2r_released import (
    COLUMNS,
    EXPERTS,
    FREE,
    LAYERS,
    PUBLISHED,
    constrained,
    counts_of,
    drawn,
    second_choices,
)


def test_drawn_matrices_resemble_the_published_ones() -> None:
    generator = np.random.default_rng(0)
    layers = [closeness(counts_of(second_choices(generator))) for _ in range(2 * LAYERS)]
    shares = np.mean([layer.shares for layer in layers], axis=0)
    assert [*shares, np.mean([layer.entropy for layer in layers])] == pytest.approx(
        PUBLISHED[FREE][:4], abs=0.03
    )


def test_a_constraint_saves_copies() -> None:
    found = {t: dict(zip(COLUMNS, values, strict=False)) for t, values in drawn(0, 4).items()}
    best = [found[t]["EP 4, best"] for t in PUBLISHED]
    assert best == sorted(best) and best[0] < best[-1] - 0.1
    for own in found.values():
        assert 1 <= own["EP 4, best"] <= own["EP 4, in order"] <= 2


def test_a_constraint_renormalises_over_the_first_partners() -> None:
    shares = second_choices(np.random.default_rng(1))
    partners = np.argsort(-shares, axis=1)[:, : EXPERTS - 1]
    two = constrained(shares, partners, 2)
    assert np.allclose(two.sum(axis=1), 1) and ((two > 0).sum(axis=1) == 2).all()
    kept = two > 0
    assert np.allclose(
        two[kept] / two.max(axis=1).repeat(2), (shares / shares.max(1)[:, None])[kept]
    )
    assert np.array_equal(constrained(shares, partners, FREE), shares / shares.sum(1)[:, None])
