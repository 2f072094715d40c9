"""A Hugging Face directory as a `torch_dist` checkpoint, which loads at any layout.

What the model is says its config.json. Only safetensors are read. The folder gets its name when it
is whole: one iteration with its record, and what lay beside the weights.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_scmoe import __version__
from megatron_scmoe.c2r.lists import partners_of
from megatron_scmoe.huggingface import dialects, fields, tensor_names, tokenizer
from megatron_scmoe.huggingface.config import KEPT, ONLY, to_options
from megatron_scmoe.huggingface.dialects import Dialect, Where
from megatron_scmoe.huggingface.export import DTYPES, PADDING, whole_folder
from megatron_scmoe.huggingface.layouts import LAYOUTS
from megatron_scmoe.huggingface.progress import progress
from megatron_scmoe.huggingface.safetensors_files import DTYPES as STORED
from megatron_scmoe.huggingface.safetensors_files import SafetensorsReader, converted, read_file
from megatron_scmoe.huggingface.tensor_names import Config, Tensor
from megatron_scmoe.huggingface.torch_dist import TorchDistWriter
from megatron_scmoe.run.checkpoint import contents
from megatron_scmoe.run.checkpoint.model_options import ARCHITECTURE, SCMOE
from megatron_scmoe.run.checkpoint.record import SCHEMA, record_path, tokenizer_digest
from megatron_scmoe.words import read_json, size

FIRST_ITERATION = 1  # the host refuses a tracker that names 0
VOCABULARY_MULTIPLE = 128  # the host's --make-vocab-size-divisible-by
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BYTES = {name: dtype.itemsize for dtype, name in STORED.items()}
# What the host's newer checkpoints say of themselves, checkpointing.py.
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Directory:
    """A Hugging Face directory and what it is."""

    folder: Path
    reader: SafetensorsReader
    dialect: Dialect
    config: Config
    """In ours."""


def open_directory(
    folder: Path, dialect_of: Callable[[Config], Dialect] = dialects.of_config
) -> Directory:
    """Read config and headers of a directory.

    Args:
        folder: the directory.
        dialect_of: of a config.json, or a ValueError.

    Raises:
        ValueError: one line that says what is wrong with which file.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"--input {folder} has no config.json")
    try:
        theirs = read_json(path)
        dialect = dialect_of(theirs)
        config = dialect.config(theirs)
        fields.check(config)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    tokens = tokenizer.size_of(folder)
    if tokens > config["vocab_size"]:
        raise ValueError(
            f"the tokenizer in {folder} has {tokens} tokens, and vocab_size of {path} is "
            f"{config['vocab_size']}: resize the model, or take the others out of the tokenizer"
        )
    return Directory(folder, SafetensorsReader(folder), dialect, config)


def locate(directory: Directory) -> list[tuple[Tensor, list[Where]]]:
    """Where the parts of every tensor of the model lie.

    Raises:
        ValueError: the directory lacks tensors, has others, or some of another shape or type.
    """
    reader, config = directory.reader, directory.config
    present = reader.names()
    found = []
    used: set[str] = set()
    missing = []
    for tensor in tensor_names.tensors(config):
        wheres = []
        for name, shape in tensor.parts:
            where = directory.dialect.where(name, config, present)
            wheres.append(where)
            if where.name is None:
                continue
            if where.name not in present:
                missing.append(where.name)
                continue
            used.add(where.name)
            _check(directory, where, shape)
        found.append((tensor, wheres))
    if missing:
        raise ValueError(
            f"{directory.folder} lacks {len(missing)} tensors of the model of its config.json, the "
            f"first is {missing[0]}"
        )
    if config["tie_word_embeddings"] and HEAD in present:
        _check_tied(directory)
        used.add(HEAD)
    unknown = sorted(
        name for name in present - used if not directory.dialect.is_ignored(name, config)
    )
    if unknown:
        raise ValueError(
            f"{directory.folder} has {len(unknown)} tensors that the model of its config.json does "
            f"not have, the first is {unknown[0]}"
        )
    return found


