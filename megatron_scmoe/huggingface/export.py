"""A `torch_dist` checkpoint as a Hugging Face directory.

What the model is says the checkpoint's record; tensors are read, cut and written one by one. The
directory gets its name when it is whole.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_scmoe.huggingface import longcat, safetensors_files, tensor_names, tokenizer
from megatron_scmoe.huggingface.config import from_record
from megatron_scmoe.huggingface.layouts import LAYOUTS, is_zero_centered
from megatron_scmoe.huggingface.progress import progress
from megatron_scmoe.huggingface.safetensors_files import BLOCK_BYTES, Entry
from megatron_scmoe.huggingface.tensor_names import Config, Tensor
from megatron_scmoe.huggingface.torch_dist import Address, TorchDistReader
from megatron_scmoe.run.checkpoint import contents
from megatron_scmoe.run.checkpoint.record import read_record
from megatron_scmoe.words import size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PADDING = "padding.safetensors"
REPORT = "conversion.json"
MODELLING = ("configuration_scmoe.py", "modeling_scmoe.py")


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint and what it is."""

    folder: Path
    iteration: int
    reader: TorchDistReader
    config: Config
    record: dict[str, Any]
    tokenizer: Path | None
    """The folder of its tokenizer."""


@dataclass
class Counts:
    """What was read, written and left."""

    sources: int = 0
    written: int = 0
    bytes: int = 0
    left: list[str] = field(default_factory=list)
    checksums: dict[str, int] = field(default_factory=dict)

    def experts(self) -> dict[str, str]:
        """A checksum for each routed expert, of those of its tensors."""
        found: dict[str, int] = {}
        for name, checksum in self.checksums.items():
            head, _, tail = name.partition(".mlp.experts.")
            if tail:
                expert = f"{head}.mlp.experts.{tail.split('.')[0]}"
                found[expert] = (found.get(expert, 0) * 31 + checksum) & 0xFFFFFFFF
        return {name: f"{value:08x}" for name, value in found.items()}


def open_checkpoint(
    load: Path, step: int | None = None, tokenizer_folder: Path | None = None
) -> SourceCheckpoint:
    """Find an iteration, read its record, and see that it is whole.

    Args:
        load: the folder of all iterations.
        step: the iteration; None for the one that the tracker names.
        tokenizer_folder: in place of the record's.

    Raises:
        ValueError: one line that says what is wrong with which file.
    """
    if not load.is_dir():
        raise ValueError(f"{load} is no folder")
    if (load / contents.DISTRIBUTED).exists():
        raise ValueError(f"{load} is one iteration: use the folder that it lies in, {load.parent}")
    found = ", ".join(map(str, contents.saved_iterations(load))) or "none"
    iteration = step if step is not None else contents.tracked_iteration(load)
    if not isinstance(iteration, int):
        tracked = f"has no {contents.TRACKER}" if iteration is None else f"is a {iteration}"
        raise ValueError(f"{load} {tracked}: say which with --ckpt-step (there: {found})")
    checkpoint = contents.iteration_folder(load, iteration)
    if not checkpoint.is_dir():
        raise ValueError(f"{load} has no iteration {iteration} (there: {found})")
    if not (checkpoint / contents.DISTRIBUTED).exists() and any(checkpoint.glob("mp_rank_0*")):
        raise ValueError(
            f"{checkpoint} is in Megatron's older format: load it and save it with --ckpt-format "
            "torch_dist"
        )
    if defects := contents.defects(checkpoint):
        raise ValueError(defects[0].split("; for a file that you trust")[0])
    record = read_record(load, iteration)
    if record is None:
        raise ValueError(
            f"{checkpoint}.json is missing, which says what the model is: load the checkpoint with "
            "pretrain_gpt_scmoe.py and save it again"
        )
    try:
        config = from_record(record)
    except KeyError as error:
        raise ValueError(f"{checkpoint}.json does not say what {error.args[0]} is") from error
    folder = tokenizer_folder or tokenizer.folder_of(record, load)
    config = tokenizer.complete(config, record, folder)
    return SourceCheckpoint(load, iteration, TorchDistReader(checkpoint), config, record, folder)


