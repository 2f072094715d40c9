"""Numbers, options and tables as a reader wants them, and files that are whole or not there."""

import json
import os
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from math import log10
from pathlib import Path
from typing import Any, NoReturn


def duration(seconds: float) -> str:
    """Milliseconds with three significant digits or, from 100 ms, none behind the point."""
    return f"{_three_digits(seconds * 1e3)} ms"


def speed(bytes_per_second: float) -> str:
    """Bytes a second in powers of 1000."""
    return f"{size(bytes_per_second)}/s"


def size(number: float) -> str:
    """Bytes in powers of 1000."""
    if number < 1000:
        return f"{number:.0f} B"
    power = min(int(log10(number) / 3), 4)
    return f"{_three_digits(number / 1000**power)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def percent(share: float) -> str:
    """A share with one digit behind the point."""
    return f"{share:.1%}"


def change(value: float, reference: float) -> str:
    """How much more a value is, with its sign."""
    share = value / reference - 1 if reference else 0.0
    return f"{share:+.1%}" if abs(share) >= 0.0005 else "0.0%"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _three_digits(number: float) -> str:
    rounded = float(f"{number:.3g}")  # 9.999 is 10.0
    return f"{number:.{0 if rounded >= 100 else 1 if rounded >= 10 else 2}f}"


def numbers(values: Sequence[int]) -> str:
    """1, 2, 3, 5 as 1-3, 5."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def installed(package: str) -> str | None:
    """Its version, if it is installed."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def flag(dest: str) -> str:
    """The option of an attribute of the parsed arguments."""
    return "--" + dest.replace("_", "-")


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], words: Container[int] = (0,)
) -> str:
    """Columns of a terminal: `words`, by their numbers, to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name first, so that it is whole or not there.

    Raises:
        OSError: it cannot be written; its text names the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        error.filename = str(path)  # of a full disk the system names none
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds, whose numbers can all be computed with.

    Raises:
        ValueError: it holds no such thing; one line without the file's name.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # a pipe would be waited for
    try:
        content = json.loads(
            path.read_bytes().decode(),
            parse_int=_computable(int),
            parse_float=_computable(float),
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON, or not all of it: {error}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} and no object")
    return content


LARGEST = 2**63
"""More than any count, time or seed of ours."""


def _computable[N: (int, float)](kind: type[N]) -> Any:
    def parse(text: str) -> N:
        number = kind(text) if len(text) < 400 else None
        if number is None or not abs(number) <= LARGEST:
            _no_number(text)
        return number

    return parse


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is no number to compute with")
