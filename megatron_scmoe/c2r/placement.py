"""Which rank every expert lies on: a file of JSON, made by tools/c2r.py place.

    {"schema": 1, "experts": 8, "ranks": 4, "ranks_per_node": 2,
     "layers": {"2": [[0, 5], [1, 2], [3, 7], [4, 6]]}, "provenance": {...}}

A layer's key is the number of its attention layer, from 1; it has the experts of every rank. Ranks
are those of an expert parallel group, and those of a node are neighbours. Experts have the numbers
that the router gives them, here as everywhere: a placement changes where they lie and nothing else.

Shapes: N routed experts
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from megatron_scmoe.c2r.closeness import groups_in_order
from megatron_scmoe.c2r.collaboration import Collaboration
from megatron_scmoe.c2r.layer_file import SCHEMA, checked_layers, other_layers, whole
from megatron_scmoe.words import numbers, read_json, write_whole

Ranks = tuple[tuple[int, ...], ...]
"""The experts of every rank, as many on each."""


@dataclass(frozen=True)
class Placement:
    """Of all MoE layers of a model."""

    experts: int
    ranks: int
    ranks_per_node: int
    layers: Mapping[int, Ranks]
    """By the number of the attention layer."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: what JSON can hold."""

    @cached_property
    def digest(self) -> str:
        """Of what it places where."""
        content = json.dumps([self.ranks, sorted(self.layers.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    def order(self, layer: int) -> list[int]:
        """The experts of a layer as they lie, rank by rank, [N]."""
        return [expert for rank in self.layers[layer] for expert in rank]

    def rank_of(self, layer: int) -> np.ndarray:
        """The rank of every expert of a layer, [N]."""
        return rank_of(self.layers[layer])

    def node_of(self, layer: int) -> np.ndarray:
        """The node of every expert of a layer, [N]."""
        return self.rank_of(layer) // self.ranks_per_node

    def complaint(self, experts: int, ranks: int, layers: Iterable[int]) -> str | None:
        """Why it is not one of a model with so many experts on so many ranks and MoE layers of
        these numbers; None if it is."""
        if experts != self.experts:
            return f"it has {self.experts} experts, and --num-experts is {experts}"
        if ranks != self.ranks:
            return f"it has {self.ranks} ranks, and --expert-model-parallel-size is {ranks}"
        return other_layers(self.layers, layers)


def rank_of(ranks: Ranks) -> np.ndarray:
    """The rank of every expert, [N]."""
    found = np.empty(sum(map(len, ranks)), np.int64)
    for number, experts in enumerate(ranks):
        found[list(experts)] = number
    return found


def groups_of(experts: int, groups: int, layer: int, placed: Placement | None) -> np.ndarray:
    """The group of every expert, of so many equal ones of neighbouring ranks, [N].

    Args:
        placed: on a multiple of as many ranks; None where experts lie in order.
    """
    if placed is None:
        return groups_in_order(experts, groups)
    return placed.rank_of(layer) // (placed.ranks // groups)


class Copies(NamedTuple):
    """Rows of a token, if it is sent once to every rank or to every node that has one of its
    experts; its own rank and node count too."""

    ranks: float
    nodes: float


def copies(placed: Placement, counts: Collaboration) -> dict[int, Copies]:
    """Of every layer, means over the tokens that were counted.

    Raises:
        ValueError: a layer was not counted, or only in pairs where a token has more than two
            experts.
    """
    if lacking := placed.layers.keys() - counts.layers.keys():
        raise ValueError(f"layer {numbers([*lacking])} was not counted")
    return {
        layer: Copies(
            counts.layers[layer].distinct(placed.rank_of(layer)),
            counts.layers[layer].distinct(placed.node_of(layer)),
        )
        for layer in sorted(placed.layers)
    }


def contiguous(experts: int, ranks: int) -> Ranks:
    """Where experts lie without a placement."""
    each = experts // ranks
    return tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(ranks))


def write(path: Path, placement: Placement) -> None:
    """Write it whole or not at all, a line for each layer.

    Raises:
        OSError: it cannot be written.
    """
    layers = ",\n".join(
        f'  "{layer}": {json.dumps(ranks)}' for layer, ranks in sorted(placement.layers.items())
    )
    head = json.dumps(
        {
            "schema": SCHEMA,
            "experts": placement.experts,
            "ranks": placement.ranks,
            "ranks_per_node": placement.ranks_per_node,
            "provenance": dict(placement.provenance),
        },
        indent=1,
    )
    write_whole(path, f'{head.removesuffix("\n}")},\n "layers": {{\n{layers}\n }}\n}}\n')


def read(path: Path | str) -> Placement:
    """The placement that a file holds.

    Raises:
        ValueError: it is none; one line that names the file.
    """
    try:
        return _placement(read_json(Path(path)))
    except FileNotFoundError:
        _refuse(path, "there is no such file")
    except OSError as error:
        _refuse(path, error.strerror or str(error))
    except ValueError as error:
        _refuse(path, str(error))


def _refuse(path: Path | str, why: str) -> NoReturn:
    raise ValueError(
        f"{path} is no placement of experts ({why}): make one with tools/c2r.py place."
    ) from None


def _placement(content: dict[str, Any]) -> Placement:
    layers = checked_layers(content, content.get("layers"))
    sizes = (whole(content, name, least=1) for name in ("experts", "ranks", "ranks_per_node"))
    experts, ranks, ranks_per_node = sizes
    if experts % ranks or ranks % ranks_per_node:
        raise ValueError(
            f"{experts} experts, {ranks} ranks and {ranks_per_node} ranks a node do not divide"
        )
    for number, lists in layers.items():
        if not _deals_out(lists, experts, ranks):
            raise ValueError(
                f"layer {number} is not {ranks} lists of {experts // ranks} experts, each of the "
                f"{experts} once"
            )
    placed = {number: tuple(tuple(rank) for rank in lists) for number, lists in layers.items()}
    return Placement(experts, ranks, ranks_per_node, placed, content.get("provenance", {}))


def _deals_out(lists: Any, experts: int, ranks: int) -> bool:
    """Whether every rank has as many experts, and every expert one rank."""
    if not isinstance(lists, list) or len(lists) != ranks:
        return False
    if not all(isinstance(rank, list) and len(rank) == experts // ranks for rank in lists):
        return False
    placed = [expert for rank in lists for expert in rank]
    whole = all(type(expert) is int for expert in placed)
    return whole and sorted(placed) == list(range(experts))
