"""Checks that ask the GPUs and the libraries around them. Unverified: written without a GPU."""

import importlib
import os
import shutil
import subprocess
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator

import torch

from megatron_scmoe.host.cpu import no_cuda_device
from megatron_scmoe.run.doctor.findings import Finding
from megatron_scmoe.words import installed

BLACKWELL = 10  # compute capability from which the host asks for no number of connections
BUSY = 0.1  # share of a GPU's memory in use that is worth a word


def here() -> bool:
    """Whether this is a machine with CUDA devices."""
    return not no_cuda_device()


def check_device_of_rank(args: Namespace | None) -> Iterator[Finding]:
    """Every rank of a node has a device of its own."""
    if not here():
        return
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= devices:
        yield Finding(
            "error",
            f"local rank {local_rank} has no GPU of its own, this node shows {devices}",
            f"start with --nproc-per-node {devices}, or look at CUDA_VISIBLE_DEVICES",
        )


def check_connections(args: Namespace | None) -> Iterator[Finding]:
    """With one connection all streams share a hardware queue: nothing runs beside anything."""
    if not here():
        return
    value = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    shown = f"CUDA_DEVICE_MAX_CONNECTIONS is {value or 'not set (the driver takes 8)'}"
    overlaps = (
        args is not None
        and args.scmoe_shortcut_position != "none"
        and args.scmoe_overlap
        and args.expert_model_parallel_size > 1
    )
    if value != "1" or not overlaps:
        yield Finding("ok", shown)
        return
    assert args is not None
    sizes = (args.tensor_model_parallel_size, args.context_parallel_size)
    demanded = max(sizes) > 1 and torch.cuda.get_device_properties(0).major < BLACKWELL
    yield Finding(
        "warning",
        f"{shown}, so the all-to-all waits in the queue of the work that should hide it",
        "Megatron demands it with tensor or context parallelism on this GPU; the overlap wants "
        "--tensor-model-parallel-size 1 with expert parallelism, and 32 connections"
        if demanded
        else "set it to 32 before the launch",
    )


def check_gpus(args: Namespace | None) -> Iterator[Finding]:
    """Names, memory, driver, NCCL."""
    if not here():
        yield Finding("ok", "no CUDA device: the CPU backend, gloo")
        return
    devices = range(torch.cuda.device_count())
    names = Counter(
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        for properties in map(torch.cuda.get_device_properties, devices)
    )
    models = "; ".join(f"{count} x {name}" for name, count in names.items())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding(
        "warning" if len(names) > 1 else "ok",
        f"{models}; driver {_driver()}, CUDA {torch.version.cuda}, NCCL {nccl}",
        "different GPUs wait for the slowest" if len(names) > 1 else "",
    )
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        if free < (1 - BUSY) * total:
            yield Finding(
                "warning",
                f"GPU {device}: {(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB are in use",
                "look for processes of an earlier run with nvidia-smi",
            )
    without = [
        f"{one}-{other}"
        for one in devices
        for other in devices
        if one < other and not torch.cuda.can_device_access_peer(one, other)
    ]
    if without:
        yield Finding(
            "warning",
            f"no peer access between GPUs {', '.join(without)}, they exchange through the host",
            "look at nvidia-smi topo -m",
        )


def _driver() -> str:
    """The driver's version, as nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        return f"unknown ({type(error).__name__} of nvidia-smi)"
    return ", ".join(dict.fromkeys(answer.stdout.split()))


def check_libraries(args: Namespace | None) -> Iterator[Finding]:
    """Transformer Engine and apex: there, importable, and built for this torch's CUDA."""
    for distribution, module, use in (
        ("transformer_engine", "transformer_engine.pytorch", "--transformer-impl local"),
        ("apex", "amp_C", "--no-gradient-accumulation-fusion --no-persist-layer-norm"),
    ):
        version = installed(distribution)
        if version is None:
            yield Finding("ok", f"{distribution}: not installed, not needed with {use}")
        elif not here():
            yield Finding("ok", f"{distribution} {version}: not used without a CUDA device")
        else:
            yield from _importable(distribution, version, module)
    for major in ("12", "13"):
        built = installed(f"transformer_engine_cu{major}")
        if here() and built is not None and not (torch.version.cuda or "").startswith(f"{major}."):
            yield Finding(
                "error",
                f"transformer_engine_cu{major} {built} is built for CUDA {major}, torch for "
                f"{torch.version.cuda}",
                "install the build that matches torch",
            )


def _importable(distribution: str, version: str, module: str) -> Iterator[Finding]:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a missing library, a wrong symbol
        reason = " ".join(str(error).split())[:200]
        yield Finding(
            "warning",
            f"{distribution} {version} is installed, but {module} cannot be imported ({reason})",
            f"build it for torch {torch.__version__}",
        )
    else:
        yield Finding("ok", f"{distribution} {version}")


CHECKS = (check_gpus, check_libraries)
