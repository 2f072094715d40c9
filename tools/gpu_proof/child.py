"""One part, in a process of its own.

    python -m tools.gpu_proof.child MODULE NAME FOLDER DEVICE DEADLINE

The deadline is in seconds since the epoch: what the imports take is the part's time too.
"""

import importlib
import sys
import time
from pathlib import Path

import torch

from tools.gpu_proof.results import Results

MARGIN_S = 5.0
"""A part that keeps its time must not be killed while it ends."""

module, name, folder, device, deadline = sys.argv[1:]
part = importlib.import_module(module)
part.run(
    Results(name, Path(folder)), torch.device(device), float(deadline) - MARGIN_S - time.time()
)
