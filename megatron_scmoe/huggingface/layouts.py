"""How the parts of Hugging Face lie in one tensor of Megatron's, both ways.

Shapes: g key-value heads, q query heads of one of them, d head, h hidden, V vocabulary, P padded
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_scmoe.huggingface.tensor_names import Config

Parts = list[Tensor]


@dataclass(frozen=True)
class Packing:
    """Both directions; each gives back what the other took."""

    split: Callable[[Tensor, list[int], Config], Parts]
    """Parts of one of Megatron's tensors; views where that is possible.

    Args: the tensor, the numbers of rows of the parts, the model.
    """
    join: Callable[[Parts, Config], Tensor]


def _split(whole: Tensor, rows: list[int], config: Config) -> Parts:
    return list(whole.split(rows))


def _join(parts: Parts, config: Config) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split_qkv(whole: Tensor, rows: list[int], config: Config) -> Parts:
    """Megatron's rows are [g, (q + 2) d]: the queries of a key-value head, its key, its value."""
    groups, head = config["num_key_value_heads"], config["head_dim"]
    queries = config["num_attention_heads"] // groups
    grouped = whole.view(groups, (queries + 2) * head, *whole.shape[1:])
    parts = grouped.split([queries * head, head, head], dim=1)
    return [part.reshape(-1, *whole.shape[1:]) for part in parts]


def _join_qkv(parts: Parts, config: Config) -> Tensor:
    groups = config["num_key_value_heads"]
    grouped = [part.view(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])


def _split_vocabulary(whole: Tensor, rows: list[int], config: Config) -> Parts:
    """Without the padding, which is kept apart (padding.safetensors)."""
    return [whole[: rows[0]]]


def _split_norm(whole: Tensor, rows: list[int], config: Config) -> Parts:
    """With --apply-layernorm-1p Megatron keeps a norm's weight less 1."""
    return [whole.float() + 1 if is_zero_centered(config) else whole]


def _join_norm(parts: Parts, config: Config) -> Tensor:
    return parts[0].float() - 1 if is_zero_centered(config) else parts[0]


def is_zero_centered(config: Config) -> bool:
    """Whether norms are exported in fp32, where adding 1 loses next to nothing."""
    return bool(config.get("megatron", {}).get("layernorm_zero_centered_gamma", False))


LAYOUTS = {
    "joined": Packing(_split, _join),
    "qkv": Packing(_split_qkv, _join_qkv),
    "vocabulary": Packing(_split_vocabulary, _join),
    "norm": Packing(_split_norm, _join_norm),
}
