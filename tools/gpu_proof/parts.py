"""The parts of the proof, in order of value.

A part's imports may be broken, or may touch the device: only the process that runs it imports it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PACKAGE = "tools.gpu_proof"


@dataclass(frozen=True)
class ProofPart:
    """A module of the package with `run(results, device, seconds)`."""

    limit_s: float
    """On a GPU."""
    correctness: bool
    """Whether `make test-gpu` runs it."""
    module: str = ""
    """Where its name is not the part's."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of its process."""


def hidden_at(connections: int, limit_s: float) -> ProofPart:
    """What is hidden; with 1 connection, as tensor parallelism wants it before Blackwell, too."""
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": str(connections)}
    return ProofPart(limit_s, False, "hidden", environment)


PARTS = {
    "right": ProofPart(130, correctness=True),
    "ranks": ProofPart(100, correctness=True),
    "main_job": ProofPart(150, correctness=True),
    "transformer_engine": ProofPart(75, correctness=True),
    "hidden": hidden_at(32, 65),
    "hidden_1": hidden_at(1, 45),
    "fast": ProofPart(120, correctness=False),
    "generation": ProofPart(45, correctness=True),
}
