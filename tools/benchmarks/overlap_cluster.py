"""Two hosts, a slow link, real training: how much of the all-to-all a shortcut hides.

    python -m tools.benchmarks.overlap_cluster [--quick]

Two network namespaces stand for two hosts (network.py). Every contender is a Megatron command line
(contenders.py), run by `torchrun --nnodes 2`, one rank a host, on real text: forward, backward,
optimizer, and after each step a forward-only pass. The link's rates are found first, so that
communication is the wanted share of the top-2 MoE layer's time (calibration.py). Then contenders
take turns, repetition by repetition and link by link, so that a drift of the machine hits all.

What the numbers mean and what they leave out: docs/benchmarks.md. Needs root and iproute2.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path

from tools.benchmarks.calibration import CalibrationError, LayerTime, find_rate
from tools.benchmarks.contenders import (
    Contender,
    Sizes,
    contenders,
    fixed_slots,
    positions_of,
    run_options,
)
from tools.benchmarks.environment import describe
from tools.benchmarks.goals import judge
from tools.benchmarks.job import JobError, two_node_job
from tools.benchmarks.network import NetworkError, TwoHosts, two_hosts
from tools.benchmarks.report import link_name, write_report
from tools.benchmarks.results import UNLIMITED, Launch, summarize
from tools.benchmarks.step_log import Step, read_curve
from tools.benchmarks.text import write_text

SCRIPT = ["pretrain_gpt_scmoe.py"]
METER = ["-m", "tools.benchmarks.meter_moe_layer"]
FIRST_RATE = 400e6  # bits per second, where the search for the rates begins
SHARE_TOLERANCE = 0.01
CALIBRATION_STEPS = 1000  # the run is ended when the rates are found


class UsageError(Exception):
    """A mistake on the command line; one line."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    shares: Sequence[float]
    repetitions: int
    warmup: int
    """First steps of each launch, not counted: five of them choose the expert slot."""
    steps: int
    """Counted steps of each launch."""
    calibration_steps: int
    """Counted steps of a rate that is tried."""


FULL = Settings((0.15, 0.30, 0.60, 0.75), repetitions=3, warmup=6, steps=5, calibration_steps=5)
QUICK = Settings((0.60,), repetitions=1, warmup=6, steps=2, calibration_steps=2)
QUICK_CONTENDERS = ("top2", "shared", "pos1", "pos2")


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    hosts: TwoHosts
    sizes: Sizes
    prefix: Path
    folder: Path
    megatron_options: list[str]

    def options(self, contender: Contender, name: str, iterations: int) -> list[str]:
        run = run_options(self.prefix, self.folder / "cache", self.folder / name, iterations)
        return [*self.sizes.options(), *run, *self.megatron_options, *contender.options]

    def calibrate(self, top2: Contender, settings: Settings) -> dict[float | None, LayerTime]:
        """Links by wanted share; one run of top-2 whose link changes while it runs."""
        options = self.options(top2, "calibration", CALIBRATION_STEPS)
        links: dict[float | None, LayerTime] = {}
        log = self.folder / "calibration.log"
        with two_node_job(self.hosts, METER, options, log) as steps:
            list(islice(steps, settings.warmup))

            def measure(rate: float | None) -> LayerTime:
                self.hosts.limit(rate)
                next(steps)  # began before the link had changed, or while it did
                time = layer_time(rate, list(islice(steps, settings.calibration_steps)))
                print(f"  {link_name(time.share, time)}", flush=True)
                return time

            links[UNLIMITED] = measure(None)
            rate = FIRST_RATE
            for share in sorted(settings.shares):
                found = find_rate(measure, share, links[UNLIMITED], rate, SHARE_TOLERANCE)
                assert found.rate is not None
                links[share], rate = found, found.rate
        return links

    def launch(
        self,
        contender: Contender,
        link: LayerTime,
        share: float | None,
        repetition: int,
        settings: Settings,
    ) -> Launch:
        """One contender on one link."""
        self.hosts.limit(link.rate)
        name = f"{contender.name.replace('/', '-')}.{share}.{repetition}"
        options = self.options(contender, name, settings.warmup + settings.steps)
        with two_node_job(self.hosts, SCRIPT, options, self.folder / f"{name}.log") as all_steps:
            counted = list(all_steps)[settings.warmup :]
        curves = [
            read_curve(self.folder / name, tag) for tag in ("a2a-seconds", "a2a-exposed-seconds")
        ]
        exchange, exposed = (
            [curve[step.iteration] for step in counted if step.iteration in curve]
            for curve in curves
        )
        return Launch(
            contender=contender.name,
            share=share,
            repetition=repetition,
            train=[step.train for step in counted],
            layers=[step.layers for step in counted],
            inference=[step.inference for step in counted],
            exchange=exchange,
            exposed=exposed,
        )


def layer_time(rate: float | None, steps: list[Step]) -> LayerTime:
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


