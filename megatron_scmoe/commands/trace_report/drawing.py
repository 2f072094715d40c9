"""Timelines and bars as SVG. Widths are percentages: text keeps its size when the page is resized.

Colours are classes, which the page's style sheet fills for light, dark and paper.
"""

from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from math import floor, log, log10

from markupsafe import Markup

from megatron_scmoe.commands.trace_report.traces import Pass
from megatron_scmoe.commands.trace_report.words import duration, step_name
from megatron_scmoe.overlap.measure.trace import EXCHANGES, LANES
from megatron_scmoe.overlap.recorder import Activity
from megatron_scmoe.overlap.schedule import POSITIONS, Step, window

LANE_HEIGHT, LANE_GAP, AXIS_HEIGHT = 26, 10, 22
CHUNK_HEIGHT, STRIP = 20, 6
MARGIN = 5  # percent of a spread's width, for the mark
BAR_HEIGHT = 16
# A label is drawn if it fits at the narrowest width of the page.
PLOT_PIXELS, CHARACTER_PIXELS = 560, 6.6
VISIBLE = 0.1  # percent of the width
DENSE = {step.value for position in POSITIONS for step in window(position)}
WAITS = (Step.WAIT_DISPATCH.value, Step.WAIT_COMBINE.value)


def element(tag: str, content: Markup | str = "", **attributes: object) -> Markup:
    """One SVG element; an underscore of an attribute's name stands for a hyphen, or ends it."""
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    text = Markup("").join(Markup(' {}="{}"').format(*pair) for pair in names.items())
    return Markup("<{}{}>{}</{}>").format(Markup(tag), text, content, Markup(tag))


def _rect(
    begin: float, width: float, y: float, height: float, class_: str, title: str = ""
) -> Markup:
    tip = element("title", title) if title else ""
    return element(
        "rect",
        tip,
        x=f"{begin:.3f}%",
        width=f"{width:.3f}%",
        y=y,
        height=height,
        class_=class_,
    )


def lane_heights(one: Pass) -> list[int]:
    """Pixels of each lane: chunks are in flight beside each other, each on a line of its own."""
    exchange = max(LANE_HEIGHT, CHUNK_HEIGHT * _num_chunks(one))
    return [exchange if lane in EXCHANGES else LANE_HEIGHT for lane in LANES]


def timeline(one: Pass) -> Markup:
    """A pass to scale: a lane for each kind of work, and where compute stood still."""
    begin, length = one.begin, one.end - one.begin
    heights = lane_heights(one)
    tops = [sum(heights[:lane]) + lane * LANE_GAP for lane in range(len(LANES))]
    height = sum(heights) + len(LANES) * LANE_GAP

    def percent(seconds: float) -> float:
        return 100 * seconds / length

    parts = list(_axis(length, height))
    for span in one.steps:
        name = span.activity.name
        lane, class_ = _lane(name)
        parts += _activity(
            # A wait is mostly covered by what is exposed; the rest sorts what has arrived.
            "" if name in WAITS else _label(one, span.activity),
            percent(span.begin - begin),
            percent(span.end - span.begin),
            tops[lane],
            LANE_HEIGHT,
            class_,
            f"{step_name(name)}: {duration(span.end - span.begin)}",
        )
    for exchange in one.exchanges:
        name, _, chunk, _ = exchange.activity
        at, width = percent(exchange.begin - begin), percent(exchange.end - exchange.begin)
        label, lane = _label(one, exchange.activity), LANES.index(name)
        title = (
            f"{label}: {duration(exchange.end - exchange.begin)} in flight, "
            f"{duration(exchange.blocked)} exposed"
        )
        thickness = heights[lane] / _num_chunks(one)
        top = tops[lane] + chunk * thickness
        parts += _activity(label, at, width, top, thickness, name, title)
        # Compute waits until the exchange is complete: what is exposed is its end.
        exposed = percent(exchange.blocked)
        if exposed >= VISIBLE:
            part = at + width - exposed, exposed
            parts.insert(0, _rect(*part, 0, height, "standstill", title))
            parts.append(_rect(*part, tops[0], LANE_HEIGHT, "exposed", title))
            parts.append(_rect(*part, top + thickness - STRIP, STRIP, "exposed", title))
    description = (
        f"{one.direction} pass of layer {one.place.layer} on rank {one.place.rank}, "
        f"{duration(length)}; the tables below have its numbers"
    )
    return element(
        "svg",
        Markup("").join(parts),
        role="img",
        aria_label=description,
        width="100%",
        height=height + AXIS_HEIGHT,
    )


