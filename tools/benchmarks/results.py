"""From measured steps to the numbers of the table: medians, spreads, ratios, goals."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tools.benchmarks.contenders import Contender

UNLIMITED = None
"""The share of a link without a limit."""


@dataclass(frozen=True)
class Launch:
    """The measured steps of one launch of a contender; times in seconds, one entry a step."""

    contender: str
    share: float | None
    """Wanted communication share of the top-2 MoE layer, which names the link; or UNLIMITED."""
    repetition: int
    train: list[float]
    """Whole training steps."""
    layers: list[float]
    """Their forward and backward, without the reduction of the gradients."""
    inference: list[float]
    """Forward-only passes."""
    exchange: list[float] = field(default_factory=list)
    """Time of all-to-alls in flight; empty for stock contenders, whose all-to-alls block."""
    exposed: list[float] = field(default_factory=list)
    """The part of it for which compute stood still."""


@dataclass(frozen=True)
class Ratio:
    """Median over repetitions, and the range of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Ratio":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One contender on one link."""

    contender: str
    share: float | None
    baseline: str
    train: float
    """Median training step, seconds."""
    spread: float
    """Distance of its quartiles over its median."""
    inference: float
    speed: Ratio
    """Of training, against the baseline on this link."""
    layers_speed: Ratio
    inference_speed: Ratio
    unlimited: Ratio | None
    """Training step over the same contender's on the unlimited link."""
    layers_unlimited: Ratio | None
    inference_unlimited: Ratio | None
    hidden: float | None
    """Share of the all-to-alls' time that compute did not wait for."""


def summarize(launches: list[Launch], rows: list[Contender]) -> list[Row]:
    """Link by link, contenders in the order of the table.

    Ratios are taken between launches of the same repetition, which ran shortly after one another.
    """
    by_key = {(one.contender, one.share, one.repetition): one for one in launches}
    shares = list(dict.fromkeys(one.share for one in launches))
    repetitions = sorted({one.repetition for one in launches})
    baselines = {row.name: row.baseline for row in rows}

    def ratio(
        over: tuple[str, float | None], under: tuple[str, float | None], steps: Callable
    ) -> Ratio:
        return Ratio.of(
            statistics.median(steps(by_key[(*over, repetition)]))
            / statistics.median(steps(by_key[(*under, repetition)]))
            for repetition in repetitions
        )

    table = []
    for share in shares:
        for name, baseline in baselines.items():
            mine = [by_key[name, share, repetition] for repetition in repetitions]
            here, base = (name, share), (baseline, share)
            kinds = {"train": train, "layers": layers, "inference": inference}
            speed = {kind: ratio(base, here, steps) for kind, steps in kinds.items()}
            against: dict[str, Ratio | None] = dict.fromkeys(kinds)
            if UNLIMITED in shares and share is not UNLIMITED:
                against |= {
                    kind: ratio(here, (name, UNLIMITED), steps) for kind, steps in kinds.items()
                }
            all_steps = [second for one in mine for second in one.train]
            table.append(
                Row(
                    contender=name,
                    share=share,
                    baseline=baseline,
                    train=statistics.median(all_steps),
                    spread=spread(all_steps),
                    inference=statistics.median(s for one in mine for s in one.inference),
                    speed=speed["train"],
                    layers_speed=speed["layers"],
                    inference_speed=speed["inference"],
                    unlimited=against["train"],
                    layers_unlimited=against["layers"],
                    inference_unlimited=against["inference"],
                    hidden=hidden_share(mine),
                )
            )
    return table


def train(launch: Launch) -> list[float]:
    return launch.train


def layers(launch: Launch) -> list[float]:
    return launch.layers


def inference(launch: Launch) -> list[float]:
    return launch.inference


def spread(values: list[float]) -> float:
    """Distance of the quartiles over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / median


def hidden_share(launches: list[Launch]) -> float | None:
    """1 - exposed / in flight over all measured steps; None where nothing was reported."""
    exchange = math.fsum(second for one in launches for second in one.exchange)
    exposed = math.fsum(second for one in launches for second in one.exposed)
    return 1 - exposed / exchange if exchange else None
