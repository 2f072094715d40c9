"""Tiny data on disk, as `preprocess_data` would write it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

NUM_DOCUMENTS = 64
DOCUMENT_TOKENS = 100


@pytest.fixture(scope="session")
def data_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count upwards from a random token, modulo the vocabulary: easy to learn."""
    prefix = tmp_path_factory.mktemp("data") / "counting"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for start in np.random.default_rng(0).integers(60, size=NUM_DOCUMENTS):
        tokens = torch.from_numpy((start + np.arange(DOCUMENT_TOKENS)) % 60)
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix
