"""What the records of a run say about its overlap: the report's numbers, in seconds and bytes.

in flight   from the start of an exchange to its completion
exposed     the part of it for which compute stood still in the wait
hidden      the rest
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import batched
from statistics import fmean, median
from typing import NamedTuple

from megatron_scmoe.commands.trace_report.traces import TracedPass, TracedRun, TraceError, UnitPlace
from megatron_scmoe.overlap.measure.adaptive import DIRECTIONS, unit_times
from megatron_scmoe.overlap.measure.cost import (
    RoutedTimes,
    SlotCost,
    UnitTimes,
    best_slots,
    data_parallel_bytes,
    slot_seconds_of_routes,
)
from megatron_scmoe.overlap.measure.trace import EXCHANGES
from megatron_scmoe.overlap.recorder import Direction, Exchange, Span
from megatron_scmoe.overlap.schedule import Step, window


class Communication(NamedTuple):
    """Exchanges, summed."""

    in_flight: float
    exposed: float

    @property
    def hidden(self) -> float:
        """Of the time in flight, what is not exposed."""
        return self.in_flight - self.exposed

    @property
    def hidden_share(self) -> float:
        return self.hidden / self.in_flight if self.in_flight else 0.0


def communication(exchanges: Iterable[Exchange], divisor: int = 1) -> Communication:
    """The sum over exchanges, divided."""
    listed = list(exchanges)
    return Communication(
        sum(x.end - x.begin for x in listed) / divisor, sum(x.blocked for x in listed) / divisor
    )


@dataclass(frozen=True)
class LinkSpeed:
    """Bytes/s of one exchange in one direction, over all that sent something.

    Attributes:
        size: bytes that a rank sent to others in an exchange, median.
        least, median, most: of bytes / time in flight.
        together: the same from the moment when the last rank had started, median; what the link
            gave without the wait for a late rank. None where no group was seen whole.
    """

    size: float
    least: float
    median: float
    most: float
    together: float | None


@dataclass(frozen=True)
class RankFigures:
    """One rank, mean over iterations.

    Attributes:
        compute: dense operators of the window and routed experts, forward and backward.
        experts: the routed experts' part of it.
        late: from the first start of an exchange in the group to this rank's start, mean.
        last: share of the exchanges that this rank started last.
    """

    communication: Communication
    compute: float
    experts: float
    late: float
    last: float


@dataclass(frozen=True)
class DirectionFigures:
    """One direction of a unit, mean over ranks and layers, median over iterations.

    Attributes:
        slot: where the experts ran.
        best: the slot with the least predicted time.
        times: of the parts, what the formula is applied to.
        costs: predicted, of every slot; with further routes, theirs at the best ones.
        measured: a pass from the first exchange's start until all is done.
        exposed: of it, what a pass stood still for.
        launching: of a pass, the step that starts the dispatch; forward it waits for all ranks'
            numbers of rows.
    """

    slot: int
    best: int
    times: UnitTimes
    costs: tuple[SlotCost, ...]
    measured: float
    exposed: float
    launching: float


@dataclass(frozen=True)
class DataParallel:
    """What data parallelism sends beside the exchanges, in an iteration, from one rank.

    Attributes:
        sent: bytes, of gradients and gathered parameters.
        shared: of them, those of the shared experts.
        speed: bytes/s, the median of the exchanges' medians; None where nothing was exchanged.
    """

    sent: float
    shared: float
    speed: float | None


@dataclass(frozen=True)
class Traffic:
    """What a rank sends, an iteration, mean over ranks and iterations.

    Attributes:
        sent: bytes, to other ranks.
        between_nodes: the part of them that left its node.
        copies: rows made of a token, mean; None where no trace says it.
        load: rows of the busiest rank's experts / mean; None where no trace says it.
    """

    sent: float
    between_nodes: float
    copies: float | None
    load: float | None


@dataclass(frozen=True)
class Figures:
    """Everything that the report shows.

    Attributes:
        total: an iteration, mean over ranks and iterations.
        layers: the same of one layer's exchange in one direction.
        links: None where nothing was sent.
        example: forward and backward of one unit, the one nearest to the medians of all.
    """

    total: Communication
    layers: dict[tuple[int, Direction, str], Communication]
    ranks: dict[int, RankFigures]
    directions: dict[Direction, DirectionFigures]
    links: dict[tuple[Direction, str], LinkSpeed | None]
    example: dict[Direction, TracedPass]
    data_parallel: DataParallel
    traffic: Traffic


def analyse(run: TracedRun, rank: int | None = None) -> Figures:
    """All figures.

    Args:
        rank: whose unit is the example; None for any.

    Raises:
        TraceError: the rank left no trace, or a direction no whole pass.
    """
    if rank is not None and rank not in run.ranks:
        raise TraceError(f"--rank {rank} is not in the traces; there are {list(run.ranks)}")
    samples = len(run.ranks) * len(run.iterations)
    exchanges = [
        (one.place.layer, one.direction, exchange)
        for one in run.passes
        for exchange in one.exchanges
    ]
    by_layer = defaultdict(list)
    for layer, direction, exchange in exchanges:
        by_layer[layer, direction, exchange.activity.name].append(exchange)
    # A pipeline stage has some of the layers only: their mean is over the ranks that have them.
    holders = {
        layer: len({(p.rank, p.iteration) for p in run.records if p.layer == layer})
        for layer in run.layers
    }
    starts = _starts(run)
    links = {
        (direction, name): _link(run, direction, name, starts)
        for direction in DIRECTIONS
        for name in EXCHANGES
    }
    return Figures(
        total=communication((exchange for *_, exchange in exchanges), samples),
        layers={
            key: communication(by_layer[key], holders[key[0]])
            for key in sorted(by_layer, key=_layer_order)
        },
        ranks={rank: _rank_figures(run, rank, starts) for rank in run.ranks},
        directions={direction: _direction_figures(run, direction) for direction in DIRECTIONS},
        links=links,
        example=_example(run, rank),
        data_parallel=_data_parallel(run, [link for link in links.values() if link is not None]),
        traffic=_traffic(run, [exchange for *_, exchange in exchanges], samples),
    )


def _traffic(run: TracedRun, exchanges: list[Exchange], samples: int) -> Traffic:
    loads = []
    for group in set(run.groups.values()):
        rows = [run.rows[rank] for rank in group if rank in run.rows]
        if any(rows):
            loads.append(max(rows) / fmean(rows))
    return Traffic(
        sent=sum(exchange.bytes for exchange in exchanges) / samples,
        between_nodes=sum(exchange.bytes_between_nodes for exchange in exchanges) / samples,
        copies=run.copies,
        load=fmean(loads) if loads else None,
    )


def _data_parallel(run: TracedRun, links: list[LinkSpeed]) -> DataParallel:
    facts, own = run.facts, run.parameters
    stage = facts["world_size"] // facts["pipeline_model_parallel_size"]
    expert_ranks = facts["expert_model_parallel_size"] * facts["expert_tensor_parallel_size"]
    gathered = own["parameter_bytes"] if facts["use_distributed_optimizer"] else None

    def sent(kind: str, model_ranks: int) -> float:
        ranks = max(stage // model_ranks, 1)
        return data_parallel_bytes(own[kind], ranks, own["gradient_bytes"], gathered)

    dense, shared = (
        sent(kind, facts["tensor_model_parallel_size"])
        for kind in ("dense_parameters", "shared_expert_parameters")
    )
    return DataParallel(
        sent=dense + sent("expert_parameters", expert_ranks),
        shared=shared,
        speed=median(link.median for link in links) if links else None,
    )


def _layer_order(key: tuple[int, Direction, str]) -> tuple[int, int, int]:
    layer, direction, name = key
    order = EXCHANGES.index(name)
    return layer, DIRECTIONS.index(direction), order if direction == "forward" else -order


# Starts of the same exchange on the ranks of a group. ---------------------------------------------

_Key = tuple[tuple[int, ...], int, int, object]


def _key(run: TracedRun, place: UnitPlace, exchange: Exchange) -> _Key:
    return run.groups[place.rank], place.iteration, place.layer, exchange.activity


def _starts(run: TracedRun) -> dict[_Key, dict[int, float]]:
    """By exchange: when each rank started it; only what all ranks of the group have on record."""
    starts: dict[_Key, dict[int, float]] = defaultdict(dict)
    for one in run.passes:
        for exchange in one.exchanges:
            starts[_key(run, one.place, exchange)][one.place.rank] = exchange.begin
    return {key: ranks for key, ranks in starts.items() if len(ranks) == len(key[0]) > 1}


def _rank_figures(run: TracedRun, rank: int, starts: dict[_Key, dict[int, float]]) -> RankFigures:
    own = [one for one in run.passes if one.place.rank == rank]
    iterations = len(run.iterations)
    dense = {step.value for step in window(run.position)}
    steps = [span for one in own for span in one.steps]

    def seconds(names: set[str]) -> float:
        return sum(s.end - s.begin for s in steps if s.activity.name in names) / iterations

    groups = [ranks for ranks in starts.values() if rank in ranks]
    late = [ranks[rank] - min(ranks.values()) for ranks in groups]
    last = [ranks[rank] == max(ranks.values()) for ranks in groups]
    experts = seconds({Step.EXPERTS.value})
    return RankFigures(
        communication=communication((x for one in own for x in one.exchanges), iterations),
        compute=seconds(dense) + experts,
        experts=experts,
        late=fmean(late) if late else 0.0,
        last=fmean(last) if last else 0.0,
    )


def _link(
    run: TracedRun, direction: Direction, name: str, starts: dict[_Key, dict[int, float]]
) -> LinkSpeed | None:
    sizes, speeds, together = [], [], []
    for one in run.passes:
        for exchange in one.exchanges:
            if exchange.activity[:2] != (name, direction) or not exchange.bytes:
                continue
            seconds = exchange.end - exchange.begin
            if seconds <= 0:
                continue
            sizes.append(exchange.bytes)
            speeds.append(exchange.bytes / seconds)
            ranks = starts.get(_key(run, one.place, exchange))
            # A rank to which the last one sends nothing may be done before that one starts.
            if ranks and exchange.end > max(ranks.values()):
                together.append(exchange.bytes / (exchange.end - max(ranks.values())))
    if not speeds:
        return None
    return LinkSpeed(
        size=median(sizes),
        least=min(speeds),
        median=median(speeds),
        most=max(speeds),
        together=median(together) if together else None,
    )


# One direction of a unit. -----------------------------------------------------------------------


def _direction_figures(run: TracedRun, direction: Direction) -> DirectionFigures:
    """Figures averaged as a run does to choose its slots (overlap/measure/adaptive.py).

    Raises:
        TraceError: a record or a pass is not whole.
    """
    passes = defaultdict(list)
    for one in run.passes:
        if one.direction == direction:
            passes[one.place].append(one)
    samples: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
    for place, record in run.records.items():
        try:
            times = unit_times(record, direction, run.position, 1 + len(run.further))
            own = passes[place]
            if not (own and all(_dense_or_experts(one, run.position) for one in own)):
                raise ValueError(f"not every {direction} pass is whole")
        except ValueError as error:
            raise TraceError(
                f"rank {place.rank}, layer {place.layer}, iteration {place.iteration}: {error}"
            ) from error
        measured = [
            fmean(_measured(one, run.position) for one in own),
            communication(x for one in own for x in one.exchanges).exposed / len(own),
            fmean(_seconds(one, Step.START_DISPATCH) for one in own),
        ]
        parts = [*times.dense, *(seconds for route in times.routes for seconds in route)]
        samples[place.rank, place.iteration].append([*parts, *measured])
    over_units = {
        key: [fmean(column) for column in zip(*rows, strict=True)] for key, rows in samples.items()
    }
    over_iterations = [
        [
            median(column)
            for column in zip(
                *(row for key, row in over_units.items() if key[0] == rank), strict=True
            )
        ]
        for rank in run.ranks
    ]
    mean = [fmean(column) for column in zip(*over_iterations, strict=True)]
    *parts, measured_seconds, exposed, launching = mean
    operators = len(window(run.position))
    routes = batched(parts[operators:], len(RoutedTimes._fields))
    first, *further = (RoutedTimes(*route) for route in routes)
    unit = UnitTimes(tuple(parts[:operators]), *first, tuple(further))
    return DirectionFigures(
        slot=getattr(run.slots, direction),
        best=best_slots(unit, run.position, run.further, direction)[0],
        times=unit,
        costs=tuple(
            slot_seconds_of_routes(unit, slot, run.position, run.further, direction)
            for slot in range(operators + 1)
        ),
        measured=measured_seconds,
        exposed=exposed,
        launching=launching,
    )


def _seconds(one: TracedPass, step: Step) -> float:
    return sum(span.end - span.begin for span in one.steps if span.activity.name == step.value)


def _dense_or_experts(one: TracedPass, position: str) -> list[Span]:
    names = {step.value for step in (*window(position), Step.EXPERTS)}
    return [span for span in one.steps if span.activity.name in names]


def _measured(one: TracedPass, position: str) -> float:
    """What the formula predicts: dense work of the window, experts and exchanges."""
    ends = [span.end for span in _dense_or_experts(one, position)]
    begin = min(exchange.begin for exchange in one.exchanges)
    return max(*ends, *(exchange.end for exchange in one.exchanges)) - begin


def _example(run: TracedRun, rank: int | None) -> dict[Direction, TracedPass]:
    """The unit nearest to the medians of time and of exposed time, in both directions.

    Raises:
        TraceError: no unit has both directions.
    """
    pairs: dict[tuple[UnitPlace, int], dict[Direction, TracedPass]] = defaultdict(dict)
    for one in run.passes:
        if rank is None or one.place.rank == rank:
            pairs[one.place, one.number][one.direction] = one
    whole = [pair for pair in pairs.values() if len(pair) == len(DIRECTIONS)]
    if not whole:
        raise TraceError("no unit has both a forward and a backward pass in the traces")
    exposed = {one: communication(one.exchanges).exposed for pair in whole for one in pair.values()}
    typical = {
        direction: (
            median(pair[direction].end - pair[direction].begin for pair in whole),
            median(exposed[pair[direction]] for pair in whole),
        )
        for direction in DIRECTIONS
    }

    def distance(pair: dict[Direction, TracedPass]) -> float:
        return sum(
            (abs(one.end - one.begin - seconds) + abs(exposed[one] - blocked)) / seconds
            for one, (seconds, blocked) in ((pair[d], typical[d]) for d in DIRECTIONS)
        )

    return min(whole, key=distance)
