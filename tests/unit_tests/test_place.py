"""Where experts are placed: the search against all placements, its parts against loops, and the
file."""

import json
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from megatron_scmoe.c2r import collaboration, placement
from megatron_scmoe.c2r.collaboration import Collaboration, LayerCounts
from megatron_scmoe.c2r.place import (
    MAX_IMBALANCE,
    Chosen,
    cost,
    greedy,
    improved,
    place,
)
from megatron_scmoe.c2r.placement import Placement, Ranks, contiguous, rank_of
from megatron_scmoe.commands import c2r
from tests.unit_tests.test_damaged_files import damaged

EXPERTS = 8
LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4), (8, 2)]
NEARLY = 1.01


def clustered(generator: np.random.Generator) -> np.ndarray:
    """Tokens of every pair of experts, [N, N], a few partners having most, as measured of
    LLaMA-MoE: the best three have about nine in ten."""
    pairs = np.triu(generator.lognormal(0, 1.8, (EXPERTS, EXPERTS)), 1)
    return np.round(1000 * (pairs + pairs.T))


def of_pairs(together: np.ndarray) -> Chosen:
    """Of tokens with two experts each."""
    return Chosen.of_pairs(together, together.sum(axis=1))


def of_sets(generator: np.random.Generator, number: int, topk: int) -> Chosen:
    """Sets of experts of a few kinds of tokens, some with an expert less."""
    sets = np.array([generator.permutation(EXPERTS)[:topk] for _ in range(number)])
    sets[generator.random(number) < 0.1, -1] = -1
    counts = generator.integers(0, 50, number)
    load = np.zeros(EXPERTS)
    for chosen, count in zip(sets, counts, strict=True):
        for expert in chosen[chosen >= 0]:
            load[expert] += count
    return Chosen(sets, counts, load)


def cases() -> list[Chosen]:
    generator = np.random.default_rng(7)
    found = [of_pairs(clustered(generator)) for _ in range(5)]
    return found + [of_sets(generator, 30, topk) for topk in (2, 3, 4, 4, 6)]


def exhaustive(chosen: Chosen, ranks: int, ranks_per_node: int) -> Ranks:
    """The best of all placements."""
    limits = ranks_per_node, MAX_IMBALANCE
    every = every_placement(tuple(range(len(chosen.load))), ranks, ranks_per_node)
    return min(every, key=lambda found: cost(chosen, found, *limits))


