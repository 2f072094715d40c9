"""From measured steps to the numbers of the table: medians, spreads, ratios, goals."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tools.benchmarks.contenders import Contender
from tools.benchmarks.job import Job
from tools.benchmarks.network import TwoHosts
from tools.benchmarks.step_log import TrainingStep


@dataclass(frozen=True)
class TimedTurn:
    """A few steps of a contender that ran one after the other; seconds, one entry a step."""

    contender: str
    share: float
    """Wanted communication share of the top-2 MoE layer, which names the link."""
    limited: bool
    """Whether the link had its limit: otherwise the same run without it, right behind."""
    repetition: int
    train: list[float]
    """Whole training steps."""
    layers: list[float]
    """Their forward and backward, without the reduction of the gradients."""
    inference: list[float]
    """Forward-only passes."""
    exchange: list[float]
    """Time of all-to-alls in flight; empty for stock contenders, whose all-to-alls block."""
    exposed: list[float]
    """The part of it for which compute stood still."""
    slots: str | None = None
    """Where the experts ran, forward and backward."""

    @classmethod
    def of(
        cls, contender: str, share: float, limited: bool, repetition: int, steps: list[TrainingStep]
    ) -> "TimedTurn":
        return cls(
            contender,
            share,
            limited,
            repetition,
            train=[step.train for step in steps],
            layers=[step.layers for step in steps],
            inference=[step.inference for step in steps],
            exchange=[step.exchange for step in steps if step.exchange is not None],
            exposed=[step.exposed for step in steps if step.exposed is not None],
            slots=steps[-1].slots,
        )


@dataclass(frozen=True)
class Ratio:
    """Median over repetitions, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Ratio":
        low, median, high = quartiles(list(values))
        return cls(median, low, high)


@dataclass(frozen=True)
class TurnsRow:
    """One contender on one link."""

    contender: str
    share: float
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
    unlimited: Ratio
    """Training step over that of the same run without a limit on the link."""
    layers_unlimited: Ratio
    inference_unlimited: Ratio
    hidden: float | None
    """Share of the all-to-alls' time that compute did not wait for."""
    slots: str | None
    """Where the experts ran, forward and backward."""


def take_turns(
    hosts: TwoHosts,
    jobs: Sequence[tuple[Contender, Job]],
    link: tuple[float, float | None],
    repetitions: int,
    steps: int,
) -> Iterator[tuple[TimedTurn, TrainingStep]]:
    """Let jobs that stand still go on, one at a time, with the link's limit and without.

    Args:
        link: the share that names it and its rate, in bits per second.
        steps: counted ones of a turn; each is preceded by one that is not.

    Yields:
        every turn, and its last step.
    """
    share, rate = link
    for repetition in range(repetitions):
        # There and back, so that a drift favours nobody.
        for row, job in jobs if repetition % 2 == 0 else reversed(jobs):
            job.resume()
            for limited in (True, False):
                hosts.limit(rate if limited else None)
                job.take(1)  # stood still, or the link changed meanwhile
                taken = job.take(steps)
                yield TimedTurn.of(row.name, share, limited, repetition, taken), taken[-1]
            job.pause()
            hosts.limit(rate)
        print(f"  {repetition + 1}/{repetitions}", flush=True)


def summarize(turns: list[TimedTurn], rows: list[Contender]) -> list[TurnsRow]:
    """Link by link, contenders in the order of the table.

    Ratios are taken between turns of the same repetition, which ran shortly after one another.
    """
    by_key = {(one.contender, one.share, one.limited, one.repetition): one for one in turns}
    repetitions = sorted({one.repetition for one in turns})

    def ratio(over: tuple[str, float, bool], under: tuple[str, float, bool], steps: str) -> Ratio:
        return Ratio.of(
            statistics.median(getattr(by_key[(*over, repetition)], steps))
            / statistics.median(getattr(by_key[(*under, repetition)], steps))
            for repetition in repetitions
        )

    table = []
    for share in dict.fromkeys(one.share for one in turns):
        for contender in rows:
            here = (contender.name, share, True)
            base, lifted = (contender.baseline, share, True), (contender.name, share, False)
            mine = [by_key[(*here, repetition)] for repetition in repetitions]
            all_steps = [second for one in mine for second in one.train]
            table.append(
                TurnsRow(
                    contender=contender.name,
                    share=share,
                    baseline=contender.baseline,
                    train=statistics.median(all_steps),
                    spread=spread(all_steps),
                    inference=statistics.median(s for one in mine for s in one.inference),
                    speed=ratio(base, here, "train"),
                    layers_speed=ratio(base, here, "layers"),
                    inference_speed=ratio(base, here, "inference"),
                    unlimited=ratio(here, lifted, "train"),
                    layers_unlimited=ratio(here, lifted, "layers"),
                    inference_unlimited=ratio(here, lifted, "inference"),
                    hidden=hidden_share(mine),
                    slots=mine[-1].slots,
                )
            )
    return table


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of a single value three times itself."""
    if len(values) < 2:
        values = values * 2
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def spread(values: list[float]) -> float:
    """Distance of the quartiles over the median."""
    low, median, high = quartiles(values)
    return (high - low) / median


def hidden_share(turns: list[TimedTurn]) -> float | None:
    """1 - exposed / in flight over all measured steps; None where nothing was reported."""
    exchange = math.fsum(second for one in turns for second in one.exchange)
    exposed = math.fsum(second for one in turns for second in one.exposed)
    return 1 - exposed / exchange if exchange else None
