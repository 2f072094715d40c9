"""Two hosts of two ranks each, a slow link: what a token that is sent once is worth.

    python -m tools.benchmarks.c2r_cluster --mbit 300 [--topk 2 8] [--placement FILE]
    python -m tools.benchmarks.c2r_cluster --bytes [--topk 2 8] [--placement FILE]

The hosts, the model and the turns of overlap_cluster. For every top-k stock Megatron, the same with
--scmoe-dispatch-copies rank and node, and a shortcut with one routed expert less and a shared one,
all four ways; with --placement each that is not stock once more with the experts where the file
puts them. Time: step of stock Megatron / step, between turns of one repetition, with uniform random
routing; a placement wants a router that was trained, --load in --megatron-options.

--bytes counts in place of timing: what a rank sends to other ranks and to the other host in an
iteration, and rows of a token, of a router that trains for --steps steps on real text. Every way
routes alike: the numbers do not depend on what else the machine does.

Needs root and iproute2.
"""

import argparse
import json
import shlex
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_scmoe.model.dispatch import COPIES
from megatron_scmoe.words import table
from tools.benchmarks.contenders import Contender, Sizes, run_options
from tools.benchmarks.job import Job, JobError
from tools.benchmarks.network import NetworkError, TwoHosts, two_hosts
from tools.benchmarks.overlap_cluster import ITERATIONS, SCRIPT, add_sizes
from tools.benchmarks.provenance import describe
from tools.benchmarks.real_text import write_text
from tools.benchmarks.turns import TimedTurn, TurnsRow, summarize

RANKS = 2
"""Of a host."""
SIZES = Sizes(ffn_hidden_size=256, num_experts=16, micro_batch_size=4)
COUNTED = ("a2a (MB)", "a2a between nodes (MB)", "copies per token")
WARMUP = 9
"""Eight steps measure, and choose the expert slot."""


def contenders(topk: int, placement: str | None) -> list[Contender]:
    """For times: stock Megatron first, which all are compared with."""
    stock = f"top{topk}"
    alone = ("--scmoe-combine", "add")
    rows = [Contender(stock, "none", topk, False, baseline=stock)]
    rows += [
        Contender(
            f"{stock} {copies}",
            "none",
            topk,
            False,
            baseline=stock,
            options=(*_sent(copies), *alone),
        )
        for copies in COPIES
        if copies != "expert"
    ]
    if topk > 1:
        rows += [
            Contender(
                f"pos2 top{topk - 1} {copies}",
                "pos2",
                topk - 1,
                True,
                baseline=stock,
                options=_sent(copies),
            )
            for copies in COPIES
        ]
    return [*rows, *_placed(rows[1:], placement)]


def counted(topk: int, placement: str | None) -> list[Contender]:
    """For bytes: one model, every way of sending."""
    rows = [
        Contender(f"top{topk} {copies}", "pos2", topk, True, options=_sent(copies))
        for copies in COPIES
    ]
    return [*rows, *_placed(rows, placement)]


def _sent(copies: str) -> tuple[str, ...]:
    return "--scmoe-dispatch-copies", copies


