"""What the figures suggest, one line each, every line with the numbers that it rests on."""

from statistics import fmean

from megatron_scmoe.commands.trace_report.analysis import DirectionFigures, Figures
from megatron_scmoe.commands.trace_report.traces import TracedRun
from megatron_scmoe.overlap.recorder import Direction
from megatron_scmoe.words import duration, percent

ALL_HIDDEN = 0.97  # share of the communication beyond which there is nothing to gain
MATTERS = 0.03  # exposed time / a pass
WORTH_A_CHANGE = 1.03  # predicted time / that of the best slot
OFTEN_LAST = 0.75  # share of its exchanges that a late rank starts last
LATE = 0.1  # its delay / mean time in flight
UNEVEN = 1.25  # a rank's expert time / the mean of all
COUNTING = 0.1  # waiting for the numbers of rows / a pass
UNPREDICTED = 1.25  # measured time / predicted


def advise(run: TracedRun, figures: Figures) -> list[str]:
    """Lines in the order of their weight; none if nothing stands out."""
    lines = []
    if not run.overlaps:
        lines.append(
            "Overlap was switched off (--no-scmoe-overlap): every exchange is awaited where it "
            "starts."
        )
    elif figures.total.hidden_share >= ALL_HIDDEN:
        lines.append(
            f"{percent(figures.total.hidden_share)} of the communication is hidden: another "
            "schedule has nothing to gain."
        )
    lines += _ranks(run, figures)
    lines += _gradients(run, figures)
    for direction, own in figures.directions.items():
        lines += [f"{direction.capitalize()}: {line}" for line in _window(run, own)]
    lines += _slots(run, figures)
    for direction, own in figures.directions.items():
        lines += [f"{direction.capitalize()}: {line}" for line in _surprises(run, direction, own)]
    return lines


def _ranks(run: TracedRun, figures: Figures) -> list[str]:
    lines = []
    count = sum(len(one.exchanges) for one in run.passes) / len(run.ranks) / len(run.iterations)
    in_flight = figures.total.in_flight / count
    latest = max(figures.ranks, key=lambda rank: figures.ranks[rank].late)
    own = figures.ranks[latest]
    if own.last >= OFTEN_LAST and own.late >= LATE * in_flight:
        lines.append(
            f"Rank {latest} is late: it starts {percent(own.last)} of its exchanges last, "
            f"{duration(own.late)} after the first rank on average, and the others wait for it. "
            "Look at its machine, and at the rows that its experts get."
        )
    mean = fmean(rank.experts for rank in figures.ranks.values())
    busiest = max(figures.ranks, key=lambda rank: figures.ranks[rank].experts)
    if mean and figures.ranks[busiest].experts >= UNEVEN * mean:
        lines.append(
            f"The experts of rank {busiest} compute {figures.ranks[busiest].experts / mean:.1f} "
            "times as long as the mean of all ranks: if its machine is as fast as the others, the "
            "routing is uneven (--moe-aux-loss-coeff, --moe-expert-capacity-factor)."
        )
    return lines


def _gradients(run: TracedRun, figures: Figures) -> list[str]:
    """The shared experts send gradients once an iteration; every micro-batch hides something."""
    own = figures.data_parallel
    if run.facts["overlap_grad_reduce"] or own.speed is None:
        return []
    seconds = own.shared / own.speed
    if seconds <= figures.total.hidden:
        return []
    return [
        f"The gradients of the shared experts cross the link for about {duration(seconds)} an "
        f"iteration, more than the {duration(figures.total.hidden)} that are hidden: add "
        f"--overlap-grad-reduce, more micro-batches than {run.num_microbatches} an iteration "
        "(--global-batch-size), or take a smaller --moe-shared-expert-intermediate-size."
    ]


def _window(run: TracedRun, own: DirectionFigures) -> list[str]:
    times = own.times
    fits = times.communication <= times.window
    if not run.overlaps or fits or own.exposed < MATTERS * own.measured:
        return []
    remedies = [f"send more chunks (--scmoe-num-chunks {2 * run.num_chunks})"]
    if run.position != "pos3":
        remedies.append("widen the window (a later --scmoe-shortcut-position)")
    return [
        f"the exchanges take {duration(times.communication)}, the dense work that can hide them "
        f"{duration(times.window)}. They do not fit: {' or '.join(remedies)}."
    ]


def _slots(run: TracedRun, figures: Figures) -> list[str]:
    gains = [
        own.costs[own.slot].seconds / own.costs[own.best].seconds
        for own in figures.directions.values()
    ]
    all_hidden = figures.total.hidden_share >= ALL_HIDDEN
    if not run.overlaps or all_hidden or max(gains) < WORTH_A_CHANGE:
        return []
    now = sum(own.costs[own.slot].seconds for own in figures.directions.values())
    best = sum(own.costs[own.best].seconds for own in figures.directions.values())
    slots = ",".join(str(own.best) for own in figures.directions.values())
    return [
        f"With --scmoe-expert-slot {slots} a unit is predicted to take {percent(1 - best / now)} "
        "less time. The default, auto, measures and chooses by itself; --scmoe-remeasure-slot does "
        "it again after a resume."
    ]


def _surprises(run: TracedRun, direction: Direction, own: DirectionFigures) -> list[str]:
    lines = []
    if direction == "forward" and own.launching >= COUNTING * own.measured:
        lines.append(
            f"compute stands still for {duration(own.launching)} a pass before the dispatch "
            "starts, for the numbers of rows of all ranks: a rank comes late to its router. That "
            "is no exchange and not in the exposed time."
        )
    predicted, expected = (
        own.costs[own.slot][:2] if run.overlaps else (own.times.sequential, own.times.communication)
    )
    if own.measured >= UNPREDICTED * predicted:
        waits = own.exposed - expected >= (own.measured - predicted) / 2
        lines.append(
            f"a pass takes {duration(own.measured)}, the formula says {duration(predicted)}: "
            + (
                f"{duration(own.exposed)} are exposed, not {duration(expected)}. The exchanges "
                "differ from pass to pass, and compute waits for the long ones; the formula knows "
                "their mean."
                if waits
                else "time passes between the operators that it adds up."
            )
        )
    return lines
