"""Variants from outside the package, a file each; docs/variants.md shows them."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_scmoe.model.combine import COMBINES
from megatron_scmoe.model.dispatch import DISPATCHERS
from megatron_scmoe.model.experts.at_home import AT_HOME

TABLES: tuple[dict[str, Any], ...] = (COMBINES, DISPATCHERS, AT_HOME)


@contextmanager
def registered() -> Iterator[None]:
    """Import the files, whose last lines register them, and take them out again."""
    before = [dict(table) for table in TABLES]
    try:
        for name in ("combine", "dispatch", "experts"):
            module = f"{__name__}.{name}"
            sys.modules.pop(module, None)
            importlib.import_module(module)
        yield
    finally:
        for table, values in zip(TABLES, before, strict=True):
            table.clear()
            table.update(values)
