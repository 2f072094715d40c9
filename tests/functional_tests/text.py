"""Real text for tests: the license, a token per byte, a paragraph per document."""

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

LICENSE = Path(__file__).parents[2] / "LICENSE"


def write_text(folder: Path) -> Path:
    """Write the dataset; returns the prefix of .bin and .idx."""
    prefix = folder / "license"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for paragraph in LICENSE.read_bytes().split(b"\n\n"):
        if paragraph:
            builder.add_document(torch.tensor(list(paragraph)), [len(paragraph)])
    builder.finalize(f"{prefix}.idx")
    return prefix
