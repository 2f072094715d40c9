"""A `torch_dist` checkpoint, tensor by tensor: no model, no process group, no GPU.

torch writes every chunk of a tensor as a file of `torch.save` inside a `.distcp` file; `.metadata`
says where. Chunks are whatever the ranks of the run held, so a tensor is put together here, and
only as much of it as is asked for.

Shapes: layers and experts are leading dimensions of a stacked tensor on disk.
"""

import json
import mmap
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_scmoe.run.checkpoint.contents import DISTRIBUTED
from megatron_scmoe.run.checkpoint.unpickle import read_metadata

STACKED_LAYERS = "decoder.layers."
STACKED_EXPERTS = "mlp.experts.experts."
DATA_FILE = "__0_0.distcp"
AHEAD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Address:
    """A tensor of tensor_names.py on disk: a key, and indices into its leading dimensions."""

    key: str
    index: tuple[int, ...]


class TorchDistReader:
    """Tensors of one iteration by the names of tensor_names.py.

    Raises:
        OSError, pickle.UnpicklingError: there is no metadata, or it is not what torch writes.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.folder = checkpoint
        metadata = read_metadata(checkpoint)
        self.stored: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.objects = metadata.state_dict_metadata.keys() - self.stored.keys()
        self._where: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._last: tuple[MetadataIndex, Tensor] | None = None
        self._found: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def place(self, name: str) -> Address:
        """Where a tensor lies: layers may be an axis, routed experts always are.

        Raises:
            KeyError: nowhere.
        """
        index: tuple[int, ...] = ()
        expert = re.search(rf"{re.escape(STACKED_EXPERTS)}(\d+)\.", name)
        if expert:
            index = (int(expert[1]),)
            name = name.replace(expert[0], STACKED_EXPERTS)
        layer = re.match(rf"{re.escape(STACKED_LAYERS)}(\d+)\.", name)
        if layer and name not in self.stored:
            stacked = name.replace(layer[0], STACKED_LAYERS)
            if stacked in self.stored:
                name, index = stacked, (int(layer[1]), *index)
        if name not in self.stored:
            raise KeyError(name)
        return Address(name, index)

    def shape(self, place: Address) -> tuple[int, ...]:
        return tuple(self.stored[place.key].size[len(place.index) :])

    def dtype(self, place: Address) -> torch.dtype:
        return self.stored[place.key].properties.dtype

    def places(self, key: str, leading: int) -> set[tuple[int, ...]]:
        """The indices of a key's `leading` dimensions, layers and experts, that are there."""
        return set(self._chunks_at(key, leading))

    def read(self, place: Address) -> Tensor:
        """One tensor, whole.

        Raises:
            ValueError: bytes of it are in no chunk, or a file is damaged; with the file's name.
        """
        shape, depth = self.shape(place), len(place.index)
        found = None
        filled = 0
        for chunk in self._chunks(place):
            values = self._load(place.key, chunk)
            own = tuple(
                wanted - begin for wanted, begin in zip(place.index, chunk.offsets, strict=False)
            )
            values = values[own]
            if values.shape == shape:
                return values
            if found is None:
                found = torch.empty(shape, dtype=values.dtype)
            begins, lengths = chunk.offsets[depth:], chunk.sizes[depth:]
            region = tuple(
                slice(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)
            )
            found[region] = values
            filled += values.numel()
        if found is None or filled != found.numel():
            raise ValueError(f"{self.folder}: not all of {place.key} is there")
        return found

    def largest_chunk(self, place: Address) -> int:
        """Elements that are read at once for a tensor."""
        return max((prod(chunk.sizes) for chunk in self._chunks(place)), default=0)

    def _chunks(self, place: Address) -> list[ChunkStorageMetadata]:
        return self._chunks_at(place.key, len(place.index)).get(place.index, [])

    def _chunks_at(
        self, key: str, leading: int
    ) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """The chunks of every index of the leading dimensions; looked for once, not per expert."""
        found = self._found.get((key, leading))
        if found is None:
            found = self._found[key, leading] = {}
            for chunk in self.stored[key].chunks:
                sides = zip(chunk.offsets[:leading], chunk.sizes[:leading], strict=True)
                ranges = (range(begin, begin + length) for begin, length in sides)
                for index in product(*ranges):
                    found.setdefault(index, []).append(chunk)
        return found

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """The chunk, kept until another one is asked for: it may hold several experts.

        Raises:
            ValueError: it is missing or corrupt.
        """
        index = MetadataIndex(key, chunk.offsets)
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        self._last = None  # its memory is free before the next one is read
        where = self._where.get(index)
        if where is None:
            raise ValueError(f"{self.folder}: a chunk of {key} is in no file")
        path = self.folder / where.relative_path
        try:
            values = _mapped(path, where)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except Exception as error:  # damage is stumbled over in any way there is
            raise ValueError(f"{path} is corrupt (in {key})") from error
        if values.shape != chunk.sizes or values.dtype != self.stored[key].properties.dtype:
            raise ValueError(f"{path} is corrupt: {key} has another shape than .metadata says")
        self._last = (index, values)
        return values


