"""Turn a quick-start run into summary.json, loss.png and a short table.

Reads the TensorBoard event files of every launch of the run (a resumed launch writes a second
file into the same folder) and the held-out tokens. The yardstick is the unigram entropy of those
tokens, in nats per token: the least cross-entropy a model can reach that knows how often each
token occurs and nothing else. A model that has learned from context must be clearly below it.

Exit status: 0 all well; 1 a warning in the table; 2 something is missing, nothing written.
"""

import argparse
import io
import json
import math
import platform
import statistics
import sys
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scmoe.say import one_line, say
from megatron_scmoe.words import write_whole

LOSS, VALIDATION, TIME = "lm loss", "lm loss validation", "iteration-time"
A2A, A2A_EXPOSED = "a2a-seconds", "a2a-exposed-seconds"
FINAL_POINTS = 10  # the final loss is a mean of this many: one batch alone is noisy
WARMUP_ITERATIONS = 5  # of each launch, which do not count for the speed
MIN_GAIN = 0.5  # nats by which the validation loss must beat the unigram entropy
RESUME_POINTS = 20  # losses that the line is laid through which the resumed run should continue
MIN_RESUME_TOLERANCE = 0.25  # nats; otherwise four standard deviations of those losses
SMOOTHED = 31  # iterations

Series = dict[int, float]  # by iteration


