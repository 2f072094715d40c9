"""What a checkpoint or a Hugging Face directory is, for people: read from its headers alone."""

from collections import Counter
from math import prod
from pathlib import Path

from megatron_scmoe.huggingface import export, load, tensor_names
from megatron_scmoe.huggingface.tensor_names import Config
from megatron_scmoe.words import numbers, size, table


def inspect(path: Path, step: int | None = None, tensors: bool = False) -> str:
    """The lines to print.

    Args:
        path: the folder of all iterations, or a directory with a config.json.
        step: the iteration.
        tensors: add every tensor by both names, with its shape.

    Raises:
        ValueError: it is neither, or not whole; one line.
    """
    if (path / "config.json").exists():
        directory = load.open_directory(path)
        load.locate(directory)
        kinds = Counter(kind for _, kind in directory.reader.entries.values())
        stored = sum(
            prod(shape) * load.BYTES[kind] for shape, kind in directory.reader.entries.values()
        )
        config, what = directory.config, f"{path}: {len(directory.reader.names())} tensors"
    else:
        source = export.open_checkpoint(path, step)
        located, left = export.locate(source)
        reader = source.reader
        kinds = Counter(str(reader.dtype(place)).removeprefix("torch.") for _, place in located)
        stored = sum(prod(reader.shape(p)) * reader.dtype(p).itemsize for _, p in located)
        config = source.config
        what = f"{reader.folder}: {len(located)} tensors, {len(left)} keys of other state"
    lines = [f"{what}, {size(stored)} ({', '.join(f'{k} {n}' for k, n in sorted(kinds.items()))})"]
    lines += [f"  {name} {text}" for name, text in _facts(config)]
    if tensors:
        rows = [
            (tensor.megatron, name, str(list(shape)))
            for tensor in tensor_names.tensors(config)
            for name, shape in tensor.parts
        ]
        lines += ["", table(("Megatron", "Hugging Face", "shape"), rows, words=(0, 1, 2))]
    return "\n".join(lines)


def _facts(config: Config) -> list[tuple[str, str]]:
    """What decides which model it is, in the words of config.json."""
    weights = sum(
        prod(shape) for tensor in tensor_names.tensors(config) for _, shape in tensor.parts
    )
    shortcut = config["shortcut_position"]
    if shortcut != "none":
        shortcut += f", {config['shortcut_norm']} norm, combine {config['combine']}"
    at_home = [f"{config[f'{k}_experts']} {k}" for k in ("zero", "copy", "constant")]
    latent = config["kv_lora_rank"]
    attention = (
        f"latent of {latent}" if latent else f"{config['num_key_value_heads']} key-value heads"
    )
    experts = [f"{config['num_experts']} of {config['moe_intermediate_size']}"]
    experts += [text for text in at_home if not text.startswith("0 ")]
    if config["shared_expert_intermediate_size"]:
        experts.append(f"shared {config['shared_expert_intermediate_size']}")
    return [
        ("parameters", f"{weights:,}"),
        ("vocabulary", f"{config['vocab_size']:,}"),
        (
            "attention layers",
            f"{config['num_hidden_layers']} of {config['hidden_size']}, "
            f"{config['num_attention_heads']} heads, {attention}",
        ),
        ("MoE in layers", numbers(config["moe_layers"])),
        ("experts", ", ".join(experts)),
        (
            "router",
            f"{config['router']}, {config['scoring_func']}, "
            f"{config['num_experts_per_tok']} a token",
        ),
        ("shortcut", shortcut),
    ]