def locate(source: SourceCheckpoint) -> tuple[list[tuple[Tensor, Address]], list[str]]:
    """Where every tensor of the model lies, and the keys that are left on purpose.

    Raises:
        ValueError: the checkpoint lacks tensors, has others, or some of another shape.
    """
    reader, config = source.reader, source.config
    found: list[tuple[Tensor, Address]] = []
    missing = []
    for tensor in tensor_names.tensors(config):
        place = _place(reader, tensor.megatron)
        if place is None:
            missing.append(tensor.megatron)
            continue
        expected = _shape(tensor, source)
        if reader.shape(place) != expected:
            raise ValueError(
                f"{tensor.megatron} is {list(reader.shape(place))} in {reader.folder}, and the "
                f"model of its record has {list(expected)}"
            )
        found.append((tensor, place))
    if missing:
        raise ValueError(
            f"{reader.folder} lacks {len(missing)} tensors of the model of its record, the first "
            f"is {missing[0]}"
        )
    taken: dict[str, set[tuple[int, ...]]] = {}
    for _, place in found:
        taken.setdefault(place.key, set()).add(place.index)
    left = [
        key
        for key in (*reader.stored, *reader.objects)
        if key.startswith(tensor_names.OTHER_STATE) or tensor_names.NO_WEIGHTS in key
    ]
    extra = sorted((reader.stored.keys() | reader.objects) - taken.keys() - set(left))
    for key, indices in taken.items():
        leading = len(next(iter(indices)))
        there = reader.places(key, leading)
        extra += [f"{key} {list(index)}" for index in sorted(there - indices)]
    if extra:
        raise ValueError(
            f"{reader.folder} has {len(extra)} tensors that the model of its record does not have, "
            f"the first is {extra[0]}"
        )
    return found, sorted(left)


def _place(reader: TorchDistReader, name: str) -> Address | None:
    """The norm in front of a MoE has a dense layer's name in stock Megatron's local spec."""
    stock = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    for candidate in (name, stock):
        try:
            return reader.place(candidate)
        except KeyError:
            continue
    return None


def _shape(tensor: Tensor, source: SourceCheckpoint) -> tuple[int, ...]:
    """Of Megatron's tensor: its parts one behind the other, the vocabulary padded."""
    rows = sum(shape[0] for _, shape in tensor.parts)
    if tensor.row.layout == "vocabulary":
        rows = source.record["padded_vocab_size"]
    return (rows, *tensor.parts[0][1][1:])


def export(
    load: Path,
    output: Path,
    step: int | None = None,
    dtype: str | None = None,
    tokenizer_folder: Path | None = None,
    shard_bytes: int = safetensors_files.SHARD_BYTES,
    say: Any = print,
    target: str = "scmoe",
    zero_expert_rows: bool = False,
) -> Counts:
    """Write a checkpoint as a Hugging Face directory.

    Args:
        load: the folder of all iterations.
        output: a folder that is not there yet, or is empty.
        step: the iteration; None for the one that the tracker names.
        dtype: a key of DTYPES; None for that of each tensor on disk. The router keeps its own.
        tokenizer_folder: in place of the record's.
        say: gets lines for the user.
        target: scmoe, our modelling code beside the weights; or longcat_flash, which is in
            transformers, vLLM and SGLang.
        zero_expert_rows: write what transformers 5.23 wants for LongCat's experts without weights.

    Raises:
        ValueError: the checkpoint is not whole, is none of ours, has other tensors than its record
            says, or is no model of the target; one line.
        OSError: the disk is full.
    """
    if tokenizer_folder is not None and not tokenizer.is_there(tokenizer_folder):
        raise ValueError(f"--tokenizer {tokenizer_folder} has no tokenizer.json and none like it")
    source = open_checkpoint(load, step, tokenizer_folder)
    located, left = locate(source)
    reader, config = source.reader, source.config
    config["dtype"] = _dtype_name(dtype, reader, located)
    is_longcat = target == "longcat_flash"
    theirs = longcat.to_theirs(config) if is_longcat else config
    name_of = longcat.name_of if is_longcat else str
    entries = [
        Entry(name_of(name), shape, _dtype(tensor, reader.dtype(place), dtype, config))
        for tensor, place in located
        for name, shape in tensor.parts
    ]
    rows = longcat.rows_without_weights(config) if is_longcat and zero_expert_rows else []
    entries += [Entry(name, shape, entries[0].dtype) for name, shape in rows]
    for line in longcat.notes(config) if is_longcat else ():
        say(line)
    counts = Counts(len(located), len(entries), sum(entry.bytes for entry in entries), left)
    peak = peak_bytes(reader, [place for _, place in located])
    if source.record["options"].get("moe_expert_capacity_factor") is not None:
        say("--moe-expert-capacity-factor stays behind: an exported model drops no token")
    say(
        f"{size(counts.bytes)} in {counts.written} tensors; at most {size(peak)} of them in memory "
        "at a time"
    )
    with whole_folder(output, counts.bytes) as folder:
        writer = safetensors_files.SafetensorsWriter(folder, entries, shard_bytes)
        padding: dict[str, torch.Tensor] = {}
        with progress(counts.bytes, "export") as advance:
            for tensor, place in located:
                for name, values in parts_of(tensor, reader.read(place), config, padding):
                    writer.write(name_of(name), values)
                    advance(values.numel() * values.dtype.itemsize)
        for name, shape in rows:
            writer.write(name, torch.zeros(shape))
        writer.close()
        counts.checksums = writer.checksums
        _write_padding(folder, padding)
        _write_texts(folder, source, theirs, counts)
        for name in () if is_longcat else MODELLING:
            shutil.copy(Path(__file__).with_name(name), folder / name)
        if source.tokenizer is not None:
            tokenizer.copy(source.tokenizer, folder)
    if source.tokenizer is None or not tokenizer.is_there(source.tokenizer):
        say(_no_tokenizer(source.record))
    experts = counts.experts()
    say(
        f"{counts.sources} tensors of iteration {source.iteration} mapped, {counts.written} "
        f"written, {len(left)} keys left ({_kinds(left)}); {len(experts)} routed experts, "
        f"{len(set(experts.values()))} of them different"
    )
    return counts