def _check_tied(directory: Directory) -> None:
    """Refuse a tied output layer with weights of its own; some programs write it too.

    Raises:
        ValueError: it is another tensor than the embedding.
    """
    reader = directory.reader
    if reader.entries[HEAD] != reader.entries.get(EMBEDDING) or not torch.equal(
        reader.read(HEAD), reader.read(EMBEDDING)
    ):
        raise ValueError(
            f"{directory.folder} says tie_word_embeddings true, and its {HEAD} is another tensor "
            f"than {EMBEDDING}: set it to false"
        )


def _check(directory: Directory, where: Where, shape: tuple[int, ...]) -> None:
    assert where.name is not None
    own, dtype = directory.reader.entries[where.name]
    if where.expert is not None:
        if own[0] < directory.config["num_experts"]:
            raise ValueError(f"{where.name} has {own[0]} experts in {directory.folder}")
        own = own[1:]
    whole = list(shape)
    whole[where.dimension] *= where.part[1]
    expected = tuple(whole)
    if own != expected:
        vocabulary = "embed_tokens" in where.name or "lm_head" in where.name
        field = ": vocab_size does not fit" if vocabulary and own[1:] == expected[1:] else ""
        raise ValueError(
            f"{where.name} is {list(own)} in {directory.folder}, and the model of its config.json "
            f"has {list(expected)}{field}"
        )
    is_partners = where.name.endswith(".partners")
    if dtype not in STORED.values() or is_partners != (dtype == STORED[torch.int64]):
        raise ValueError(
            f"{where.name} is {dtype} in {directory.folder}: of quantised weights only bf16, fp16 "
            "and fp32 can be read"
        )
    if is_partners:
        rows = directory.reader.read(where.name).tolist()
        partners_of(rows, directory.config["num_experts"], f"{where.name} in {directory.folder}")


def load(
    folder: Path, save: Path, dtype: str | None = None, say: Any = print
) -> dict[str, int | str]:
    """Write a Hugging Face directory as a checkpoint.

    Args:
        folder: the directory.
        save: a folder that is not there yet, or is empty.
        dtype: a key of export.DTYPES; None for that of each tensor. The router keeps its own.
        say: gets lines for the user.

    Returns:
        What was done, in numbers.

    Raises:
        ValueError: the directory is not whole, or no model here is it; one line.
        OSError: the disk is full.
    """
    return write(open_directory(folder), save, dtype, say)


def write(
    directory: Directory, save: Path, dtype: str | None = None, say: Any = print
) -> dict[str, int | str]:
    """The same, of a directory that has been opened."""
    located = locate(directory)
    folder, config, reader = directory.folder, directory.config, directory.reader
    options = options_of(directory, save)
    # The first gate of all has no residual (model/builder.py).
    alike = options["moe_layer_freq"] == 1 and not config["gating_residual"]
    stacked = config["num_hidden_layers"] if alike else 0
    iteration = config.get("megatron", {}).get("iteration", FIRST_ITERATION)
    total = sum(prod(shape) for tensor, _ in located for _, shape in tensor.parts)
    bytes_each = DTYPES[dtype].itemsize if dtype else 4
    padding = _padding(folder)
    with whole_folder(save, total * (bytes_each if dtype else 2)) as partial:
        writer = TorchDistWriter(
            contents.iteration_folder(partial, iteration), stacked, config["num_experts"]
        )
        with progress(total, "import") as advance:
            for tensor, wheres in located:
                values = _join(tensor, wheres, directory, padding, options)
                if dtype and not tensor.row.keeps_dtype:
                    values = converted(tensor.megatron, values, DTYPES[dtype])
                writer.write(tensor.megatron, values)
                advance(values.numel())
        state = {
            "args": Namespace(**_saved_options(options)),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "content_metadata": CONTENT,
        }
        writer.write_object("common_state/shard_0_1", state)
        writer.close()
        tokenizer.copy(folder, partial / tokenizer.FOLDER)
        record = _record(options, iteration, partial)
        record_path(partial, iteration).write_text(json.dumps(record, indent=1) + "\n")
        contents.write_tracker(partial, iteration)
    say(
        f"{len(reader.names())} tensors of {folder} read, {len(located)} of Megatron written "
        f"({size(total * bytes_each)} or less) as iteration {iteration} in {save}"
    )
    return {"read": len(reader.names()), "written": len(located), "iteration": iteration}