def every_placement(experts: tuple[int, ...], ranks: int, ranks_per_node: int) -> Iterator[Ranks]:
    for of_nodes in parts_of(experts, ranks // ranks_per_node):
        inside = [list(parts_of(node, ranks_per_node)) for node in of_nodes]
        for chosen in product(*inside):
            yield tuple(rank for node in chosen for rank in node)


def parts_of(experts: tuple[int, ...], number: int) -> Iterator[Ranks]:
    """Every way to make `number` parts of one size, whose order does not matter."""
    if number == 1:
        yield (experts,)
        return
    first, *others = experts
    for with_first in combinations(others, len(experts) // number - 1):
        rest = tuple(expert for expert in others if expert not in with_first)
        for parts in parts_of(rest, number - 1):
            yield ((first, *with_first), *parts)


def test_copies_are_the_distinct_ranks_of_every_token() -> None:
    chosen = of_sets(np.random.default_rng(0), 40, 4)
    rank = rank_of(((0, 5), (1, 2), (3, 7), (4, 6)))
    visits = tokens = 0
    for members, count in zip(chosen.sets, chosen.counts, strict=True):
        visits += int(count) * len({int(rank[expert]) for expert in members if expert >= 0})
        tokens += int(count)
    assert chosen.copies(rank) == pytest.approx(visits / tokens, abs=1e-12)


def published(together: np.ndarray, num_groups: int) -> Ranks:
    """The grouping as it is written down, entry by entry of a matrix that is emptied."""
    matrix = together.copy()
    np.fill_diagonal(matrix, 0)
    size = len(matrix) // num_groups
    groups: list[list[int]] = []
    while matrix.any():
        x, y = (int(i) for i in np.unravel_index(np.argmax(matrix), matrix.shape))
        inside = {expert: group for group in groups for expert in group}
        grouped = [expert for expert in (x, y) if expert in inside]
        if not grouped and len(groups) < num_groups:
            groups.append([x, y])
        elif not grouped:
            rooms = [group for group in groups if size - len(group) >= 2]
            if rooms:
                max(rooms, key=lambda g: sum(together[x, i] + together[y, i] for i in g)).extend(
                    [x, y]
                )
        elif len(grouped) == 1 and len(inside[grouped[0]]) < size:
            inside[grouped[0]].append(y if grouped[0] == x else x)
        matrix[x, y] = matrix[y, x] = 0
    placed = {expert for group in groups for expert in group}
    rest = [expert for expert in range(len(matrix)) if expert not in placed]
    groups += [[] for _ in range(num_groups - len(groups))]
    for group in groups:
        while len(group) < size:
            group.append(rest.pop(0))
    return tuple(tuple(sorted(group)) for group in groups)


@pytest.mark.parametrize("ranks", [2, 4])
def test_greedy_is_the_published_grouping(ranks: int) -> None:
    for seed in range(20):
        together = clustered(np.random.default_rng(seed))
        if seed % 2:  # entries that are 0, and some that are equal
            together = np.where(together > np.median(together), np.round(together, -3), 0)
        found = greedy(of_pairs(together), ranks, ranks)
        assert {tuple(sorted(group)) for group in found} == set(published(together, ranks))


@pytest.mark.parametrize(("ranks", "ranks_per_node"), LAYOUTS)
def test_the_search_is_never_worse_than_greedy_and_close_to_the_best(
    ranks: int, ranks_per_node: int
) -> None:
    limits = ranks_per_node, MAX_IMBALANCE
    for number, chosen in enumerate(cases()):
        found = cost(chosen, place(chosen, ranks, ranks_per_node), *limits)
        best = cost(chosen, exhaustive(chosen, ranks, ranks_per_node), *limits)
        start = greedy(chosen, ranks, ranks_per_node)
        assert found <= cost(chosen, start, *limits), number
        assert cost(chosen, improved(chosen, start, *limits), *limits) <= cost(
            chosen, start, *limits
        ), number
        assert found.overload <= best.overload + 1e-9, number
        assert found.of_nodes <= best.of_nodes * NEARLY, number
        if found.of_nodes <= best.of_nodes + 1e-9:
            assert found.of_ranks <= best.of_ranks * NEARLY, number


def test_a_placement_saves_what_partners_allow() -> None:
    """Four pairs of partners that the router's order has apart: one copy in place of two."""
    together = np.zeros((EXPERTS, EXPERTS))
    for expert in range(4):
        together[expert, expert + 4] = together[expert + 4, expert] = 100
    chosen = of_pairs(together)
    assert chosen.copies(rank_of(contiguous(EXPERTS, 4))) == 2
    placed = place(chosen, 4, 2)
    assert placed == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert chosen.copies(rank_of(placed)) == 1


def test_matrices_of_zeros_end() -> None:
    nothing = of_pairs(np.zeros((EXPERTS, EXPERTS)))
    for search in (greedy, place, exhaustive):
        assert sorted(search(nothing, 4, 2)) == sorted(contiguous(EXPERTS, 4))
    empty = Chosen(np.zeros((0, 4), int), np.zeros(0), np.zeros(EXPERTS))
    assert place(empty, 8, 4) == contiguous(EXPERTS, 8)


def test_the_bound_on_load_comes_before_copies() -> None:
    """The two busiest experts are partners, and must part."""
    together = np.zeros((EXPERTS, EXPERTS))
    together[0, 1] = together[1, 0] = 1000
    for expert in range(2, EXPERTS, 2):
        together[expert, expert + 1] = together[expert + 1, expert] = 400
    chosen = of_pairs(together)
    apart = rank_of(place(chosen, 4, 4, 1.3))
    assert apart[0] != apart[1]
    rows = np.bincount(apart, chosen.load)
    assert rows.max() / rows.mean() <= 1.3
    together = rank_of(place(chosen, 4, 4, 2.0))
    assert together[0] == together[1]


def test_a_search_over_many_sets_looks_at_some_and_is_the_same_twice() -> None:
    generator = np.random.default_rng(3)
    sets = np.sort(generator.permuted(np.tile(np.arange(16), (20_000, 1)), axis=1)[:, :3], axis=1)
    chosen = Chosen(sets, np.ones(len(sets)), np.bincount(sets.ravel(), minlength=16))
    assert place(chosen, 4, 2) == place(chosen, 4, 2)


PLACED = Placement(8, 4, 2, {2: ((0, 5), (1, 2), (3, 7), (4, 6))}, {"matrix": "counts.json"})


def test_a_file_holds_a_placement(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    both = Placement(8, 4, 2, {**PLACED.layers, 4: contiguous(8, 4)}, PLACED.provenance)
    placement.write(path, both)
    assert placement.read(path) == both and not list(tmp_path.glob("*.partial"))
    assert json.loads(path.read_text())["layers"]["2"] == [[0, 5], [1, 2], [3, 7], [4, 6]]
    assert both.order(2) == [0, 5, 1, 2, 3, 7, 4, 6]
    assert both.rank_of(2).tolist() == [0, 1, 1, 2, 3, 0, 3, 2]
    assert both.node_of(2).tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
    assert both.digest != PLACED.digest == Placement(8, 4, 1, PLACED.layers).digest


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"schema": 2}, "it has schema 2, this version reads 1"),
        ({"ranks": 3}, "8 experts, 3 ranks and 2 ranks a node do not divide"),
        ({"experts": True}, "experts is no whole number from 1"),
        ({"layers": {"two": []}}, "'two' is no number of a layer"),
        ({"layers": {"2": [[0, 5], [1, 2], [3, 7], [4, 4]]}}, "layer 2 is not 4 lists of 2"),
        ({"layers": {"2": [[0, 5, 1], [2], [3, 7], [4, 6]]}}, "layer 2 is not 4 lists of 2"),
        ({"layers": []}, "it has no layers"),
        ({"layers": {}}, "it has no layers"),
    ],
)
def test_what_is_no_placement_is_one_line(tmp_path: Path, change: dict, line: str) -> None:
    path = tmp_path / "placement.json"
    placement.write(path, PLACED)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="is no placement of experts") as error:
        placement.read(path)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    placement.write(path, PLACED)
    whole = json.loads(path.read_text())
    for seed in range(300):
        path.write_bytes(damaged(whole, seed))
        try:
            placement.read(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), seed
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="is no placement of experts"):
            placement.read(missing)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ((16, 4, [2]), "it has 8 experts, and --num-experts is 16"),
        ((8, 2, [2]), "it has 4 ranks, and --expert-model-parallel-size is 2"),
        ((8, 4, [2, 4]), "it lacks layer 4"),
        ((8, 4, [4]), "it lacks layer 4"),
        ((8, 4, []), "it has layer 2, which has no MoE in this model"),
    ],
)
def test_a_placement_of_another_model_says_why(model: tuple, line: str) -> None:
    assert PLACED.complaint(*model) == line
    assert PLACED.complaint(8, 4, [2]) is None


