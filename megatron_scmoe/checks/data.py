"""Data that cannot be trained on, before any rank builds a dataset."""

import math
from argparse import Namespace
from collections.abc import Iterable

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_scmoe.checks.refusal import Found, Refusal


def _not_read(dest: str) -> Refusal:
    return Refusal(lambda args: getattr(args, dest), f"--{dest.replace('_', '-')} is not supported")


def _on_disk(prefixes: Iterable[str]) -> list[str]:
    return [prefix for prefix in prefixes if not is_object_storage_path(prefix)]


def _missing_dataset(args: Namespace) -> Found:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for prefixes, _ in filter(None, [blend, *(blend_per_split or [])]):
        for prefix in _on_disk(prefixes):
            if not IndexedDataset.exists(prefix):
                return {"prefix": prefix}
    return False


def _bad_weight(args: Namespace) -> Found:
    """The host divides by their sum, behind a bare assert (core/datasets/utils.py)."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for prefixes, weights in filter(None, [blend, *(blend_per_split or [])]):
        for prefix, weight in zip(prefixes, weights or (), strict=False):
            if not (weight > 0 and math.isfinite(weight)):
                return {"prefix": prefix, "weight": f"{weight:g}"}
    return False


def _remote_without_cache(args: Namespace) -> Found:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for prefixes, _ in filter(None, [blend, *(blend_per_split or [])]):
        for prefix in prefixes:
            if is_object_storage_path(prefix) and not args.object_storage_cache_path:
                return {"prefix": prefix}
    return False


def _empty_split(args: Namespace) -> Found:
    """The host would count epochs of nothing forever (core/datasets/gpt_dataset.py:693)."""
    blend, _ = get_blend_and_blend_per_split(args)
    if not blend:
        return False
    shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    for prefix in _on_disk(blend[0]):
        documents = len(IndexedDataset(prefix).document_indices) - 1
        for kind, share in zip(Split, shares, strict=True):
            if share is not None and round(share[0] * documents) == round(share[1] * documents):
                return {"kind": kind.name, "documents": documents, "prefix": prefix}
    return False


DATA = (
    *map(
        _not_read,
        ("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking"),
    ),
    Refusal(
        _bad_weight,
        "{prefix} has the weight {weight} among the data",
        "leave it out, or give it a positive weight",
    ),
    Refusal(
        _remote_without_cache,
        "{prefix} is read through a local folder",
        "add --object-storage-cache-path",
    ),
    Refusal(_missing_dataset, "no dataset {prefix}.bin and {prefix}.idx"),
    Refusal(
        _empty_split,
        "--split {split} leaves the {kind} data none of the {documents} documents of {prefix}",
        "give it a larger share, or 0",
    ),
)


def _small_vocabulary(args: Namespace, tokens: int) -> Found:
    if args.padded_vocab_size >= tokens:
        return False
    ranks = args.tensor_model_parallel_size
    return {"tokens": tokens, "enough": -(-tokens // ranks) * ranks}


# Of the options that the host leaves after it has built the tokenizer, and the tokenizer's tokens.
VOCABULARY = (
    Refusal(
        _small_vocabulary,
        "--padded-vocab-size {padded_vocab_size} is less than the {tokens} tokens of the tokenizer",
        "use at least {enough}",
    ),
)
