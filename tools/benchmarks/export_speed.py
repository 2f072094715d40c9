"""How fast an export to Hugging Face is beside a copy of the same bytes, and what memory it takes.

    python -m tools.benchmarks.export_speed --folder DIR [--gigabytes 3] [--turns 5]

A checkpoint of random weights, many experts and one chunk for each, is made under DIR, which lies
on the disk in question. It is exported and copied in turns, each in a process of its own that
imports first; the time ends when everything is on the disk (fsync). Before each of them the page
cache is dropped, which takes root; --cached leaves it, so that the disk is only written to.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_scmoe.huggingface import export, load, safetensors_files, tensor_names
from megatron_scmoe.huggingface.config import ARCHITECTURES
from megatron_scmoe.huggingface.dialects import NEUTRAL
from megatron_scmoe.words import size
from tools.benchmarks.provenance import as_markdown, describe

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MODEL: dict[str, Any] = {
    **NEUTRAL,
    "architectures": ARCHITECTURES,
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 1024,
    "moe_layers": [1, 3, 5, 7],
    "shortcut_position": "pos2",
    "num_experts_per_tok": 2,
    "pre_softmax": True,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
}
EXPERT_BYTES = 3 * 1024 * 1024 * 4


class Spent(NamedTuple):
    """What a process took behind its imports."""

    wall: float
    cpu: float
    """Of its children too."""
    memory: int
    """Bytes at its peak beyond what it had before."""


def make_checkpoint(folder: Path, gigabytes: float) -> Path:
    """With about so many bytes of experts in fp32."""
    experts = max(1, round(gigabytes * 1e9 / EXPERT_BYTES / len(MODEL["moe_layers"])))
    config = {**MODEL, "num_experts": experts}
    directory = folder / "directory"
    directory.mkdir()
    tensors = [part for tensor in tensor_names.tensors(config) for part in tensor.parts]
    entries = [safetensors_files.Entry(*part, torch.float32) for part in tensors]
    writer = safetensors_files.SafetensorsWriter(directory, entries)
    for name, shape in tensors:
        writer.write(name, torch.randn(shape))
    writer.close()
    (directory / "config.json").write_text(json.dumps(config))
    load.load(directory, folder / "checkpoints", say=lambda line: None)
    shutil.rmtree(directory)
    return folder / "checkpoints"


def run_export(source: Path, output: Path) -> None:
    export.export(source, output, say=lambda line: None)


def run_copy(source: Path, output: Path) -> None:
    subprocess.run(["cp", "-r", "--reflink=never", source, output], check=True)


def timed(task: Callable[[Path, Path], None], source: Path, output: Path) -> Spent:
    """Until the output is on the disk."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held, before, start = _peak(), _cpu(), time.monotonic()
    task(source, output)
    for path in output.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return Spent(time.monotonic() - start, _cpu() - before, _peak() - held)


def _cpu() -> float:
    """Seconds of this process and of those that it has started."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(each.ru_utime + each.ru_stime for each in map(resource.getrusage, who))


def _peak() -> int:
    """Bytes of this process, mapped files too."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    ]
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, metavar="DIR", help="on the disk; left as it was")
    add("--gigabytes", type=float, default=3, metavar="GB", help="of experts (default: 3)")
    add("--turns", type=int, default=5, metavar="N", help="of each (default: 5)")
    add("--cached", action="store_true", help="read from the page cache, not from the disk")
    args = parser.parse_args()
    environment = describe()
    tasks = {"export": run_export, "cp": run_copy}
    found: dict[str, list[Spent]] = {name: [] for name in tasks}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source = make_checkpoint(Path(scratch), args.gigabytes)
        read = export.open_checkpoint(source)
        bound = export.peak_bytes(read.reader, [place for _, place in export.locate(read)[0]])
        total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        for _ in range(args.turns):
            for name, task in tasks.items():
                output = Path(scratch, "output")
                os.sync()
                if args.cached:
                    subprocess.run(f"cat {source}/*/* >/dev/null", shell=True, check=True)
                else:
                    DROP_CACHES.write_text("3")
                with ProcessPoolExecutor(1, context) as pool:
                    found[name].append(pool.submit(timed, task, source, output).result())
                shutil.rmtree(output)
    print(as_markdown(environment))
    print(
        f"\n{size(total)} {'in the page cache' if args.cached else 'on the disk'}; the export's "
        f"bound is {size(bound)}, which the checkpoint is {total / bound:.0f} times.\n\n"
        "| | s, median (least to most) | CPU s, median | memory beyond the program |\n"
        "|---|---|---|---|"
    )
    for name, each in found.items():
        walls = [spent.wall for spent in each]
        cpu = statistics.median(spent.cpu for spent in each)
        print(
            f"| {name} | {statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f}) | "
            f"{cpu:.2f} | {size(max(spent.memory for spent in each))} |"
        )
    ratio = statistics.median(
        copy.wall / own.wall for own, copy in zip(found["export"], found["cp"], strict=True)
    )
    print(f"\nThe export is {ratio:.0%} as fast as the copy, the median of {args.turns} turns.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
