"""What a result must say about itself: command, commit, machine, GPU, versions, date."""

import argparse
import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.real_text import REPOSITORY

MAX_LOAD_PER_CORE = 0.25
"""With more than this beside it a timing says nothing."""
PACKAGES = ("torch", "megatron-core", "megatron-scmoe", "numpy")
COMMIT = "GPU_PROOF_COMMIT"
"""The variable that names it where the repository's .git did not travel."""


def describe() -> dict[str, Any]:
    """Take it when the run begins: load and date are of that moment."""
    return {
        "command": shlex.join([*_launcher(), "-m", module(), *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _first_value("/proc/cpuinfo", "model name") or platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": round(
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
            ),
            "kernel": platform.release(),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "gpu": _gpu() if torch.cuda.is_available() else None,
    }


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where results go: a folder named after the program, unless another is."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs", parser.prog),
        metavar="FOLDER",
        help="folder of the results",
    )


def as_markdown(environment: dict[str, Any]) -> str:
    """The same for the head of a report."""
    machine = environment["machine"]
    busy = machine["load_average"] > MAX_LOAD_PER_CORE * machine["cores"]
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
    return "\n".join(
        (
            "```",
            environment["command"],
            "```",
            "",
            f"{environment['date']}, commit {environment['commit']}. {machine['processor']}, "
            f"{machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}; "
            f"load average {machine['load_average']} when it began. {versions}.",
            *_gpu_line(environment.get("gpu")),
            *(["", "**The machine was busy: these times are no result.**"] if busy else []),
        )
    )


def _gpu_line(gpu: dict[str, Any] | None) -> list[str]:
    return ["", ", ".join(f"{name} {value}" for name, value in gpu.items()) + "."] if gpu else []


def _gpu() -> dict[str, Any]:
    """Without a context on the device, which would take some of its memory for good."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card, driver, memory = ["unknown"] * 3
    if shutil.which(query[0]):
        answer = subprocess.run(query, capture_output=True, text=True)
        if answer.returncode == 0:
            card, driver, memory = answer.stdout.splitlines()[0].split(", ")
    return {
        "card": card,
        "memory": memory,
        "driver": driver,
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "Transformer Engine": _version("transformer-engine", "not installed"),
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set"),
    }


def _launcher() -> list[str]:
    """Without where the ranks meet."""
    nodes, ranks = (os.environ.get(name) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if nodes is None or ranks is None:
        return ["python"]
    return ["torchrun", "--nnodes", nodes, "--nproc-per-node", ranks]


def module() -> str:
    """This program's, as `python -m` takes it; of another project's the file."""
    path = Path(sys.argv[0]).resolve()
    inside = path.is_relative_to(REPOSITORY)
    if not inside:
        return path.name
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__main__")


def commit() -> str:
    """The commit, and whether the files differ from it."""
    commit, changes = (
        subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True).stdout
        for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
    )
    if not commit:
        return os.environ.get(COMMIT, "unknown")
    return commit.strip() + (" with uncommitted changes" if changes.strip() else "")


def _first_value(path: str, key: str) -> str | None:
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return None


def _version(package: str, absent: str = "from source") -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return absent
