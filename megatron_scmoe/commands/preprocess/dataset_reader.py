"""Megatron's .bin and .idx files as they are on disk, and whether they fit together.

Reads the format that `dataset_writer` describes, without Megatron; the index may be in memory, the
data never is.
"""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.commands.preprocess.dataset_writer import MAGIC
from megatron_scmoe.words import read_json

_HEADER = struct.Struct("<9sQBQQ")
# Megatron's DType, by its codes.
_TYPES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_ENTRIES = 1 << 20  # in memory at a time


class Dataset:
    """One dataset.

    Args:
        prefix: path without suffix, as in --data-path.

    Raises:
        DataError: there is none, or its index has no such form.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise DataError(f"{path}: no such file; give the path without .bin and .idx")
        content = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.zeros(0, np.uint8)
        if content.size < _HEADER.size or bytes(content[: len(MAGIC)]) != MAGIC:
            raise DataError(f"{index} is no index of Megatron's")
        _, version, code, sequences, documents = _HEADER.unpack(bytes(content[: _HEADER.size]))
        if version != 1 or code not in _TYPES:
            raise DataError(f"{index}: version {version}, type {code}: not known to Megatron")
        self.dtype = np.dtype(_TYPES[code])
        sizes = [4 * sequences, 8 * sequences, 8 * documents]
        self.modes = content.size == _HEADER.size + sum(sizes) + sequences
        if content.size != _HEADER.size + sum(sizes) and not self.modes:
            raise DataError(
                f"{index} is {content.size} bytes for {sequences} sequences and {documents - 1} "
                f"documents, which take {_HEADER.size + sum(sizes)}: it is cut short or damaged"
            )
        parts, at = [], _HEADER.size
        for size, kind in zip(sizes, (np.int32, np.int64, np.int64), strict=True):
            parts.append(content[at : at + size].view(kind))
            at += size
        self.lengths, self.pointers, self.ends = parts
        """int32 a sequence; int64 a sequence, in bytes; int64 a document, and 0 before them."""
        self.bin_bytes = data.stat().st_size
        rest = self.bin_bytes - self.bin_bytes % self.dtype.itemsize
        self.ids = (
            np.memmap(data, self.dtype, "r", shape=(rest // self.dtype.itemsize,))
            if rest
            else np.zeros(0, self.dtype)
        )

    @property
    def documents(self) -> int:
        return max(len(self.ends) - 1, 0)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def document(self, number: int) -> np.ndarray:
        """The ids of a document, of one that `faults` says nothing about."""
        first, last = self.ends[number], self.ends[number + 1]
        if first == last:
            return self.ids[:0]
        size = self.dtype.itemsize
        start = int(self.pointers[first]) // size
        return self.ids[start : int(self.pointers[last - 1]) // size + int(self.lengths[last - 1])]

    def manifest(self) -> dict[str, object] | None:
        """What preprocessing has written beside it; None if nothing.

        Raises:
            DataError: it cannot be read.
        """
        path = Path(f"{self.prefix}.json")
        if not path.exists():
            return None
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}") from error

    def faults(self, checksum: bool) -> Iterator[str]:
        """What is wrong with it, a line each.

        checksum: read the data too, for ids beyond the vocabulary and the manifest's sha256.
        """
        if not len(self.ends) or self.ends[0] != 0:
            yield "the documents of the index do not begin at sequence 0"
            return
        if (np.diff(self.ends) < 0).any() or self.ends[-1] != len(self.lengths):
            yield "the documents of the index are not the sequences one after the other"
        if len(self.lengths) and self.lengths.min() < 0:
            yield "the index has negative lengths"
        position = 0
        for at in range(0, len(self.lengths), _ENTRIES):
            lengths = self.lengths[at : at + _ENTRIES].astype(np.int64) * self.dtype.itemsize
            starts = position + np.cumsum(lengths) - lengths
            wrong = np.flatnonzero(starts != self.pointers[at : at + _ENTRIES])
            if wrong.size:
                yield (
                    f"the index has sequence {at + wrong[0]} at another place than the lengths "
                    "before it say"
                )
                break
            position += int(lengths.sum())
        if self.tokens * self.dtype.itemsize != self.bin_bytes:
            yield (
                f"{self.prefix}.bin is {self.bin_bytes} bytes, the index says "
                f"{self.tokens * self.dtype.itemsize}"
            )
        manifest = self.manifest()
        if manifest is not None:
            yield from self._differences(manifest, checksum)

    def _differences(self, manifest: dict[str, object], checksum: bool) -> Iterator[str]:
        index = Path(f"{self.prefix}.idx")
        found: dict[str, object] = {
            "documents": self.documents,
            "sequences": len(self.lengths),
            "tokens": self.tokens,
            "dtype": self.dtype.name,
            "bin_bytes": self.bin_bytes,
            "idx_bytes": index.stat().st_size,
        }
        if checksum:
            for suffix in ("bin", "idx"):
                with open(f"{self.prefix}.{suffix}", "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                found[f"{suffix}_sha256"] = digest
            size = manifest.get("vocab_size")
            blocks = range(0, len(self.ids), _ENTRIES)
            largest = max((self.ids[at : at + _ENTRIES].max() for at in blocks), default=0)
            if isinstance(size, int) and largest >= size:
                yield f"the largest id is {largest}, the manifest's vocabulary has {size}"
        for name, value in found.items():
            if manifest.get(name, value) != value:
                yield f"the manifest says {name} {manifest[name]}, here it is {value}"


def digests(dataset: Dataset) -> np.ndarray:
    """64 bits of a hash of each document's ids, uint64; equal ids of any two types are equal."""
    result = np.empty(dataset.documents, np.uint64)
    for number in range(dataset.documents):
        ids = np.asarray(dataset.document(number), np.int64)
        digest = hashlib.blake2b(ids.data, digest_size=8).digest()
        result[number] = int.from_bytes(digest, "little")
    return result