def read_launches(folder: Path) -> list[dict[str, Series]]:
    """The scalars of every launch by tag, oldest first.

    Where a tag has two values for one iteration the first counts: Megatron writes the loss on
    the test set, if there is one, as a second "lm loss validation" of the last iteration.

    Raises:
        ValueError: a tag is missing.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    launches = []
    for path in sorted(folder.glob("events.out.tfevents.*")):  # then follows the time of its start
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        launch = {
            tag: {event.step: event.value for event in reversed(events.Scalars(tag))}
            for tag in events.Tags()["scalars"]
        }
        if LOSS in launch:
            launches.append(launch)
    tags = {tag for launch in launches for tag in launch}
    missing = [tag for tag in (LOSS, VALIDATION, TIME, A2A, A2A_EXPOSED) if tag not in tags]
    if missing:
        raise ValueError(f"{folder} lacks the tags: {', '.join(missing)}")
    return launches


def merge(series: Iterable[Series]) -> Series:
    """One curve from all launches; what a resumed launch repeats replaces what it repeats."""
    merged: Series = {}
    for one in series:
        merged |= one
    return dict(sorted(merged.items()))


def unigram_entropy(prefix: Path) -> float:
    """Entropy of the tokens of the Megatron dataset `prefix`.bin / .idx, in nats per token.

    Raises:
        ValueError: a file is missing.
    """
    for suffix in (".idx", ".bin"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise ValueError(f"no such file: {prefix}{suffix}")
    with warnings.catch_warnings():
        # The host says which GPU libraries it would like and that there is no process group.
        warnings.simplefilter("ignore")
        from megatron_scmoe import host

        host.prepare()
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(str(prefix))
    counts = np.bincount(np.concatenate([dataset[i] for i in range(len(dataset))]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def expected_loss(before: Series, after: int, iteration: int) -> tuple[float, float]:
    """The loss that a line through the last losses up to `iteration` leads to, and its tolerance.

    Raises:
        ValueError: there are too few of them.
    """
    known = {s: loss for s, loss in before.items() if s <= iteration and math.isfinite(loss)}
    if len(known) < 3:
        raise ValueError(f"only {len(known)} losses were logged up to iteration {iteration}")
    steps = np.array(list(known)[-RESUME_POINTS:], dtype=float) - iteration
    losses = np.array(list(known.values())[-RESUME_POINTS:])
    slope, level = np.polyfit(steps, losses, 1)
    spread = float(np.std(losses - (level + slope * steps), ddof=2))
    return float(level + slope * (after - iteration)), max(MIN_RESUME_TOLERANCE, 4 * spread)


def iteration_seconds(launches: list[dict[str, Series]]) -> float:
    """Median, without the first iterations of each launch.

    Raises:
        ValueError: there are no others.
    """
    warm = [
        seconds
        for launch in launches
        for step, seconds in launch.get(TIME, {}).items()
        if step >= min(launch[LOSS]) + WARMUP_ITERATIONS
    ]
    if not warm:
        raise ValueError(f"no launch has more than {WARMUP_ITERATIONS} iterations")
    return statistics.median(warm)


def summarize(run_dir: Path, tokens: int, resumed_from: int) -> tuple[dict[str, Any], list[Series]]:
    """All numbers, and the curves of training and validation.

    Args:
        tokens: of an iteration.
        resumed_from: the checkpoint's iteration, which the last launch loaded.

    Raises:
        ValueError, OSError: something is missing.
    """
    launches = read_launches(run_dir / "tensorboard")
    train, validation, flying, exposed = (
        merge(launch.get(tag, {}) for launch in launches)
        for tag in (LOSS, VALIDATION, A2A, A2A_EXPOSED)
    )
    a2a = math.fsum(flying.values())
    resumed = {step: loss for step, loss in launches[-1][LOSS].items() if step > resumed_from}
    if not resumed:
        raise ValueError(f"the last launch logged no loss after iteration {resumed_from}")
    before = merge(launch[LOSS] for launch in launches[:-1])
    expected, tolerance = expected_loss(before, min(resumed), resumed_from)
    seconds = iteration_seconds(launches)
    summary: dict[str, Any] = {
        "iterations": max(train),
        "initial_loss": next(iter(train.values())),
        "final_loss": statistics.fmean(list(train.values())[-FINAL_POINTS:]),
        "validation_loss": validation[max(validation)],
        "unigram_entropy": unigram_entropy(run_dir / "data" / "valid_text_document"),
        "tokens_trained": tokens * max(train),
        "tokens_per_second": tokens / seconds,
        "a2a_seconds": a2a,
        "a2a_hidden_share": 1 - math.fsum(exposed.values()) / a2a if a2a > 0 else None,
        "resumed_from_iteration": resumed_from,
        "resume_loss": resumed[min(resumed)],
        "resume_expected_loss": expected,
        "resume_tolerance": tolerance,
        "python_version": platform.python_version(),
        "torch_version": metadata.version("torch"),
        "megatron_core_version": metadata.version("megatron-core"),
    }
    summary["warnings"] = find_warnings(summary, train)
    return summary, [train, validation]


def find_warnings(summary: dict[str, Any], train: Series) -> list[str]:
    """What a reader must not overlook, one sentence each."""
    found = []
    loss, entropy = summary["validation_loss"], summary["unigram_entropy"]
    if not all(map(math.isfinite, (*train.values(), loss))):
        found.append("a loss is not finite")
    elif loss > entropy - MIN_GAIN:
        found.append(
            f"validation loss {loss:.3f} is not {MIN_GAIN} nats below the unigram entropy "
            f"{entropy:.3f}: little was learned from context"
        )
    first, expected = summary["resume_loss"], summary["resume_expected_loss"]
    if abs(first - expected) > summary["resume_tolerance"]:
        found.append(
            f"the first loss after the resume is {first:.3f}, the curve before it leads to "
            f"{expected:.3f} +- {summary['resume_tolerance']:.3f}"
        )
    return found


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal, one aligned row a line."""
    entropy, hidden = summary["unigram_entropy"], summary["a2a_hidden_share"]
    rows = [
        ("iterations", f"{summary['iterations']:,} ({summary['tokens_trained']:,} tokens)"),
        ("train loss", f"{summary['initial_loss']:.3f} -> {summary['final_loss']:.3f} nats/token"),
        ("validation loss", f"{summary['validation_loss']:.3f} nats/token"),
        (
            "unigram entropy",
            f"{entropy:.3f} nats/token, beaten by {entropy - summary['validation_loss']:.3f}",
        ),
        ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s (median)"),
        ("all-to-all", f"{summary['a2a_seconds']:.2f} s in flight, all iterations"),
        ("  hidden share", "n/a" if hidden is None else f"{hidden:.1%}"),
        (
            f"resumed from {summary['resumed_from_iteration']}",
            f"loss {summary['resume_loss']:.3f}, expected {summary['resume_expected_loss']:.3f} "
            f"+- {summary['resume_tolerance']:.3f}",
        ),
        *(("WARNING", warning) for warning in summary["warnings"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def draw(summary: dict[str, Any], curves: list[Series]) -> bytes:
    """The loss curves as PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("loss.png needs matplotlib: pip install 'megatron-scmoe[plot]'") from error
    train, validation = curves
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    steps, losses = list(train), list(train.values())
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="training")
    if len(losses) >= SMOOTHED:
        smooth = np.convolve(losses, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
        label = f"mean of {SMOOTHED} iterations"
        axes.plot(steps[SMOOTHED // 2 :][: len(smooth)], smooth, color="tab:blue", label=label)
    label = f"validation (last {summary['validation_loss']:.2f})"
    axes.plot(list(validation), list(validation.values()), "o", color="tab:orange", label=label)
    label = f"unigram entropy of the held-out tokens ({summary['unigram_entropy']:.2f})"
    axes.axhline(summary["unigram_entropy"], color="0.35", linestyle="--", label=label)
    at = summary["resumed_from_iteration"]
    axes.axvline(at, color="tab:green", linestyle=":", label=f"resumed from iteration {at:,}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("cross-entropy (nats / token)")
    axes.set_title(f"ScMoE quick start, {summary['tokens_trained'] / 1e6:,.2f} M training tokens")
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Print the table, write both files, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, kind, metavar, text in (
        ("--run-dir", Path, "FOLDER", "receives summary.json and loss.png"),
        ("--tokens-per-iteration", int, "TOKENS", "global batch x sequence length"),
        ("--resumed-from-iteration", int, "N", "that of the checkpoint"),
    ):
        parser.add_argument(name, type=kind, required=True, metavar=metavar, help=text)
    args = parser.parse_args(argv)
    try:
        summary, curves = summarize(
            args.run_dir, args.tokens_per_iteration, args.resumed_from_iteration
        )
        picture = draw(summary, curves)
        # A loss that is not finite (there is a warning then) becomes null: NaN is not JSON.
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in summary.items()
        }
        write_whole(args.run_dir / "loss.png", picture)
        write_whole(args.run_dir / "summary.json", json.dumps(finite, indent=2) + "\n")
    except (OSError, ValueError) as error:
        say(one_line(error))
        return 2
    print(table(summary))
    print(f"written: {args.run_dir / 'summary.json'}, {args.run_dir / 'loss.png'}")
    return 1 if summary["warnings"] else 0


if __name__ == "__main__":
    sys.exit(main())
