"""Two hosts, a slow link, real training: how much of the all-to-all a shortcut hides.

    python -m tools.benchmarks.overlap_cluster [--quick]

Two network namespaces stand for two hosts (network.py). Every contender is a Megatron command line
(contenders.py), run by `torchrun --nnodes 2`, one rank a host, on real text: forward, backward,
optimizer, and after each step a forward-only pass. The link's rates are found first, so that
communication is the wanted share of the top-2 MoE layer's time (calibration.py). Then, link by
link, all contenders are started and take turns of a few steps while the others stand still
(job.py), so that a drift of the machine hits all. Each turn goes on for as long without the limit.

What the numbers mean and what they leave out: docs/benchmarks.md. Needs root and iproute2.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tools.benchmarks.calibration import LayerTime, find_rate
from tools.benchmarks.cluster_report import link_name, rate_name, write_report
from tools.benchmarks.contenders import (
    Contender,
    Sizes,
    contenders,
    fixed_slots,
    positions_of,
    run_options,
    wider_contenders,
)
from tools.benchmarks.goals import judge
from tools.benchmarks.job import Job
from tools.benchmarks.network import BenchmarkError, TwoHosts, exit_code, two_hosts
from tools.benchmarks.provenance import add_output, describe
from tools.benchmarks.real_text import write_text
from tools.benchmarks.step_log import TrainingStep
from tools.benchmarks.turns import TimedTurn, summarize, take_turns

SCRIPT = ["pretrain_gpt_scmoe.py"]
METER = ["-m", "tools.benchmarks.meter_moe_layer"]
FIRST_RATE = 400e6  # bits per second, where the search for the rates begins
SHARE_TOLERANCE = 0.01
ITERATIONS = 10_000  # a run is ended when it has been measured


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    shares: Sequence[float]
    repetitions: int
    """Turns of each contender on each link."""
    warmup: int
    """First steps of each run, not counted: eight of them measure, and choose the expert slot."""
    steps: int
    """Counted steps of a turn with the limit, and as many without; each is preceded by one that is
    not counted."""
    calibration_steps: int
    """Counted steps of a rate that is tried."""
    rates: Sequence[float] = ()
    """Bits per second, in place of the shares."""


FULL = Settings((0.15, 0.30, 0.60, 0.75), repetitions=7, warmup=9, steps=1, calibration_steps=5)
QUICK = Settings((0.60,), repetitions=3, warmup=9, steps=1, calibration_steps=3)
QUICK_CONTENDERS = ("top2", "shared", "pos1", "pos2")


@dataclass(frozen=True)
class TwoHostBench:
    """What all runs share."""

    hosts: TwoHosts
    sizes: Sizes
    prefix: Path
    folder: Path
    megatron_options: list[str]

    def job(self, number: int, contender: Contender, log: str, script: list[str]) -> Job:
        run = run_options(self.prefix, self.folder / "cache", ITERATIONS)
        options = [*self.sizes.options(), *run, *self.megatron_options]
        options += contender.command_line(self.sizes)
        return Job(self.hosts, number, script, options, self.folder / f"{log}.log")

    def calibrate(
        self, top2: Contender, settings: Settings
    ) -> tuple[LayerTime, dict[float, LayerTime]]:
        """The link without a limit, and links by wanted share; one run whose link changes."""
        with self.job(0, top2, "calibration", METER) as job:
            job.take(settings.warmup)

            def measure(rate: float | None) -> LayerTime:
                self.hosts.limit(rate)
                job.take(1)  # began before the link had changed, or while it did
                time = layer_time(rate, job.take(settings.calibration_steps))
                print(f"  {rate_name(time)}: {time.share:.1%}", flush=True)
                return time

            unlimited = measure(None)
            if settings.rates:
                found_at = [measure(given) for given in settings.rates]
                return unlimited, {round(time.share, 3): time for time in found_at}
            links: dict[float, LayerTime] = {}
            rate = FIRST_RATE
            for share in sorted(settings.shares):
                found = find_rate(measure, share, unlimited, rate, SHARE_TOLERANCE)
                assert found.rate is not None
                links[share], rate = found, found.rate
        return unlimited, links

    def measure(
        self, rows: list[Contender], share: float, link: LayerTime, settings: Settings
    ) -> list[TimedTurn]:
        """All contenders on one link."""
        with ExitStack() as alive:
            jobs: list[tuple[Contender, Job]] = []
            self.hosts.limit(link.rate)
            for number, row in enumerate(rows):
                log = f"{row.name.replace('/', '-')}.{share}"
                job = alive.enter_context(self.job(number, row, log, SCRIPT))
                job.take(settings.warmup)
                job.pause()
                jobs.append((row, job))
            found = take_turns(
                self.hosts, jobs, (share, link.rate), settings.repetitions, settings.steps
            )
            return [turn for turn, _ in found]


def layer_time(rate: float | None, steps: list[TrainingStep]) -> LayerTime:
    """Medians of the fields that meter_moe_layer.py adds to the loss line."""

    def median(field: str) -> float:
        return statistics.median(step.fields[f"{field} (ms)"] for step in steps) / 1e3

    exchange = median("moe a2a")
    return LayerTime(
        rate=rate,
        exchange=exchange,
        other=median("moe layer") - exchange,
        inference_share=median("moe a2a inference") / median("moe layer inference"),
    )


def choose_rows(args: argparse.Namespace, sizes: Sizes) -> list[Contender]:
    """The table, with the slots and contenders that were asked for, without those that were not.

    Raises:
        BenchmarkError: a name that does not exist.
    """
    table = contenders(sizes) + wider_contenders(sizes)
    added: list[Contender] = []
    for text in args.contender:
        added.append(_derived(text, table + added))
    for position in args.slots:
        if position not in positions_of(sizes):
            raise BenchmarkError(f"--slots {position}: not a position of this layout.")
        added += fixed_slots(next(row for row in table if row.name == position))
    rows = table + added
    usual = [row.name for row in table if not args.quick or row.name in QUICK_CONTENDERS]
    names = [*(args.only or usual), *(row.name for row in added)]
    known = {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise BenchmarkError(f"--only {name}: choose from {', '.join(known)}.")
    # The rates are found with top2, and who is compared needs whom it is compared with.
    wanted = {"top2", *names, *(known[name].baseline for name in names)}
    return [row for row in rows if row.name in wanted]


def _derived(text: str, rows: list[Contender]) -> Contender:
    """NAME=BASE OPTIONS: another contender's command line with further options.

    Raises:
        BenchmarkError: it is not written so.
    """
    name, separator, rest = text.partition("=")
    base, *options = shlex.split(rest) or [""]
    known = {row.name: row for row in rows}
    if not separator or base not in known or not name.strip():
        raise BenchmarkError(
            f"--contender {text!r}: write 'NAME=BASE OPTIONS', BASE one of {', '.join(known)}."
        )
    options = [*known[base].options, *options]
    return replace(known[base], name=name.strip(), options=tuple(options))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="overlap_cluster", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one share, few contenders, 5 minutes")
    share = "of communication in the top-2 MoE layer's time"
    add("--shares", type=float, nargs="+", metavar="SHARE", help=share)
    rate = "rates of each direction of the link, in place of --shares"
    add("--mbit", type=float, nargs="+", metavar="MBIT", help=rate)
    add("--warmup", type=int, metavar="N", help="first steps of each run, not counted")
    add("--steps", type=int, metavar="N", help="counted steps of each turn")
    add("--only", nargs="+", metavar="NAME", help="these contenders, and their baselines")
    add(
        "--contender",
        action="append",
        default=[],
        metavar="'NAME=BASE OPTIONS'",
        help="one more contender: BASE's command line with further options",
    )
    add("--slots", nargs="+", default=[], metavar="POSITION", help="also with every fixed slot")
    add_common(parser, Sizes())
    return parser.parse_args(argv)


def add_common(parser: argparse.ArgumentParser, defaults: Sizes) -> None:
    """Options of all programs on two hosts, one for every field of Sizes among them."""
    add = parser.add_argument
    add_output(parser)
    add("--repetitions", type=int, metavar="N", help="turns of each contender on each link")
    add("--megatron-options", default="", metavar="OPTIONS", help="of every contender, one string")
    sizes = parser.add_argument_group("sizes")
    for field in fields(Sizes):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            sizes.add_argument(flag, action="store_true", help=field.metadata["help"])
        else:
            text = f"{field.metadata['help']} (default: %(default)s)"
            default = getattr(defaults, field.name)
            sizes.add_argument(flag, type=int, default=default, metavar="N", help=text)


def settings_from_args(args: argparse.Namespace) -> Settings:
    """The defaults of --quick or of a full run, with what was given in place of them.

    Raises:
        BenchmarkError: nothing would be measured.
    """
    settings = QUICK if args.quick else FULL
    given = {
        name: value
        for name in ("shares", "repetitions", "warmup", "steps")
        if (value := getattr(args, name)) is not None
    }
    settings = replace(settings, **given, rates=[mbit * 1e6 for mbit in args.mbit or ()])
    if settings.rates and args.shares:
        raise BenchmarkError("--mbit and --shares: give one of them.")
    if not all(rate > 0 for rate in settings.rates):
        raise BenchmarkError("--mbit is positive.")
    if min(settings.repetitions, settings.steps, settings.warmup) < 1:
        raise BenchmarkError("--repetitions, --steps and --warmup are at least 1.")
    if not all(0 < share < 1 for share in settings.shares):
        raise BenchmarkError("--shares are between 0 and 1, for example 0.6.")
    return settings


def run(args: argparse.Namespace) -> int:
    settings = settings_from_args(args)
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    rows = choose_rows(args, sizes)
    environment = describe()
    with two_hosts() as hosts:
        folder = args.output.resolve()
        print("== text", flush=True)
        prefix = write_text(folder / "text")
        bench = TwoHostBench(hosts, sizes, prefix, folder, shlex.split(args.megatron_options))
        print("== rates of the link", flush=True)
        unlimited, links = bench.calibrate(rows[0], settings)
        turns: list[TimedTurn] = []
        for share, link in links.items():
            print(f"== {link_name(share, link)}: {len(rows)} runs", flush=True)
            turns += bench.measure(rows, share, link, settings)
    table = summarize(turns, rows)
    described = asdict(settings) | asdict(sizes)
    goals = judge(table)
    paths = write_report(folder, environment, described, unlimited, links, turns, table, goals)
    print(paths[0].read_text())
    print("written:", *paths)
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_code("overlap_cluster", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
