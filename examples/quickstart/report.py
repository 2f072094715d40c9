"""Turn a quick-start run into summary.json, loss.png and a short table.

Reads the TensorBoard event files of every launch of the run (a resumed launch writes a second
file into the same folder) and the held-out tokens. The yardstick is the unigram entropy of those
tokens, in nats per token: the least cross-entropy a model can reach that knows how often each
token occurs and nothing else. A model that has learned from context must be clearly below it.

Exit status: 0 all well; 1 a warning in the table; 2 something is missing, nothing written.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LOSS = "lm loss"
VALIDATION = "lm loss validation"
ITERATION_TIME = "iteration-time"
A2A = "a2a-seconds"
A2A_EXPOSED = "a2a-exposed-seconds"
REQUIRED_TAGS = (LOSS, VALIDATION, ITERATION_TIME, A2A, A2A_EXPOSED)

FINAL_POINTS = 10
"""`final_loss` is the mean of this many last logged losses: one batch alone is noisy."""
WARMUP_ITERATIONS = 5
"""Iterations of each launch that do not count for the speed."""
MIN_GAIN = 0.5
"""Nats per token by which the validation loss must beat the unigram entropy."""
RESUME_POINTS = 20
"""The first loss after the resume is compared with a line through this many losses before it."""
MIN_RESUME_TOLERANCE = 0.25
"""Nats per token that it may always be off; otherwise four standard deviations of those losses."""

Series = dict[int, float]
"""Values by iteration, in increasing order of iterations."""


# ---- reading ------------------------------------------------------------------------------------


def read_launch(path: Path) -> dict[str, Series]:
    """The scalars of one event file.

    Where a tag has two values for one iteration the first counts: Megatron writes the loss on
    the test set, if there is one, as a second "lm loss validation" of the last iteration.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    launch: dict[str, Series] = {}
    for tag in accumulator.Tags()["scalars"]:
        series = launch.setdefault(tag, {})
        for event in accumulator.Scalars(tag):
            series.setdefault(event.step, event.value)
    return launch


def read_launches(tensorboard_dir: Path) -> list[dict[str, Series]]:
    """All launches that logged a training loss, oldest first; ValueError if a tag is missing."""
    # "events.out.tfevents.<unix time>. ..." sorts by start time.
    launches = [read_launch(path) for path in sorted(tensorboard_dir.glob("events.out.tfevents.*"))]
    launches = [launch for launch in launches if LOSS in launch]
    if not launches:
        raise ValueError(f'no event file with "{LOSS}" in {tensorboard_dir}')
    missing = [tag for tag in REQUIRED_TAGS if not any(tag in launch for launch in launches)]
    if missing:
        raise ValueError(f"{tensorboard_dir} lacks the tags: {', '.join(missing)}")
    return launches


def merge(series: Iterable[Series]) -> Series:
    """One curve from all launches; what a resumed launch repeats replaces what it repeats."""
    merged: Series = {}
    for one in series:
        merged |= one
    return dict(sorted(merged.items()))


