"""The parts of the proof, in order of value.

A part's imports may be broken, or may touch the device: only the process that runs it imports it.
"""

from dataclasses import dataclass

PACKAGE = "tools.gpu_proof"


@dataclass(frozen=True)
class ProofPart:
    """A module of the package with `run(results, device, seconds)`."""

    limit_s: float
    """On a GPU."""
    correctness: bool
    """Whether `make test-gpu` runs it."""


PARTS = {
    "right": ProofPart(130, correctness=True),
    "ranks": ProofPart(100, correctness=True),
    "main_job": ProofPart(150, correctness=True),
    "transformer_engine": ProofPart(75, correctness=True),
    "hidden": ProofPart(110, correctness=False),
    "fast": ProofPart(120, correctness=False),
    "generation": ProofPart(45, correctness=True),
}
