"""Whether communication is hidden, with CUDA_DEVICE_MAX_CONNECTIONS at 32 and at 1.

The variable is read when a process first touches the device: each setting has a process of its own,
`connections.py`, which says what is measured. What it finds stands in this part's file.
"""

import os
import subprocess
import sys
import time

import torch

from tools.benchmarks.real_text import REPOSITORY
from tools.gpu_proof.results import Results

SETTINGS = (32, 1)
"""The one for overlap first; the other is what tensor parallelism asks for before Blackwell."""


def run(results: Results, device: torch.device, seconds: float) -> None:
    """See the module."""
    deadline = time.monotonic() + seconds
    for place, setting in enumerate(SETTINGS):
        left = deadline - time.monotonic()
        until = time.time() + left / (len(SETTINGS) - place)
        name = f"process with {setting} connections"
        arguments = [str(results.folder), device.type, str(until)]
        try:
            process = subprocess.run(
                [sys.executable, "-m", "tools.gpu_proof.connections", *arguments],
                cwd=REPOSITORY,
                env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": str(setting)},
                timeout=left,
            )
        except subprocess.TimeoutExpired:
            results.check(name, False, f"it took longer than {left:.0f} s")
        else:
            results.check(name, process.returncode == 0, f"exit code {process.returncode}")
