"""Experts to ranks, so that a token's experts lie together: arXiv:2504.01337 and arXiv:2505.13345.

Wanted are as few copies between nodes as can be, then as few between ranks, on ranks that have as
many experts each and at most `max_imbalance` times the mean load. `greedy` is the published
grouping; `improved` swaps experts from there.

Shapes: S sets of experts, K experts of a token at most, N experts, G groups
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_scmoe.c2r.collaboration import LayerCounts
from megatron_scmoe.c2r.placement import Ranks, contiguous, rank_of

MAX_IMBALANCE = 1.25
_SEARCHED = 2**14  # sets that a search looks at; what is said of its result counts them all
# Searches, times the number of experts: with many, one is long and has many ways out.
_STARTS, _REFINED = 256, 64
_BLOCK = 2**14
_NOTHING = 1e-9  # copies of a token


@dataclass(frozen=True)
class Chosen:
    """What one layer's router has chosen for the tokens of a text.

    Where a token has more than two experts, pairs of them stand in for sets that are not known: a
    token with three experts on a rank has three pairs there, and saves two copies.
    """

    sets: np.ndarray
    """Experts that were chosen together, -1 for none, [S, K]."""
    counts: np.ndarray
    """Tokens of every set, [S]."""
    load: np.ndarray
    """Tokens of every expert, [N]."""

    @classmethod
    def of_pairs(cls, together: np.ndarray, load: np.ndarray) -> "Chosen":
        """From tokens that have both of two experts, [N, N], symmetric, and from those that have
        one, [N]."""
        first, second = np.triu_indices(len(load), 1)
        counts = together[first, second]
        sets = np.stack([first, second], axis=1)
        return cls(sets[counts > 0], counts[counts > 0], load)

    @classmethod
    def of_counts(cls, layer: LayerCounts) -> "Chosen":
        """From the counts of a layer: its sets, or its pairs."""
        if layer.sets is None or layer.set_tokens is None:
            return cls.of_pairs(layer.together, layer.chosen)
        return cls(layer.sets, layer.set_tokens, layer.chosen)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Which experts a set has, [S', N], 1 or 0, with its tokens, [S'], part by part."""
        for start in range(0, len(self.sets), _BLOCK):
            sets = self.sets[start : start + _BLOCK]
            member = np.zeros((len(sets), len(self.load) + 1), np.float32)
            np.put_along_axis(member, sets, 1.0, axis=1)  # -1 is the last column
            yield member[:, :-1], self.counts[start : start + _BLOCK].astype(np.float64)

    def copies(self, group: np.ndarray) -> float:
        """Mean number of groups that a set's experts are in.

        Args:
            group: of every expert, [N].
        """
        one_hot = _one_hot(group)
        visits = sum(
            float(counts @ (member @ one_hot > 0).sum(axis=1)) for member, counts in self.blocks()
        )
        return visits / max(float(self.counts.sum()), 1.0)


class PlacementCost(NamedTuple):
    """What is to be small, the first before the second."""

    overload: float
    """Load of ranks beyond what is allowed, summed, as a share of the mean."""
    of_nodes: float
    """Copies of a token, by nodes."""
    of_ranks: float
    """Copies of a token, by ranks."""