def counts_of_clusters(topk: int) -> Collaboration:
    """Two layers whose tokens choose among experts of one remainder by 4, mostly."""
    generator = np.random.default_rng(5)
    layers = {}
    for number in (2, 4):
        kinds = [generator.permutation(np.arange(kind, 8, 4)) for kind in range(4)]
        tokens = []
        for _ in range(400):
            own = kinds[generator.integers(4)]
            others = generator.permutation(np.setdiff1d(np.arange(8), own))
            tokens.append(sorted([*own, *others][:topk]))
        sets, set_tokens = np.unique(np.array(tokens), axis=0, return_counts=True)
        member = np.eye(8, dtype=int)[sets].sum(axis=1)
        together = member.T @ (member * set_tokens[:, None])
        chosen = together.diagonal().copy()
        np.fill_diagonal(together, 0)
        with_sets = (sets, set_tokens) if topk > 2 else ()
        layers[number] = LayerCounts(len(tokens), chosen, together, *with_sets)
    return Collaboration(8, topk, layers, {"iteration": 7})


@pytest.mark.parametrize("topk", [2, 3])
def test_the_program_places(tmp_path: Path, capsys: pytest.CaptureFixture[str], topk: int) -> None:
    matrix, output = tmp_path / "counts.json", tmp_path / "placement.json"
    counts = counts_of_clusters(topk)
    collaboration.write(matrix, counts)
    words = ["place", "--matrix", str(matrix), "--ranks", "4", "--ranks-per-node", "2"]
    assert c2r.main([*words, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    placed = placement.read(output)
    assert placed.provenance == {"matrix": str(matrix), "max_imbalance": 1.25, "iteration": 7}
    assert (placed.experts, placed.ranks, placed.ranks_per_node) == (8, 4, 2)
    assert [*placed.layers] == [2, 4]
    of_layer = placement.copies(placed, counts)[2]
    before = placement.copies(Placement(8, 4, 2, {2: contiguous(8, 4)}), counts)[2]
    assert of_layer.ranks == pytest.approx(topk - 1) and of_layer.ranks < before.ranks
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["2"])
    cells = [f"{value:.3f}" for pair in zip(before, of_layer, strict=True) for value in pair]
    assert line.split()[1:5] == cells
    rows = np.bincount(placed.rank_of(2), counts.layers[2].chosen)
    assert line.split()[-4:] == [f"{load:.2f}" for load in rows / rows.mean()]


def test_a_report_counts_the_ranks_of_a_placement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix, file = tmp_path / "counts.json", tmp_path / "placement.json"
    counts = counts_of_clusters(3)
    collaboration.write(matrix, counts)
    by_remainder = ((0, 4), (2, 6), (1, 5), (3, 7))
    placed = Placement(8, 4, 2, {2: by_remainder, 4: by_remainder})
    placement.write(file, placed)
    words = ["report", "--matrix", str(matrix), "--placement", str(file)]
    assert c2r.main(words) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-6:] == ["ranks", "of", "4", "nodes", "of", "2"]
    assert lines[-1] == "lie on, N ranks, experts placed."
    by_layer = {line.split()[0]: line.split() for line in lines if line}
    for number, of_layer in placement.copies(placed, counts).items():
        assert by_layer[str(number)][-2:] == [f"{copies:.3f}" for copies in of_layer]
        assert of_layer.ranks == pytest.approx(2)

    assert c2r.main([*words, "--ranks", "4"]) == 2
    assert "leave out --ranks and --ranks-per-node" in capsys.readouterr().err
    placement.write(file, Placement(8, 4, 2, {2: by_remainder}))
    assert c2r.main(words) == 2
    said = capsys.readouterr().err
    assert "has 8 experts in layer 2, and --matrix 8 in layer 2, 4" in said
    assert said.count("\n") == 1


