"""Expert slots that a checkpoint holds are times of one machine and one layout.

A run with the same options, machine and versions takes them, all ranks or none.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.builder import agree_on_slots
from megatron_scmoe.run.checkpoint import model_options, record
from megatron_scmoe.run.checkpoint.record import machine_facts, read_record, write_record
from megatron_scmoe.run.checkpoint.resume import _keep_slots
from tests.distributed_utils import run_distributed


def arguments(**more: Any) -> Namespace:
    tokenizer = dict.fromkeys(
        ("tokenizer_model", "vocab_file", "merge_file", "tokenizer_type", "vocab_size")
    )
    defaults: dict[str, Any] = dict.fromkeys((*model_options.LAYOUT, *model_options.TIMES))
    defaults |= {
        "world_size": 16,
        "expert_model_parallel_size": 8,
        "expert_tensor_parallel_size": 1,
        "scmoe_expert_slot": "auto",
        "scmoe_remeasure_slot": False,
        "scmoe_measured_slots": None,
    }
    return Namespace(**tokenizer | defaults | more)


@pytest.fixture
def resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, list[str]]]:
    """Go on from a run that has measured; the slots that are kept, and the notes."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    saved = arguments(scmoe_measured_slots=[2, 3])
    (tmp_path / "iter_0000004").mkdir()
    write_record(tmp_path, 4, saved)

    def go_on(**more: Any) -> tuple[Any, list[str]]:
        here = arguments(**more)
        notes = _keep_slots("--load X", read_record(tmp_path, 4), saved, here)
        return here.scmoe_measured_slots, notes

    return go_on


def test_same_machine_keeps_them(resume) -> None:
    slots, (note,) = resume()
    assert slots == [2, 3]
    assert "sets the expert slots it has measured, 2 forward and 3 backward" in note


def test_slots_that_are_asked_for_are_no_matter(resume) -> None:
    assert resume(scmoe_expert_slot="1", bf16=True) == (None, [])
    assert resume(scmoe_remeasure_slot=True) == (None, [])


@pytest.mark.parametrize("dest", [*model_options.LAYOUT, *model_options.TIMES])
def test_other_option(resume, dest: str) -> None:
    value = {"expert_model_parallel_size": 16, "expert_tensor_parallel_size": 2}.get(dest, "other")
    slots, (note,) = resume(**{dest: value})
    assert slots is None
    assert note.startswith("--load X: expert slots are measured again, it differs: ")
    assert f"{model_options.flag(dest)} " in note


def other_device(patch: pytest.MonkeyPatch) -> str:
    """A checkpoint of the CPU goes on on a GPU."""
    patch.setattr("megatron_scmoe.host.cpu.no_cuda_device", lambda: False)
    patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    patch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    return "cores there, NVIDIA H100 80GB HBM3 here; NCCL none there, 2.28.9 here"


def other_node(patch: pytest.MonkeyPatch) -> str:
    patch.setenv("LOCAL_WORLD_SIZE", "4")
    return "expert parallel ranks a node 8 there, 4 here"


def other_connections(patch: pytest.MonkeyPatch) -> str:
    patch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    return "CUDA_DEVICE_MAX_CONNECTIONS 1 there, not set here"


def other_torch(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(record, "installed", lambda package: "0.0")
    return f"torch {torch.__version__.split('+')[0]}"


@pytest.mark.parametrize("change", [other_device, other_node, other_connections, other_torch])
def test_other_machine(resume, monkeypatch: pytest.MonkeyPatch, change: Callable[..., str]) -> None:
    expected = change(monkeypatch)
    slots, (note,) = resume()
    assert slots is None and expected in note and "\n" not in note


def test_other_number_of_ranks(resume) -> None:
    slots, (note,) = resume(world_size=32)
    assert slots is None and note.endswith("it differs: ranks 16 there, 32 here")


def test_record_without_a_machine(tmp_path: Path) -> None:
    """Of an earlier version, or none: nobody knows where it was measured."""
    saved = arguments(scmoe_measured_slots=[2, 3])
    for found in (None, {"versions": {}}):
        here = arguments()
        (note,) = _keep_slots("--load X", found, saved, here)
        assert here.scmoe_measured_slots is None and "device unknown there" in note


@pytest.mark.parametrize(
    ("node", "expert_parallel", "expert_tensor_parallel", "expected"),
    [(8, 8, 1, 8), (8, 16, 1, 8), (8, 4, 1, 4), (8, 8, 2, 4), (4, 2, 8, 1)],
)
def test_expert_parallel_ranks_of_a_node(
    monkeypatch: pytest.MonkeyPatch,
    node: int,
    expert_parallel: int,
    expert_tensor_parallel: int,
    expected: int,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    facts = machine_facts(
        arguments(
            expert_model_parallel_size=expert_parallel,
            expert_tensor_parallel_size=expert_tensor_parallel,
        )
    )
    assert facts["expert parallel ranks a node"] == expected


def test_ranks_that_disagree_all_measure() -> None:
    """Two kinds of machines in one job, and the checkpoint is of one of them."""
    assert run_distributed(_measures, 2, [[2, 3], None]) == [True, True]
    assert run_distributed(_measures, 2, [[2, 3], [2, 3]]) == [False, False]


def _measures(slots: list[list[int] | None]) -> bool:
    own = slots[torch.distributed.get_rank()]
    scmoe = ScMoEConfig(scmoe_shortcut_position="pos2", scmoe_measured_slots=own)
    agree_on_slots(scmoe)
    return scmoe.measures_slots
