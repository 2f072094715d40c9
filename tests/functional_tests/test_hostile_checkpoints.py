"""Checkpoints that would run code: nothing of it runs, and one line says what and where.

In the metadata of the iteration that is asked for, and of another one that only a search reads; in
an object among the tensors; the doctor too. A user may trust a file.
"""

import os
import pickle
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_scmoe.run.checkpoint import contents, unpickle
from tests.functional_tests.test_checkpoints import error_line, succeeded, train

LINE = "names os.makedirs, which no checkpoint needs and which could run anything"


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.folder), 0o777, True)


@pytest.fixture(scope="module")
def saved(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations on one rank, saved after three and six."""
    folder = tmp_path_factory.mktemp("saved")
    save = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
    one = ["--expert-model-parallel-size", "1"]
    succeeded(train(data_prefix, folder, *save, *one, ranks=1))
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints"))


def go_on(data: Path, checkpoints: Path, *options: str) -> Any:
    one = ["--expert-model-parallel-size", "1", "--train-iters", "7"]
    load = ["--load", str(checkpoints), *one, *options]
    return train(data, checkpoints.parent / "run", *load, ranks=1)


def spoil_metadata(checkpoint: Path, folder: Path) -> None:
    """It still is what it was, and something else."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    metadata.planner_data = Hostile(folder)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def spoil_object(checkpoint: Path, folder: Path) -> None:
    """The options among the tensors: the file grows, its metadata are in order."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    ((index, where),) = [
        x for x in metadata.storage_data.items() if x[0].fqn.startswith("common_state")
    ]
    file = checkpoint / where.relative_path
    hostile = BytesIO()
    torch.save(Hostile(folder), hostile)
    begin = file.stat().st_size
    file.write_bytes(file.read_bytes() + hostile.getvalue())
    length = len(hostile.getvalue())
    metadata.storage_data[index] = replace(where, offset=begin, length=length)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata(data_prefix: Path, checkpoints: Path, tmp_path: Path) -> None:
    spoil_metadata(checkpoints / "iter_0000006", tmp_path / "made")
    line = error_line(go_on(data_prefix, checkpoints))
    assert f"iter_0000006/.metadata {LINE}" in line and "add --trust-checkpoints" in line
    assert "the newest complete checkpoint there is iteration 3" in line
    assert not (tmp_path / "made").exists()


def test_metadata_that_nobody_asked_for(
    data_prefix: Path, checkpoints: Path, tmp_path: Path
) -> None:
    """A search for the newest whole iteration reads them."""
    spoil_metadata(checkpoints / "iter_0000006", tmp_path / "made")
    assert contents.newest_complete(checkpoints) == 3
    line = error_line(go_on(data_prefix, checkpoints, "--ckpt-step", "5"))
    assert "the newest complete checkpoint there is iteration 3" in line
    assert not (tmp_path / "made").exists()


def test_object_among_the_tensors(data_prefix: Path, checkpoints: Path, tmp_path: Path) -> None:
    spoil_object(checkpoints / "iter_0000006", tmp_path / "made")
    line = error_line(go_on(data_prefix, checkpoints))
    assert f" of the checkpoint {LINE}" in line and "common_state" in line
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "getcwd"),
        ("torch", "load"),
        ("torch", "os.getcwd"),  # as deep as one likes, from protocol 4 on
        ("torch.serialization", "load"),
        ("collections", "namedtuple"),
        ("torch.distributed.checkpoint.metadata", "dataclass"),
    ],
)
def test_a_module_of_the_metadata_is_not_all_of_it(module: str, name: str) -> None:
    words = (bytes([0x8C, len(word)]) + word.encode() for word in (module, name))
    call = b"\x80\x04" + b"".join(words) + b"\x93)R."  # STACK_GLOBAL, (), REDUCE, STOP
    with pytest.raises(unpickle.UntrustedError, match=rf"names {module}\.{name}, which no"):
        unpickle.load_metadata(BytesIO(call))


def test_trusted(data_prefix: Path, checkpoints: Path, tmp_path: Path) -> None:
    spoil_metadata(checkpoints / "iter_0000006", tmp_path / "made")
    succeeded(go_on(data_prefix, checkpoints, "--trust-checkpoints"))
    assert (tmp_path / "made").is_dir()
