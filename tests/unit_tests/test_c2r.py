"""Counts of experts that are chosen together: their files, their numbers, partners, pictures."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_scmoe.c2r import collaboration, lists
from megatron_scmoe.c2r.closeness import closeness, groups_in_order
from megatron_scmoe.c2r.collaboration import NOBODY, Collaboration, LayerCounts
from megatron_scmoe.c2r.heat_map import heat_map
from megatron_scmoe.commands import c2r

EXPERTS = 6


def counted(tokens: Sequence[Sequence[int]], topk: int, with_sets: bool) -> LayerCounts:
    """One after the other, from the experts of every token."""
    chosen, together = np.zeros(EXPERTS, int), np.zeros((EXPERTS, EXPERTS), int)
    sets: dict[tuple[int, ...], int] = {}
    for experts in tokens:
        for i in experts:
            chosen[i] += 1
            for j in experts:
                together[i, j] += i != j
        full = (*sorted(experts), *[NOBODY] * (topk - len(experts)))
        sets[full] = sets.get(full, 0) + 1
    if not with_sets:
        return LayerCounts(len(tokens), chosen, together)
    found = np.array([*sets]), np.array([*sets.values()])
    return LayerCounts(len(tokens), chosen, together, *found)


def random_tokens(topk: int, number: int = 200) -> list[list[int]]:
    rng = np.random.default_rng(topk)
    weights = rng.dirichlet(np.ones(EXPERTS))
    return [
        rng.choice(EXPERTS, rng.integers(0, topk + 1), replace=False, p=weights).tolist()
        for _ in range(number)
    ]


def counts(topk: int = 3, layers: Sequence[int] = (2, 4)) -> Collaboration:
    tokens = random_tokens(topk)
    of_layers = {number: counted(tokens[number:], topk, topk > 2) for number in layers}
    return Collaboration(EXPERTS, topk, of_layers, {"data": "seeds"})


def assert_equal(found: Collaboration, wanted: Collaboration) -> None:
    assert (found.experts, found.topk, found.provenance) == (
        wanted.experts,
        wanted.topk,
        wanted.provenance,
    )
    assert found.layers.keys() == wanted.layers.keys()
    for number, layer in wanted.layers.items():
        for name, value in vars(layer).items():
            np.testing.assert_array_equal(getattr(found.layers[number], name), value)


@pytest.mark.parametrize("name", ["counts.json", "counts.safetensors"])
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_what_is_written_is_read(tmp_path: Path, name: str, topk: int) -> None:
    collaboration.write(tmp_path / name, counts(topk))
    assert_equal(collaboration.read(tmp_path / name), counts(topk))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_the_groups_of_a_token_are_counted(topk: int, groups: int) -> None:
    """Against every token on its own, with experts in order and in any other."""
    tokens = random_tokens(topk)
    layer = counted(tokens, topk, topk > 2)
    for of_expert in (
        groups_in_order(EXPERTS, groups),
        np.random.default_rng(1).permutation(groups_in_order(EXPERTS, groups)),
    ):
        wanted = np.mean([len({of_expert[e] for e in experts}) for experts in tokens])
        assert layer.distinct(of_expert) == pytest.approx(wanted, abs=1e-12)


def test_pairs_do_not_say_where_three_experts_go() -> None:
    with pytest.raises(ValueError, match="more than two experts"):
        counted([[0, 1, 2]] * 3, 3, with_sets=False).distinct(groups_in_order(EXPERTS, 2))


def test_closeness_of_known_counts() -> None:
    """Expert 0 with 1 alone; 2 with 3 and 4 as often; nobody has 5."""
    layer = counted([[0, 1]] * 4 + [[2, 3]] * 2 + [[2, 4]] * 2, 2, with_sets=False)
    found = closeness(layer)
    assert found.shares == pytest.approx((4.5 / 5, 1, 1))
    assert found.entropy == pytest.approx(np.log(2) / np.log(5) / 5)
    assert found.partners == pytest.approx(6 / 5)
    assert found.load == pytest.approx(4 / (16 / 6))


def test_counts_of_nobody() -> None:
    layer = counted([], 2, with_sets=False)
    assert closeness(layer).shares == (0, 0, 0)
    assert layer.distinct(groups_in_order(EXPERTS, 2)) == 0


def test_partners_are_in_the_order_of_their_counts() -> None:
    """argsort(-A) without the expert itself; where counts are equal, by number."""
    layer = counted([[0, 3]] * 3 + [[0, 2]] * 2 + [[0, 5]] * 2 + [[4, 1]], 2, with_sets=False)
    partners = lists.lists_of(Collaboration(EXPERTS, 2, {1: layer})).layers[1]
    assert partners[0].tolist() == [3, 2, 5, 1, 4]
    assert partners[4].tolist() == [1, 0, 2, 3, 5]


def test_lists_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix, output = tmp_path / "counts.json", tmp_path / "lists.json"
    collaboration.write(matrix, counts())
    assert c2r.main(["lists", "--matrix", str(matrix), "--output", str(output)]) == 0
    found, wanted = lists.read(output), lists.lists_of(counts())
    assert "layer 2, 4" in capsys.readouterr().out
    assert found.layers.keys() == wanted.layers.keys()
    for number, partners in wanted.layers.items():
        np.testing.assert_array_equal(found.layers[number], partners)
    assert found.complaint(EXPERTS, [2, 4]) is None
    assert found.complaint(8, [2, 4]) == "it has lists of 6 experts, and --num-experts is 8"
    assert found.complaint(EXPERTS, [1, 2, 3, 4]) == "it lacks layer 1, 3"
    assert str(found.complaint(EXPERTS, [2])).startswith("it has layer 4")


def damage(content: Any, *keys: Any, to: Any) -> Any:
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return content


DAMAGED_COUNTS: dict[str, Callable[[Any], Any]] = {
    "schema": lambda c: damage(c, "schema", to=7),
    "experts is no whole number": lambda c: damage(c, "experts", to="6"),
    "topk is 9": lambda c: damage(c, "topk", to=9),
    "no layers": lambda c: damage(c, "layers", to={}),
    "no number of a layer": lambda c: damage(c, "layers", to={"x": c["layers"]["2"]}),
    "tokens is no whole number": lambda c: damage(c, "layers", "2", "tokens", to=1.5),
    "chosen is not 6": lambda c: damage(c, "layers", "2", "chosen", to=[1, 2]),
    "together is not 6 x 6": lambda c: damage(c, "layers", "2", "together", 1, to=[0]),
    "together is not": lambda c: damage(c, "layers", "2", "together", 1, 2, to=-4),
    "not symmetric": lambda c: damage(c, "layers", "2", "together", 1, 2, to=10**4),
    "more tokens chose": lambda c: damage(c, "layers", "2", "tokens", to=1),
    "sets are no list": lambda c: damage(c, "layers", "2", "sets", to=3),
    "no ascending list": lambda c: damage(c, "layers", "2", "sets", 0, to=[4, 1]),
    "set_tokens is not": lambda c: damage(c, "layers", "2", "set_tokens", to=[1]),
    "sets is not": lambda c: damage(c, "layers", "2", "sets", 0, to=[0, 1, 2, 3]),
    "provenance": lambda c: damage(c, "provenance", to=[]),
}


@pytest.mark.parametrize("line", DAMAGED_COUNTS)
def test_damaged_counts_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    path = tmp_path / "counts.json"
    collaboration.write(path, counts())
    path.write_text(json.dumps(DAMAGED_COUNTS[line](json.loads(path.read_text()))))
    assert c2r.main(["report", "--matrix", str(path)]) == 2
    said = capsys.readouterr().err
    assert line in said and str(path) in said and said.count("\n") == 1


DAMAGED_LISTS: dict[str, Callable[[Any], Any]] = {
    "schema": lambda c: damage(c, "schema", to=None),
    "experts is no whole number": lambda c: damage(c, "experts", to=0),
    "no lists": lambda c: damage(c, "lists", to=[]),
    "no layers": lambda c: damage(c, "lists", to={}),
    "no number of a layer": lambda c: damage(c, "lists", to={"0": c["lists"]["2"]}),
    "layer 2 is not 6 x 5": lambda c: damage(c, "lists", "2", to=[[1]]),
    "every other expert once": lambda c: damage(c, "lists", "2", 3, 0, to=3),
    "provenance": lambda c: damage(c, "provenance", to=[]),
}


@pytest.mark.parametrize("line", DAMAGED_LISTS)
def test_damaged_lists_are_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "lists.json"
    lists.write(path, lists.lists_of(counts()))
    path.write_text(json.dumps(DAMAGED_LISTS[line](json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=line) as error:
        lists.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["counts.json", "counts.safetensors", "lists.json"])
def test_bytes_that_are_cut_or_flipped(tmp_path: Path, name: str) -> None:
    """Read as before, or one line; never anything else."""
    path = tmp_path / name
    is_lists = name == "lists.json"
    lists.write(path, lists.lists_of(counts())) if is_lists else collaboration.write(path, counts())
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content[: rng.integers(0, len(content))])
        if rng.integers(2):
            damaged = bytearray(content)
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            lists.read(path) if is_lists else collaboration.read(path)
        except ValueError as error:
            assert str(path) in str(error)


def test_a_report_has_a_line_for_every_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix, picture = tmp_path / "counts.json", tmp_path / "map.svg"
    collaboration.write(matrix, counts())
    words = ["report", "--matrix", str(matrix), "--ranks", "6", "--ranks-per-node", "3"]
    assert c2r.main([*words, "--picture", str(picture)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-6:] == ["ranks", "of", "6", "nodes", "of", "2"]
    by_layer = {line.split()[0]: line.split() for line in lines if line}
    for number, layer in counts().layers.items():
        assert by_layer[str(number)][-2:] == [
            f"{layer.distinct(groups_in_order(EXPERTS, groups)):.3f}" for groups in (6, 2)
        ]
    assert "mean" in by_layer
    assert picture.read_text() == heat_map(counts())


def test_the_heat_map_is_darkest_at_the_closest_pair() -> None:
    layer = counted([[0, 3]] * 8 + [[0, 1]] + [[2, 4]] * 3 + [[2, 5]] * 3, 2, with_sets=False)
    svg = heat_map(Collaboration(EXPERTS, 2, {2: layer}))
    found = re.search(r"base64,([^\"]+)", svg)
    assert found
    pixels = np.array(Image.open(BytesIO(base64.b64decode(found.group(1)))))
    assert pixels.shape == (EXPERTS, EXPERTS, 3)
    shares = layer.together / layer.together.sum(axis=1, keepdims=True)
    order = np.argsort(-shares.ravel(), kind="stable")
    brightness = pixels.sum(axis=2, dtype=int).ravel()[order]
    assert (np.diff(brightness) >= 0).all() and brightness[0] < brightness[-1]


REFUSED = {
    "--ranks 4 does not divide the 6 experts": ["report", "--ranks", "4"],
    "--ranks-per-node 4 does not divide --ranks 6": ["--ranks", "6", "--ranks-per-node", "4"],
    "is written as SVG": ["report", "--picture", "map.png"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    matrix = tmp_path / "counts.json"
    collaboration.write(matrix, counts())
    words = [word for word in REFUSED[line] if word != "report"]
    assert c2r.main(["report", "--matrix", str(matrix), *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_neither_torch_nor_megatron_is_imported() -> None:
    program = (
        "import sys; from megatron_scmoe.commands import c2r; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron.core')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
