"""What can be said of one machine before any process group exists.

Every check takes the options of the run, or None to look at the machine alone, and yields findings.
What a GPU is asked stands in gpu.py.
"""

import importlib.util
import math
import os
import platform
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path

import torch
from megatron.core.utils import is_torch_min_version
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

from megatron_scmoe.host.version import SUPPORTED, megatron_core_folder, megatron_core_version
from megatron_scmoe.run.checkpoint import contents
from megatron_scmoe.run.doctor import gpu, network
from megatron_scmoe.run.doctor.findings import Finding

Check = Callable[[Namespace | None], Iterator[Finding]]

MIN_TORCH = "2.8.0"  # overlap/streams.py relies on it, see pyproject.toml
SHARED_MEMORY = Path("/dev/shm")
NCCL_SHARED_MEMORY = 1 << 30  # bytes; NVIDIA's advice for containers
LOADERS = 3  # training, validation, test
PREFETCHED = 2  # batches that a data worker keeps ready, torch's default
HOST_BYTES_PER_PARAMETER = 18  # in the host's estimate of memory, without distributed optimizer


def examine(args: Namespace | None) -> list[Finding]:
    """Every check of this machine, for tools/doctor.py."""
    # Whether the nodes of a job agree on versions is asked in nodes.py.
    own = Finding("ok", f"{versions()} (supported: {SUPPORTED})")
    checks = (*_STARTUP, *gpu.CHECKS, *network.CHECKS)
    return [own, *(finding for check in checks for finding in check(args))]


def start_up(args: Namespace) -> list[str]:
    """The checks that cost nothing, before a run joins its process groups.

    Returns:
        Warnings, a line each; nothing when all is well.

    Raises:
        ValueError: the run would fail, and why.
    """
    found = [finding for check in _STARTUP for finding in check(args)]
    for finding in found:
        if finding.severity == "error":
            raise ValueError(finding.line)
    return [f"warning: {finding.line}" for finding in found if finding.severity == "warning"]


def versions() -> str:
    """Those of which a job's nodes should have the same."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, megatron-core "
        f"{megatron_core_version()}"
    )


def check_torch(args: Namespace | None) -> Iterator[Finding]:
    """The overlap wants streams that older versions do not have."""
    if not is_torch_min_version(MIN_TORCH):
        yield Finding(
            "error",
            f"torch {torch.__version__} is older than what the overlap's streams are written for",
            f"install torch>={MIN_TORCH}",
        )


def check_dataset_helpers(args: Namespace | None) -> Iterator[Finding]:
    """Rank 0 of a run calls `make` for the host's dataset helpers unless it cannot be called
    (host/wheel.py); when that fails the host leaves the other ranks waiting."""
    folder = megatron_core_folder() / "datasets"
    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    compiles = (folder / "Makefile").exists() and os.environ.get("RANK", "0") == "0"
    if compiles:
        missing = [tool for tool in ("make", "g++") if shutil.which(tool) is None]
        if missing:
            yield Finding(
                "error",
                "Megatron compiles its dataset helpers at the start, and there is no "
                f"{' and no '.join(missing)}",
                "install make and g++, or megatron-core's wheel, where they are built",
            )
        else:
            yield Finding("ok", f"Megatron's dataset helpers are compiled by make in {folder}")
    elif built:
        yield Finding("ok", "Megatron's dataset helpers are built; make is not needed")
    elif (folder / "Makefile").exists():
        yield Finding(
            "warning",
            "Megatron's dataset helpers are not built here; a run builds them where rank 0 is",
            f"run make -C {folder}, unless the nodes share that folder",
        )
    else:
        yield Finding(
            "error",
            f"Megatron's dataset helpers are not built, and {folder} has no Makefile",
            f"reinstall megatron-core{SUPPORTED} from its wheel",
        )


def check_shared_memory(args: Namespace | None) -> Iterator[Finding]:
    """Data workers hand batches over through /dev/shm; without peer access NCCL needs it too."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    need = 0 if args is None else _batches_in_flight(args)
    need += NCCL_SHARED_MEMORY if gpu.here() else 0
    if free >= need:
        yield Finding("ok", f"{SHARED_MEMORY} has {_size(free)} free")
        return
    remedy = "start the container with --shm-size or --ipc=host"
    if args is not None and args.num_workers:
        remedy += ", or use --num-workers 0"
    yield Finding(
        "warning",
        f"{SHARED_MEMORY} has {_size(free)} free, and data workers and NCCL may need {_size(need)}",
        remedy,
    )


