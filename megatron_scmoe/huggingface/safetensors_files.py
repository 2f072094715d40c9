"""Sharded safetensors, written and read a tensor at a time.

The library `safetensors` writes a file from tensors that are all in memory. The format is a header
and the bytes behind it, in the header's order (https://huggingface.co/docs/safetensors): here the
header is written first, and each tensor as soon as it is there. Reading is the library's.
"""

import json
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_scmoe.words import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 1000**3  # as transformers
BLOCK_BYTES = 32 * 2**20  # what is converted and written at once

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",  # partners of experts
}


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Shards of a folder, in the order of the entries.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, entries: list[Entry], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.checksums: dict[str, int] = {}
        shards: list[list[Entry]] = [[]]
        filled = 0
        for entry in entries:
            if shards[-1] and filled + entry.bytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(entry)
            filled += entry.bytes
        count = len(shards)
        self._file_of = {
            entry.name: SINGLE if count == 1 else f"model-{n + 1:05d}-of-{count:05d}.safetensors"
            for n, shard in enumerate(shards)
            for entry in shard
        }
        self._shards = shards
        self._due = iter(entry for shard in shards for entry in shard)
        self._open: tuple[str, BinaryIO] | None = None
        self._beside = ThreadPoolExecutor(1)  # a checksum takes as long as the write

    def write(self, name: str, values: Tensor) -> None:
        """The next tensor, converted to the type of its entry.

        Raises:
            ValueError: another one was to come, one of another shape, or one that the type cannot
                hold.
        """
        entry = next(self._due, None)
        if entry is None or entry.name != name or entry.shape != tuple(values.shape):
            raise ValueError(f"{name} {list(values.shape)} is written where {entry} was to come")
        file = self._file(name)
        checksum: Future[int] | None = None
        flat = values.contiguous().view(-1)
        for block in flat.split(BLOCK_BYTES // entry.dtype.itemsize):
            own = converted(name, block, entry.dtype)
            data = memoryview(own.view(torch.uint8).numpy())
            before = 0 if checksum is None else checksum.result()
            checksum = self._beside.submit(zlib.crc32, data, before)
            file.write(data)
        self.checksums[name] = 0 if checksum is None else checksum.result()

    def close(self) -> None:
        """Write the index, if there are several files.

        Raises:
            ValueError: a tensor has not come.
        """
        self._beside.shutdown()
        left = next(self._due, None)
        if left is not None:
            raise ValueError(f"{left.name} was not written")
        if self._open is not None:
            self._open[1].close()
        if len(self._shards) > 1:
            total = sum(entry.bytes for shard in self._shards for entry in shard)
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _file(self, name: str) -> BinaryIO:
        file_name = self._file_of[name]
        if self._open is None or self._open[0] != file_name:
            if self._open is not None:
                self._open[1].close()
            file = (self.folder / file_name).open("wb")
            self._open = (file_name, file)
            shard = next(s for s in self._shards if self._file_of[s[0].name] == file_name)
            file.write(_header(shard))
        return self._open[1]


def _header(entries: Iterable[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def converted(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another type.

    Raises:
        ValueError: some are too large for fp16, the only type whose range is narrower.
    """
    own = values.to(dtype)
    if dtype == torch.float16 != values.dtype and (own.isinf() & values.isfinite()).any():
        raise ValueError(f"{name} has numbers beyond 65504, where fp16 ends: use bf16")
    return own


class SafetensorsReader:
    """All tensors of a folder, whatever file they lie in.

    Raises:
        ValueError: a file is missing, cut off, damaged, or no safetensors; one line with its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] = {}
        self.entries: dict[str, tuple[tuple[int, ...], str]] = {}
        if (folder / INDEX).exists():
            self._file_of = _weight_map(folder / INDEX)
        elif (folder / SINGLE).exists():
            self._file_of = {}
        else:
            raise ValueError(_no_weights(folder))
        files = sorted(set(self._file_of.values())) or [SINGLE]
        found: dict[str, str] = {}
        for name in files:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing, which {INDEX} names")
            with _opened(folder / name) as file:
                for key in file.keys():  # noqa: SIM118 (no dictionary)
                    part = file.get_slice(key)
                    self.entries[key] = (tuple(part.get_shape()), part.get_dtype())
                    found[key] = name
        for key, name in self._file_of.items():
            if found.get(key) != name:
                raise ValueError(f"{folder / name} lacks {key}, which {INDEX} places there")
        self._file_of = found

    def names(self) -> set[str]:
        return set(self.entries)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one along its first dimension."""
        path = self.folder / self._file_of[name]
        with _opened(path) as file:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file.

    Raises:
        ValueError: it is cut off, damaged, or no safetensors; one line with its name.
    """
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dictionary)


def _opened(path: Path):  # type: ignore[no-untyped-def]
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} is cut off or no safetensors file ({text})") from error


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weights = read_json(path).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    names = list(weights.items()) if isinstance(weights, dict) else []
    inside = all(isinstance(file, str) and Path(file).name == file for _, file in names)
    if not names or not inside:
        raise ValueError(f"{path} has no weight_map of files beside it")
    return dict(names)


def _no_weights(folder: Path) -> str:
    pickles = sorted((*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which could run anything and is not loaded: save the model "
            "as safetensors"
        )
    return f"{folder} has no {SINGLE} and no {INDEX}"
