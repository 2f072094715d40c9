"""How the proof measures: contenders in turns, medians with their spread, the chip's own rates."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tools.benchmarks.turns import spread
from tools.gpu_proof.results import Results

BFLOAT16_FLOPS_PER_S = 989e12
"""Of the H100 and H200 data sheets: dense bf16, which no matrix product reaches."""


@dataclass(frozen=True)
class Timing:
    """The samples of one contender."""

    seconds: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread_share(self) -> float:
        """Distance of the quartiles over the median."""
        return spread(self.seconds)

    def beside(self, floor_s: float) -> dict[str, Any]:
        """Values of a finding, with what no version of the contender falls below."""
        return {
            "median_s": self.median_s,
            "spread_share": self.spread_share,
            "floor_s": floor_s,
            "over_floor_ratio": self.median_s / floor_s,
        }


def in_turns(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, turns: int, steps: int
) -> dict[str, Timing]:
    """Seconds of a call, the contenders one after another, the order reversed every other turn.

    Args:
        contenders: what is called, by name.
        turns: samples of each contender; one turn before them warms up.
        steps: calls in a sample. The host may run ahead of the device within them.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(1 + turns):
        for name in names if turn % 2 else reversed(names):
            seconds = _seconds(contenders[name], device, steps)
            if turn > 0:
                samples[name].append(seconds)
    return {name: Timing(seconds) for name, seconds in samples.items()}


def _seconds(function: Callable[[], object], device: torch.device, steps: int) -> float:
    """Mean over `steps` calls. The first call is not counted: it fills the device's queue."""
    function()
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(steps):
            function()
        return (time.perf_counter() - began) / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


@dataclass(frozen=True)
class Rates:
    """What this chip reaches at best: no code on it is much faster."""

    flops_per_s: float
    """A big product of bf16 matrices."""
    bytes_per_s: float
    """A big copy, bytes read and written."""

    @classmethod
    def measure(cls, device: torch.device) -> "Rates":
        size, nbytes = (256, 2**20) if device.type == "cpu" else (8192, 2**31)
        options = {"dtype": torch.bfloat16, "device": device}
        left, right = (torch.randn(size, size, **options) for _ in range(2))  # type: ignore
        source = torch.randn(nbytes // 2, **options)  # type: ignore
        target = torch.empty_like(source)
        contenders = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
        times = in_turns(contenders, device, turns=5, steps=5)
        return cls(2 * size**3 / times["product"].median_s, 2 * nbytes / times["copy"].median_s)

    def floor_s(self, flops: float, nbytes: float) -> float:
        """No version of something takes less.

        Args:
            flops: that it must do.
            nbytes: that it must read and write.
        """
        return max(flops / self.flops_per_s, nbytes / self.bytes_per_s)


@dataclass(frozen=True)
class PartStep:
    """A piece of a part; its findings begin with its name."""

    name: str
    run: Callable[[], None]
    seconds: float
    """It is not begun with less time left."""
    missing: str | None = None
    """What it needs and this machine has not."""


def do_steps(results: Results, steps: Sequence[PartStep], deadline: float) -> None:
    """One after the other, the valuable ones first, until the time is up.

    Args:
        deadline: of time.monotonic.
    """
    for step in steps:
        if step.missing is not None:
            results.skipped(step.name, f"needs {step.missing}")
        elif time.monotonic() + step.seconds > deadline:
            results.skipped(step.name, f"less than {step.seconds:.0f} s were left")
        else:
            with results.guarded(step.name):
                step.run()
            # Layers and their hooks hold each other.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
