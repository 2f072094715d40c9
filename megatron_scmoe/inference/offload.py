"""How much of the experts stays on the device: asked, planned and reported.

home    every expert of this rank, in host memory or in a file
slots   experts of a layer that are on the device at one time
"""

import os
import shutil
import tempfile
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Module

from megatron_scmoe.host.cpu import no_cuda_device
from megatron_scmoe.inference.cache_size import CacheSize
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.experts.offload.experts import Offload, OffloadedExperts
from megatron_scmoe.model.experts.offload.tiers import Tier
from megatron_scmoe.model.specs import moe_layer_pattern, pipeline_stages
from megatron_scmoe.planner.size import model_size
from megatron_scmoe.words import percent, size

SHARE_OF_FREE = 0.8
"""Of the memory that is free; activations need some, and the host's buffers."""


@dataclass(frozen=True)
class OffloadPlan:
    """Sizes of one rank."""

    tier: Tier
    layers: int
    """MoE layers, on the stage that has most."""
    experts: int
    """Of a layer."""
    expert_bytes: int
    slots: int

    @property
    def home_bytes(self) -> int:
        return self.layers * self.experts * self.expert_bytes

    @property
    def device_bytes(self) -> int:
        return self.layers * self.slots * self.expert_bytes

    def line(self) -> str:
        """For the user, before anything is loaded."""
        where = {"cpu": "host memory", "disk": f"a file in {tempfile.gettempdir()}"}[self.tier]
        return (
            f"--scmoe-offload-experts {self.tier}: {self.experts} experts of "
            f"{size(self.expert_bytes)} in {self.layers} layers, {size(self.home_bytes)}, in "
            f"{where}; {self.slots} a layer, {size(self.device_bytes)}, on the device"
        )


def plan_offload(args: Namespace, model: ScMoEModelConfig, length: int) -> OffloadPlan | None:
    """What this rank keeps where; None if all experts stay on the device.

    Args:
        args: validated.
        length: tokens of the longest prompt and its continuation.

    Raises:
        ValueError: it does not fit, in one line.
    """
    if args.scmoe_offload_experts == "none":
        return None
    config = model.transformer
    chosen = moe_layer_pattern(config)
    counts = [sum(chosen[layer] for layer in stage) for stage in pipeline_stages(config)[0]]
    layers, experts = max(counts), config.num_moe_experts // config.expert_model_parallel_size
    each = expert_bytes(config)
    asked: CacheSize = args.scmoe_expert_cache_size
    slots = asked.experts
    if slots is None:
        budget = asked.memory
        if budget is None:
            budget = _room(args, model, length, layers * experts * each)
        slots = int(budget // (layers * each))
    plan = OffloadPlan(args.scmoe_offload_experts, layers, experts, each, min(slots, experts))
    _check(args, plan)
    return plan


def expert_bytes(config: TransformerConfig) -> int:
    """Of the weights of one expert on one rank."""
    ffn = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
    into = 2 * ffn if config.gated_linear_unit else ffn
    weights = (into + ffn) * config.hidden_size
    if config.add_bias_linear:
        weights += into + config.hidden_size
    return weights * config.params_dtype.itemsize


def _room(args: Namespace, model: ScMoEModelConfig, length: int, home: int) -> float:
    """Bytes of the device's memory that are left for experts."""
    config = model.transformer
    kept = 2 * config.num_query_groups * config.kv_channels * length * args.inference_max_requests
    routed = sum(moe_layer_pattern(config)) * config.num_moe_experts * expert_bytes(config)
    element = config.params_dtype.itemsize
    rest = max(0, model_size(model, 1, 1).parameters * element - routed)
    split = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    if no_cuda_device():
        free = float(available_memory())
        if args.scmoe_offload_experts == "cpu":
            free -= home  # the same memory
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    else:
        free = torch.cuda.mem_get_info()[0]
    return SHARE_OF_FREE * free - (rest + kept * config.num_layers * element) / split


def available_memory() -> int:
    """Bytes of host memory that can be used, by the machine and by the control groups."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


# By the controllers of a line of /proc/self/cgroup, version 2 and version 1: where the groups are
# mounted, the limit of one and what it uses.
_GROUPS = {
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def _left_in_groups(own: Path, mounts: Path) -> list[int]:
    """Bytes that each group may still use that has a limit, those around this process's own too."""
    left = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _GROUPS:
            continue
        mount, limit, used = _GROUPS[controllers]
        group = mounts / mount / path.lstrip("/")
        for folder in (group, *group.parents):
            # Without a limit, "max"; in a container the path may be the host's, of which only the
            # root is there.
            with suppress(OSError, ValueError):
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                left.append(max(0, room + _cached(folder)))
    return left


def _cached(group: Path) -> int:
    """Bytes of files that a group has read and the kernel takes back for it."""
    for line in (group / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def _check(args: Namespace, plan: OffloadPlan) -> None:
    needed = min(args.moe_router_topk, plan.experts)
    if plan.slots < needed:
        least = size(needed * plan.layers * plan.expert_bytes)
        raise ValueError(
            f"--scmoe-expert-cache-size has room for {max(plan.slots, 0)} experts a layer, and one "
            f"token needs {needed}, {least} of all layers: ask for more."
        )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    home = plan.home_bytes * ranks
    if plan.tier == "cpu":
        if (free := available_memory()) < home:
            raise ValueError(
                f"--scmoe-offload-experts cpu: the experts are {size(home)} on this node, and "
                f"{size(free)} of its memory are free; use disk, or more nodes."
            )
        return
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < home:
        raise ValueError(
            f"--scmoe-offload-experts disk: the experts are {size(home)} on this node, and "
            f"{size(free)} are free in {folder}; set TMPDIR to another folder."
        )


def offload_of(plan: OffloadPlan | None) -> Offload | None:
    """What the model is built with."""
    return None if plan is None else Offload(plan.tier, plan.slots)


def layers_of(model: Module) -> list[Any]:
    """The offloaded experts of every layer."""
    return [module for module in model.modules() if isinstance(module, OffloadedExperts)]


def fetch_line(model: Module, plan: OffloadPlan) -> str:
    """What this rank has fetched."""
    accounts = [layer.cache.account for layer in layers_of(model)]
    asked, fetched = (
        sum(getattr(account, name) for account in accounts) for name in ("asked", "fetched")
    )
    hits = percent(1 - fetched / asked) if asked else "none"
    return f"experts: {fetched} fetched, {size(fetched * plan.expert_bytes)}; hit rate {hits}"