def test_pairs_alone_are_placed_without_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = counts_of_clusters(3)
    for layer in counts.layers.values():
        layer.sets = layer.set_tokens = None
    matrix, output = tmp_path / "counts.json", tmp_path / "placement.json"
    collaboration.write(matrix, counts)
    words = ["place", "--matrix", str(matrix), "--ranks", "4", "--output", str(output)]
    assert c2r.main(words) == 0
    shown = capsys.readouterr().out
    assert "nan" in shown and "pairs alone" in shown and "No placement" not in shown
    placed = placement.read(output)
    assert placed.ranks_per_node == 4
    assert all(one % 4 == other % 4 for one, other in placed.layers[2])
    assert c2r.main([*words, "--max-imbalance", "1"]) == 0
    assert "No placement with a busiest rank of at most 1.0 was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--ranks 3", "--ranks 3 does not divide the 8 experts"),
        ("--ranks 4 --ranks-per-node 3", "--ranks-per-node 3 does not divide --ranks 4"),
        ("--ranks 4 --max-imbalance 0.9", "--max-imbalance 0.9 is not at least 1"),
        ("--ranks 4 --max-imbalance nan", "--max-imbalance nan is not at least 1"),
        ("--ranks four", "--ranks"),
    ],
)
def test_what_cannot_be_placed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    matrix, output = tmp_path / "counts.json", tmp_path / "placement.json"
    collaboration.write(matrix, counts_of_clusters(2))
    options = ["--matrix", str(matrix), "--output", str(output), *words.split()]
    assert c2r.main(["place", *options]) == 2
    shown = capsys.readouterr()
    assert line in shown.out + shown.err and (shown.out + shown.err).count("\n") == 1
    assert not output.exists()