def measure_all(
    bench: Bench,
    rows: list[Contender],
    links: dict[float | None, LayerTime],
    settings: Settings,
) -> list[Launch]:
    """Everybody once on every link, then all over again."""
    launches = []
    for repetition in range(settings.repetitions):
        for share, link in links.items():
            for row in rows:
                launch = bench.launch(row, link, share, repetition, settings)
                launches.append(launch)
                print(
                    f"  {repetition + 1}/{settings.repetitions}  {link_name(share, link)}  "
                    f"{row.name}: {statistics.median(launch.train) * 1e3:.0f} ms, inference "
                    f"{statistics.median(launch.inference) * 1e3:.0f} ms",
                    flush=True,
                )
    return launches


def choose_rows(args: argparse.Namespace, sizes: Sizes) -> list[Contender]:
    """The table, with the slots and contenders that were asked for, without those that were not.

    Raises:
        UsageError: a name that does not exist.
    """
    table = contenders(sizes)
    added: list[Contender] = []
    for text in args.contender:
        added.append(_derived(text, table + added))
    for position in args.slots:
        if position not in positions_of(sizes):
            raise UsageError(f"--slots {position}: not a position of this layout.")
        added += fixed_slots(next(row for row in table if row.name == position))
    rows = table + added
    usual = [row.name for row in table if not args.quick or row.name in QUICK_CONTENDERS]
    names = [*(args.only or usual), *(row.name for row in added)]
    known = {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise UsageError(f"--only {name}: choose from {', '.join(known)}.")
    # The rates are found with top2, and who is compared needs whom it is compared with.
    wanted = {"top2", *names, *(known[name].baseline for name in names)}
    return [row for row in rows if row.name in wanted]


def _derived(text: str, rows: list[Contender]) -> Contender:
    """NAME=BASE OPTIONS: another contender's command line with further options."""
    name, separator, rest = text.partition("=")
    base, *options = shlex.split(rest) or [""]
    known = {row.name: row for row in rows}
    if not separator or base not in known or not name.strip():
        raise UsageError(
            f"--contender {text!r}: write 'NAME=BASE OPTIONS', BASE one of {', '.join(known)}."
        )
    return Contender(name.strip(), (*known[base].options, *options), known[base].baseline)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="overlap_cluster", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one share, one repetition, few contenders, 3 minutes")
    add("--output", type=Path, default=Path("runs/overlap_cluster"), help="folder of the results")
    add("--shares", type=float, nargs="+", help="of communication in the top-2 MoE layer's time")
    add("--repetitions", type=int)
    add("--warmup", type=int, help="first steps of each launch, not counted")
    add("--steps", type=int, help="counted steps of each launch")
    add("--only", nargs="+", metavar="NAME", help="these contenders, and their baselines")
    add(
        "--contender",
        action="append",
        default=[],
        metavar="'NAME=BASE OPTIONS'",
        help="one more contender: BASE's command line with further options",
    )
    add("--slots", nargs="+", default=[], metavar="POSITION", help="also with every fixed slot")
    add("--megatron-options", default="", help="further options of every contender, one string")
    sizes = parser.add_argument_group("sizes")
    for field in fields(Sizes):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            sizes.add_argument(flag, action="store_true")
        else:
            sizes.add_argument(flag, type=int, default=field.default)
    return parser.parse_args(argv)


def settings_from_args(args: argparse.Namespace) -> Settings:
    """The defaults of --quick or of a full run, with what was given in place of them.

    Raises:
        UsageError: nothing would be measured.
    """
    settings = QUICK if args.quick else FULL
    given = {
        name: value
        for name in ("shares", "repetitions", "warmup", "steps")
        if (value := getattr(args, name)) is not None
    }
    settings = replace(settings, **given)
    if min(settings.repetitions, settings.steps, settings.warmup) < 1:
        raise UsageError("--repetitions, --steps and --warmup are at least 1.")
    if not all(0 < share < 1 for share in settings.shares):
        raise UsageError("--shares are between 0 and 1, for example 0.6.")
    return settings


def run(args: argparse.Namespace) -> None:
    settings = settings_from_args(args)
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    rows = choose_rows(args, sizes)
    environment = describe()
    with two_hosts() as hosts:
        folder = args.output.resolve()
        print("== text", flush=True)
        prefix = write_text(folder / "text")
        bench = Bench(hosts, sizes, prefix, folder, shlex.split(args.megatron_options))
        print("== rates of the link", flush=True)
        links = bench.calibrate(rows[0], settings)
        print(f"== {len(rows) * len(links) * settings.repetitions} runs", flush=True)
        launches = measure_all(bench, rows, links, settings)
    table = summarize(launches, rows)
    described = asdict(settings) | asdict(sizes)
    paths = write_report(folder, environment, described, links, launches, table, judge(table))
    print(paths[0].read_text())
    print("written:", *paths)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (CalibrationError, JobError, NetworkError, UsageError, OSError) as error:
        print(f"overlap_cluster: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("overlap_cluster: interrupted, the hosts are removed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
