"""What --scmoe-expert-cache-size says. Imports no torch: options are read before it is there."""

import re
from argparse import ArgumentTypeError
from dataclasses import dataclass

UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


@dataclass(frozen=True)
class CacheSize:
    """What --scmoe-expert-cache-size asks for: experts a layer, bytes of all layers, or neither."""

    experts: int | None = None
    memory: float | None = None


def cache_size(text: str) -> CacheSize:
    """Read the option: a number, a number with a unit, or auto.

    Raises:
        ArgumentTypeError: it is none of them.
    """
    if text == "auto":
        return CacheSize()
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return CacheSize(experts=int(text))
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([A-Za-z]+)", text, re.ASCII)
    if found is None or found[2] not in UNITS:
        raise ArgumentTypeError(
            f"{text} is neither auto, nor a number of experts, nor bytes with a unit such as 2GiB"
        )
    return CacheSize(memory=float(found[1]) * UNITS[found[2]])
