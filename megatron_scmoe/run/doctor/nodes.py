"""What the nodes of a job differ in, from what every rank said of itself at one moment."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_scmoe.run.doctor.findings import Finding, RankOfHost

CLOCKS_APART_S = 2.0
"""Far more than the ranks of a job need to leave a barrier."""


class Node(NamedTuple):
    """What a rank said when it had left a barrier."""

    place: RankOfHost
    versions: str
    clock: float
    """Seconds since 1970."""


def judge(ranks: Sequence[Node]) -> Iterator[Finding]:
    """Versions and clocks of several hosts; nothing of one."""
    first = {rank.place.host: rank for rank in reversed(ranks)}
    if len(first) == 1:
        return
    if len({node.versions for node in first.values()}) > 1:
        told = "; ".join(f"{host}: {node.versions}" for host, node in sorted(first.items()))
        yield Finding(
            "warning", f"the nodes run different versions, {told}", "install the same everywhere"
        )
    early = min(first.values(), key=lambda node: node.clock)
    late = max(first.values(), key=lambda node: node.clock)
    apart = late.clock - early.clock
    if apart > CLOCKS_APART_S:
        yield Finding(
            "warning",
            f"the clock of {late.place.host} is {apart:.1f} s ahead of that of {early.place.host}, "
            "so logs and checkpoints of nodes cannot be put in order",
            "start chrony or ntpd on both",
        )
    else:
        yield Finding("ok", f"{len(first)} nodes, clocks at most {apart:.1f} s apart")
