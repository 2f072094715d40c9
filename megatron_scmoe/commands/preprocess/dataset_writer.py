"""Megatron's .bin and .idx files, under their final names only when whole.

Everything is written into a hidden folder beside the output, synced to disk, and renamed: all .bin
first, then the .json manifests, the .idx last. Megatron cannot read a .bin without its .idx, so
nothing looks finished before it is.

The format is that of Megatron's IndexedDatasetBuilder (megatron/core/datasets/indexed_dataset.py),
written here because importing that takes seconds and because it holds the index in memory as Python
integers; a test compares the bytes. Here an index in the making lies in files that only grow, which
cost no memory and can be cut back to where a run was.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PUBLISHED = (".bin", ".json", ".idx")  # in the order of renaming
COUNTS = ("documents", "empty_documents", "sequences", "tokens")
GROWING = (".bin", ".lengths", ".ends")  # ids; int32 a sequence; int64 a document

MAGIC = b"MMIDIDX\x00\x00"
_CODES: dict[type[np.number], int] = {np.int32: 4, np.uint16: 8}
_ENTRIES = 1 << 20  # of an index that are in memory at a time


def optimal_dtype(vocab_size: int) -> type[np.number]:
    """Megatron's type of ids on disk for a vocabulary of this size."""
    return np.uint16 if vocab_size < 65500 else np.int32


class DatasetWriter:
    """One dataset in the making: `folder`/name.bin, .idx and .json.

    partitions: N > 1 orders documents as Megatron-LM's --partitions does: document i belongs to
    partition i mod N, and the partitions are joined one after the other. Until then the last N-1
    lie in files of their own, so joining needs up to twice the room.
    state: of `state`, to go on from there; what was written after it is cut off.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: type[np.number],
        partitions: int,
        state: dict[str, int] | None = None,
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.documents = self.empty_documents = self.sequences = self.tokens = 0
        self._path = folder / name
        self._parts = [
            _Part(folder / (f"{name}.part{number}" if number else name))
            for number in range(partitions)
        ]
        if state:
            for name in COUNTS:
                setattr(self, name, state[name])
            for number, part in enumerate(self._parts):
                part.cut([state[f"part{number}{suffix}"] for suffix in GROWING])

    def state(self) -> dict[str, int]:
        """Where the dataset is, on disk when this returns."""
        state = self._counts()
        for number, part in enumerate(self._parts):
            for suffix, size in zip(GROWING, part.sync(), strict=True):
                state[f"part{number}{suffix}"] = size
        return state

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sequences: np.ndarray) -> None:
        """Add documents.

        Args:
            tokens: their ids, of the dataset's type.
            lengths: the number of ids of each sequence, int32.
            sequences: the number of sequences of each document, int64.
        """
        if len(self._parts) == 1:
            self._parts[0].add(tokens, lengths, sequences)
        else:
            last_sequence = np.cumsum(sequences)
            last_token = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            for number, (end, count) in enumerate(zip(last_sequence, sequences, strict=True)):
                self._parts[(self.documents + number) % len(self._parts)].add(
                    tokens[last_token[end - count] : last_token[end]],
                    lengths[end - count : end],
                    sequences[number : number + 1],
                )
        self.documents += len(sequences)
        self.empty_documents += int((sequences == 0).sum())
        self.sequences += len(lengths)
        self.tokens += len(tokens)

    def finish(self, description: dict[str, object]) -> None:
        """Join the partitions, write the index and, from `description` and what was counted,
        the manifest; all on disk when it returns. The growing files stay, to go on from a `state`
        again if the process is killed before `publish`."""
        whole, *others = self._parts
        for part in others:
            whole.join(part)
        whole.write_index(f"{self._path}.idx", self.dtype)
        manifest = description | self._counts() | {"dtype": np.dtype(self.dtype).name}
        for suffix in ("bin", "idx"):
            with open(f"{self._path}.{suffix}", "rb") as stream:
                manifest[f"{suffix}_bytes"] = os.fstat(stream.fileno()).st_size
                manifest[f"{suffix}_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        Path(f"{self._path}.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for suffix in PUBLISHED:
            _sync(Path(f"{self._path}{suffix}"))

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTS}

    def close(self) -> None:
        for part in self._parts:
            with suppress(OSError):  # what is still buffered is not wanted
                part.close()


class _Part:
    """Documents in the order in which they come, in three files that grow."""

    def __init__(self, path: Path) -> None:
        self._paths = [Path(f"{path}{suffix}") for suffix in GROWING]
        self._streams: list[BinaryIO] = [path.open("ab") for path in self._paths]
        self._sequences = 0

    def cut(self, sizes: Sequence[int]) -> None:
        """Cut the files to sizes that were recorded.

        Raises:
            OSError: a file is shorter than it was.
        """
        for path, stream, size in zip(self._paths, self._streams, sizes, strict=True):
            if path.stat().st_size < size:
                raise OSError(f"{path} is shorter than it was: delete its folder and start anew")
            stream.truncate(size)
        self._sequences = sizes[1] // 4

    def sync(self) -> list[int]:
        """The files' sizes, on disk when this returns."""
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())
        return [path.stat().st_size for path in self._paths]

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sequences: np.ndarray) -> None:
        """Add documents, as the dataset's `add` does."""
        ends = self._sequences + np.cumsum(sequences, dtype=np.int64)
        for stream, array in zip(self._streams, (tokens, lengths, ends), strict=True):
            stream.write(array.data)
        self._sequences += len(lengths)

    def join(self, other: "_Part") -> None:
        """Put another part's documents behind this one's."""
        other.close()
        tokens, lengths, ends = other._paths
        for path, stream in zip((tokens, lengths), self._streams, strict=False):
            with path.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
        for block in _blocks(ends, np.int64):
            self._streams[2].write((self._sequences + block).data)
        self._sequences += other._sequences

    def write_index(self, path: str, dtype: type[np.number]) -> None:
        """The .idx: magic, version, type, counts, and for each sequence its length and where it
        begins, for each document the sequence behind its last."""
        self.close()
        _, lengths, ends = self._paths
        documents = ends.stat().st_size // 8
        with open(path, "wb") as stream:
            stream.write(MAGIC + struct.pack("<QB", 1, _CODES[dtype]))
            stream.write(struct.pack("<QQ", self._sequences, documents + 1))
            with lengths.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
            position = 0
            for block in _blocks(lengths, np.int32):
                behind = position + np.cumsum(block, dtype=np.int64) * dtype().itemsize
                stream.write(struct.pack("<q", position) + behind[:-1].tobytes())
                position = int(behind[-1])
            stream.write(struct.pack("<q", 0))
            with ends.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


