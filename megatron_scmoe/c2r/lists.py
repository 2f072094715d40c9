"""Partners of every expert, best first, and their file: what --scmoe-c2r-lists names.

    {"schema": 1, "experts": 8, "lists": {"2": [[3, 1, ...], ...]}, "provenance": {...}}

A layer's key is the number of its attention layer, from 1.

Shapes: N routed experts
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scmoe.c2r.collaboration import Collaboration, counts_of
from megatron_scmoe.c2r.layer_file import SCHEMA, checked_layers, other_layers, whole
from megatron_scmoe.words import read_json, write_whole


@dataclass
class Lists:
    """The partners of a model's experts."""

    experts: int
    layers: dict[int, np.ndarray]
    """By the number of the attention layer, from 1: of every expert all others, [N, N - 1]."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def complaint(self, experts: int, layers: Iterable[int]) -> str | None:
        """Why they are not those of a model with so many experts and MoE layers of these numbers;
        None if they are."""
        if experts != self.experts:
            return f"it has lists of {self.experts} experts, and --num-experts is {experts}"
        return other_layers(self.layers, layers)


def lists_of(counts: Collaboration) -> Lists:
    """argsort(-A[i]) of every expert without itself; where counts are equal the lower number comes
    first."""
    layers = {}
    for number, layer in counts.layers.items():
        ranked = layer.together.copy()
        np.fill_diagonal(ranked, -1)  # an expert is its own last partner
        layers[number] = np.argsort(-ranked, axis=1, kind="stable")[:, :-1]
    return Lists(counts.experts, layers, counts.provenance)


def write(path: Path, lists: Lists) -> None:
    """Write the file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "schema": SCHEMA,
        "experts": lists.experts,
        "lists": {str(number): partners.tolist() for number, partners in lists.layers.items()},
        "provenance": lists.provenance,
    }
    write_whole(path, json.dumps(content) + "\n")


def read(path: Path) -> Lists:
    """The lists of a file.

    Raises:
        ValueError: the file is no such thing; one line.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
        experts = whole(content, "experts", least=1)
        layers = {
            number: partners_of(value, experts, f"layer {number}")
            for number, value in checked_layers(content, content.get("lists")).items()
        }
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} holds no lists of partners ({error}): write it anew with c2r.py lists"
        ) from error
    return Lists(experts, layers, content.get("provenance", {}))


def partners_of(value: Any, experts: int, name: str) -> np.ndarray:
    """The partners of every expert of a layer, [N, N - 1].

    Raises:
        ValueError: a row is not all other experts; it begins with the name.
    """
    partners = counts_of(value, name, (experts, experts - 1))
    everyone = np.arange(experts)[:, None]
    if (np.sort(np.hstack([everyone, partners]), axis=1) != everyone.T).any():
        raise ValueError(f"{name}: a row does not name every other expert once")
    return partners
