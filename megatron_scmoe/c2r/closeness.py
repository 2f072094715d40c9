"""Numbers about counts of experts: how close partners are, and how far tokens travel.

Shapes: N routed experts
"""

from dataclasses import dataclass

import numpy as np

from megatron_scmoe.c2r.collaboration import LayerCounts


@dataclass(frozen=True)
class Closeness:
    """Means over the experts that have a partner."""

    shares: tuple[float, ...]
    """Of an expert's pairs, those with its best partner, its two best, its three best."""
    entropy: float
    """Of its pairs over its partners; 1 where all are equally frequent, 0 where there is one."""
    partners: float
    """Experts that were ever chosen together with it."""
    load: float
    """The busiest expert's tokens / the mean; of all experts."""


def closeness(layer: LayerCounts) -> Closeness:
    """How the experts of one layer keep together."""
    pairs = layer.together.sum(axis=1)
    rows = layer.together[pairs > 0] / np.maximum(pairs[pairs > 0], 1)[:, None]
    busiest = float(layer.chosen.max() / layer.chosen.mean()) if layer.chosen.any() else 1.0
    if not len(rows):
        return Closeness((0.0, 0.0, 0.0), 0.0, 0.0, busiest)
    best = -np.sort(-rows, axis=1)
    shares = tuple(float(best[:, :top].sum(axis=1).mean()) for top in (1, 2, 3))
    logs = np.log(rows, where=rows > 0, out=np.zeros_like(rows))
    others = max(rows.shape[1] - 1, 2)
    entropy = float(-(rows * logs).sum(axis=1).mean() / np.log(others))
    return Closeness(shares, entropy, float((rows > 0).sum(axis=1).mean()), busiest)


def groups_in_order(experts: int, groups: int) -> np.ndarray:
    """Numbers of the groups of experts that lie in order, as Megatron places them, [N]."""
    return np.arange(experts) * groups // experts
