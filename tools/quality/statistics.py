"""Means, spreads and a paired test over seeds."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class PairedSeeds:
    """Two contenders, seed by seed: the same weights' seed, data and order."""

    differences: tuple[float, ...]
    """Of held-out losses, the first one's minus the second one's; below 0 the first is better."""

    @classmethod
    def of(cls, one: Mapping[int, float], other: Mapping[int, float]) -> "PairedSeeds":
        """From held-out losses by seed."""
        return cls(tuple(one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def p(self) -> float | None:
        """Of Student's paired test, both sides; None with fewer than two seeds."""
        count = len(self.differences)
        if count < 2:
            return None
        error = statistics.stdev(self.differences) / math.sqrt(count)
        if error == 0:
            return 0.0 if self.mean else 1.0
        return student(self.mean / error, count - 1)

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `no difference` of the first; `one seed` is no verdict."""
        if self.p is None:
            return "one seed" if self.differences else "not run"
        if self.p >= SIGNIFICANCE:
            return "no difference"
        return "better" if self.mean < 0 else "worse"


def student(t: float, degrees: int) -> float:
    """Probability of |T| >= |t| under Student's distribution.

    With t = sqrt(n) tan(a) its density is proportional to cos(a)^(n-1) over -pi/2 < a < pi/2.
    """
    steps = 2000
    edge = math.atan(abs(t) / math.sqrt(degrees))

    def area(low: float, high: float) -> float:  # by Simpson's rule
        width = (high - low) / steps
        weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
        return (
            math.fsum(
                weight * max(0.0, math.cos(low + i * width)) ** (degrees - 1)
                for i, weight in enumerate(weights)
            )
            * width
            / 3
        )

    return min(1.0, area(edge, math.pi / 2) / area(0, math.pi / 2))


def spread(values: list[float]) -> float | None:
    """Standard deviation over seeds; None of one."""
    return statistics.stdev(values) if len(values) > 1 else None
