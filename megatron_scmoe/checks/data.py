"""Data that cannot be trained on, before any rank builds a dataset."""

import math
import struct
from argparse import Namespace
from itertools import filterfalse, zip_longest
from operator import attrgetter
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexReader
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_scmoe.checks.refusal import Found, Refusal
from megatron_scmoe.words import flag

NOT_READ = ("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking")
LOOKED_AT = 1_000_000
"""Sequences of a data set, its last ones."""


def _weighted(args: Namespace) -> list[tuple[str, float | None]]:
    """The data sets of all splits, with their weights if they have some."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    blends = filter(None, [blend, *(blend_per_split or [])])
    return [pair for prefixes, weights in blends for pair in zip_longest(prefixes, weights or ())]


def _on_disk(args: Namespace) -> list[str]:
    return [prefix for prefix, _ in _weighted(args) if not is_object_storage_path(prefix)]


def _missing_dataset(args: Namespace) -> Found:
    missing = [prefix for prefix in _on_disk(args) if not IndexedDataset.exists(prefix)]
    return bool(missing) and {"prefix": missing[0]}


def _damaged_dataset(args: Namespace) -> Found:
    """What the host reads as it is, or refuses without the file's name."""
    for prefix in _on_disk(args):
        try:
            why = _defect(prefix)
        except (AssertionError, OSError, ValueError, struct.error) as error:
            why = f"{prefix}.idx cannot be read ({error})"
        if why:
            return {"prefix": prefix, "why": why}
    return False


def _defect(prefix: str) -> str | None:
    """What is wrong with the files of a data set, beyond what stands in every sequence of a large
    one: every rank looks.

    Raises:
        AssertionError, OSError, ValueError, struct.error: the index is damaged.
    """
    index = _IndexReader(f"{prefix}.idx", multimodal=False)
    lengths, begins = index.sequence_lengths, index.sequence_pointers
    documents = index.document_indices
    size = Path(f"{prefix}.bin").stat().st_size
    if not len(lengths) or not size:
        return "they hold no token"
    if documents[0] != 0 or documents[-1] != len(lengths):
        return "the index is damaged: its documents are not its sequences"
    looked_at = slice(None) if len(lengths) <= LOOKED_AT else slice(-LOOKED_AT, None)
    lengths, begins = lengths[looked_at].astype(np.int64), begins[looked_at]
    ends = begins + lengths * index.dtype_size
    if lengths.min() < 0 or begins.min() < 0 or (ends[:-1] != begins[1:]).any():
        return "the index is damaged: its sequences do not follow each other"
    if ends[-1] != size:
        return f"the index ends at byte {ends[-1]} and {prefix}.bin at {size}"
    return None


def _bad_weight(args: Namespace) -> Found:
    """The host divides by their sum, behind a bare assert (core/datasets/utils.py)."""
    for prefix, weight in _weighted(args):
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            return {"prefix": prefix, "weight": f"{weight:g}"}
    return False


def _remote_without_cache(args: Namespace) -> Found:
    remote = [prefix for prefix, _ in _weighted(args) if is_object_storage_path(prefix)]
    return bool(remote and not args.object_storage_cache_path) and {"prefix": remote[0]}


def _empty_split(args: Namespace) -> Found:
    """The host would count epochs of nothing forever (core/datasets/gpt_dataset.py:693)."""
    blend, _ = get_blend_and_blend_per_split(args)
    if not blend:
        return False
    shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    for prefix in filterfalse(is_object_storage_path, blend[0]):
        documents = len(IndexedDataset(prefix).document_indices) - 1
        for kind, share in zip(Split, shares, strict=True):
            if share is not None and round(share[0] * documents) == round(share[1] * documents):
                return {"kind": kind.name, "documents": documents, "prefix": prefix}
    return False


DATA = (
    *(Refusal(attrgetter(dest), f"{flag(dest)} is not supported") for dest in NOT_READ),
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
        _damaged_dataset,
        "{prefix}.bin and {prefix}.idx cannot be trained on",
        "{why}; write or copy both again",
    ),
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
