"""Documents from Parquet files, as lines of JSON."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_scmoe.commands.preprocess import DataError

_ROWS = 256  # read at a time


def check_pyarrow(path: Path) -> None:
    """Look for pyarrow without importing it.

    Raises:
        DataError: it is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"reading {path} needs pyarrow: pip install 'megatron-scmoe[data]'")


def read_rows(path: Path, keys: Sequence[str], skip: int) -> Iterator[tuple[bytes, float]]:
    """Each row as a line of JSON with `keys`, and the share of the rows that is read with it.

    skip: rows at the beginning that are left out.

    Raises:
        DataError: a column is missing or holds no text; the file cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, keys)
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= skip:
                    row += rows
                    continue
                for batch in file.iter_batches(_ROWS, [group], list(keys), use_threads=False):
                    for values in batch.select(list(keys)).to_pylist():
                        row += 1
                        if row > skip:
                            yield json.dumps(values).encode(), row / file.metadata.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: this Parquet file cannot be read: {error}") from error


def _check_columns(path: Path, schema: Any, keys: Sequence[str]) -> None:
    import pyarrow.types as kinds

    for key in keys:
        if key not in schema.names:
            present = ", ".join(map(repr, schema.names[:8]))
            raise DataError(f"{path}: no column {key!r} (--json-keys); the file has: {present}")
        kind = schema.field(key).type
        if kinds.is_dictionary(kind):
            kind = kind.value_type
        if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
            raise DataError(f"{path}: the column {key!r} is no text but {kind}")
