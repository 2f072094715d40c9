"""What is on disk, without loading it; optimizers of another layout; differences of options."""

import copy
import random
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_scmoe.host.optimizer import load_chain_of_any_layout
from megatron_scmoe.run.checkpoint import contents
from megatron_scmoe.run.checkpoint.model_options import differences


def write_checkpoint(folder: Path, iteration: int) -> Path:
    """As the host lays it out: tensors, their metadata, and a file that says it is finished."""
    checkpoint = contents.iteration_folder(folder, iteration)
    dcp.save({"weight": torch.arange(1000.0)}, checkpoint_id=checkpoint, no_dist=True)
    (checkpoint / contents.DISTRIBUTED).write_text("{}")
    return checkpoint


def test_newest_complete_skips_the_half_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4)
    (contents.iteration_folder(tmp_path, 4) / contents.DISTRIBUTED).unlink()
    contents.iteration_folder(tmp_path, 6).mkdir()
    assert contents.saved_iterations(tmp_path) == [2, 4, 6]
    assert contents.newest_complete(tmp_path) == 2


def test_corrupt_files_reads_every_byte(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 2)
    assert contents.corrupt_files(checkpoint) == []
    (shard,) = checkpoint.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert contents.defects(checkpoint) == []  # the sizes are right
    assert contents.corrupt_files(checkpoint) == [shard]


def test_damaged_metadata_is_a_defect_that_is_named(tmp_path: Path) -> None:
    """Other bytes of the same length, wherever they are: nothing but a phrase comes of it."""
    checkpoint = write_checkpoint(tmp_path, 2)
    whole = (checkpoint / ".metadata").read_bytes()
    named = 0
    for seed in range(500):
        choose, content = random.Random(seed), bytearray(whole)
        for _ in range(choose.choice([1, 2, 8])):
            content[choose.randrange(len(content))] = choose.randrange(256)
        (checkpoint / ".metadata").write_bytes(content)
        found = contents.defects(checkpoint)
        assert len(found) <= 1, seed
        if found:
            assert found[0].startswith(str(checkpoint)) and "\n" not in found[0], seed
            named += 1
        else:
            contents.corrupt_files(checkpoint)
    assert 100 < named < 500


def test_damaged_tensors_are_found_whatever_the_damage(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 2)
    (shard,) = checkpoint.glob("*.distcp")
    whole = shard.read_bytes()
    for seed in range(100):
        choose, content = random.Random(seed), bytearray(whole)
        for _ in range(50):
            content[choose.randrange(len(content))] ^= 1 + choose.randrange(255)
        shard.write_bytes(content)
        assert contents.corrupt_files(checkpoint) == [shard], seed


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 10_000])
def test_damaged_marker_of_the_host(tmp_path: Path, content: str) -> None:
    checkpoint = write_checkpoint(tmp_path, 2)
    (checkpoint / contents.DISTRIBUTED).write_text(content)
    (line,) = contents.defects(checkpoint)
    assert line.startswith(f"{checkpoint / contents.DISTRIBUTED} is corrupt (it ")


@pytest.mark.parametrize("content", [b"\xff\xfe", "²".encode(), b"9" * 5000, b"-1"])
def test_damaged_tracker(tmp_path: Path, content: bytes) -> None:
    (tmp_path / contents.TRACKER).write_bytes(content)
    with pytest.raises(ValueError, match="and no iteration"):
        contents.tracked_iteration(tmp_path)


def test_folders_that_are_no_iterations(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    for name in ("iter_²", "iter_x", "iter_"):
        (tmp_path / name).mkdir()
    assert contents.saved_iterations(tmp_path) == [2]


def test_tracker(tmp_path: Path) -> None:
    assert contents.tracked_iteration(tmp_path) is None
    contents.write_tracker(tmp_path, 12)
    assert contents.tracked_iteration(tmp_path) == 12
    (tmp_path / contents.TRACKER).write_text("release\n")
    assert contents.tracked_iteration(tmp_path) == "release"
    (tmp_path / contents.TRACKER).write_text("")
    with pytest.raises(ValueError, match="holds '' and no iteration"):
        contents.tracked_iteration(tmp_path)
    assert contents.readable_tracker(tmp_path) is None


def test_frequency_and_pattern_of_the_same_model_do_not_differ() -> None:
    saved = Namespace(num_layers=4, moe_layer_freq=1)
    assert not differences(saved, Namespace(num_layers=4, moe_layer_freq=[1] * 4), DESTS)
    assert differences(saved, Namespace(num_layers=4, moe_layer_freq=[0, 1] * 2), DESTS)


DESTS = ("moe_layer_freq",)


def group(expert: bool, **options: Any) -> dict[str, Any]:
    return {"is_expert_parallel": expert, "wd_mult": 1.0, "lr": 0.5, "step": 7, **options}


@pytest.mark.parametrize("ours", [1, 2])
def test_optimizers_of_another_chain(ours: int) -> None:
    """Saved with the other number of optimizers: own tensors, the saved step, own options."""
    current = [group(expert=index == 1, lr=0.0, step=0) for index in range(ours)]
    tensors = [{"param_state": f"tensors {index}"} for index in range(ours)]
    if ours == 1:
        saved = {i: {"optimizer": {"param_groups": [group(i == 1)]}} for i in range(2)}
        loaded: dict[Any, Any] = {**copy.deepcopy(saved), **tensors[0]}
    else:
        loaded = {"optimizer": {"param_groups": [group(False)]}, **dict(enumerate(tensors))}
    received: list[dict[Any, Any]] = []
    chain = SimpleNamespace(
        chained_optimizers=[SimpleNamespace(param_groups=[own]) for own in current]
    )
    load_chain_of_any_layout(lambda _, state_dict: received.append(state_dict))(chain, loaded)
    (state_dict,) = received
    for index, part in enumerate([state_dict] if ours == 1 else state_dict.values()):
        assert part["param_state"] == f"tensors {index}"
        (options,) = part["optimizer"]["param_groups"]
        assert (options["lr"], options["step"]) == (0.0, 7)
        assert options["is_expert_parallel"] == (index == 1)
