"""What ran on the GPU beside what: kernels and copies of a trace of torch.profiler.

Intervals are (begin, end) in seconds.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Interval = tuple[float, float]
# Chrome's categories of what occupies the device.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Kernel(NamedTuple):
    """Something that ran on a stream."""

    name: str
    stream: int
    begin: float
    end: float


class Hole(NamedTuple):
    """Time in which nothing ran."""

    seconds: float
    before: str
    """The kernel in front of it."""
    after: str
    """The kernel behind it."""


def profile(function: Callable[[], Any], path: Path) -> list[Kernel]:
    """Call it twice under torch.profiler, which starts with the first call, and keep the second.

    Args:
        path: of the trace, for Perfetto.
    """
    with torch.profiler.profile(
        # The host's operators would slow it down.
        activities=[torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for _ in range(2):
            function()
            torch.cuda.synchronize()
            profiler.step()
    return read_kernels(json.loads(path.read_text()))


def read_kernels(trace: dict[str, Any]) -> list[Kernel]:
    """From Chrome's format, microseconds, in order of their beginning."""
    kernels = [
        Kernel(
            event["name"],
            event["args"]["stream"],
            event["ts"] / 1e6,
            (event["ts"] + event["dur"]) / 1e6,
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE
    ]
    return sorted(kernels, key=lambda kernel: kernel.begin)


def busiest_stream(kernels: Iterable[Kernel]) -> int:
    """The stream with the most kernels."""
    return Counter(kernel.stream for kernel in kernels).most_common(1)[0][0]


def total_s(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one of them runs."""
    seconds, until = 0.0, -math.inf
    for begin, end in sorted(intervals):
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return seconds


def beside_s(these: Sequence[Interval], those: Sequence[Interval]) -> float:
    """Seconds in which one of these and one of those run at once."""
    return total_s(these) + total_s(those) - total_s([*these, *those])


def holes(kernels: Iterable[Kernel]) -> list[Hole]:
    """Between kernels, longest first.

    Args:
        kernels: in order.
    """
    found: list[Hole] = []
    last: Kernel | None = None
    for kernel in kernels:
        if last is not None and kernel.begin > last.end:
            found.append(Hole(kernel.begin - last.end, last.name, kernel.name))
        if last is None or kernel.end > last.end:
            last = kernel
    return sorted(found, reverse=True)


def intervals(kernels: Iterable[Kernel]) -> list[Interval]:
    """Their times."""
    return [(kernel.begin, kernel.end) for kernel in kernels]