def _num_chunks(one: Pass) -> int:
    return 1 + max(exchange.activity.chunk for exchange in one.exchanges)


def _lane(step: str) -> tuple[int, str]:
    """Lane and class of a step of compute."""
    if step == Step.EXPERTS.value:
        return LANES.index("experts"), "experts"
    return LANES.index("dense compute"), "dense" if step in DENSE else "other"


def _label(one: Pass, activity: Activity) -> str:
    """Name, and number of the chunk if there are several."""
    words = step_name(activity.name).removeprefix("dense ")
    numbered = activity.name in (Step.EXPERTS.value, *EXCHANGES) and _num_chunks(one) > 1
    return f"{words} {activity.chunk + 1}" if numbered else words


def _activity(
    label: str, begin: float, width: float, top: float, height: float, class_: str, title: str
) -> Iterator[Markup]:
    yield _rect(begin, max(width, VISIBLE), top, height, f"work {class_}", title)
    for text in (label, label.partition(" ")[0]):
        if text and len(text) * CHARACTER_PIXELS + 8 <= width / 100 * PLOT_PIXELS:
            y = top + min(height / 2 + 4, height - STRIP - 3)
            yield element("text", text, x=f"{begin:.3f}%", dx=4, y=y, class_=f"label on-{class_}")
            return


def _axis(length: float, height: float) -> Iterator[Markup]:
    """Grid lines and their times."""
    raw = length / 6
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    for tick in takewhile(lambda at: at <= length, (step * number for number in count())):
        x = f"{100 * tick / length:.3f}%"
        yield element("line", x1=x, x2=x, y1=0, y2=height, class_="grid")
        if tick <= 0.97 * length:
            text = f"{tick * 1e3:g}" + (" ms" if tick == 0 else "")
            yield element("text", text, x=x, dx=2, y=height + 14, class_="tick")


def bar(segments: Sequence[tuple[str, float, str]], total: float) -> Markup:
    """Segments (class, value, title) one after the other; `total` fills the width."""
    parts, at = [], 0.0
    for class_, value, title in segments:
        width = 100 * value / total if total else 0.0
        if width > 0:
            parts.append(_rect(at, width, 0, BAR_HEIGHT, class_, title))
        at += width
    return _small(parts)


def spread(values: tuple[float, float, float], scale: tuple[float, float], class_: str) -> Markup:
    """From the least to the greatest value, with a mark at the median, on a logarithmic scale.

    Args:
        values: least, median and greatest; positive.
        scale: values at the left and the right end.
    """
    left, right = (log(x) for x in scale)
    low, middle, high = (
        MARGIN + (100 - 2 * MARGIN) * (log(x) - left) / (right - left or 1) for x in values
    )
    return _small(
        [
            _rect(low, max(high - low, VISIBLE), BAR_HEIGHT / 2 - 3, 6, f"{class_} pale"),
            element("circle", cx=f"{middle:.3f}%", cy=BAR_HEIGHT / 2, r=5, class_=class_),
        ]
    )


def _small(parts: Sequence[Markup]) -> Markup:
    """Beside numbers that say the same."""
    return element(
        "svg", Markup("").join(parts), width="100%", height=BAR_HEIGHT, aria_hidden="true"
    )
