"""Which files make up a corpus, and their lines: plain, gzip, Zstandard or xz JSON lines."""

import codecs
import glob
import gzip
import importlib.util
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_scmoe.commands.preprocess import DataError

DIRECTORY_SUFFIXES = tuple(
    text + packed for text in (".jsonl", ".json") for packed in ("", ".gz", ".zst", ".xz")
)
BATCH_BYTES = 1 << 18  # large enough that handing it to another process costs nothing
BATCH_LINES = 1000


@dataclass(frozen=True)
class Batch:
    """Consecutive lines of one file.

    first_line: number of lines[0] in the file, from 1.
    disk_bytes: how far reading this batch moved in the file on disk (0 for a pipe).
    """

    path: str
    first_line: int
    lines: list[bytes]
    disk_bytes: int


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files that `inputs` name, in reading order.

    Args:
        inputs: paths of files, of directories (their `*.jsonl` and `*.json` files, also .gz,
            .zst and .xz, sorted by name, subdirectories left out), or globs (`**` allowed, sorted).

    Raises:
        DataError: an input without a file, a link to nothing or to itself, a file named twice, or
            .zst without zstandard.
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
                    "(also .gz, .zst, .xz); name the files with a glob"
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
    return files


def read_batches(files: Iterable[Path]) -> Iterator[Batch]:
    """The lines of `files`, in order, a batch never crossing a file.

    Raises:
        DataError: a file cannot be read or is cut short; names file and line.
    """
    for path in files:
        number = 1  # of the next batch's first line
        lines: list[bytes] = []
        size = position = 0
        try:
            with path.open("rb") as raw, _decompress(raw, path.suffix) as stream:
                for line in stream:
                    if number == 1 and not lines:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    lines.append(line)
                    size += len(line)
                    if size >= BATCH_BYTES or len(lines) == BATCH_LINES:
                        start, position = position, _tell(raw)
                        yield Batch(str(path), number, lines, position - start)
                        number += len(lines)
                        lines, size = [], 0
                if lines:
                    yield Batch(str(path), number, lines, _tell(raw) - position)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{path}:{number + len(lines)}: the file cannot be read on from here: {error}"
            ) from error


def _tell(raw: BinaryIO) -> int:
    return raw.tell() if raw.seekable() else 0


def _decompress(raw: io.BufferedReader, suffix: str) -> BinaryIO | gzip.GzipFile | lzma.LZMAFile:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), buffer_size=1 << 20)
    if suffix == ".xz" and raw.peek(1):  # like the others, a file of nothing has no lines
        return lzma.LZMAFile(raw)
    return raw


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames.

    Differs from zstandard's stream_reader in that a file cut short raises EOFError: losing the
    rest of a corpus silently is the one thing this must not do.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        # Archives packed with `zstd --long=31` need the largest window.
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._frame = self._context.decompressobj()
        self._in_frame = False
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._packed or self._raw.read(1 << 17)
            if not packed:
                if self._in_frame:
                    raise EOFError("Zstandard file ended before its last frame was complete")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(f"not a valid Zstandard file ({error})") from error
            self._in_frame, self._packed = True, b""
            if self._frame.eof:
                self._packed = self._frame.unused_data
                self._frame = self._context.decompressobj()
                self._in_frame = False
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
