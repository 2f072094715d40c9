"""The hidden folder beside the output in which the files of a run are made."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def work_folder(prefix: Path) -> Iterator[Path]:
    """A folder `.<prefix>.<random>.tmp`, removed on any end but a kill of the process itself
    (SIGKILL); it can then be deleted by hand."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{prefix.name}.", suffix=".tmp", dir=prefix.parent
    ) as name:
        yield Path(name)
