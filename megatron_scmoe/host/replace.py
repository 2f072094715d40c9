"""How host symbols are replaced at run time.

A row names the symbol, where the host uses it, when and why it is replaced. The condition "cpu"
is a machine without a CUDA device; the others are defects of the wheel, "always" one that no
check at start can see. Each part of the package has a table of its own rows, beside the functions
that take the host's place; start.py puts them together.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from megatron_scmoe.host import cpu, wheel
from megatron_scmoe.words import table

CONDITIONS: dict[str, Callable[[], bool]] = {
    "always": lambda: True,
    "cpu": cpu.no_cuda_device,
    "no Makefile": wheel.makefile_missing,
    "no TE": wheel.te_missing,
    "no TE or Apex": wheel.te_and_apex_missing,
}


class Replacement(NamedTuple):
    """One replaced symbol; `make` turns the original into its replacement."""

    symbol: str
    condition: str
    host_file: str
    reason: str
    make: Callable[[Any], Any]


_MISSING = object()
# By symbol: owner, attribute, the owner's own original.
_undo: dict[str, tuple[Any, str, Any]] = {}


def replace_symbols(rows: Iterable[Replacement]) -> list[Replacement]:
    """Replace what this machine needs, each symbol once per process; the rows that were applied."""
    applied = []
    for row in rows:
        if row.symbol in _undo or not CONDITIONS[row.condition]():
            continue
        applied.append(row)
        owner, name = _locate(row.symbol)
        inherited = isinstance(owner, type) and name not in vars(owner)
        _undo[row.symbol] = owner, name, _MISSING if inherited else getattr(owner, name)
        setattr(owner, name, row.make(getattr(owner, name)))
    return applied


def format_table(rows: Sequence[Replacement]) -> str:
    """The rows as aligned columns."""
    return table(
        ("symbol", "condition", "host file", "reason"), [row[:4] for row in rows], {0, 1, 2, 3}
    )


def _locate(symbol: str) -> tuple[Any, str]:
    """The object that holds the symbol and the symbol's name in it.

    Raises:
        AttributeError: there is no such symbol.
    """
    parts = symbol.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:-1]:
            owner = getattr(owner, part, _MISSING)
        if hasattr(owner, parts[-1]):
            return owner, parts[-1]
        break
    raise AttributeError(
        f"{symbol} does not exist here: the tables of replaced symbols are written for "
        "megatron-core 0.19.2"
    )
