"""What the measurements are held against; the paper's best figures where it has one."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from megatron_scmoe.overlap.schedule import POSITIONS
from tools.benchmarks.turns import TurnsRow

# Communication share of the top-2 MoE layer: training and inference speed against top-2, best
# position (arXiv:2404.05019v3, table 1, Pos-3; table 2, LLaMA2-MoE).
PAPER = {0.60: (1.49, 1.82), 0.15: (1.14, 1.21)}
FITTING_SHARE = 0.50
"""Up to here the paper finds all communication hidden (section 4.2.2)."""
MIN_HIDDEN = 0.97
MAX_UNLIMITED = 1.03
MAX_ADAPTIVE = 1.02


@dataclass(frozen=True)
class Goal:
    """One claim and what was measured."""

    claim: str
    measured: str
    reached: bool


def judge(rows: list[TurnsRow]) -> list[Goal]:
    """All claims that these rows can answer."""
    goals: list[Goal] = []
    for share in dict.fromkeys(row.share for row in rows):
        goals += _of_link(share, [row for row in rows if row.share == share])
    return goals


def _of_link(share: float, rows: list[TurnsRow]) -> Iterator[Goal]:
    link = {row.contender: row for row in rows}
    positions = [row for row in rows if row.contender in POSITIONS]
    at = f"{share:.0%}:"
    if share in PAPER and positions:
        training, inference = PAPER[share]
        for what, speed, wanted in (
            ("training", attrgetter("speed.median"), training),
            ("inference", attrgetter("inference_speed.median"), inference),
        ):
            best = max(positions, key=speed)
            claim = f"{at} {what} {wanted:.2f} times as fast as top-2"
            yield Goal(claim, f"{speed(best):.2f} ({best.contender})", speed(best) >= wanted)
    for row in positions:
        name = row.contender
        if share <= FITTING_SHARE and row.hidden is not None:
            reached = row.hidden >= MIN_HIDDEN
            yield Goal(f"{at} {name} hides {MIN_HIDDEN:.0%}", f"{row.hidden:.1%}", reached)
        if share <= FITTING_SHARE:
            over = row.layers_unlimited.median
            claim = f"forward and backward at most {MAX_UNLIMITED} of the unlimited link"
            yield Goal(f"{at} {name}, {claim}", f"{over:.3f}", over <= MAX_UNLIMITED)
    for row in positions if "shared" in link else ():
        ratio = row.speed.median / link["shared"].speed.median
        claim = f"{at} {row.contender} not slower than stock top-1 + shared expert"
        yield Goal(claim, f"{ratio:.3f}", ratio >= 1)
    for row in positions:
        fixed = [other for other in rows if other.contender.startswith(f"{row.contender}/slot")]
        if fixed:
            best = max(fixed, key=attrgetter("speed.median"))
            ratio = best.speed.median / row.speed.median
            claim = f"takes at most {MAX_ADAPTIVE} of its best fixed slot"
            measured = f"{ratio:.3f} ({best.contender})"
            yield Goal(f"{at} {row.contender} {claim}", measured, ratio <= MAX_ADAPTIVE)
