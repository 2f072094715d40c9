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
from megatron_scmoe.words import numbers, read_json, write_whole

SCHEMA = 1


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
        wanted = set(layers)
        if missing := wanted - self.layers.keys():
            return f"it has no lists for layer {numbers([*missing])}"
        if more := self.layers.keys() - wanted:
            return f"it has lists for layer {numbers([*more])}, which has no MoE in this model"
        return None


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
        if content.get("schema") != SCHEMA or not isinstance(content.get("lists"), dict):
            raise ValueError(f"it has no lists of schema {SCHEMA}")
        experts = content.get("experts")
        if not isinstance(experts, int) or isinstance(experts, bool) or experts < 1:
            raise ValueError("experts is no number of experts")
        provenance = content.get("provenance", {})
        if not isinstance(provenance, dict):
            raise ValueError("its provenance is no object")
        layers = {}
        for key, value in content["lists"].items():
            if not key.isdecimal() or len(key) > 6 or int(key) < 1:
                raise ValueError(f"{key!r:.20} is no number of a layer")
            layers[int(key)] = partners_of(value, experts, f"layer {key}")
        if not layers:
            raise ValueError("it has no layers")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} holds no lists of partners ({error}): write it anew with c2r.py lists"
        ) from error
    return Lists(experts, dict(sorted(layers.items())), provenance)


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
