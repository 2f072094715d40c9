"""How often experts were chosen together: counts of every MoE layer, and their file.

    {"schema": 1, "experts": 8, "topk": 2, "provenance": {...},
     "layers": {"2": {"tokens": 204800, "chosen": [...], "together": [[...], ...],
                      "sets": [[0, 3, 5], ...], "set_tokens": [17, ...]}}}

A layer's key is the number of its attention layer, from 1. `sets` and `set_tokens` exist where a
token may have more than two experts: how many ranks it needs does not follow from pairs. They
may be of a part of the tokens. In safetensors the same arrays are `2.together` and so on, sets are
filled up with -1, and the rest is the metadata.

Shapes: N routed experts, S different sets, K top-k
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scmoe.c2r.layer_file import SCHEMA, checked_layers, whole
from megatron_scmoe.words import read_json, write_whole

NOBODY = -1
"""In the place of an expert that a set does not have."""


@dataclass
class LayerCounts:
    """What the tokens of one MoE layer have chosen; all are counts of tokens."""

    tokens: int
    chosen: np.ndarray
    """Of every expert, [N]."""
    together: np.ndarray
    """Of every pair of experts; the diagonal is 0, [N, N]."""
    sets: np.ndarray | None = None
    """Experts of every different set in ascending order, then NOBODY, [S, K]."""
    set_tokens: np.ndarray | None = None
    """Of every set, [S]."""

    def distinct(self, groups: np.ndarray) -> float:
        """Mean number of different groups, such as ranks or nodes, among the experts of a token.

        Args:
            groups: number of every expert's group, from 0, [N].

        Raises:
            ValueError: it does not follow from pairs, and sets were not counted.
        """
        if self.sets is not None and self.set_tokens is not None:
            of_sets = np.where(self.sets == NOBODY, NOBODY, groups[self.sets])
            of_sets.sort(axis=1)
            starts = np.diff(of_sets, axis=1, prepend=NOBODY) != 0
            total = max(int(self.set_tokens.sum()), 1)
            return float((starts.sum(axis=1) * self.set_tokens).sum() / total)
        pairs = self.together.sum() // 2
        if pairs > self.tokens:
            raise ValueError("it counts pairs alone, and its tokens have more than two experts")
        same = groups[:, None] == groups[None, :]
        saved = int(self.together[same].sum()) // 2
        return float((self.chosen.sum() - saved) / max(self.tokens, 1))


@dataclass
class Collaboration:
    """The counts of a model."""

    experts: int
    topk: int
    layers: dict[int, LayerCounts]
    """By the number of the attention layer, from 1."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where they come from: what JSON can hold."""


def write(path: Path, counts: Collaboration) -> None:
    """Write counts as JSON, or as safetensors if the name ends so; whole or not at all.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    head = {
        "schema": SCHEMA,
        "experts": counts.experts,
        "topk": counts.topk,
        "provenance": counts.provenance,
    }
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        arrays = {
            f"{number}.{name}": np.array(value, np.int64, order="C")
            for number, layer in counts.layers.items()
            for name, value in vars(layer).items()
            if value is not None
        }
        write_whole(path, save(arrays, {"collaboration": json.dumps(head)}))
        return
    layers = {str(number): _plain(layer) for number, layer in counts.layers.items()}
    write_whole(path, json.dumps({**head, "layers": layers}) + "\n")


def _plain(layer: LayerCounts) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokens": layer.tokens,
        "chosen": layer.chosen.tolist(),
        "together": layer.together.tolist(),
    }
    if layer.sets is not None and layer.set_tokens is not None:
        found["sets"] = [[e for e in members if e != NOBODY] for members in layer.sets.tolist()]
        found["set_tokens"] = layer.set_tokens.tolist()
    return found


def read(path: Path) -> Collaboration:
    """The counts of a file.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is no such thing; one line.
        OSError: it cannot be read.
    """
    try:
        head, layers = _safetensors(path) if path.suffix == ".safetensors" else _json(path)
        return _checked(head, layers)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} holds no counts of experts ({error}): write it anew with c2r.py profile"
        ) from error


def _json(path: Path) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
    content = read_json(path)
    layers = content.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(of, dict) for of in layers.values()):
        raise ValueError("it has no layers")
    topk = content.get("topk")
    width = topk if isinstance(topk, int) else 0
    for layer in layers.values():
        if "sets" in layer:
            if not isinstance(layer["sets"], list):
                raise ValueError("its sets are no list")
            layer["sets"] = [
                [*members, *[NOBODY] * (width - len(members))] for members in layer["sets"]
            ]
    return content, layers


def _safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    layers: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(path, "numpy") as file:
            head = json.loads((file.metadata() or {}).get("collaboration", "{}"))
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                number, _, name = key.partition(".")
                layers.setdefault(number, {})[name] = file.get_tensor(key)
    except (SafetensorError, RecursionError) as error:
        raise ValueError(error) from error
    if not isinstance(head, dict):
        raise ValueError("its metadata are no object")
    return head, layers


def _checked(head: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> Collaboration:
    found = checked_layers(head, layers)
    experts, topk = whole(head, "experts"), whole(head, "topk")
    if not 1 <= topk <= experts:
        raise ValueError(f"topk is {topk} and experts is {experts}")
    for number, layer in found.items():
        try:
            found[number] = _layer(layer, experts, topk)
        except ValueError as error:
            raise ValueError(f"layer {number}: {error}") from error
    return Collaboration(experts, topk, found, head.get("provenance", {}))


def _layer(layer: Mapping[str, Any], experts: int, topk: int) -> LayerCounts:
    tokens = whole(layer, "tokens")
    chosen = counts_of(layer.get("chosen"), "chosen", (experts,))
    together = counts_of(layer.get("together"), "together", (experts, experts))
    if (together != together.T).any() or together.diagonal().any():
        raise ValueError("together is not symmetric with a diagonal of 0")
    if (together > chosen[:, None]).any() or (chosen > tokens).any():
        raise ValueError("more tokens chose experts together than chose one, or than there are")
    if "sets" not in layer:
        return LayerCounts(tokens, chosen, together)
    set_tokens = counts_of(layer.get("set_tokens"), "set_tokens", (len(layer["sets"]),))
    sets = counts_of(layer["sets"], "sets", (len(set_tokens), topk), NOBODY)
    if (sets >= experts).any() or ((np.diff(sets, axis=1) <= 0) & (sets[:, 1:] != NOBODY)).any():
        raise ValueError("a set is no ascending list of experts")
    return LayerCounts(tokens, chosen, together, sets, set_tokens)


def counts_of(value: Any, name: str, shape: tuple[int, ...], least: int = 0) -> np.ndarray:
    """An array of whole numbers.

    Raises:
        ValueError: it is none, has another shape, or a number below `least`.
    """
    with suppress(ValueError):  # of rows that differ in length
        array = np.array(value)
        if array.size == 0 == np.prod(shape):
            return np.zeros(shape, np.int64)
        if array.dtype.kind in "iu" and array.shape == shape:
            counts = array.astype(np.int64)
            if (counts >= least).all():
                return counts
    sizes = " x ".join(map(str, shape))
    raise ValueError(f"{name} is not {sizes} whole numbers from {least}")
