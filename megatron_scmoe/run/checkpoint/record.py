"""The readable file beside every checkpoint: `iter_0000100.json` next to `iter_0000100/`.

It holds all options as the run resolved them, the padded vocabulary, a digest of the tokenizer,
the machine and the versions, so that people and tools can read what a checkpoint is without loading
it.
"""

import hashlib
import json
import os
import platform
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_scmoe.run.checkpoint.model_options import ARCHITECTURE, SCMOE
from megatron_scmoe.words import installed, read_json, write_whole

SCHEMA = 1
UNKNOWN = "unknown"
# What others look up in a record, by part.
READ: dict[str, set[str]] = {
    "tokenizer": {"type", "vocab_size", "sha256"},
    "versions": {"python"},
    "machine": set(),
    "model": set(),
    "options": set(),
}
PACKAGES = ("megatron-scmoe", "megatron-core", "torch", "transformer-engine", "apex")


def record_path(folder: Path, iteration: int) -> Path:
    """Where the record of an iteration lies."""
    return folder / f"iter_{iteration:07d}.json"


def build_record(args: Namespace, iteration: int) -> dict[str, Any]:
    """The record of a run with these validated options at this iteration."""
    options = {dest: _plain(value) for dest, value in sorted(vars(args).items())}
    model = {dest: options.pop(dest) for dest in (*ARCHITECTURE, *SCMOE) if dest in options}
    return {
        "schema": SCHEMA,
        "iteration": iteration,
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": machine_facts(args),
        "padded_vocab_size": options.pop("padded_vocab_size", None),
        "tokenizer": tokenizer_digest(args),
        "model": model,
        "options": options,
    }


def write_record(folder: Path, iteration: int, args: Namespace) -> None:
    """Write the record, whole or not at all, and drop those whose checkpoints are gone."""
    drop_records_without_checkpoint(folder)
    path = record_path(folder, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(build_record(args, iteration), indent=1) + "\n")


def drop_records_without_checkpoint(folder: Path) -> None:
    """Remove the records of checkpoints that are gone or were never finished."""
    for other in (*folder.glob("iter_*.json"), *folder.glob("iter_*.partial")):
        if not other.with_suffix("").is_dir():
            other.unlink(missing_ok=True)


def read_record(folder: Path, iteration: int) -> dict[str, Any] | None:
    """The record of an iteration, or None for a checkpoint that has none (stock Megatron's).

    Raises:
        ValueError: the file is no record.
    """
    path = record_path(folder, iteration)
    if not path.exists():
        return None
    try:
        record = read_json(path)
        if "schema" in record and record["schema"] != SCHEMA:
            raise ValueError(f"it has schema {record['schema']}, this version reads {SCHEMA}")
        for name, fields in READ.items():
            part = record.setdefault(name, {})
            if not isinstance(part, dict):
                raise ValueError(f"'{name}' is no object")
            if lacking := sorted(fields - part.keys()):
                raise ValueError(f"'{name}' lacks {', '.join(lacking)}")
        return record
    except ValueError as error:
        raise ValueError(
            f"{path} is no record of a checkpoint's options ({error}): restore it, or delete it to "
            "load the checkpoint without."
        ) from error


def tokenizer_digest(args: Namespace) -> dict[str, Any]:
    """Type, vocabulary and SHA-256 of the tokenizer's files, wherever they lie."""
    digest = hashlib.sha256()
    for value in (args.tokenizer_model, args.vocab_file, args.merge_file):
        path = Path(value) if value else None
        if path is None or not path.exists():
            digest.update(f"{value}\n".encode())  # a name on a hub, or nothing
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and ".git" not in file.parts:
                digest.update(file.read_bytes())
    return {
        "type": args.tokenizer_type,
        "vocab_size": args.vocab_size,
        "sha256": digest.hexdigest(),
    }


def machine_facts(args: Namespace) -> dict[str, Any]:
    """What decides the times of a run and is no option of it, by the name that users read."""
    # Reading records, as the converter does, goes without the host, whose import takes seconds.
    from megatron_scmoe.host.cpu import no_cuda_device

    cuda = not no_cuda_device()
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Expert tensor parallel ranks are neighbours, expert parallel ones come next.
    experts = min(args.expert_model_parallel_size, max(1, node // args.expert_tensor_parallel_size))
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "ranks": args.world_size,
        "expert parallel ranks a node": experts,
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set"),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "none",
    }


def machine_differences(record: dict[str, Any] | None, args: Namespace) -> list[str]:
    """`name value there, value here` for every fact and version of a machine that differs."""
    here = machine_facts(args) | _timed(_versions())
    there = {} if record is None else record.get("machine", {}) | _timed(record["versions"])
    return [
        f"{name} {there.get(name, UNKNOWN)} there, {value} here"
        for name, value in here.items()
        if there.get(name, UNKNOWN) != value
    ]


def _timed(versions: dict[str, str]) -> dict[str, str]:
    """Those whose kernels a unit runs."""
    return {name: versions.get(name, "none") for name in ("torch", "transformer-engine")}


def _versions() -> dict[str, str]:
    return {package: found for package in PACKAGES if (found := installed(package))}


def _plain(value: Any) -> Any:
    """What JSON can hold; everything else by its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
