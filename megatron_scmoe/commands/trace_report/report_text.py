"""The report as text: what was hidden, where a unit's time went, and what else stands out."""

from collections.abc import Iterator, Sequence

from megatron_scmoe.commands.trace_report.advice import advise
from megatron_scmoe.commands.trace_report.analysis import (
    Communication,
    DataParallel,
    DirectionFigures,
    Figures,
    Traffic,
)
from megatron_scmoe.commands.trace_report.traces import TracedPass, TracedRun
from megatron_scmoe.overlap.measure.adaptive import DIRECTIONS
from megatron_scmoe.overlap.measure.trace import EXCHANGES, LANES
from megatron_scmoe.overlap.recorder import Direction
from megatron_scmoe.overlap.schedule import Step, window
from megatron_scmoe.words import change, duration, numbers, percent, size, speed, table

RANKS_SHOWN = 16
COLUMNS = 72  # of a timeline
COMMUNICATION = ("in flight", "hidden", "exposed", "hidden share")


def render(run: TracedRun, figures: Figures) -> str:
    """All sections, with a line between them."""
    sections = [
        _head(run, figures),
        "\n".join(f"- {line}" for line in advise(run, figures)),
        *(_timeline(one) for one in figures.example.values()),
        _layers(figures),
        _ranks(figures),
        *(_slots(run, name, own) for name, own in figures.directions.items()),
        _parts(run, figures),
        _links(figures),
    ]
    return "\n\n".join(section for section in sections if section)


def _head(run: TracedRun, figures: Figures) -> str:
    facts, total = run.facts, figures.total
    ranks = f"{numbers(run.ranks)} of {facts['world_size']}"
    if len(run.ranks) < facts["world_size"]:
        ranks += " (the others have no unit, or their traces are missing)"
    iterations = numbers(run.iterations)
    if run.left_out:
        iterations += f" ({numbers(run.left_out)} ran with other slots and are left out)"
    layout = (
        ("EP", "expert_model_parallel_size"),
        ("expert TP", "expert_tensor_parallel_size"),
        ("TP", "tensor_model_parallel_size"),
        ("PP", "pipeline_model_parallel_size"),
        ("CP", "context_parallel_size"),
    )
    rows = {
        "Hidden": f"{percent(total.hidden_share)} of the communication, {duration(total.hidden)} "
        f"of {duration(total.in_flight)} an iteration, mean over ranks",
        "Exposed": f"{duration(total.exposed)} an iteration",
        "Sent": _traffic(run, figures.traffic),
        "Unit": ", ".join(
            f"{name} {duration(own.measured)}, {duration(own.exposed)} of it exposed"
            for name, own in figures.directions.items()
        ),
        "Shortcut": f"{run.position}, overlap {'on' if run.overlaps else 'off'}, "
        f"chunks {run.num_chunks}",
        "Slots": f"{run.slots.forward} forward, {run.slots.backward} backward",
        "Iterations": iterations,
        "Ranks": ranks,
        "Layout": ", ".join(f"{name} {facts[key]}" for name, key in layout),
        "Experts": f"{facts['num_experts']}, top-{facts['moe_router_topk']}, "
        f"{facts['moe_token_dispatcher_type']} over {facts['backend']}",
        "Model": f"{facts['num_layers']} layers, hidden {facts['hidden_size']}, "
        f"{facts['params_dtype']}",
        "Batch": f"{facts['global_batch_size']} sequences of {facts['seq_length']} tokens, "
        f"micro-batch {facts['micro_batch_size']}, {run.num_microbatches} an iteration",
    }
    if figures.data_parallel.sent:
        rows["Gradients"] = _data_parallel(run, figures.data_parallel)
    if facts["compute_slow_down"]:
        rows["Compute"] = (
            f"{facts['compute_slow_down']:.3f} x its time alone beside exchanges, in the run's "
            "first iterations"
        )
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())


def _traffic(run: TracedRun, own: Traffic) -> str:
    parts = [
        f"{size(own.sent)} to other ranks an iteration",
        f"{size(own.between_nodes)} of it to other nodes",
    ]
    if own.copies is not None:
        copies = run.facts.get("scmoe_dispatch_copies", "expert")
        parts.append(f"{own.copies:.2f} rows of a token, one for each {copies}")
    if own.load is not None:
        parts.append(f"the busiest rank has {own.load:.2f} x the mean rows")
    return ", ".join(parts)


def _data_parallel(run: TracedRun, own: DataParallel) -> str:
    time = "" if own.speed is None else f", {duration(own.sent / own.speed)} at the link's speed"
    gathers = " and parameters" if run.facts["use_distributed_optimizer"] else ""
    overlap = "with" if run.facts["overlap_grad_reduce"] else "without"
    return (
        f"data parallelism sends {size(own.sent)} of gradients{gathers} an iteration{time}; "
        f"{size(own.shared)} are the shared experts'; {overlap} --overlap-grad-reduce"
    )