def cost(chosen: Chosen, ranks: Ranks, ranks_per_node: int, max_imbalance: float) -> PlacementCost:
    """Of a placement."""
    rank = rank_of(ranks)
    of_rank = np.bincount(rank, chosen.load)
    overload = float(_beyond(of_rank, of_rank, max_imbalance).sum())
    return PlacementCost(overload, chosen.copies(rank // ranks_per_node), chosen.copies(rank))


def place(
    chosen: Chosen, ranks: int, ranks_per_node: int, max_imbalance: float = MAX_IMBALANCE
) -> Ranks:
    """The best placement that is found from the published one, from none and from random ones.

    The same for the same numbers.

    Args:
        ranks: of an expert parallel group; divides the number of experts.
        ranks_per_node: divides it.
    """
    experts, limits = len(chosen.load), (ranks_per_node, max_imbalance)
    generator = np.random.default_rng(0)
    starts = [greedy(chosen, ranks, ranks_per_node), contiguous(experts, ranks)]
    for _ in range(max(_STARTS // experts - 2, 0)):
        starts.append(_cut(generator.permutation(experts).tolist(), ranks))

    def rank_cost(found: Ranks) -> PlacementCost:
        return cost(chosen, found, *limits)

    # The published one stands first: of equal ones it is taken.
    pairs = Chosen.of_pairs(_matrix(chosen), chosen.load)
    found = [starts[0], *(improved(pairs, start, *limits) for start in starts)]
    found = sorted({_in_order(ranks, ranks_per_node): None for ranks in found}, key=rank_cost)
    if chosen.sets.shape[1] > 2:
        searched = _sample(chosen, generator)
        best = found[: max(_REFINED // experts, 1)]
        found = sorted(
            found + [improved(searched, start, *limits) for start in best], key=rank_cost
        )
    return _in_order(found[0], ranks_per_node)


def greedy(chosen: Chosen, ranks: int, ranks_per_node: int) -> Ranks:
    """The published grouping, of experts and then of ranks."""
    matrix = _matrix(chosen)
    groups = _grouped(matrix, ranks)
    member = _one_hot(rank_of(groups))
    of_nodes = _grouped(member.T @ matrix @ member, ranks // ranks_per_node)
    return tuple(groups[rank] for node in of_nodes for rank in node)


def _grouped(matrix: np.ndarray, num_groups: int) -> Ranks:
    """Groups of one size by the largest entries of a matrix.

    Published as a loop that takes the largest entry until all is grouped, it does not end once all
    entries are 0. Here what is left then fills the free places in the order of its numbers.

    Args:
        matrix: [N, N], symmetric.
    """
    size = len(matrix) // num_groups
    groups: list[list[int]] = []
    where: dict[int, list[int]] = {}
    first, second = np.triu_indices(len(matrix), 1)
    entries = matrix[first, second]
    for pair in np.argsort(-entries, kind="stable"):
        if entries[pair] <= 0:
            break
        together = [int(first[pair]), int(second[pair])]
        free = [expert for expert in together if expert not in where]
        if len(free) == 2 and len(groups) < num_groups and size > 1:
            groups.append([])
            group = groups[-1]
        elif len(free) == 2:
            # The group that they work with most, of those with room for both.
            open_groups = [group for group in groups if len(group) + 2 <= size]
            sums = [matrix[np.ix_(together, group)].sum() for group in open_groups]
            group = open_groups[int(np.argmax(sums))] if sums else []
            free = free if sums else []
        elif len(free) == 1:
            group = where[together[1 - together.index(free[0])]]
            free = free if len(group) < size else []
        else:
            continue
        for expert in free:
            group.append(expert)
            where[expert] = group
    groups += [[] for _ in range(num_groups - len(groups))]
    rest = iter(expert for expert in range(len(matrix)) if expert not in where)
    for group in groups:
        group += [next(rest) for _ in range(size - len(group))]
    return tuple(tuple(group) for group in groups)


def improved(
    chosen: Chosen, ranks: Ranks, ranks_per_node: int, max_imbalance: float = MAX_IMBALANCE
) -> Ranks:
    """Let two experts change places, the best two each time, until no two make it better."""
    order = [expert for rank in ranks for expert in rank]
    while True:
        ranks = _cut(order, len(ranks))
        rank = rank_of(ranks)
        more = np.stack(  # of every part of the cost, by pair of experts
            [
                _overload(chosen.load, rank, max_imbalance),
                _change(chosen, rank // ranks_per_node),
                _change(chosen, rank),
            ]
        )
        more[np.abs(more) < _NOTHING] = 0.0
        more[:, rank[:, None] == rank] = 0.0
        best = np.lexsort(more.reshape(3, -1)[::-1])[0]
        one, other = divmod(int(best), len(order))
        if not tuple(more[:, one, other]) < (0.0, 0.0, 0.0):
            return ranks
        i, j = order.index(one), order.index(other)
        order[i], order[j] = other, one


def _change(chosen: Chosen, group: np.ndarray) -> np.ndarray:
    """Copies of a token that there would be more if two experts changed places, [N, N].

    An expert that leaves takes a copy with it where it was its token's only one of the group, and
    needs one where the token has none in the other group. A token of both is in both groups still.
    """
    one_hot = _one_hot(group)
    if chosen.sets.shape[1] == 2:
        together = _matrix(chosen)
        of_group = together @ one_hot
        one_way = np.take_along_axis(of_group, group[:, None], 1) - of_group[:, group] + together
    else:
        experts = len(group)
        needed = np.zeros((experts, one_hot.shape[1]))
        saved, kept = np.zeros(experts), np.zeros((experts, experts))
        for member, counts in chosen.blocks():
            per_group = member @ one_hot
            alone = member * (per_group[:, group] == 1) * counts[:, None]
            saved += alone.sum(axis=0)
            kept += alone.T @ member
            needed += member.T @ ((per_group == 0) * counts[:, None])
        one_way = needed[:, group] + kept - saved[:, None]
    more = (one_way + one_way.T) / max(float(chosen.counts.sum()), 1.0)
    more[group[:, None] == group] = 0.0
    return more


def _overload(load: np.ndarray, rank: np.ndarray, max_imbalance: float) -> np.ndarray:
    """Overload that there would be more if two experts changed places, [N, N]."""
    of_rank = np.bincount(rank, load)
    with_other = of_rank[rank][:, None] - load[:, None] + load
    more = _beyond(with_other, of_rank, max_imbalance) - _beyond(
        of_rank[rank][:, None], of_rank, max_imbalance
    )
    return more + more.T


def _beyond(rows: np.ndarray, of_rank: np.ndarray, max_imbalance: float) -> np.ndarray:
    """What ranks with so many rows have too many, as a share of the mean of all ranks."""
    return np.maximum(rows / max(of_rank.mean(), 1.0) - max_imbalance, 0.0)


def _cut(order: list[int], ranks: int) -> Ranks:
    each = len(order) // ranks
    return tuple(tuple(order[start : start + each]) for start in range(0, len(order), each))


def _in_order(ranks: Ranks, ranks_per_node: int) -> Ranks:
    """The same with experts, ranks of a node and nodes in the order of their first experts."""
    sorted_ranks = [tuple(sorted(rank)) for rank in ranks]
    starts = range(0, len(ranks), ranks_per_node)
    of_nodes = sorted(sorted(sorted_ranks[start : start + ranks_per_node]) for start in starts)
    return tuple(rank for node in of_nodes for rank in node)


def _one_hot(group: np.ndarray) -> np.ndarray:
    """[N, G]."""
    return np.eye(int(group.max()) + 1, dtype=np.float32)[group]


def _matrix(chosen: Chosen) -> np.ndarray:
    """Tokens that have both experts, [N, N], 0 on the diagonal."""
    matrix = np.zeros(2 * chosen.load.shape)
    for member, counts in chosen.blocks():
        matrix += member.T @ (member * counts[:, None])
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _sample(chosen: Chosen, generator: np.random.Generator) -> Chosen:
    """The same with fewer sets, if there are many."""
    if len(chosen.sets) <= _SEARCHED:
        return chosen
    taken = np.sort(generator.choice(len(chosen.sets), _SEARCHED, replace=False))
    return Chosen(chosen.sets[taken], chosen.counts[taken], chosen.load)
