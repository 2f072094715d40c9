"""The page: rows of figures for the template page.html."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from megatron_scmoe import __version__
from megatron_scmoe.commands.trace_report.advice import advise
from megatron_scmoe.commands.trace_report.analysis import Communication, DirectionFigures, Figures
from megatron_scmoe.commands.trace_report.drawing import (
    LANE_GAP,
    bar,
    lane_heights,
    spread,
    timeline,
)
from megatron_scmoe.commands.trace_report.traces import Run
from megatron_scmoe.commands.trace_report.words import (
    change,
    duration,
    numbers,
    percent,
    size,
    slot_name,
    speed,
    step_name,
)
from megatron_scmoe.overlap.measure.adaptive import DIRECTIONS
from megatron_scmoe.overlap.measure.trace import LANES
from megatron_scmoe.overlap.recorder import Direction
from megatron_scmoe.overlap.schedule import window

RANKS_SHOWN = 16
_OPTION = re.compile(r"(--[a-z][a-z-]*(?: \d+(?:,\d+)?)?)")


class Row(NamedTuple):
    """A row of a table: its name, a bar, and its numbers as text."""

    name: str
    bar: Markup
    cells: tuple[str, ...]
    notes: tuple[str, ...] = ()


def render(run: Run, figures: Figures) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "duration": duration,
        "lane_gap": LANE_GAP,
        "lane_heights": lane_heights,
        "lanes": LANES,
        "numbers": numbers,
        "percent": percent,
        "size": size,
        "speed": speed,
        "timeline": timeline,
    }
    shown = sorted(figures.ranks, key=lambda rank: -figures.ranks[rank].communication.exposed)
    return environment.get_template("page.html").render(
        advice=[_code(line) for line in advise(run, figures)],
        directions={name: _direction(run, own) for name, own in figures.directions.items()},
        facts=_facts(run),
        figures=figures,
        layers=list(_layers(figures)),
        links=list(_links(figures)),
        parts=list(_parts(run, figures)),
        ranks=list(_ranks(figures, sorted(shown[:RANKS_SHOWN]))),
        ranks_left_out=len(shown[RANKS_SHOWN:]),
        run=run,
        total_bar=_communication_bar("all exchanges", figures.total, figures.total.in_flight),
        version=__version__,
    )


def _code(line: str) -> Markup:
    """Options in a type of their own, in one piece."""
    return Markup(_OPTION.sub(r"<code>\1</code>", escape(line)))


def _facts(run: Run) -> dict[str, str]:
    facts = run.facts
    layout = (
        ("EP", "expert_model_parallel_size"),
        ("expert TP", "expert_tensor_parallel_size"),
        ("TP", "tensor_model_parallel_size"),
        ("PP", "pipeline_model_parallel_size"),
        ("CP", "context_parallel_size"),
    )
    ranks = f"{numbers(run.ranks)} of {facts['world_size']}"
    if len(run.ranks) < facts["world_size"]:
        ranks += " (the others have no unit, or their traces are missing)"
    iterations = numbers(run.iterations)
    if run.left_out:
        iterations += f" ({numbers(run.left_out)} ran with other slots and are left out)"
    return {
        "Shortcut": run.position,
        "Expert slots": f"{run.slots.forward} forward, {run.slots.backward} backward",
        "Chunks": str(run.num_chunks),
        "Overlap": "on" if run.overlaps else "off",
        "Iterations": iterations,
        "Ranks": ranks,
        "Layout": ", ".join(f"{name} {facts[key]}" for name, key in layout),
        "Experts": f"{facts['num_experts']}, top-{facts['moe_router_topk']}",
        "Exchange": f"{facts['moe_token_dispatcher_type']} over {facts['backend']}",
        "Model": f"{facts['num_layers']} layers, hidden {facts['hidden_size']}, "
        f"{facts['params_dtype']}",
        "Batch": f"{facts['global_batch_size']} sequences of {facts['seq_length']} tokens, "
        f"micro-batch {facts['micro_batch_size']}",
    }


def _communication_bar(name: str, own: Communication, total: float) -> Markup:
    return bar(
        [
            ("hidden", own.hidden, f"{name}: {duration(own.hidden)} hidden"),
            ("exposed", own.exposed, f"{name}: {duration(own.exposed)} exposed"),
        ],
        total,
    )


def _communication_cells(own: Communication) -> tuple[str, ...]:
    return (
        duration(own.in_flight),
        duration(own.hidden),
        duration(own.exposed),
        percent(own.hidden_share),
    )


def _layers(figures: Figures) -> Iterator[Row]:
    """A row for each layer and direction; the bar tells dispatch from combine."""
    rows: dict[tuple[int, Direction], dict[str, Communication]] = {}
    for (layer, direction, name), own in figures.layers.items():
        rows.setdefault((layer, direction), {})[name] = own
    totals = {
        key: Communication(*(sum(column) for column in zip(*parts.values(), strict=True)))
        for key, parts in rows.items()
    }
    longest = max(total.in_flight for total in totals.values())
    for (layer, direction), parts in rows.items():
        segments = []
        for name, own in parts.items():
            segments += [
                (name, own.hidden, f"{name}: {duration(own.hidden)} hidden"),
                ("exposed", own.exposed, f"{name}: {duration(own.exposed)} exposed"),
            ]
        cells = _communication_cells(totals[layer, direction])
        yield Row(f"layer {layer} {direction}", bar(segments, longest), cells)


def _ranks(figures: Figures, shown: list[int]) -> Iterator[Row]:
    everyone = figures.ranks
    longest = max(own.communication.in_flight for own in everyone.values())
    latest = max(everyone, key=lambda rank: everyone[rank].late)
    slowest = max(everyone, key=lambda rank: everyone[rank].compute)
    for rank in shown:
        own = everyone[rank]
        notes = ["slowest compute"] if rank == slowest and len(everyone) > 1 else []
        notes += ["latest"] if rank == latest and own.late > 0 else []
        yield Row(
            f"rank {rank}",
            _communication_bar(f"rank {rank}", own.communication, longest),
            (
                *_communication_cells(own.communication),
                duration(own.compute),
                duration(own.late),
                percent(own.last),
            ),
            tuple(notes),
        )


class SlotTable(NamedTuple):
    """What the slots of a direction cost."""

    rows: list[Row]
    figures: DirectionFigures


def _direction(run: Run, own: DirectionFigures) -> SlotTable:
    """Every slot, the order without overlap, and what was measured."""
    times = own.times
    longest = max(times.sequential, own.measured, *(cost.seconds for cost in own.costs))
    here = own.costs[own.slot].seconds if run.overlaps else times.sequential

    def row(name: str, seconds: float, exposed: float, *notes: str) -> Row:
        segments = [
            ("dense", times.window, f"dense work: {duration(times.window)}"),
            ("experts", times.experts, f"experts: {duration(times.experts)}"),
            ("exposed", exposed, f"exposed: {duration(exposed)}"),
        ]
        cells = (duration(seconds), duration(exposed), change(seconds, here))
        return Row(name, bar(segments, longest), cells, notes)

    rows = []
    for slot, cost in enumerate(own.costs):
        notes = ["chosen"] if slot == own.slot and run.overlaps else []
        notes += ["least time"] if slot == own.best else []
        name = f"{slot}: {slot_name(run.position, slot)}"
        rows.append(row(name, cost.seconds, cost.exposed, *notes))
    notes = [] if run.overlaps else ["chosen"]
    rows.append(row("without overlap", times.sequential, times.communication, *notes))
    segments = [
        (
            "measured",
            own.measured - own.exposed,
            f"all else: {duration(own.measured - own.exposed)}",
        ),
        ("exposed", own.exposed, f"exposed: {duration(own.exposed)}"),
    ]
    cells = (duration(own.measured), duration(own.exposed), change(own.measured, here))
    rows.append(Row("measured", bar(segments, longest), cells))
    return SlotTable(rows, own)


def _parts(run: Run, figures: Figures) -> Iterator[tuple[str, str, list[str]]]:
    """Class, name and mean time of every part, forward and backward."""
    forward, backward = (figures.directions[direction].times for direction in DIRECTIONS)
    for step, *seconds in zip(window(run.position), forward.dense, backward.dense, strict=True):
        yield "dense", step_name(step.value), [duration(x) for x in seconds]
    for name in ("experts", "dispatch", "combine"):
        yield name, name, [duration(getattr(times, name)) for times in (forward, backward)]


def _links(figures: Figures) -> Iterator[Row]:
    links = {key: link for key, link in figures.links.items() if link is not None}
    if not links:  # no rank routes anything to another
        return
    scale = min(link.least for link in links.values()), max(link.most for link in links.values())
    for (direction, name), link in links.items():
        yield Row(
            f"{name} {direction}",
            spread((link.least, link.median, link.most), scale, name),
            (
                size(link.size),
                speed(link.least),
                speed(link.median),
                speed(link.most),
                "-" if link.together is None else speed(link.together),
            ),
        )
