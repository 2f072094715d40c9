"""What the files of C2R have in common: a schema, where they come from, and something for every MoE
layer, whose key is the number of its attention layer, from 1."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from megatron_scmoe.words import numbers

SCHEMA = 1


def checked_layers(head: Mapping[str, Any], layers: Any) -> dict[int, Any]:
    """What a file has for every layer, by number and in order.

    Args:
        head: all but the layers.
        layers: by key.

    Raises:
        ValueError: the head is of another schema, or there is no such thing; one line.
    """
    if head.get("schema") != SCHEMA:
        raise ValueError(f"it has schema {head.get('schema')}, this version reads {SCHEMA}")
    if not isinstance(head.get("provenance", {}), dict):
        raise ValueError("its provenance is no object")
    if not isinstance(layers, dict) or not layers:
        raise ValueError("it has no layers")
    for key in layers:
        if not key.isdecimal() or len(key) > 6 or int(key) < 1:
            raise ValueError(f"{key!r:.20} is no number of a layer")
    return {int(key): layers[key] for key in sorted(layers, key=int)}


def whole(fields: Mapping[str, Any], name: str, least: int = 0) -> int:
    """A field that is a whole number.

    Raises:
        ValueError: it is none, or less.
    """
    value = fields.get(name)
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu":
        value = int(value)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is no whole number from {least}")
    return value


def other_layers(layers: Collection[int], of_model: Iterable[int]) -> str | None:
    """What layers a file has too few or too many for a model; None if they are its MoE layers."""
    wanted = set(of_model)
    if missing := wanted.difference(layers):
        return f"it lacks layer {numbers([*missing])}"
    if more := set(layers) - wanted:
        return f"it has layer {numbers([*more])}, which has no MoE in this model"
    return None
