"""One part, in a process of its own.

    python -m tools.gpu_proof.child MODULE NAME FOLDER DEVICE DEADLINE

The deadline is in seconds since the epoch: what the imports take is the part's time too. The host's
symbols are replaced before a part imports the host.
"""

from megatron_scmoe import start

start.replace_host_symbols()

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
results = Results(name, Path(folder), rehearsal=device == "cpu")
part.run(results, torch.device(device), float(deadline) - MARGIN_S - time.time())
