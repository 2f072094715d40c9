"""What a check found: how bad it is, what was seen, what to do."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from megatron_scmoe.words import numbers

Severity = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """The answer of one check, in one line."""

    severity: Severity
    seen: str
    remedy: str = ""

    @property
    def line(self) -> str:
        return f"{self.seen}: {self.remedy}" if self.remedy else self.seen


class RankOfHost(NamedTuple):
    """Where a finding was made."""

    rank: int
    host: str


def merge(found: Sequence[tuple[RankOfHost, list[Finding]]]) -> list[tuple[Finding, str]]:
    """Findings of all ranks, each once, with where it was made; nothing where all agree.

    Args:
        found: by rank.
    """
    places: defaultdict[Finding, list[RankOfHost]] = defaultdict(list)
    for place, findings in found:
        for finding in dict.fromkeys(findings):
            places[finding].append(place)
    everywhere = len(found)
    return [(f, "" if len(where) == everywhere else _name(where)) for f, where in places.items()]


def _name(places: list[RankOfHost]) -> str:
    """'node1: ranks 8, 9; node2: rank 16'."""
    by_host: defaultdict[str, list[int]] = defaultdict(list)
    for place in places:
        by_host[place.host].append(place.rank)
    return "; ".join(f"{host}: {name_ranks(ranks)}" for host, ranks in by_host.items())


def name_ranks(ranks: Sequence[int]) -> str:
    """'rank 3', 'ranks 0-7', 'ranks 0, 2, 4-6': runs of neighbours are joined."""
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers(ranks)}"