def _placed(rows: list[Contender], placement: str | None) -> list[Contender]:
    if placement is None:
        return []
    return [
        Contender(
            f"{row.name} placed",
            row.position,
            row.topk,
            row.shared_expert,
            baseline=row.baseline,
            options=(*row.options, "--scmoe-expert-placement", placement),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class C2RBench:
    """What all runs share."""

    hosts: TwoHosts
    sizes: Sizes
    prefix: Path
    folder: Path
    megatron_options: list[str]
    balanced: bool
    """Whether routing is uniform, in place of the router's."""

    def job(self, number: int, row: Contender) -> Job:
        ranks = 2 * RANKS
        batch = ranks * self.sizes.micro_batch_size * self.sizes.num_micro_batches
        options = [
            *self.sizes.options(),
            *run_options(self.prefix, self.folder / "cache", ITERATIONS),
        ]
        if not self.balanced:
            options.remove("--moe-router-force-load-balancing")
        options += ["--expert-model-parallel-size", str(ranks), "--global-batch-size", str(batch)]
        options += [*self.megatron_options, *row.command_line(self.sizes)]
        log = self.folder / f"{row.name.replace(' ', '-')}.log"
        return Job(self.hosts, number, SCRIPT, options, log, RANKS)

    def count(self, rows: list[Contender], steps: int) -> dict[str, dict[str, float]]:
        """Numbers of the last of some steps, by contender."""
        found = {}
        for row in rows:
            with self.job(0, row) as job:
                last = job.take(steps)[-1]
            found[row.name] = {name: last.fields[name] for name in COUNTED}
            found[row.name]["loss"] = last.fields["lm loss"]
            print(f"  {row.name}: {found[row.name]}", flush=True)
        return found

    def time(
        self, rows: list[Contender], mbit: float, repetitions: int, steps: int
    ) -> list[TurnsRow]:
        """All contenders in turns, as overlap_cluster has them, without a limit too."""
        turns: list[TimedTurn] = []
        with ExitStack() as alive:
            jobs = []
            self.hosts.limit(mbit * 1e6)
            for number, row in enumerate(rows):
                job = alive.enter_context(self.job(number, row))
                job.take(WARMUP)
                job.pause()
                jobs.append((row, job))
            for repetition in range(repetitions):
                # There and back, so that a drift favours nobody.
                for row, job in jobs if repetition % 2 == 0 else reversed(jobs):
                    job.resume()
                    for rate in (mbit * 1e6, None):
                        self.hosts.limit(rate)
                        job.take(1)  # stood still, or the link changed meanwhile
                        limited, taken = rate is not None, job.take(steps)
                        turns.append(TimedTurn.of(row.name, mbit, limited, repetition, taken))
                    job.pause()
                    self.hosts.limit(mbit * 1e6)
                print(f"  {repetition + 1}/{repetitions}", flush=True)
        return summarize(turns, rows)


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


def times_table(found: list[TurnsRow]) -> str:
    """Stock Megatron's step over each one's."""
    rows = [
        [
            row.contender,
            f"{row.train * 1e3:.0f}",
            f"{row.speed.median:.2f}x ({row.speed.low:.2f} to {row.speed.high:.2f})",
            f"{row.unlimited.median:.2f}x",
            "-" if row.hidden is None else f"{row.hidden:.0%}",
        ]
        for row in found
    ]
    return table(
        ["contender", "step (ms)", "over stock", "of its own without limit", "hidden"], rows
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="c2r_cluster", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--mbit", type=float, default=300.0, metavar="MBIT", help="rate of each direction")
    add("--bytes", action="store_true", help="count what is sent, in place of timing")
    add("--topk", type=int, nargs="+", default=[2, 8], metavar="K", help="experts of a token")
    add("--placement", metavar="FILE", help="made by tools/c2r.py place for 4 ranks")
    add("--repetitions", type=int, default=7, metavar="N", help="turns of each contender")
    add("--steps", type=int, metavar="N", help="of a turn, 1; with --bytes of a run, 50")
    add("--megatron-options", default="", metavar="OPTIONS", help="of every contender, one string")
    add(
        "--output",
        type=Path,
        default=Path("runs/c2r_cluster"),
        metavar="FOLDER",
        help="folder of the results",
    )
    add_sizes(parser, SIZES)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    folder = args.output.resolve()
    results: dict[str, Any] = {
        "environment": describe(),
        "command": shlex.join(["c2r_cluster", *sys.argv[1:]]),
        "sizes": asdict(sizes),
        "ranks_of_a_host": RANKS,
    }
    texts = []
    with two_hosts() as hosts:
        prefix = write_text(folder / "text")
        options = shlex.split(args.megatron_options)
        bench = C2RBench(hosts, sizes, prefix, folder, options, balanced=not args.bytes)
        for topk in args.topk:
            print(f"== top-{topk}", flush=True)
            if args.bytes:
                found = bench.count(counted(topk, args.placement), args.steps or 50)
                results[f"bytes, top-{topk}"] = found
                texts.append(bytes_table(found))
            else:
                rows = contenders(topk, args.placement)
                timed = bench.time(rows, args.mbit, args.repetitions, args.steps or 1)
                results[f"times, top-{topk}"] = [asdict(row) for row in timed]
                texts.append(times_table(timed))
    path = folder / ("bytes.json" if args.bytes else "times.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(texts))
    print("written:", path)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (JobError, NetworkError, OSError) as error:
        print(f"c2r_cluster: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("c2r_cluster: interrupted, the hosts are removed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