def _join(
    tensor: Tensor,
    wheres: list[Where],
    directory: Directory,
    padding: dict[str, torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """One of Megatron's tensors, with what an export has kept apart of it."""
    parts = [
        read(directory.reader, where, shape)
        for where, (_, shape) in zip(wheres, tensor.parts, strict=True)
    ]
    own = padding.get(tensor.parts[0][0])
    if (
        tensor.row.layout == "norm"
        and own is not None
        and torch.equal(own.float() + 1, parts[0].float())
    ):
        return own  # adding 1 has rounded it; one that was trained since is another
    if tensor.row.layout == "vocabulary":
        rows = options["padded_vocab_size"] - len(parts[0])
        if own is None or own.shape != (rows, *parts[0].shape[1:]):
            # No token has these rows; the mean makes them as unlikely as an average token.
            own = parts[0].float().mean(0, keepdim=True).expand(rows, -1)
        parts.append(own.to(parts[0].dtype))
    return LAYOUTS[tensor.row.layout].join(parts, directory.config)


def read(reader: SafetensorsReader, where: Where, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of ours out of a dialect's files."""
    if where.name is None:
        seed = torch.Generator().manual_seed(shape[0])
        return torch.randn(shape, generator=seed) * where.std
    values = reader.read(where.name, where.expert)
    number, of = where.part
    values = values.chunk(of, where.dimension)[number] if of > 1 else values
    return values if where.scale == 1.0 else (values.float() * where.scale).to(values.dtype)


def options_of(directory: Directory, save: Path) -> dict[str, Any]:
    """All options that the checkpoint says it was trained with."""
    config = directory.config
    kept = config.get("megatron", {})
    options = {name: values[0] for name, values in ONLY.items()}
    options |= {name: kept[name] for name in KEPT if name in kept}
    options |= to_options(config)
    vocabulary = config["vocab_size"]
    padded = kept.get("padded_vocab_size") or 0
    if padded < vocabulary:
        padded = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    has_tokenizer = (directory.folder / tokenizer.TOKENIZER).exists()
    return options | {
        "seq_length": config["max_position_embeddings"],  # for what only computes
        "vocab_size": vocabulary,
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": kept.get(
            "make_vocab_size_divisible_by", VOCABULARY_MULTIPLE
        ),
        "moe_aux_loss_coeff": kept.get("moe_aux_loss_coeff", config.get("router_aux_loss_coef")),
        "moe_router_load_balancing_type": kept.get("moe_router_load_balancing_type", "aux_loss"),
        "scmoe_tau": config.get("router_tau", 0.75),
        "tokenizer_type": "HuggingFaceTokenizer" if has_tokenizer else "NullTokenizer",
        "tokenizer_model": str(save.absolute() / tokenizer.FOLDER) if has_tokenizer else None,
        "vocab_file": None,
        "merge_file": None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "use_distributed_optimizer": False,
    }


def _saved_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that a run with --use-checkpoint-args takes; a baseline's leave ours to the run."""
    left = ("seq_length", *(SCMOE if options["scmoe_shortcut_position"] == "none" else ()))
    return {name: value for name, value in options.items() if name not in left}


def _record(options: dict[str, Any], iteration: int, partial: Path) -> dict[str, Any]:
    here = options["tokenizer_model"] and str(partial / tokenizer.FOLDER)
    digest = tokenizer_digest(Namespace(**{**options, "tokenizer_model": here}))
    model = {name: options[name] for name in (*ARCHITECTURE, *SCMOE) if name in options}
    return {
        "schema": SCHEMA,
        "iteration": iteration,
        "versions": {"python": "", "megatron-scmoe": __version__},
        "machine": {},
        "padded_vocab_size": options["padded_vocab_size"],
        "tokenizer": digest,
        "model": model,
        "options": {name: value for name, value in options.items() if name not in model},
    }


def _padding(folder: Path) -> dict[str, torch.Tensor]:
    """What an export has kept apart; a directory that others have saved has none."""
    return read_file(folder / PADDING) if (folder / PADDING).exists() else {}