def _timeline(one: TracedPass) -> str:
    """A pass to scale: `#` at work or in flight, `!` the end of an exchange that is exposed."""
    length = one.end - one.begin

    def column(time: float) -> int:
        return min(round((time - one.begin) / length * COLUMNS), COLUMNS)

    lanes = {name: [" "] * COLUMNS for name in LANES}

    def draw(lane: str, begin: float, end: float, mark: str = "#") -> None:
        lanes[lane][column(begin) : column(end)] = mark * (column(end) - column(begin))

    for span in one.steps:
        if span.activity.name not in (Step.WAIT_DISPATCH.value, Step.WAIT_COMBINE.value):
            draw(lane_of(span.activity.name), span.begin, span.end)
    for exchange in one.exchanges:
        draw(exchange.activity.name, exchange.begin, exchange.end)
    for exchange in one.exchanges:
        draw(exchange.activity.name, exchange.end - exchange.blocked, exchange.end, "!")
    place = one.place
    title = (
        f"{one.direction.capitalize()} pass {one.number} of layer {place.layer} on rank "
        f"{place.rank}, iteration {place.iteration}: {duration(length)}, ! is exposed"
    )
    return "\n".join([title, *(f"{name:<14}|{''.join(marks)}|" for name, marks in lanes.items())])


def lane_of(step: str) -> str:
    """The lane of a step of compute."""
    return step if step in LANES else "dense compute"


def _communication(own: Communication) -> tuple[str, ...]:
    times = duration(own.in_flight), duration(own.hidden), duration(own.exposed)
    return *times, percent(own.hidden_share)


def _layers(figures: Figures) -> str:
    rows = [
        (f"layer {layer} {direction} {name}", *_communication(own))
        for (layer, direction, name), own in figures.layers.items()
    ]
    return "Layers, an iteration\n" + table(("", *COMMUNICATION), rows)


def _ranks(figures: Figures) -> str:
    everyone = figures.ranks
    shown = sorted(everyone, key=lambda rank: -everyone[rank].communication.exposed)[:RANKS_SHOWN]
    rows = [
        (
            f"rank {rank}",
            *_communication(own.communication),
            duration(own.compute),
            duration(own.late),
            percent(own.last),
        )
        for rank, own in ((rank, everyone[rank]) for rank in sorted(shown))
    ]
    left_out = len(everyone) - len(shown)
    title = f", the {len(shown)} with the most exposed time" if left_out else ""
    return (
        f"Ranks{title}, an iteration; late: start after the first of the group, mean; last: share "
        "of the exchanges that it starts last\n"
        + table(("", *COMMUNICATION, "compute", "late", "last"), rows)
    )


def _slots(run: TracedRun, direction: Direction, own: DirectionFigures) -> str:
    """Every slot, the order without overlap, and what was measured."""
    times = own.times
    here = own.costs[own.slot].seconds if run.overlaps else times.sequential

    def row(name: str, seconds: float, exposed: float, *notes: str) -> tuple[str, ...]:
        name += f" ({', '.join(notes)})" if notes else ""
        return name, duration(seconds), duration(exposed), change(seconds, here)

    rows = []
    for slot, cost in enumerate(own.costs):
        notes = ["chosen"] if slot == own.slot and run.overlaps else []
        notes += ["least time"] if slot == own.best else []
        name = f"{slot}: {slot_name(run.position, slot)}"
        rows.append(row(name, cost.seconds, cost.exposed, *notes))
    notes = [] if run.overlaps else ["chosen"]
    rows.append(row("without overlap", times.sequential, times.communication, *notes))
    rows.append(row("measured", own.measured, own.exposed))
    chunks = "; it knows no chunks" if run.num_chunks > 1 else ""
    formula = "max(before, dispatch) + experts + max(after, combine)"
    if run.further:
        formula = "of the first route, the other where it costs least"
    return f"Expert slots {direction}, {formula}{chunks}\n" + table(
        ("", "time", "exposed", "against chosen"), rows
    )


def _parts(run: TracedRun, figures: Figures) -> str:
    passes = [figures.directions[direction].times for direction in DIRECTIONS]
    steps = enumerate(window(run.position))
    rows = [(step_name(step.value), [unit.dense[at] for unit in passes]) for at, step in steps]
    for number in range(1 + len(run.further)):
        for name in (Step.EXPERTS.value, *EXCHANGES):
            of_route = f"{name} of route {number}" if run.further else name
            rows.append((of_route, [getattr(unit.routes[number], name) for unit in passes]))
    cells = [(name, *map(duration, seconds)) for name, seconds in rows]
    return "Mean times of a pass\n" + table(("", *DIRECTIONS), cells)


def _links(figures: Figures) -> str:
    return (
        "What the link gave: bytes to other ranks / time in flight; all started: from the start "
        "of the last rank\n"
        + table(
            ("", "sent (median)", "least", "median", "most", "all started"),
            list(_link_rows(figures)),
        )
    )


def _link_rows(figures: Figures) -> Iterator[Sequence[str]]:
    for (direction, name), link in figures.links.items():
        if link is not None:  # where no rank routes anything to another
            speeds = map(speed, (link.least, link.median, link.most))
            together = "-" if link.together is None else speed(link.together)
            yield f"{name} {direction}", size(link.size), *speeds, together


def step_name(step: str) -> str:
    """A step in words; attention of the dense layer is told from that of the MoE layer."""
    if step.startswith("dense_") and step != "dense_mlp":
        return f"dense {step_name(step.removeprefix('dense_'))}"
    return {"qkv": "QKV", "dense_mlp": "MLP"}.get(step, step.replace("_", " "))


def slot_name(position: str, slot: int) -> str:
    """Where a slot is, in the words of the window; true of both directions."""
    operators = [step_name(step.value) for step in window(position)]
    if slot == 0:
        return f"before {operators[0]}"
    if slot == len(operators):
        return f"after {operators[-1]}"
    return f"between {operators[slot - 1]} and {operators[slot]}"