def _blocks(path: Path, dtype: type[np.number]) -> Iterable[np.ndarray]:
    size = np.dtype(dtype).itemsize * _ENTRIES
    with path.open("rb") as stream:
        while block := stream.read(size):
            yield np.frombuffer(block, dtype)


class OutputFolder:
    """Where the files of one run are made, and from where they are published together.

    prefix: of the output, as in --output-prefix.
    folder: exists, and is on the same file system.
    """

    def __init__(self, prefix: Path, folder: Path) -> None:
        self.target = prefix.parent
        self._folder = folder
        self._writers: list[DatasetWriter] = []
        self._texts: list[str] = []

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for writer in self._writers:
            writer.close()

    def create(self, *dataset: Any) -> DatasetWriter:
        """A dataset that `publish` will put beside the folder as name.bin, .idx and .json.

        dataset: what a DatasetWriter takes behind its folder.
        """
        writer = DatasetWriter(self._folder, *dataset)
        self._writers.append(writer)
        return writer

    def add_text(self, name: str, content: str) -> None:
        """A file that `publish` will put beside the datasets, after them."""
        (self._folder / name).write_text(content)
        _sync(self._folder / name)
        self._texts.append(name)

    def publish(self) -> None:
        """Give the finished files their final names, in place of older ones.

        If a renaming fails, none of the final names is left.

        Raises:
            OSError: a renaming failed.
        """
        finals = [self.target / writer.name for writer in self._writers]
        try:
            _unlink(finals, (".idx", ".json"))
            for suffix in PUBLISHED:
                for final in finals:
                    os.replace(self._folder / f"{final.name}{suffix}", f"{final}{suffix}")
            for text in self._texts:
                os.replace(self._folder / text, self.target / text)
        except OSError:
            _unlink(finals, (".idx", ".json", ".bin"))
            _unlink([self.target / text for text in self._texts], ("",))
            raise
        _sync(self.target)


def _unlink(finals: Iterable[Path], suffixes: Sequence[str]) -> None:
    for suffix in suffixes:
        for final in finals:
            Path(f"{final}{suffix}").unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
