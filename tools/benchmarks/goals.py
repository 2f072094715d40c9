"""What the measurements are held against; the paper's best figures where it has one."""

from collections.abc import Iterable
from dataclasses import dataclass

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
        link = {row.contender: row for row in rows if row.share == share}
        positions = [row for name, row in link.items() if name in POSITIONS]
        if share in PAPER and positions:
            goals += _paper(share, positions)
        goals += _fits(share, positions)
        goals += _against_shared(share, positions, link)
        goals += _adaptive(share, positions, link)
    return goals


def _paper(share: float, positions: list[TurnsRow]) -> Iterable[Goal]:
    for kind, wanted in zip(("training", "inference"), PAPER[share], strict=True):
        speeds = {
            row.contender: (row.speed if kind == "training" else row.inference_speed).median
            for row in positions
        }
        best = max(speeds, key=lambda name: speeds[name])
        yield Goal(
            f"{share:.0%}: {kind} {wanted:.2f} times as fast as top-2",
            f"{speeds[best]:.2f} ({best})",
            speeds[best] >= wanted,
        )


def _fits(share: float, positions: list[TurnsRow]) -> Iterable[Goal]:
    if share > FITTING_SHARE:
        return
    for row in positions:
        if row.hidden is not None:
            yield Goal(
                f"{share:.0%}: {row.contender} hides {MIN_HIDDEN:.0%}",
                f"{row.hidden:.1%}",
                row.hidden >= MIN_HIDDEN,
            )
        over = row.layers_unlimited.median
        yield Goal(
            f"{share:.0%}: {row.contender}, forward and backward at most {MAX_UNLIMITED} of "
            "the unlimited link",
            f"{over:.3f}",
            over <= MAX_UNLIMITED,
        )


def _against_shared(
    share: float, positions: list[TurnsRow], link: dict[str, TurnsRow]
) -> Iterable[Goal]:
    if "shared" not in link:
        return
    for row in positions:
        ratio = row.speed.median / link["shared"].speed.median
        yield Goal(
            f"{share:.0%}: {row.contender} not slower than stock top-1 + shared expert",
            f"{ratio:.3f}",
            ratio >= 1,
        )


def _adaptive(share: float, positions: list[TurnsRow], link: dict[str, TurnsRow]) -> Iterable[Goal]:
    for row in positions:
        fixed = {
            name: other.speed.median
            for name, other in link.items()
            if name.startswith(f"{row.contender}/slot")
        }
        if fixed:
            best = max(fixed, key=lambda name: fixed[name])
            ratio = fixed[best] / row.speed.median
            yield Goal(
                f"{share:.0%}: {row.contender} takes at most {MAX_ADAPTIVE} of its best fixed slot",
                f"{ratio:.3f} ({best})",
                ratio <= MAX_ADAPTIVE,
            )
