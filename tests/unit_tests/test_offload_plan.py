"""What of the experts stays on the device, what does not fit, and what is left behind."""

import gc
import os
import tempfile
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scmoe.inference import offload
from megatron_scmoe.inference.cache_size import CacheSize, cache_size
from megatron_scmoe.inference.offload import plan_offload
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.experts.offload.tiers import move_home
from megatron_scmoe.overlap.schedule import window
from megatron_scmoe.planner.fetch import FetchTimes, fetch_times
from megatron_scmoe.planner.size import model_size
from megatron_scmoe.planner.times import step_flops
from tests.models import Case

GB = 10**9
# Of an expert of tests/models.py: three matrices of 16 x 12 in float64.
EXPERT = 3 * 16 * 12 * 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", CacheSize()),
        ("12", CacheSize(experts=12)),
        ("2GiB", CacheSize(memory=2 * 2**30)),
        ("1.5 MB", CacheSize(memory=1.5e6)),
    ],
)
def test_cache_size(text: str, expected: CacheSize) -> None:
    assert cache_size(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1.5", "2XB", "GB", "nan", "9" * 30, "٣"])
def test_no_cache_size(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="is neither auto, nor a number of experts"):
        cache_size(text)


def plan(monkeypatch: pytest.MonkeyPatch, free: int = GB, disk: int = GB, **asked: Any) -> Any:
    """Of a model with 8 layers, every second with 4 experts."""
    case = Case(num_layers=8, host=asked.pop("host", {}))
    model = ScMoEModelConfig(
        transformer=case.host_config(), scmoe=case.scmoe_config(), vocab_size=32, seq_length=8
    )
    args = {
        "scmoe_offload_experts": "cpu",
        "scmoe_expert_cache_size": CacheSize(experts=2),
        "moe_router_topk": 2,
        "inference_max_requests": 1,
    }
    monkeypatch.setattr(offload, "available_memory", lambda: free)
    monkeypatch.setattr(offload.shutil, "disk_usage", lambda _: Namespace(free=disk))
    return plan_offload(Namespace(**args | asked), model, length=10)


def test_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, scmoe_offload_experts="none") is None
    found = plan(monkeypatch)
    assert (found.layers, found.experts, found.expert_bytes, found.slots) == (4, 4, EXPERT, 2)
    assert found.home_bytes == 16 * EXPERT and found.device_bytes == 8 * EXPERT
    assert "4 experts of 4.61 kB in 4 layers, 73.7 kB, in host memory; 2 a layer" in found.line()
    memory = CacheSize(memory=4 * 3.5 * EXPERT)
    assert plan(monkeypatch, scmoe_expert_cache_size=memory).slots == 3
    assert plan(monkeypatch, scmoe_expert_cache_size=CacheSize()).slots == 4  # all fit
    split = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    found = plan(monkeypatch, host=split)
    assert (found.layers, found.experts) == (2, 2)


def test_auto_fills_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the size of which an expert more fits in every layer, and from a file.

    Experts that wait in the same memory leave less of it.
    """

    def slots(free: int, tier: str = "disk") -> int:
        asked = {"scmoe_offload_experts": tier, "scmoe_expert_cache_size": CacheSize()}
        return plan(monkeypatch, free=free, **asked).slots

    def fits(free: int, tier: str = "disk") -> bool:
        try:
            return slots(free, tier) == 2
        except ValueError:
            return False

    least = next(free for free in range(60_000, 10**6, 500) if fits(free))
    one_more = 4 * EXPERT / offload.SHARE_OF_FREE
    assert [slots(int(least + n * one_more)) for n in (0, 1, 2, 9)] == [2, 3, 4, 4]
    home = 16 * EXPERT
    assert fits(least + home, "cpu") and not fits(least + home - 1000, "cpu")


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_what_a_control_group_leaves(version: int, tmp_path: Path) -> None:
    """Of the group or of one around it; what the kernel caches for it counts as free."""
    mount, limit, used = {
        1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("", "memory.max", "memory.current"),
    }[version]
    own = tmp_path / "cgroup"
    own.write_text({1: "8:pids:/x\n4:memory:/job/step\n0::/\n", 2: "0::/job/step\n"}[version])
    job = tmp_path / mount / "job"
    step = job / "step"
    step.mkdir(parents=True)
    assert offload._left_in_groups(own, tmp_path) == []
    for folder, allowed, uses in ((job, "1000", "600"), (step, "max", "500")):
        (folder / limit).write_text(allowed)
        (folder / used).write_text(uses)
        (folder / "memory.stat").write_text("active_file 7\ninactive_file 100\n")
    assert offload._left_in_groups(own, tmp_path) == [500]
    (step / limit).write_text("300")
    assert min(offload._left_in_groups(own, tmp_path)) == 0


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"scmoe_expert_cache_size": CacheSize(experts=1)}, "has room for 1 experts a layer, and"),
        ({"scmoe_expert_cache_size": CacheSize(memory=1.0)}, "one token needs 2, 36.9 kB of all"),
        ({"free": 100}, "cpu: the experts are 73.7 kB on this node, and 100 B of its memory are"),
        ({"scmoe_offload_experts": "disk", "disk": 7}, "and 7 B are free in"),
    ],
)
def test_what_does_not_fit_is_one_line(
    asked: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--scmoe") as refused:
        plan(monkeypatch, **asked)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_is_gone_when_nobody_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has no name before, so that no interrupt can leave it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = torch.nn.Linear(3, 5).to(torch.bfloat16)
    weight, bias = (parameter.detach().clone() for parameter in module.parameters())

    def maps() -> int:
        return Path(f"/proc/{os.getpid()}/maps").read_text().count(str(tmp_path))

    move_home(module.parameters(), "disk")
    assert list(tmp_path.iterdir()) == [] and maps() == 1
    assert torch.equal(module.weight, weight) and torch.equal(module.bias, bias)
    assert not module.weight.requires_grad
    with torch.no_grad():
        module.weight.fill_(7)  # as a checkpoint is loaded
    assert (module.weight == 7).all() and torch.equal(module.bias, bias)
    del module
    gc.collect()
    assert maps() == 0


def test_window_and_transfer_of_a_layer() -> None:
    """Of uniform routing, at the last slot."""
    case = Case(num_layers=8, scmoe={"scmoe_shortcut_position": "pos2"})
    model = ScMoEModelConfig(
        transformer=case.host_config(), scmoe=case.scmoe_config(), vocab_size=32, seq_length=8
    )
    topk, experts = model.transformer.moe_router_topk, model.transformer.num_moe_experts
    args = Namespace(
        scmoe_shortcut_position="pos2",
        scmoe_experts_at_home={},
        scmoe_router="topk",
        scmoe_ranks_per_node=None,
    )

    def times(tokens: int, keys: int = 8, slots: int = 0) -> FetchTimes:
        return fetch_times(args, model, tokens, keys, 1e6, expert_seconds=2.0, slots=slots)

    flops = step_flops(model_size(model, 16, 1))
    dense = sum(flops[step] for step in window("pos2"))
    assert times(3).window == pytest.approx(3 * dense / 1e6)
    assert times(3, keys=16).window > times(3).window
    # A token needs K, very many need all; of what is kept a share is there.
    assert times(1).transfer == pytest.approx(2.0 * topk)
    assert times(2).transfer == pytest.approx(2.0 * experts * (1 - (1 - topk / experts) ** 2))
    assert times(10_000).transfer == pytest.approx(2.0 * experts)
    assert times(1, slots=1).transfer == pytest.approx(2.0 * topk * (1 - 1 / experts))
    assert times(1, slots=experts).transfer == 0
