"""Real text for the benchmarks: the quick start's corpus, one token per byte.

With 256 tokens the output layer costs next to nothing, so that a step is its layers.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).parents[2]
MEGABYTES = 3
VOCABULARY = 256


def write_text(folder: Path) -> Path:
    """Write the dataset, unless an earlier run has, and return the prefix of .bin and .idx."""
    prefix = folder / "bytes"
    if Path(f"{prefix}.idx").exists():
        return prefix
    folder.mkdir(parents=True, exist_ok=True)
    corpus = REPOSITORY / "examples" / "quickstart" / "corpus.py"
    size = ["--max-megabytes", str(MEGABYTES)]
    command = [sys.executable, str(corpus), "--output-dir", str(folder), *size]
    subprocess.run(command, check=True, capture_output=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which GPU libraries the host would like
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        tokens = np.frombuffer(json.loads(line)["text"].encode(), dtype=np.uint8)
        builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix
