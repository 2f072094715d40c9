"""Two hosts of two ranks each, a slow link: what a token that is sent once is worth.

    python -m tools.benchmarks.c2r_cluster --train 200 --output runs/c2r_cluster [--topk 2 8]
    python -m tools.benchmarks.c2r_cluster --trained runs/c2r_cluster --mbit 300 [--topk 2 8]
    python -m tools.benchmarks.c2r_cluster --bytes [--topk 2 8]

The hosts, the model and the turns of overlap_cluster. For every top-k stock Megatron, the same with
--scmoe-dispatch-copies rank and node, and a shortcut with one routed expert less and a shared one,
all three ways; after --train, each that sends a token once also with experts placed. Time: step of
stock Megatron / step, between turns of one repetition, on the link and without a limit.

--train trains a model without and one with the shortcut on text and places their experts by what
their routers chose; timed runs go on from there, without learning, so that all of a kind route
alike. Without --trained routing is uniform.

--bytes counts in place of timing: what a rank sends to other ranks and to the other host in an
iteration, and rows of a token, of a router that trains for --steps steps on real text. Every way
routes alike: the numbers do not depend on what else the machine does.

Needs root and iproute2.
"""

import argparse
import json
import shlex
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_scmoe.commands import c2r
from megatron_scmoe.model.dispatch import COPIES
from megatron_scmoe.words import table
from tools.benchmarks.contenders import Contender, Sizes, run_options
from tools.benchmarks.job import Job
from tools.benchmarks.network import BenchmarkError, exit_code, two_hosts
from tools.benchmarks.overlap_cluster import ITERATIONS, SCRIPT, TwoHostBench, add_common
from tools.benchmarks.provenance import describe
from tools.benchmarks.real_text import write_text
from tools.benchmarks.turns import Ratio, TimedTurn, TurnsRow, summarize, take_turns

RANKS = 2
"""Of a host."""
SIZES = Sizes(ffn_hidden_size=256, num_experts=16, micro_batch_size=4)
COUNTED = ("a2a (MB)", "a2a between nodes (MB)", "copies per token")
SENT = ("rows of a token", "MB to the other host", "MB")
WARMUP, WARMUP_PLAIN = 9, 2
"""Eight steps measure, and choose the expert slot, where there is a shortcut."""
KINDS = ("plain", "shortcut")
WAYS = tuple(COPIES)


def contenders(topk: int, kind: str, trained: Path | None) -> list[Contender]:
    """For times: stock Megatron first, which all are compared with.

    Args:
        trained: folder of `C2RBench.train`, for those with experts placed.
    """
    stock = Contender(f"top{topk}", "none", topk, False, baseline=f"top{topk}")
    base, ways = stock, WAYS[1:]
    options: tuple[str, ...] = ("--scmoe-combine", "add")
    if kind == "shortcut":
        base = Contender(f"pos2 top{topk - 1}", "pos2", topk - 1, True, baseline=stock.name)
        # One routed expert is one row, whichever way.
        options, ways = (), WAYS if topk > 2 else WAYS[:1]
    rows = [
        replace(base, name=f"{base.name} {copies}", options=(*_sent(copies), *options))
        for copies in ways
    ]
    if trained is None:
        return [stock, *rows]
    # Placed experts change nothing where each gets a row.
    once = [row for row in rows if row.options[:2] != _sent("expert")]
    return [stock, *rows, *(_placed(row, trained) for row in once)]


def counted(topk: int) -> list[Contender]:
    """For bytes: one model, every way of sending."""
    return [
        Contender(f"top{topk} {copies}", "pos2", topk, True, options=_sent(copies))
        for copies in WAYS
    ]


def _sent(copies: str) -> tuple[str, ...]:
    return "--scmoe-dispatch-copies", copies


def _placed(row: Contender, trained: Path) -> Contender:
    file = placement_of(model_folder(trained, row), row.options[1])
    options = (*row.options, "--scmoe-expert-placement", str(file))
    return replace(row, name=f"{row.name} placed", options=options)


def placement_of(folder: Path, copies: str) -> Path:
    """Made for as few copies between ranks as can be, or for as few between hosts."""
    return folder / f"placement-{copies}.json"


def model_folder(trained: Path, row: Contender) -> Path:
    """Of the model that a contender goes on from: all of one position and top-k have the same."""
    return trained / f"{row.position}-top{row.topk}"


@dataclass(frozen=True)
class Timed:
    """One contender."""

    row: TurnsRow
    fast: Ratio
    """Of training, against stock Megatron, both without a limit on the link."""
    sent: dict[str, float]
    """COUNTED, of the last step; empty for stock Megatron, which does not say."""


class C2RBench(TwoHostBench):
    """Hosts of RANKS ranks each."""

    def start(self, number: int, row: Contender, options: list[str], uniform: bool = False) -> Job:
        """A run of a contender.

        Args:
            uniform: whether routing is, in place of the router's.
        """
        ranks = 2 * RANKS
        batch = ranks * self.sizes.micro_batch_size * self.sizes.num_micro_batches
        line = [*self.sizes.options(), *run_options(self.prefix, self.folder / "cache", ITERATIONS)]
        if not uniform:
            line.remove("--moe-router-force-load-balancing")
        line += ["--expert-model-parallel-size", str(ranks), "--global-batch-size", str(batch)]
        line += [*self.megatron_options, *row.command_line(self.sizes), *options]
        log = self.folder / f"{row.name.replace(' ', '-')}.log"
        return Job(self.hosts, number, SCRIPT, line, log, RANKS)

    def train(self, row: Contender, steps: int) -> None:
        """A model for contenders to go on from, and where its experts are to lie: by what was
        chosen in the second half of the steps.

        Raises:
            BenchmarkError: it cannot be trained or placed.
        """
        folder = model_folder(self.folder, row)
        options = ["--save", str(folder / "checkpoints"), "--save-interval", str(steps // 2)]
        options += ["--scmoe-collaboration-dir", str(folder / "counts")]
        with self.start(0, row, options) as job:
            # It is saved before the next step begins.
            losses = [step.fields["lm loss"] for step in job.take(steps + 1)]
        print(f"  {row.name}: loss {losses[0]:.3f} to {losses[-2]:.3f}", flush=True)
        if row.topk == 1:
            return
        matrix = folder / "counts" / f"iter_{steps:07d}.json"
        for copies, ranks_per_node in (("rank", 2 * RANKS), ("node", RANKS)):
            line = ["place", "--matrix", str(matrix), "--output", str(placement_of(folder, copies))]
            line += ["--ranks", str(2 * RANKS), "--ranks-per-node", str(ranks_per_node)]
            if c2r.main(line):
                raise BenchmarkError(f"the experts of {matrix} were not placed")

    def count(self, rows: list[Contender], steps: int) -> dict[str, dict[str, float]]:
        """Numbers of the last of some steps, by contender."""
        found = {}
        for row in rows:
            with self.start(0, row, []) as job:
                last = job.take(steps)[-1]
            found[row.name] = {name: last.fields[name] for name in COUNTED}
            found[row.name]["loss"] = last.fields["lm loss"]
            print(f"  {row.name}: {found[row.name]}", flush=True)
        return found

    def time(
        self,
        rows: list[Contender],
        trained: Path | None,
        mbit: float,
        repetitions: int,
        steps: int,
    ) -> list[Timed]:
        """All contenders in turns, as overlap_cluster has them, without a limit too."""
        turns: list[TimedTurn] = []
        sent: dict[str, dict[str, float]] = {}
        with ExitStack() as alive:
            jobs: list[tuple[Contender, Job]] = []
            self.hosts.limit(mbit * 1e6)
            for number, row in enumerate(rows):
                options = [] if trained is None else _goes_on(model_folder(trained, row))
                job = alive.enter_context(self.start(number, row, options, trained is None))
                job.take(WARMUP_PLAIN if row.position == "none" else WARMUP)
                job.pause()
                jobs.append((row, job))
                print(f"  {row.name}", flush=True)
            for turn, last in take_turns(self.hosts, jobs, (mbit, mbit * 1e6), repetitions, steps):
                turns.append(turn)
                found = {name: last.fields[name] for name in COUNTED if name in last.fields}
                sent[turn.contender] = found
        return [
            Timed(row, unlimited_speed(turns, row), sent[row.contender])
            for row in summarize(turns, rows)
        ]


def _goes_on(folder: Path) -> list[str]:
    """With a trained model that stays as it is.

    Raises:
        BenchmarkError: there is none.
    """
    checkpoints = folder / "checkpoints"
    if not checkpoints.exists():
        raise BenchmarkError(f"{folder} has no checkpoints: train them with --train N --output.")
    return shlex.split(f"--load {checkpoints} --finetune --no-load-optim --no-load-rng --lr 0")


def unlimited_speed(turns: list[TimedTurn], row: TurnsRow) -> Ratio:
    """A contender's against its baseline, both without a limit."""
    free = {
        (one.contender, one.repetition): statistics.median(one.train)
        for one in turns
        if not one.limited
    }
    return Ratio.of(
        free[row.baseline, repetition] / seconds
        for (name, repetition), seconds in free.items()
        if name == row.contender
    )


def bytes_table(found: dict[str, dict[str, float]]) -> str:
    """Against the row for every expert of the same top-k."""
    rows = []
    for name, own in found.items():
        base = found[f"{name.split()[0]} expert"]
        cells = [name, f"{own['copies per token']:.2f}"]
        for field in COUNTED[:2]:
            cells += [f"{own[field]:.4g}", f"{base[field] / own[field]:.2f}x"]
        rows.append(cells)
    return table(
        ["sent", "rows of a token", "MB to other ranks", "", "MB to the other host", ""], rows
    )


def times_table(found: list[Timed]) -> str:
    """Stock Megatron's step over each one's."""

    def ratio(one: Ratio) -> str:
        return f"{one.median:.2f}x ({one.low:.2f} to {one.high:.2f})"

    rows = [
        {
            "contender": one.row.contender,
            "step (ms)": f"{one.row.train * 1e3:.0f}",
            "over stock": ratio(one.row.speed),
            "inference over stock": ratio(one.row.inference_speed),
            "of its own without limit": f"{one.row.unlimited.median:.2f}x",
            "over stock, no limit": ratio(one.fast),
            "hidden": "-" if one.row.hidden is None else f"{one.row.hidden:.0%}",
            **{
                heading: f"{one.sent[name]:.4g}" if name in one.sent else "-"
                for heading, name in zip(SENT, COUNTED[::-1], strict=True)
            },
        }
        for one in found
    ]
    return table(list(rows[0]), [list(row.values()) for row in rows])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="c2r_cluster", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--mbit", type=float, default=300.0, metavar="MBIT", help="rate of each direction")
    add("--bytes", action="store_true", help="count what is sent, in place of timing")
    add("--topk", type=int, nargs="+", default=[2, 8], metavar="K", help="experts of a token")
    add(
        "--only",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help="of " + ", ".join(KINDS),
    )
    add("--train", type=int, metavar="N", help="train models for N steps, in place of timing")
    add("--trained", type=Path, metavar="FOLDER", help="time models of --train: its --output")
    add("--steps", type=int, metavar="N", help="of a turn, 1; with --bytes of a run, 50")
    add_common(parser, SIZES)
    parser.set_defaults(repetitions=7)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    if args.train is not None and (args.train < 2 or args.train % 2):
        raise BenchmarkError(f"--train {args.train} is no even number from 2 on.")
    folder = args.output.resolve()
    results: dict[str, Any] = {
        "environment": describe(),
        "command": shlex.join(["c2r_cluster", *sys.argv[1:]]),
        "sizes": asdict(sizes),
        "ranks_of_a_host": RANKS,
    }
    trained = args.trained and args.trained.resolve()
    texts = []
    with two_hosts() as hosts:
        prefix = write_text(folder / "text")
        bench = C2RBench(hosts, sizes, prefix, folder, shlex.split(args.megatron_options))
        for topk in args.topk:
            print(f"== top-{topk}", flush=True)
            if args.bytes:
                found = bench.count(counted(topk), args.steps or 50)
                results[f"bytes, top-{topk}"] = found
                texts.append(bytes_table(found))
                continue
            for kind in args.only:
                rows = contenders(topk, kind, trained)
                if args.train:
                    bench.train(rows[kind != "plain"], args.train)
                    continue
                timed = bench.time(rows, trained, args.mbit, args.repetitions, args.steps or 1)
                results[f"times, top-{topk}, {kind}"] = [asdict(one) for one in timed]
                texts.append(times_table(timed))
    if args.train:
        return 0
    path = folder / ("bytes.json" if args.bytes else "times.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(texts))
    print("written:", path)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_code("c2r_cluster", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
