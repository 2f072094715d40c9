"""Copies of a token by T, with matrices drawn to have the statistics of C2R's published ones.

    python -m tools.benchmarks.c2r_released [--output FILE]

C2R (arXiv:2504.01337) published counts of LLaMA-MoE: 32 layers, 8 experts, top-2, 204,800 tokens.
Here are none of them: matrices are drawn, and what is known of the published ones stands beside.
Second choices are log-normal; their SPREAD was chosen so that the row without a constraint
resembles the published one, and the other rows follow from the rule: the lists are made from the
drawn counts, and the second choice renormalised over T partners.

On eight ranks each has one expert, and a token of two experts two copies, whatever is done.

Shapes: N experts
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megatron_scmoe.c2r.closeness import closeness, groups_in_order
from megatron_scmoe.c2r.collaboration import Collaboration, LayerCounts
from megatron_scmoe.c2r.lists import lists_of
from megatron_scmoe.c2r.place import MAX_IMBALANCE, Chosen, place
from megatron_scmoe.c2r.placement import rank_of
from megatron_scmoe.words import markdown_table, write_whole
from tools.benchmarks.provenance import describe

LAYERS, EXPERTS, TOKENS = 32, 8, 204_800
SPREAD = 2.1
"""Standard deviation of the logarithm of a pair's weight."""
FREE = EXPERTS - 1

# T: shares of the best, two, three best partners; entropy; partners; copies on two ranks in order
# and at the best placement, on four ranks the same.
COLUMNS = ["top 1", "top 2", "top 3", "entropy", "partners"]
COLUMNS += ["EP 2, in order", "EP 2, best", "EP 4, in order", "EP 4, best"]
PUBLISHED = {
    1: (0.86, 0.99, 1.0, 0.08, 1.2, 1.607, 1.079, 1.879, 1.246),
    2: (0.63, 0.95, 1.0, 0.35, 2.3, 1.582, 1.178, 1.867, 1.437),
    3: (0.56, 0.85, 0.98, 0.48, 3.4, 1.581, 1.231, 1.864, 1.487),
    4: (0.53, 0.80, 0.93, 0.55, 4.5, 1.584, 1.253, 1.868, 1.508),
    5: (0.52, 0.78, 0.91, 0.59, 5.6, 1.583, 1.264, 1.868, 1.518),
    6: (0.52, 0.77, 0.90, 0.62, 6.5, 1.583, 1.268, 1.869, 1.522),
    FREE: (0.52, 0.77, 0.89, 0.62, 6.9, 1.585, 1.268, 1.870, 1.522),
}


def second_choices(generator: np.random.Generator) -> np.ndarray:
    """Of the tokens whose best expert is i, the share whose second is j, [N, N]."""
    logs = SPREAD * generator.standard_normal((EXPERTS, EXPERTS))
    logs = (logs + logs.T) / np.sqrt(2)
    weights = np.exp(logs)
    np.fill_diagonal(weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def counts_of(shares: np.ndarray) -> LayerCounts:
    """Counts of a layer whose experts are all equally often the best."""
    ordered = np.rint(shares * (TOKENS / EXPERTS)).astype(np.int64)
    together = ordered + ordered.T
    return LayerCounts(int(ordered.sum()), together.sum(axis=1), together)


def constrained(shares: np.ndarray, partners: np.ndarray, t: int) -> np.ndarray:
    """The same with a second choice among the first T partners, [N, N]."""
    kept = np.zeros_like(shares)
    np.put_along_axis(kept, partners[:, :t], 1.0, axis=1)
    return shares * kept / (shares * kept).sum(axis=1, keepdims=True)


def numbers(layer: LayerCounts) -> list[float]:
    """COLUMNS of one layer, then copies on four ranks within the bound on load."""
    own = closeness(layer)
    found = [*own.shares, own.entropy, own.partners]
    chosen = Chosen.of_counts(layer)

    def copies(ranks: int, max_imbalance: float) -> float:
        return layer.distinct(rank_of(place(chosen, ranks, ranks, max_imbalance)))

    for ranks in (2, 4):
        found += [layer.distinct(groups_in_order(EXPERTS, ranks)), copies(ranks, np.inf)]
    return [*found, copies(4, MAX_IMBALANCE)]


def drawn(seed: int, count: int = LAYERS) -> dict[int, list[float]]:
    """By T, `numbers` of drawn matrices, means over layers.

    Args:
        count: of the layers.
    """
    generator = np.random.default_rng(seed)
    layers = {number: second_choices(generator) for number in range(1, count + 1)}
    base = {number: counts_of(shares) for number, shares in layers.items()}
    partners = lists_of(Collaboration(EXPERTS, 2, base)).layers
    return {
        t: np.mean(
            [
                numbers(counts_of(constrained(shares, partners[number], t)))
                for number, shares in layers.items()
            ],
            axis=0,
        ).tolist()
        for t in PUBLISHED
    }


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers here too")
    args = parser.parse_args()
    bounded = f"EP 4, load at most {MAX_IMBALANCE}"
    rows, found = [], drawn(args.seed)
    for t, own in found.items():
        for name, values in (("drawn", own), ("published", PUBLISHED[t])):
            cells = [f"{value:.3f}".removesuffix("0") for value in values]
            rows.append([f"T = {t}, {name}", *cells, *[""] * (name == "published")])
    print(*markdown_table(["", *COLUMNS, bounded], rows), sep="\n")
    if args.output:
        table = {t: dict(zip([*COLUMNS, bounded], own, strict=True)) for t, own in found.items()}
        content = {"environment": describe(), "seed": args.seed, "drawn, by T": table}
        write_whole(args.output, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
