"""What of a checkpoint is unpickled, and what may be in it: a pickle can run any function it names.

torch reads the metadata of a distributed checkpoint with a plain `pickle.load`, and objects in its
files with `torch.load(weights_only=False)`. Here names are looked up in a list: of the metadata
those that torch writes, of objects those that torch and Megatron call safe
(`torch.serialization.add_safe_globals`, megatron/core/safe_globals.py).
"""

import io
import pickle
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

_OF_METADATA = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},  # of a folder that was given as a Path
    "pathlib._local": {"PosixPath"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if type(value) is torch.dtype)},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}

_trusted = False


class UntrustedError(pickle.UnpicklingError):
    """A name that no checkpoint needs; the message says which."""


def trust_as_asked(args: Namespace) -> None:
    """--trust-checkpoints: look nothing up from now on in this process."""
    global _trusted
    _trusted = args.trust_checkpoints


def read_metadata(checkpoint: Path) -> Metadata:
    """The metadata of a distributed checkpoint.

    Raises:
        UntrustedError: it names something else.
        OSError, pickle.UnpicklingError: it is not there, or not what torch writes.
    """
    with (checkpoint / ".metadata").open("rb") as file:
        return load_metadata(file)


def load_metadata(file: IO[bytes]) -> Any:
    """`pickle.load` of nothing but metadata, whose places in files can be read.

    Raises:
        UntrustedError: it names something else.
        OSError: it cannot be read.
        pickle.UnpicklingError: it is damaged; unpickling stumbles over that in any way there is.
    """
    try:
        metadata = pickle.load(file) if _trusted else _MetadataUnpickler(file).load()
        places = [
            (Path(where.relative_path).is_absolute(), where.offset < 0, where.length < 0)
            for where in metadata.storage_data.values()
        ]
    except (OSError, UntrustedError):
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if any(any(place) for place in places):
        raise pickle.UnpicklingError("a tensor lies outside its file")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _OF_METADATA.get(module, ()):
            raise UntrustedError(_untrusted(f"{module}.{name}"))
        return super().find_class(module, name)


def reading_metadata_only(original: ModuleType) -> ModuleType:
    """`pickle`, for a module of torch that reads metadata with it."""
    replacement = ModuleType(original.__name__)
    vars(replacement).update(vars(original))
    vars(replacement)["load"] = load_metadata
    return replacement


def loading_safe_bytes(load_bytes: Callable[..., None]) -> Callable[..., None]:
    """`DefaultLoadPlanner.load_bytes` that looks before it unpickles.

    Raises:
        UntrustedError: an object in the file names something that nobody calls safe.
    """

    def replacement(self: Any, read_item: Any, value: io.BytesIO) -> None:
        if not _trusted:
            begin = value.tell()
            try:
                torch.load(value, weights_only=True)
            except pickle.UnpicklingError as error:
                # torch advises in 20 lines to load it all the same.
                named = re.search(r"(?:Unsupported global:|unsupported) GLOBAL (\S+)", str(error))
                if named is None:
                    raise
                where = f"{read_item.storage_index.fqn} of the checkpoint"
                raise UntrustedError(f"{where} {_untrusted(named[1])}") from None
            value.seek(begin)
        load_bytes(self, read_item, value)

    return replacement


def _untrusted(name: str) -> str:
    return (
        f"names {name}, which no checkpoint needs and which could run anything; for a file that "
        "you trust add --trust-checkpoints"
    )