def parts_of(
    tensor: Tensor, whole: torch.Tensor, config: Config, padding: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's tensors that make up one of Megatron's; `padding` gets what they do not hold:
    rows beyond the vocabulary, weights of norms less 1."""
    rows = [shape[0] for _, shape in tensor.parts]
    parts = LAYOUTS[tensor.row.layout].split(whole, rows, config)
    if tensor.row.layout == "vocabulary" and whole.shape[0] > rows[0]:
        padding[tensor.parts[0][0]] = whole[rows[0] :].clone()
    if tensor.row.layout == "norm" and is_zero_centered(config):
        padding[tensor.parts[0][0]] = whole.clone()
    for (name, shape), values in zip(tensor.parts, parts, strict=True):
        yield name, values.view(shape)


def peak_bytes(reader: TorchDistReader, places: list[Address]) -> int:
    """The most that tensors take at a time: one, whole, beside the chunk or the part that is
    copied, and a block that is converted."""
    most = 0
    for place in places:
        whole = prod(reader.shape(place))
        most = max(most, (whole + reader.largest_chunk(place)) * reader.dtype(place).itemsize)
    return most + 2 * BLOCK_BYTES


@contextmanager
def whole_folder(output: Path, needed: int) -> Iterator[Path]:
    """A folder under another name, which becomes `output` if the block ends well.

    Raises:
        ValueError: something is there already, or the disk has too little space.
    """
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: use another folder, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ValueError(f"{output.parent} has {size(free)} free, and {size(needed)} are needed")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        yield partial
        if output.exists():
            output.rmdir()
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _dtype(tensor: Tensor, own: torch.dtype, asked: str | None, config: Config) -> torch.dtype:
    if tensor.row.layout == "norm" and is_zero_centered(config):
        return torch.float32
    return own if asked is None or tensor.row.keeps_dtype else DTYPES[asked]


def _dtype_name(
    asked: str | None, reader: TorchDistReader, located: list[tuple[Tensor, Address]]
) -> str:
    """Of the embedding, which is the first."""
    dtype = DTYPES[asked] if asked else reader.dtype(located[0][1])
    return str(dtype).removeprefix("torch.")


def _write_padding(folder: Path, padding: dict[str, torch.Tensor]) -> None:
    """What transformers does not read, and import does."""
    if padding:
        from safetensors.torch import save_file

        save_file(padding, folder / PADDING)


def _write_texts(folder: Path, source: SourceCheckpoint, config: Config, counts: Counts) -> None:
    ids = {name: config[name] for name in tokenizer.IDS if config.get(name) is not None}
    texts = {
        "config.json": config,
        "generation_config.json": {"_from_model_config": True, **ids},
        REPORT: {
            "iteration": source.iteration,
            "versions": source.record["versions"],
            "experts": counts.experts(),
            "crc32": {name: f"{value:08x}" for name, value in counts.checksums.items()},
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _no_tokenizer(record: dict[str, Any]) -> str:
    name = record["options"].get("tokenizer_model") or record["tokenizer"]["type"]
    return f"no tokenizer beside the weights: {name} has no files here; give --tokenizer DIR"


def _kinds(left: list[str]) -> str:
    """`optimizer 120, extra state 40`"""
    found: dict[str, int] = {}
    for key in left:
        prefix = next(
            (p for p in tensor_names.OTHER_STATE if key.startswith(p)), tensor_names.NO_WEIGHTS
        )
        kind = prefix.strip("._")
        found[kind] = found.get(kind, 0) + 1
    return ", ".join(f"{kind} {number}" for kind, number in sorted(found.items())) or "none"
