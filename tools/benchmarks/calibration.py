"""Find the link rate at which communication is a wanted share of the top-2 MoE layer's time.

With rate r the layer takes  C(r) + K  seconds, of which C(r) in its all-to-alls:

    share(r) = C(r) / (C(r) + K)        C(r) = A + B / r

B is the amount of data, A what an exchange costs on a link without limit, K all other work. The
search measures, fits A and B through its two last measurements, and tries the rate at which the
line meets the wanted time.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from tools.benchmarks.network import BenchmarkError

MAX_MEASUREMENTS = 5


@dataclass(frozen=True)
class LayerTime:
    """Where the top-2 MoE layer's time goes, in seconds of one iteration."""

    rate: float | None
    """Bits per second and direction; None without a limit."""
    exchange: float
    """C: in all-to-alls, forward and backward."""
    other: float
    """K: everything else in the layer."""
    inference_share: float
    """The share in the forward-only pass."""

    @property
    def share(self) -> float:
        return self.exchange / (self.exchange + self.other)

    def as_dict(self) -> dict[str, float | None]:
        return {**asdict(self), "share": self.share}


def find_rate(
    measure: Callable[[float], LayerTime],
    wanted: float,
    unlimited: LayerTime,
    first_rate: float,
    tolerance: float,
) -> LayerTime:
    """Search, and return the measurement that is nearest to the wanted share.

    Args:
        measure: the layer's time at a rate, in bits per second.
        wanted: the share, between 0 and 1.
        unlimited: measured without a limit, the lowest share that there is.
        first_rate: where to begin.
        tolerance: a share this near ends the search.

    Raises:
        BenchmarkError: without a limit the share is already larger.
    """
    if not 0 < wanted < 1:
        raise BenchmarkError(f"a share of {wanted:.0%} is not between 0 % and 100 %.")
    if unlimited.share > wanted + tolerance:
        raise BenchmarkError(
            f"communication is {unlimited.share:.0%} of the MoE layer's time without any limit, "
            f"more than the wanted {wanted:.0%}: use larger sizes."
        )
    measured = [measure(first_rate)]
    while abs(measured[-1].share - wanted) > tolerance and len(measured) < MAX_MEASUREMENTS:
        measured.append(measure(next_rate(wanted, [unlimited, *measured])))
    return min(measured, key=lambda time: abs(time.share - wanted))


def next_rate(wanted: float, measured: list[LayerTime]) -> float:
    """The rate at which the line through the two last measurements has the wanted share."""
    before, last = measured[-2:]
    goal = last.other * wanted / (1 - wanted)
    slope = (last.exchange - before.exchange) / (_inverse(last) - _inverse(before))
    if slope <= 0:
        # Noise: fall back on time being proportional to 1 / rate.
        slope = last.exchange / _inverse(last)
    inverse = _inverse(last) + (goal - last.exchange) / slope
    # Never further than a factor of four: a line through noise may point anywhere.
    nearest, furthest = _inverse(last) / 4, _inverse(last) * 4
    return 1 / min(max(inverse, nearest), furthest)


def _inverse(time: LayerTime) -> float:
    return 0.0 if time.rate is None else 1 / time.rate
