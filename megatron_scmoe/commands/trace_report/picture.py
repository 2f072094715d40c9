"""The report as a picture: the example unit to scale, and what each rank hides."""

from io import BytesIO
from pathlib import Path
from typing import Any

from megatron_scmoe.commands.trace_report.analysis import Figures
from megatron_scmoe.commands.trace_report.report_text import lane_of, step_name
from megatron_scmoe.commands.trace_report.traces import TracedPass, TraceError
from megatron_scmoe.overlap.measure.trace import LANES
from megatron_scmoe.overlap.recorder import Activity
from megatron_scmoe.overlap.schedule import POSITIONS, Step, window
from megatron_scmoe.words import duration, percent, write_whole

# Colours that readers who do not see red or green can tell apart.
COLOURS = dict(zip(LANES, ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=True))
OTHER, HIDDEN, EXPOSED = "#aab3bc", "#8fa3b5", "#d55e00"
DENSE = {step.value for position in POSITIONS for step in window(position)}
WAITS = (Step.WAIT_DISPATCH.value, Step.WAIT_COMBINE.value)
LABELLED = 0.05  # share of the pass that has room for a name


def draw(figures: Figures, path: Path) -> None:
    """Write the picture in the format that the file's name ends with, whole or not at all.

    Raises:
        OSError: it cannot be written.
        TraceError: matplotlib is not installed, or does not write this format.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise TraceError(
            "--picture needs matplotlib: pip install 'megatron-scmoe[plot]'"
        ) from error
    figure = Figure(figsize=(11, 8), dpi=150, layout="constrained")
    *passes, ranks = figure.subplots(len(figures.example) + 1)
    for axes, one in zip(passes, figures.example.values(), strict=True):
        _timeline(axes, one)
    _ranks(ranks, figures)
    picture = BytesIO()
    try:
        figure.savefig(picture, format=path.suffix.removeprefix(".") or "png")
    except ValueError as error:
        raise TraceError(f"--picture {path}: {error}") from error
    write_whole(path, picture.getvalue())


def _timeline(axes: Any, one: TracedPass) -> None:
    """A lane for each kind of work; hatched, and shaded over all lanes: compute stood still."""
    length = (one.end - one.begin) * 1e3
    chunks = 1 + max(exchange.activity.chunk for exchange in one.exchanges)

    def bar(
        activity: Activity, begin: float, end: float, name: str = "", rows: int = 1, **look: Any
    ) -> None:
        at, width, height = (begin - one.begin) * 1e3, (end - begin) * 1e3, 0.8 / rows
        top = LANES.index(lane_of(activity.name)) - 0.4
        if rows > 1:  # chunks are in flight beside each other
            top += activity.chunk * height
        axes.broken_barh([(at, width)], (top, height), edgecolor="white", **look)
        if name and width >= LABELLED * length:
            middle = at + width / 2, top + height / 2
            axes.text(*middle, name, ha="center", va="center", size=7)

    for span in one.steps:
        name = span.activity.name
        lane = lane_of(name)
        colour = COLOURS[lane] if name in DENSE or lane == name else OTHER
        # A wait is mostly covered by what is exposed; the rest sorts what has arrived.
        label = "" if name in WAITS else step_name(name).removeprefix("dense ")
        bar(span.activity, span.begin, span.end, label, facecolor=colour)
    for activity, begin, end, blocked, *_ in one.exchanges:
        colour = COLOURS[activity.name]
        bar(activity, begin, end, activity.name, chunks, facecolor=colour, alpha=0.7)
        if blocked:
            bar(activity, end - blocked, end, "", chunks, facecolor=EXPOSED, hatch="///")
            stood = [(time - one.begin) * 1e3 for time in (end - blocked, end)]
            axes.axvspan(*stood, color=EXPOSED, alpha=0.15, linewidth=0)
    axes.set_yticks(range(len(LANES)), LANES)
    axes.invert_yaxis()
    axes.set_xlim(0, length)
    axes.set_xlabel("ms")
    place = one.place
    axes.set_title(
        f"{one.direction}, layer {place.layer} on rank {place.rank}, iteration {place.iteration}: "
        f"{duration(one.end - one.begin)}; shaded: compute stood still",
        loc="left",
        size=9,
    )


def _ranks(axes: Any, figures: Figures) -> None:
    """Hidden and exposed time of every rank, one beside the other."""
    names = [str(rank) for rank in figures.ranks]
    own = [rank.communication for rank in figures.ranks.values()]
    hidden, exposed = ([getattr(x, name) * 1e3 for x in own] for name in ("hidden", "exposed"))
    axes.bar(names, hidden, color=HIDDEN, label="hidden")
    axes.bar(names, exposed, bottom=hidden, color=EXPOSED, hatch="///", label="exposed")
    axes.set_xlabel("rank")
    axes.set_ylabel("ms an iteration")
    axes.set_title(
        f"communication of a rank, {percent(figures.total.hidden_share)} hidden", loc="left", size=9
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