def _mapped(path: Path, where: _StorageInfo) -> Tensor:
    """The tensor that `torch.save` has written into a part of a file, read when it is used.

    `torch.load` would copy it into fresh memory, at a quarter of the speed. Read-only.

    Raises:
        ValueError: it ends behind its archive.
    """
    with path.open("rb") as file:
        # The disk reads on while this chunk is checked and written: most often the next one.
        end = where.offset + where.length
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), end, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        view: Any = _create_file_view(file, where.offset, where.length)
        archive: Any = torch._C.PyTorchFileReader(view)
        saved = _TensorUnpickler(BytesIO(archive.get_record("data.pkl"))).load()
        begin = where.offset + archive.get_record_offset(f"data/{saved.record}")
        if begin + saved.bytes > end:
            raise ValueError("a tensor ends behind its archive")
        page = begin % mmap.ALLOCATIONGRANULARITY
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(
            file.fileno(), page + saved.bytes, flags, mmap.PROT_READ, offset=begin - page
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(mapped, dtype=saved.dtype, offset=page)
    return flat.as_strided(saved.size, saved.stride, saved.offset)


@dataclass(frozen=True)
class _Saved:
    """A tensor as its pickle says."""

    record: str
    bytes: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler of what `torch.save` writes for one tensor, and of nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, *place: _Saved(*storage, *place[:3])
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is in no tensor")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, record, _, elements = pid
        return record, elements * dtype.itemsize, dtype


class TorchDistWriter:
    """A checkpoint as a single rank would write it; every chunk is whole experts or a tensor.

    Args:
        checkpoint: a new folder.
        stacked_layers: 0, or the number of layers if they are an axis of one tensor.
        experts: their number.
    """

    def __init__(self, checkpoint: Path, stacked_layers: int, experts: int) -> None:
        checkpoint.mkdir(parents=True)
        self.folder = checkpoint
        self._layers, self._experts = stacked_layers, experts
        self._file = (checkpoint / DATA_FILE).open("wb")
        self._entries: dict[str, Any] = {}
        self._where: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, name: str, values: Tensor) -> None:
        """Add one tensor of tensor_names.py, and for a linear layer the empty state that the host
        saves beside it and asks for."""
        sizes: list[int] = []
        begin: list[int] = []
        layer = re.match(rf"{re.escape(STACKED_LAYERS)}(\d+)\.", name)
        if layer and self._layers:
            name = name.replace(layer[0], STACKED_LAYERS)
            sizes, begin = [self._layers], [int(layer[1])]
        expert = re.search(rf"{re.escape(STACKED_EXPERTS)}(\d+)\.", name)
        if expert:
            name = name.replace(expert[0], STACKED_EXPERTS)
            sizes, begin = [*sizes, self._experts], [*begin, int(expert[1])]
        offsets = torch.Size([*begin, *[0] * values.dim()])
        chunk = ChunkStorageMetadata(offsets, torch.Size([*[1] * len(sizes), *values.shape]))
        entry = self._entries.setdefault(
            name,
            TensorStorageMetadata(
                TensorProperties(dtype=values.dtype), torch.Size([*sizes, *values.shape]), []
            ),
        )
        entry.chunks.append(chunk)
        if values.numel() < values.untyped_storage().nbytes() // values.itemsize:
            values = values.clone()  # a view would be saved with all of the tensor behind it
        self._save(MetadataIndex(name, offsets), values.contiguous().view(chunk.sizes))
        module, _, kind = name.rpartition(".")
        if kind == "weight" and ".linear_" in f".{module}":
            shard, of = (".".join(map(str, numbers)) for numbers in (begin or [0], sizes or [1]))
            self.write_object(f"{module}._extra_state/shard_{shard}_{of}", None)

    def write_object(self, key: str, value: Any) -> None:
        """Add an object, as the host keeps a run's options."""
        self._entries[key] = BytesStorageMetadata()
        self._save(MetadataIndex(key), [value])

    def close(self) -> None:
        """Write the metadata; the checkpoint is whole afterwards."""
        self._file.close()
        metadata = Metadata(self._entries, storage_data=self._where, version="1.0.0")
        with (self.folder / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)
        text = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        (self.folder / DISTRIBUTED).write_text(text)

    def _save(self, index: MetadataIndex, value: Any) -> None:
        begin = self._file.tell()
        torch.save(value, self._file)
        self._where[index] = _StorageInfo(DATA_FILE, begin, self._file.tell() - begin)