def token_counts(prefix: Path) -> npt.NDArray[np.int64]:
    """How often each token id occurs in the Megatron dataset `prefix`.bin / .idx."""
    for suffix in (".idx", ".bin"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise ValueError(f"no such file: {prefix}{suffix}")
    with warnings.catch_warnings():
        # The host says which GPU libraries it would like and that there is no process group.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(str(prefix))
    if not len(dataset):
        raise ValueError(f"{prefix}.bin holds no tokens")
    return np.bincount(np.concatenate([dataset[i] for i in range(len(dataset))]))


def vocab_size(tokenizer_dir: Path) -> int:
    """Entries of a Hugging Face tokenizer, special tokens included."""
    from tokenizers import Tokenizer

    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return Tokenizer.from_file(str(path)).get_vocab_size()


# ---- arithmetic ---------------------------------------------------------------------------------


def unigram_entropy(counts: npt.NDArray[np.int64]) -> float:
    """Entropy of the empirical token distribution, in nats per token."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def resume_iteration(launches: list[dict[str, Series]]) -> int | None:
    """The checkpoint the last launch started from, taken from the iterations it logged."""
    if len(launches) < 2:
        return None
    steps = sorted(launches[-1][LOSS])
    interval = steps[1] - steps[0] if len(steps) > 1 else 1
    return steps[0] - interval


@dataclass(frozen=True)
class Resume:
    """The first loss after the resume beside what the curve before it predicts."""

    iteration: int
    first_loss: float
    expected_loss: float
    tolerance: float

    @property
    def is_continuous(self) -> bool:
        return abs(self.first_loss - self.expected_loss) <= self.tolerance


def check_resume(first: list[Series], last: Series, iteration: int) -> Resume:
    """Extend a line through the last losses before `iteration` to the first one after it.

    first: losses of the earlier launches; last: losses of the resumed launch.
    """
    before = {
        step: loss
        for step, loss in merge(first).items()
        if step <= iteration and math.isfinite(loss)
    }
    after = {step: loss for step, loss in last.items() if step > iteration}
    if len(before) < 3 or not after:
        raise ValueError(
            f"cannot check the resume at iteration {iteration}: "
            f"{len(before)} losses logged up to it, {len(after)} after it"
        )
    steps = np.array(list(before)[-RESUME_POINTS:], dtype=float)
    losses = np.array(list(before.values())[-RESUME_POINTS:])
    slope, level = np.polyfit(steps - iteration, losses, 1)
    spread = float(np.std(losses - (level + slope * (steps - iteration)), ddof=2))
    step = min(after)
    return Resume(
        iteration=iteration,
        first_loss=after[step],
        expected_loss=float(level + slope * (step - iteration)),
        tolerance=max(MIN_RESUME_TOLERANCE, 4 * spread),
    )


def median_iteration_seconds(launches: list[dict[str, Series]]) -> float:
    """Median "iteration-time", without the first iterations of each launch if others exist."""
    warm, every = [], []
    for launch in launches:
        start = min(launch[LOSS])
        for step, seconds in launch.get(ITERATION_TIME, {}).items():
            every.append(seconds)
            if step >= start + WARMUP_ITERATIONS:
                warm.append(seconds)
    return statistics.median(warm or every)


# ---- the report ---------------------------------------------------------------------------------


@dataclass
class Report:
    """Everything the table, the summary and the figure show."""

    losses: Series
    validation: Series
    entropy: float
    resume: Resume | None
    summary: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def build_report(args: argparse.Namespace) -> Report:
    """Read everything, then compute; raises ValueError for whatever is missing."""
    launches = read_launches(args.tensorboard_dir)
    losses = merge(launch[LOSS] for launch in launches)
    validation = merge(launch.get(VALIDATION, {}) for launch in launches)
    a2a_seconds = math.fsum(merge(launch.get(A2A, {}) for launch in launches).values())
    blocked = math.fsum(merge(launch.get(A2A_EXPOSED, {}) for launch in launches).values())
    counts = token_counts(args.valid_prefix)
    entropy = unigram_entropy(counts)

    iteration = args.resumed_from_iteration
    if iteration is None:
        iteration = resume_iteration(launches)
    resume = None
    if iteration is not None:
        earlier = [launch[LOSS] for launch in (launches[:-1] or launches)]
        resume = check_resume(earlier, launches[-1][LOSS], iteration)

    loss_values, validation_loss = list(losses.values()), list(validation.values())[-1]
    seconds = median_iteration_seconds(launches)
    summary: dict[str, Any] = {
        "iterations": max(losses),
        "initial_loss": loss_values[0],
        "final_loss": statistics.fmean(loss_values[-FINAL_POINTS:]),
        "validation_loss": validation_loss,
        "unigram_entropy": entropy,
        "vocab_size": vocab_size(args.tokenizer_model),
        "validation_tokens": int(counts.sum()),
        "tokens_per_iteration": args.tokens_per_iteration,
        "tokens_trained": args.tokens_per_iteration * max(losses),
        "median_iteration_seconds": seconds,
        "tokens_per_second": args.tokens_per_iteration / seconds,
        "a2a_seconds": a2a_seconds,
        "a2a_hidden_share": 1 - blocked / a2a_seconds if a2a_seconds > 0 else None,
        "resumed_from_iteration": iteration,
        "resume_loss": resume and resume.first_loss,
        "resume_expected_loss": resume and resume.expected_loss,
        "resume_is_continuous": resume and resume.is_continuous,
        "python_version": platform.python_version(),
        "torch_version": metadata.version("torch"),
        "megatron_core_version": metadata.version("megatron-core"),
    }
    if args.corpus_json.is_file():
        summary["corpus"] = json.loads(args.corpus_json.read_text(encoding="utf-8"))
    report = Report(losses, validation, entropy, resume, summary)
    report.warnings += find_warnings(report)
    summary["warnings"] = report.warnings
    return report


def find_warnings(report: Report) -> list[str]:
    """What a reader must not overlook, one sentence each."""
    found = []
    last_step, last_loss = list(report.validation.items())[-1]
    if not all(map(math.isfinite, (*report.losses.values(), last_loss))):
        found.append("a loss is not finite")
    elif last_loss > report.entropy - MIN_GAIN:
        found.append(
            f"validation loss {last_loss:.3f} at iteration {last_step} is not {MIN_GAIN} nats "
            f"below the unigram entropy {report.entropy:.3f}: little was learned from context"
        )
    resume = report.resume
    if resume is not None and not resume.is_continuous:
        found.append(
            f"the first loss after the resume is {resume.first_loss:.3f}, the curve before it "
            f"leads to {resume.expected_loss:.3f} +- {resume.tolerance:.3f}"
        )
    return found


def table(report: Report) -> str:
    """The summary for a terminal, one aligned row a line."""
    summary = report.summary
    hidden = summary["a2a_hidden_share"]
    gain = report.entropy - summary["validation_loss"]
    rows = [
        ("iterations", f"{summary['iterations']:,} ({summary['tokens_trained']:,} tokens)"),
        ("train loss", f"{summary['initial_loss']:.3f} -> {summary['final_loss']:.3f} nats/token"),
        ("validation loss", f"{summary['validation_loss']:.3f} nats/token"),
        ("unigram entropy", f"{report.entropy:.3f} nats/token, beaten by {gain:.3f}"),
        ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s (median)"),
        ("all-to-all", f"{summary['a2a_seconds']:.2f} s in flight, all iterations"),
        ("  hidden share", "n/a" if hidden is None else f"{hidden:.1%}"),
    ]
    if resume := report.resume:
        verdict = f"loss {resume.first_loss:.3f}, expected {resume.expected_loss:.3f}"
        rows.append((f"resumed from {resume.iteration}", f"{verdict} +- {resume.tolerance:.3f}"))
    rows += [("WARNING", warning) for warning in report.warnings]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The height of a line fitted through about 5 % of the curve around each point.

    Unlike a moving average it follows the slope up to both ends.
    """
    size = min(len(values), max(5, len(values) // 20))
    if size < 3:
        return values
    smoothed = np.empty_like(values)
    for i in range(len(values)):
        start = min(max(0, i - size // 2), len(values) - size)
        window = np.arange(start, start + size)
        smoothed[i] = np.polyfit(window - i, values[window], 1)[1]
    return smoothed


def plot(report: Report, path: Path) -> None:
    """Draw the loss curves into the PNG file `path`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("loss.png needs matplotlib: pip install 'megatron-scmoe[plot]'") from error

    steps, losses = np.array(list(report.losses)), np.array(list(report.losses.values()))
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="training, raw")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    axes.plot(
        list(report.validation),
        list(report.validation.values()),
        "o",
        color="tab:orange",
        markeredgecolor="white",
        markersize=7,
        zorder=3,
        label=f"validation (last {report.summary['validation_loss']:.2f})",
    )
    axes.axhline(
        report.entropy,
        color="0.35",
        linestyle="--",
        linewidth=1.2,
        label=f"unigram entropy of the held-out tokens ({report.entropy:.2f})",
    )
    if report.resume:
        axes.axvline(
            report.resume.iteration,
            color="tab:green",
            linestyle=":",
            linewidth=1.5,
            label=f"resumed from iteration {report.resume.iteration:,}",
        )
    axes.set_xlabel("iteration")
    axes.set_ylabel("cross-entropy (nats / token)")
    tokens = report.summary["tokens_trained"]
    axes.set_title(
        f"ScMoE quick start: {tokens / 1e6:,.2f} M training tokens, "
        f"vocabulary of {report.summary['vocab_size']:,}"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, max(steps) * 1.02)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def write_outputs(report: Report, output_dir: Path) -> None:
    """Write both files completely or neither of them."""
    output_dir.mkdir(parents=True, exist_ok=True)
    summary, picture = output_dir / "summary.json.tmp", output_dir / "loss.png.tmp"
    try:
        plot(report, picture)
        # A loss that is not finite (there is a warning then) becomes null: NaN is not JSON.
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in report.summary.items()
        }
        summary.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
        os.replace(picture, output_dir / "loss.png")
        os.replace(summary, output_dir / "summary.json")
    finally:
        picture.unlink(missing_ok=True)
        summary.unlink(missing_ok=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="report.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, help="receives summary.json and loss.png")
    add("--tokens-per-iteration", type=int, required=True, help="global batch x sequence length")
    add("--tensorboard-dir", type=Path, help="default: RUN_DIR/tensorboard")
    add("--valid-prefix", type=Path, help="default: RUN_DIR/data/valid_text_document")
    add("--tokenizer-model", type=Path, help="default: RUN_DIR/tokenizer")
    add("--corpus-json", type=Path, help="optional file, default: RUN_DIR/data/corpus.json")
    add("--resumed-from-iteration", type=int, help="default: found from the event files")
    args = parser.parse_args(argv)
    args.tensorboard_dir = args.tensorboard_dir or args.run_dir / "tensorboard"
    args.valid_prefix = args.valid_prefix or args.run_dir / "data" / "valid_text_document"
    args.tokenizer_model = args.tokenizer_model or args.run_dir / "tokenizer"
    args.corpus_json = args.corpus_json or args.run_dir / "data" / "corpus.json"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.tokens_per_iteration <= 0:
            raise ValueError(f"--tokens-per-iteration {args.tokens_per_iteration} is not positive")
        report = build_report(args)
        write_outputs(report, args.run_dir)
    except (OSError, ValueError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    print(f"written: {args.run_dir / 'summary.json'}, {args.run_dir / 'loss.png'}")
    return 1 if report.warnings else 0


if __name__ == "__main__":
    sys.exit(main())
