"""The traces of a run (--scmoe-trace-dir) as the records that they were written from.

Times are seconds since the first event of the run.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any, NamedTuple

from megatron_scmoe.overlap.measure.trace import (
    EXCHANGES,
    TRACED_LAYOUT,
    TRACED_OPTIONS,
    TRACED_PARAMETERS,
)
from megatron_scmoe.overlap.recorder import Activity, Direction, Exchange, Span, UnitRecord
from megatron_scmoe.overlap.schedule import PAIR, TAPS, Route, Slots, Step, window
from megatron_scmoe.words import read_json

# What ranks of one run may differ in.
OF_ITERATIONS = ("copies_per_token", "expert_rows")
OF_ONE_RANK = ("expert_parallel_ranks", "expert_slots", *OF_ITERATIONS, *TRACED_PARAMETERS)
MODEL_PARALLEL = ("tensor_model", "pipeline_model", "context")
# Clocks of machines differ by less; two runs into one folder are further apart.
SAME_RUN_SECONDS = 60.0


class TraceError(Exception):
    """The traces cannot be read; the message is one line for the user."""


class UnitPlace(NamedTuple):
    """Whose record it is."""

    rank: int
    iteration: int
    layer: int


class TracedPass(NamedTuple):
    """One pass of a unit on one rank, in one direction."""

    place: UnitPlace
    number: int
    """From 1, in the iteration; a backward pass has the number of its forward pass."""
    direction: Direction
    steps: tuple[Span, ...]
    exchanges: tuple[Exchange, ...]

    @property
    def begin(self) -> float:
        return min(part.begin for part in self._parts())

    @property
    def end(self) -> float:
        return max(part.end for part in self._parts())

    def _parts(self) -> tuple[Span | Exchange, ...]:
        return (*self.steps, *self.exchanges)


@dataclass(frozen=True)
class TracedRun:
    """What the traces of a run hold.

    Attributes:
        facts: options and layout, as megatron_scmoe/overlap/measure/each_iteration.py writes them.
        groups: the expert parallel ranks of each rank.
        slots: where the experts ran, in all iterations of the report.
        parameters: TRACED_PARAMETERS of the rank that has most.
        left_out: iterations that ran with other slots; they are not in `records`.
        records: what each unit did.
        copies: rows that an all-to-all made of a token, mean; None where no trace says it.
        rows: of the experts of each rank, in all iterations of the report.
    """

    facts: Mapping[str, Any]
    groups: Mapping[int, tuple[int, ...]]
    parameters: Mapping[str, int]
    slots: Slots
    left_out: tuple[int, ...]
    records: Mapping[UnitPlace, UnitRecord]
    copies: float | None = None
    rows: Mapping[int, float] = field(default_factory=dict)

    @property
    def position(self) -> str:
        return self.facts["scmoe_shortcut_position"]

    @property
    def num_chunks(self) -> int:
        return self.facts["scmoe_num_chunks"]

    @property
    def further(self) -> tuple[Route, ...]:
        """Routed branches beside that of the position; their slots are not in the traces."""
        return tuple(Route(tap, Slots(0, 0)) for tap in self.facts.get("further_taps", ()))

    @property
    def overlaps(self) -> bool:
        return self.facts["scmoe_overlap"]

    @property
    def num_microbatches(self) -> int:
        """Of an iteration."""
        facts = self.facts
        samples = facts["micro_batch_size"] * facts["world_size"]
        ranks_of_a_sample = math.prod(facts[f"{name}_parallel_size"] for name in MODEL_PARALLEL)
        return facts["global_batch_size"] * ranks_of_a_sample // samples

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({place.rank for place in self.records}))

    @cached_property
    def iterations(self) -> tuple[int, ...]:
        return tuple(sorted({place.iteration for place in self.records}))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({place.layer for place in self.records}))

    @cached_property
    def passes(self) -> tuple[TracedPass, ...]:
        return tuple(one for place, record in self.records.items() for one in _split(place, record))


def _split(place: UnitPlace, record: UnitRecord) -> list[TracedPass]:
    steps: dict[tuple[int, Direction], list[Span]] = defaultdict(list)
    exchanges: dict[tuple[int, Direction], list[Exchange]] = defaultdict(list)
    for span in record.steps:
        steps[span.activity.pass_number, span.activity.direction].append(span)
    for exchange in record.exchanges:
        activity = exchange.activity
        exchanges[activity.pass_number, activity.direction].append(exchange)
    return [
        TracedPass(place, number, direction, tuple(steps[number, direction]), tuple(mine))
        for (number, direction), mine in exchanges.items()
    ]


def read_run(folder: Path) -> TracedRun:
    """All rank-*.json of a folder.

    Raises:
        TraceError: there is no trace, one is broken, or they are not of one run.
    """
    paths = sorted(folder.glob("rank-*.json"))
    if not paths:
        raise TraceError(
            f"no rank-*.json in {folder}: was the run given --scmoe-trace-dir, and did it reach "
            "--profile-step-start?"
        )
    traces = {path: _load(path) for path in paths}
    first = paths[0]
    facts = _shared_facts(traces[first])
    for path in paths[1:]:
        others = _shared_facts(traces[path])
        for name in sorted(facts.keys() | others.keys()):
            if facts.get(name) != others.get(name):
                raise TraceError(
                    f"{first.name} and {path.name} are not of one run: {name} is "
                    f"{facts.get(name)} and {others.get(name)}; empty {folder} and trace again"
                )
    events = {path: _steps(trace) for path, trace in traces.items()}
    _check_times(events)
    slots, iterations, left_out = _slots(traces)
    origin = min(event["ts"] for steps in events.values() for event in steps)
    records: dict[UnitPlace, UnitRecord] = defaultdict(UnitRecord)
    groups, copies, rows = {}, [], {}
    for path, steps in events.items():
        try:
            for event in steps:
                if event["args"]["iteration"] in iterations:
                    _add(records, event, origin)
            own = traces[path]["otherData"]
            groups[steps[0]["pid"]] = tuple(own["expert_parallel_ranks"])
            rows[steps[0]["pid"]] = sum(_numbers(own, "expert_rows", iterations))
            copies += _numbers(own, "copies_per_token", iterations)
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, error) from error
    if not any(record.exchanges for record in records.values()):
        raise TraceError(
            f"the traces in {folder} hold no exchange: with one expert parallel rank nothing is "
            "sent, and there is nothing to report"
        )
    parameters = max(
        (
            {name: trace["otherData"][name] for name in TRACED_PARAMETERS}
            for trace in traces.values()
        ),
        key=lambda of_rank: of_rank["dense_parameters"],
    )
    mean = fmean(copies) if copies else None
    return TracedRun(facts, groups, parameters, slots, left_out, dict(records), mean, rows)


def _numbers(facts: dict[str, Any], name: str, iterations: set[int]) -> list[float]:
    """What a trace says of iterations; older ones say nothing.

    Raises:
        ValueError: it is not of their kinds.
    """
    by_iteration = facts.get(name, {})
    _need({name: by_iteration}, {name: dict})
    found = [value for number, value in by_iteration.items() if int(number) in iterations]
    for value in found:
        _need({name: value}, {name: (*NUMBER, NoneType)})
    return [value for value in found if value is not None]


def _load(path: Path) -> dict[str, Any]:
    try:
        trace = read_json(path)
        _need(trace, {"otherData": dict, "traceEvents": list})
        facts = trace["otherData"]
        needed = (*TRACED_OPTIONS, *TRACED_PARAMETERS, *TRACED_LAYOUT, "expert_slots")
        _need(facts, {name: KINDS.get(name, int) for name in needed})
        sizes = [facts[name] for name in TRACED_OPTIONS if KINDS.get(name, int) is int]
        if min(sizes) < 1 or min(facts[name] for name in TRACED_PARAMETERS) < 0:
            raise ValueError("a size is not positive")
        if facts["scmoe_shortcut_position"] not in TAPS or facts["scmoe_num_chunks"] < 1:
            raise ValueError("no step of a unit")
        for rank in facts["expert_parallel_ranks"]:
            _need({"rank": rank}, {"rank": int})
        _need({"further_taps": [], **facts}, {"further_taps": list})
        first = TAPS[facts["scmoe_shortcut_position"]].tap
        if not all(tap in range(first, len(PAIR)) for tap in facts.get("further_taps", ())):
            raise ValueError("a route taps outside of the unit")
        for event in trace["traceEvents"]:
            _check_event(event)
        ranks = {event["pid"] for event in _steps(trace)}
        if len(ranks) != 1 or not ranks <= set(facts["expert_parallel_ranks"]):
            raise ValueError("no step of a unit" if not ranks else "it is not of one rank")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(path, error) from error
    return trace


Kinds = dict[str, type | tuple[type, ...]]
KINDS: Kinds = {
    "scmoe_shortcut_position": str,
    "scmoe_overlap": bool,
    "overlap_grad_reduce": bool,
    "use_distributed_optimizer": bool,
    "moe_token_dispatcher_type": str,
    "params_dtype": str,
    "backend": str,
    "expert_parallel_ranks": list,
    "compute_slow_down": (int, float, NoneType),
    "expert_slots": dict,
}
"""Of facts that are no whole numbers."""
NUMBER = (int, float)
OF_EVENT: Kinds = {"args": dict, "pid": int, "ts": NUMBER, "dur": NUMBER, "cat": str}
OF_STEP: Kinds = {"step": str, **dict.fromkeys(("iteration", "layer", "chunk", "pass"), int)}
OF_EXCHANGE: Kinds = {"blocked_us": NUMBER, "bytes": NUMBER, "bytes_between_nodes": NUMBER}
NEWER = {"route": 0, "bytes_between_nodes": 0}
"""What older traces do not have."""
STEPS = {*EXCHANGES, *(step.value for step in Step)}


def _need(fields: dict[str, Any], kinds: Kinds) -> None:
    """Refuse fields that are not there or not of their kinds.

    Raises:
        KeyError: a field is missing.
        ValueError: a field is of another kind.
    """
    for name, kind in kinds.items():
        value = fields[name]
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ValueError(f"'{name}' is {value!r:.40}")


def _check_event(event: Any) -> None:
    if not isinstance(event, dict):
        raise ValueError(f"an event is {event!r:.40}")
    _need(event, {"ph": str})
    if event["ph"] != "X":
        return
    _need(event, OF_EVENT)
    args = NEWER | event["args"]
    _need(args, {**OF_STEP, "route": int})
    if args["step"] in EXCHANGES:
        _need(args, OF_EXCHANGE)
    if args["step"] not in STEPS:
        raise ValueError(f"'step' is {args['step']!r:.40}")
    if event["cat"] not in ("forward", "backward"):
        raise ValueError(f"'cat' is {event['cat']!r:.40}")
    if args["pass"] < 1 or args["chunk"] < 0:
        raise ValueError(f"'pass' is {args['pass']} and 'chunk' {args['chunk']}")
    if event["dur"] < 0 or min(args.get("blocked_us", 0), args.get("bytes", 0)) < 0:
        raise ValueError("an event takes less than no time, or sends less than nothing")


def _broken(path: Path, error: Exception) -> TraceError:
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return TraceError(f"{path} is no trace that this version has written: {reason}")


def _steps(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def _shared_facts(trace: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in trace["otherData"].items() if name not in OF_ONE_RANK}


def _check_times(events: Mapping[Path, list[dict[str, Any]]]) -> None:
    """An iteration is at one time on all ranks.

    Raises:
        TraceError: it is not, so that the files are not of one run.
    """
    times: dict[int, list[tuple[float, Path]]] = defaultdict(list)
    for path, steps in events.items():
        begins: dict[int, float] = {}
        for event in steps:
            iteration, begin = event["args"]["iteration"], event["ts"] / 1e6
            begins[iteration] = min(begin, begins.get(iteration, begin))
        for iteration, begin in begins.items():
            times[iteration].append((begin, path))
    for iteration, begins_of_ranks in times.items():
        for (before, first), (after, second) in pairwise(sorted(begins_of_ranks)):
            if after - before > SAME_RUN_SECONDS:
                raise TraceError(
                    f"{first.name} and {second.name} are not of one run: their iteration "
                    f"{iteration} began {after - before:.0f} s apart; empty {first.parent} and "
                    "trace again"
                )


def _slots(traces: Mapping[Path, dict[str, Any]]) -> tuple[Slots, set[int], tuple[int, ...]]:
    """The slots of the last iteration, the iterations that ran with them, and the others.

    Raises:
        TraceError: slots are damaged, or the files are not of one run.
    """
    by_rank = []
    for path, trace in traces.items():
        try:
            slots = {int(i): Slots(*pair) for i, pair in trace["otherData"]["expert_slots"].items()}
            operators = len(window(trace["otherData"]["scmoe_shortcut_position"]))
            numbers = [slot for pair in slots.values() for slot in pair]
            if not all(type(slot) is int and 0 <= slot <= operators for slot in numbers):
                raise ValueError(f"expert slots outside 0..{operators}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _broken(path, error) from error
        by_rank.append(slots)
    # A run that was stopped leaves some ranks an iteration short.
    common = sorted(set.intersection(*(set(slots) for slots in by_rank)))
    if not common or any(slots[i] != by_rank[0][i] for slots in by_rank for i in common):
        raise TraceError(
            f"the files in {next(iter(traces)).parent} are not of one run: they share no iteration "
            "with the same expert slots; empty the folder and trace again"
        )
    last = by_rank[0][common[-1]]
    kept = {i for i in common if by_rank[0][i] == last}
    return last, kept, tuple(i for i in common if i not in kept)


def _add(records: dict[UnitPlace, UnitRecord], event: dict[str, Any], origin: float) -> None:
    """Add a step or an exchange to its record."""
    args = event["args"]
    record = records[UnitPlace(event["pid"], args["iteration"], args["layer"])]
    activity = Activity(
        args["step"], event["cat"], args["chunk"], args["pass"], args.get("route", 0)
    )
    # Microseconds since 1970 fill a float: subtract before anything else.
    begin = (event["ts"] - origin) / 1e6
    end = begin + event["dur"] / 1e6
    if args["step"] in EXCHANGES:
        blocked = min(args["blocked_us"] / 1e6, end - begin)
        sizes = args["bytes"], args.get("bytes_between_nodes", 0)
        record.exchanges.append(Exchange(activity, begin, end, blocked, *sizes))
    else:
        record.steps.append(Span(activity, begin, end))
