"""Megatron's .bin and .idx files, under their final names only when whole.

Everything is written into a hidden folder `.<prefix>.<random>.tmp` beside the output, synced to
disk, and renamed: all .bin first, then the .json manifests, the .idx last. Megatron cannot read a
.bin without its .idx, so nothing looks finished before it is. The folder is removed on any end
but a kill of the process itself (SIGKILL); it can then be deleted by hand.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_scmoe.commands.preprocess.quiet import quiet_imports

with quiet_imports():
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

PUBLISHED = (".bin", ".json", ".idx")  # in the order of renaming


def optimal_dtype(vocab_size: int) -> type[np.number]:
    """Megatron's type of ids on disk for a vocabulary of this size."""
    return DType.optimal_dtype(vocab_size)


class DatasetWriter:
    """One dataset in the making: `folder`/name.bin, .idx and .json.

    partitions: N > 1 orders documents as Megatron-LM's --partitions does: document i belongs to
    partition i mod N, and the partitions are joined one after the other. Until then the last N-1
    lie in files of their own, so joining needs up to twice the room.
    """

    def __init__(self, folder: Path, name: str, dtype: type[np.number], partitions: int) -> None:
        self.name = name
        self.dtype = dtype
        self.documents = self.empty_documents = self.sequences = self.tokens = 0
        self._path = folder / name
        self._parts = [self._path, *(folder / f"{name}.part{i}" for i in range(1, partitions))]
        self._builders = [IndexedDatasetBuilder(f"{part}.bin", dtype) for part in self._parts]

    def add(self, tokens: np.ndarray, lengths: Sequence[list[int]]) -> None:
        """Add documents: their ids, and the number of ids of each sequence of each document."""
        start = 0
        for document in lengths:
            size = sum(document)
            builder = self._builders[self.documents % len(self._builders)]
            builder.add_document(tokens[start : start + size], document)
            start += size
            self.documents += 1
            self.empty_documents += not document
            self.sequences += len(document)
        self.tokens += start

    def finish(self, description: dict[str, object]) -> None:
        """Joins the partitions, writes the index and, from `description` and what was counted,
        the manifest; all on disk when it returns."""
        whole = self._builders[0]
        for part, builder in zip(self._parts[1:], self._builders[1:], strict=True):
            builder.finalize(f"{part}.idx")
            whole.add_index(str(part))
            os.unlink(f"{part}.bin")
            os.unlink(f"{part}.idx")
        whole.finalize(f"{self._path}.idx")
        manifest = description | {
            "documents": self.documents,
            "empty_documents": self.empty_documents,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "dtype": np.dtype(self.dtype).name,
        }
        for suffix in ("bin", "idx"):
            with open(f"{self._path}.{suffix}", "rb") as stream:
                manifest[f"{suffix}_bytes"] = os.fstat(stream.fileno()).st_size
                manifest[f"{suffix}_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        Path(f"{self._path}.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for suffix in PUBLISHED:
            _sync(Path(f"{self._path}{suffix}"))

    def close(self) -> None:
        for builder in self._builders:
            with suppress(OSError):  # what is still buffered is not wanted
                builder.data_file.close()


class OutputFolder:
    """Where the files of one run are made, and from where they are published together.

    prefix: of the output, as in --output-prefix; its folder is created if missing.
    """

    def __init__(self, prefix: Path) -> None:
        self.target = prefix.parent
        self.target.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(
            prefix=f".{prefix.name}.", suffix=".tmp", dir=self.target
        )
        self._writers: list[DatasetWriter] = []

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for writer in self._writers:
            writer.close()
        self._folder.cleanup()

    def create(self, name: str, dtype: type[np.number], partitions: int) -> DatasetWriter:
        """A dataset that `publish` will put beside the folder as name.bin, .idx and .json."""
        writer = DatasetWriter(Path(self._folder.name), name, dtype, partitions)
        self._writers.append(writer)
        return writer

    def publish(self) -> None:
        """Gives the finished files their final names, in place of older ones.

        If a renaming fails, none of the final names is left.
        """
        finals = [self.target / writer.name for writer in self._writers]
        try:
            _unlink(finals, (".idx", ".json"))
            for suffix in PUBLISHED:
                for final in finals:
                    os.replace(Path(self._folder.name, final.name + suffix), f"{final}{suffix}")
        except OSError:
            _unlink(finals, (".idx", ".json", ".bin"))
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
