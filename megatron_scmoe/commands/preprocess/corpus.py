"""Which files make up a corpus, and their documents as lines of JSON."""

import codecs
import glob
import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_scmoe.commands.preprocess import DataError, parquet
from megatron_scmoe.commands.preprocess.packed import ERRORS, SUFFIXES, decompress

DIRECTORY_SUFFIXES = (
    *(text + packed for text in (".jsonl", ".json") for packed in ("", *SUFFIXES)),
    ".parquet",
)
BATCH_BYTES = 1 << 18  # large enough that handing it to another process costs nothing
BATCH_LINES = 1000


@dataclass(frozen=True)
class Bookmark:
    """A place between two lines: in which file, behind how many of its lines, and where that is on
    disk (0 where only reading from the beginning leads there)."""

    file: int = 0
    lines: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """Consecutive lines of one file.

    first_line: number of lines[0] in the file, from 1.
    disk_bytes: how far reading this batch moved in the file on disk (0 for a pipe).
    end: the place behind it.
    """

    path: str
    first_line: int
    lines: list[bytes]
    disk_bytes: int
    end: Bookmark = Bookmark()


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files that `inputs` name, in reading order.

    Args:
        inputs: paths of files, of directories (their `*.jsonl` and `*.json` files, also .gz,
            .zst and .xz, and `*.parquet`, sorted by name, subdirectories left out), or globs (`**`
            allowed, sorted).

    Raises:
        DataError: an input without a file, a link to nothing or to itself, a file named twice, or
            .zst without zstandard, .parquet without pyarrow.
    """
    files: list[Path] = []
    for name in inputs:
        if not name:
            raise DataError("--input '' is empty: name a file, a directory or a glob")
        path = Path(name)
        if path.is_dir():
            found = sorted(
                file
                for file in path.iterdir()
                if file.name.endswith(DIRECTORY_SUFFIXES)
                and (file.is_file() or (file.is_symlink() and not file.exists()))
            )
            if not found:
                raise DataError(
                    f"--input {name}: this directory has no *.jsonl or *.json file "
                    "(also .gz, .zst, .xz) and no *.parquet; name the files with a glob"
                )
        elif path.exists():
            found = [path]
        else:
            matches = (Path(match) for match in glob.glob(name, recursive=True))
            found = sorted(match for match in matches if not match.is_dir())
            if not found and path.is_symlink():
                found = [path]
            if not found:
                what = "matches no file" if glob.has_magic(name) else "does not exist"
                raise DataError(f"--input {name}: {what}")
        files += found
    seen: set[Path] = set()
    for file in files:
        if not file.exists():
            raise DataError(f"--input {file} is a link to nothing: mend it, or take it away")
        if file.resolve() in seen:
            raise DataError(f"--input names {file} twice; its documents would be written twice")
        seen.add(file.resolve())
        if file.suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
            raise DataError(f"reading {file} needs zstandard: pip install 'megatron-scmoe[data]'")
        if file.suffix == ".parquet":
            parquet.check_pyarrow(file)
    return files


def read_batches(
    files: Sequence[Path], keys: Sequence[str] = ("text",), start: Bookmark = Bookmark()
) -> Iterator[Batch]:
    """The documents of `files` as lines of JSON, in order, a batch never crossing a file.

    A line of a file is one; a row of a `.parquet` file is one with `keys`; a `.txt` file, packed or
    not, is one whose only key is its text.

    Args:
        start: where to begin, the end of an earlier batch.

    Raises:
        DataError: a file cannot be read or is cut short; names file and line.
    """
    for number, path in enumerate(files):
        if number >= start.file:
            here = start if number == start.file else Bookmark(number)
            if path.suffix == ".parquet":
                yield from _parquet_batches(path, keys, here)
            elif Path(path.stem if path.suffix in SUFFIXES else path).suffix == ".txt":
                yield from _text_batch(path, keys, here)
            else:
                yield from _line_batches(path, here)


def _line_batches(path: Path, start: Bookmark) -> Iterator[Batch]:
    number = start.lines + 1  # of the next batch's first line
    lines: list[bytes] = []
    size = 0
    try:
        with path.open("rb") as raw, decompress(raw, path.suffix) as stream:
            if start.offset:
                raw.seek(start.offset)
            else:
                for _ in itertools.islice(stream, start.lines):
                    pass
            position = _tell(raw)
            for line in stream:
                if number == 1 and not lines:
                    line = line.removeprefix(codecs.BOM_UTF8)
                lines.append(line)
                size += len(line)
                if size >= BATCH_BYTES or len(lines) == BATCH_LINES:
                    before, position = position, _tell(raw)
                    number += len(lines)
                    end = Bookmark(start.file, number - 1, position if stream is raw else 0)
                    yield Batch(str(path), number - len(lines), lines, position - before, end)
                    lines, size = [], 0
            if lines:
                end = Bookmark(start.file, number + len(lines) - 1)
                yield Batch(str(path), number, lines, _tell(raw) - position, end)
    except ERRORS as error:
        raise DataError(
            f"{path}:{number + len(lines)}: the file cannot be read on from here: {error}"
        ) from error


def _text_batch(path: Path, keys: Sequence[str], start: Bookmark) -> Iterator[Batch]:
    if start.lines:
        return
    if len(keys) > 1:
        raise DataError(f"{path}: a text file has one text, --json-keys names {len(keys)}")
    try:
        with path.open("rb") as raw, decompress(raw, path.suffix) as stream:
            content = stream.read().removeprefix(codecs.BOM_UTF8)
    except ERRORS as error:
        raise DataError(f"{path}: the file cannot be read: {error}") from error
    try:
        line = json.dumps({keys[0]: content.decode()}, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        line = content  # the encoder says where it is not UTF-8
    yield Batch(str(path), 1, [line], path.stat().st_size, Bookmark(start.file, 1))


def _parquet_batches(path: Path, keys: Sequence[str], start: Bookmark) -> Iterator[Batch]:
    number, size, lines = start.lines + 1, 0, []
    disk_bytes = path.stat().st_size
    before = share = 0.0
    for line, share in parquet.read_rows(path, keys, start.lines):
        lines.append(line)
        size += len(line)
        if size >= BATCH_BYTES or len(lines) == BATCH_LINES:
            moved, before = int((share - before) * disk_bytes), share
            number += len(lines)
            end = Bookmark(start.file, number - 1)
            yield Batch(str(path), number - len(lines), lines, moved, end)
            lines, size = [], 0
    if lines:
        end = Bookmark(start.file, number + len(lines) - 1)
        yield Batch(str(path), number, lines, int((share - before) * disk_bytes), end)


def _tell(raw: BinaryIO) -> int:
    return raw.tell() if raw.seekable() else 0