def _batches_in_flight(args: Namespace) -> int:
    """Bytes of the batches that this node's data workers keep ready."""
    tokens = args.seq_length
    sample = tokens * (8 + 8 + 8 + 4)  # tokens, labels, position_ids; loss_mask
    if args.create_attention_mask_in_dataloader:
        sample += tokens * tokens
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return LOADERS * args.num_workers * PREFETCHED * args.micro_batch_size * sample * ranks


def check_disk(args: Namespace | None) -> Iterator[Finding]:
    """The folder of --save can be written and has room."""
    if args is None or args.save is None:
        return
    folder = next(path for path in (Path(args.save), *Path(args.save).parents) if path.exists())
    if not _writable(folder):
        yield Finding(
            "error", f"--save {args.save}: {folder} cannot be written", "use another folder"
        )
        return
    free, need = shutil.disk_usage(folder).free, checkpoint_bytes(args)
    seen = f"--save {args.save} has {_size(free)} free, and a checkpoint takes about {_size(need)}"
    if free >= need:
        yield Finding("ok", seen)
    else:
        yield Finding("warning", seen, "make room, or --save elsewhere")


def _writable(folder: Path) -> bool:
    """Whether a file can be made there: permissions alone do not say it of every file system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def checkpoint_bytes(args: Namespace) -> int:
    """Size of one checkpoint: that of the newest one in --save, or an estimate.

    The estimate takes for each parameter the model's bytes and, with the optimizer, three float32
    values.
    """
    newest = contents.newest_complete(Path(args.save)) if Path(args.save).is_dir() else None
    if newest is not None:
        files = contents.iteration_folder(Path(args.save), newest).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())
    bytes_each = torch.finfo(args.params_dtype).bits // 8 + (0 if args.no_save_optim else 12)
    return math.ceil(_parameters(args) * bytes_each)


def check_memory(args: Namespace | None) -> Iterator[Finding]:
    """Whether weights that no GPU holds fit at all; the system would kill whoever tries."""
    if args is None or gpu.here():
        return
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / args.world_size
    need = share * _parameters(args) * torch.finfo(args.params_dtype).bits / 8
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        yield Finding(
            "error",
            f"the weights alone take {_size(need)} of this machine's {_size(there)} of memory",
            "use a smaller model, or more machines",
        )


def _parameters(args: Namespace) -> float:
    """The host's number for the whole model, without gates and shortcut norms."""
    whole = copy(args)  # on one rank
    whole.tensor_model_parallel_size = whole.pipeline_model_parallel_size = 1
    whole.expert_model_parallel_size = whole.expert_tensor_parallel_size = 1
    whole.world_size = whole.data_parallel_size = 1
    whole.use_distributed_optimizer = False
    if whole.moe_ffn_hidden_size is None:
        whole.moe_ffn_hidden_size = whole.ffn_hidden_size
    return compute_weight_and_optimizer_memory(whole) / HOST_BYTES_PER_PARAMETER


def _size(size: float) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(size, 1)) // 10), len(units) - 1)
    return f"{size / 2 ** (10 * power):.3g} {units[power]}"


_STARTUP: tuple[Check, ...] = (
    check_torch,
    gpu.check_device_of_rank,
    gpu.check_connections,
    check_dataset_helpers,
    check_shared_memory,
    check_memory,
    check_disk,
)
