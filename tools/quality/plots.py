"""Pictures of a folder of results: how it learns, and what came out."""

from pathlib import Path
from statistics import fmean

from tools.quality.contenders import BY_NAME, CONTENDERS
from tools.quality.report import Found

CURVES, RANKING = "curves.png", "held_out.png"
BASE = "top2"


def draw(found: Found, folder: Path) -> list[Path]:
    """Both pictures, as far as there are results; needs matplotlib, of the extra `plot`."""
    return [*_curves(found, folder / CURVES), *_ranking(found, folder / RANKING)]


def _curves(found: Found, path: Path) -> list[Path]:
    """Training loss, and its difference from top-2's, seed by seed; bands reach from the least to
    the largest seed."""
    from matplotlib.figure import Figure

    names = [each.name for each in CONTENDERS if each.main and found.runs.get(each.name)]
    if BASE not in names:
        return []
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = {seed: dict(result.losses) for seed, result in found.runs[BASE].items()}
    for number, name in enumerate(names):
        color = f"C{number}" if number < 10 else None
        losses = {seed: dict(result.losses) for seed, result in found.runs[name].items()}
        _band(left, losses, BY_NAME[name].title, color)
        if name != BASE:
            shared = losses.keys() & base.keys()
            smooth = {
                seed: _smooth({at: losses[seed][at] - base[seed][at] for at in losses[seed]})
                for seed in shared
            }
            if smooth:
                _band(right, smooth, BY_NAME[name].title, color)
    right.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="iteration", ylabel="training loss, nats per token", title="how they learn")
    right.set(
        xlabel="iteration",
        ylabel="loss - top-2's of the same seed",
        title="below 0: better than top-2 (bands: all seeds)",
    )
    start = max(at for losses in base.values() for at in losses) // 5
    late = [y for line in right.lines[:-1] for x, y in line.get_xydata() if x >= start]
    if late:
        margin = 0.5 * (max(late) - min(late)) or 0.01
        right.set_ylim(min(*late, 0) - margin, max(*late, 0) + margin)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return [path]


def _band(axes, by_seed: dict[int, dict[int, float]], label: str, color: str | None) -> None:
    iterations = sorted(set.intersection(*(set(losses) for losses in by_seed.values())))
    columns = [[losses[at] for losses in by_seed.values()] for at in iterations]
    (line,) = axes.plot(iterations, [fmean(c) for c in columns], label=label, color=color)
    if len(by_seed) > 1:
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(iterations, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _smooth(losses: dict[int, float], over: int = 7) -> dict[int, float]:
    """Running means."""
    iterations = sorted(losses)
    return {
        at: fmean(losses[i] for i in iterations[max(0, n - over + 1) : n + 1])
        for n, at in enumerate(iterations)
    }


def _ranking(found: Found, path: Path) -> list[Path]:
    """Held-out loss of every contender, best on top; a dot for each seed."""
    from matplotlib.figure import Figure

    rows = sorted(
        ((each, list(found.held_out(each.name).values())) for each in CONTENDERS),
        key=lambda row: fmean(row[1]) if row[1] else 0,
        reverse=True,
    )
    rows = [(each, losses) for each, losses in rows if losses]
    if not rows:
        return []
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for height, (each, losses) in enumerate(rows):
        color = "C0" if each.main else "C1"
        axes.plot(losses, [height] * len(losses), "o", color=color, alpha=0.5, markersize=5)
        axes.plot([fmean(losses)], [height], "|", color=color, markersize=14, markeredgewidth=2)
    base = list(found.held_out(BASE).values())
    if base:
        axes.axvline(fmean(base), color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [each.title for each, _ in rows], fontsize="small")
    axes.set(
        xlabel="held-out loss, nats per token (a dot a seed, a bar their mean; dotted: top-2)",
        title="blue: main contenders",
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    return [path]
