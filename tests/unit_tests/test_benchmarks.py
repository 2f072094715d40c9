"""Benchmarks without their network and their clock: parsing, search for rates, tables, goals.

A run's log, jobs that stand still, ratios, reports, one-line errors.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_scmoe.overlap.recorder import Activity, Exchange, Span, UnitRecord
from megatron_scmoe.overlap.schedule import window
from tools.benchmarks import c2r_cluster, job, network, overlap_cluster
from tools.benchmarks.calibration import LayerTime, find_rate
from tools.benchmarks.cluster_report import write_pair, write_report
from tools.benchmarks.contenders import Contender, Sizes, contenders, fixed_slots
from tools.benchmarks.goals import judge
from tools.benchmarks.paper_shapes import communication_share, operator_times
from tools.benchmarks.provenance import as_markdown
from tools.benchmarks.step_log import StepReader, TrainingStep
from tools.benchmarks.turns import TimedTurn, hidden_share, spread, summarize

# What the last rank of a run prints, shortened.
LOG = """\
INFO:megatron.core.timers:(min, max) time across ranks (ms):
    model-and-optimizer-setup ......................: (6748.43, 6749.87)
 [2026-11-24 22:11:18.634180] iteration        1/       2 | consumed samples:           32 | \
elapsed time per iteration (ms): 812.5 | lm loss: 5.174809E+00 | a2a (ms): 91.2 | \
a2a exposed (ms): 52.1 | a2a hidden: 43.0% | expert slots: 2,3 | \
moe layer (ms): 300.500 | moe a2a (ms): 120.250 |
INFO:megatron.core.timers:(min, max) time across ranks (ms):
    forward-backward ...............................: (700.00, 710.00)
    all-grads-sync .................................: (90.00, 110.00)
    optimizer ......................................: (50.00, 51.00)
INFO:megatron.core.timers:(min, max) time across ranks (ms):
    evaluate .......................................: (200.00, 210.00)
---------------------------------------
 validation loss at iteration 1 | lm loss value: 4.430428E+00 | lm loss PPL: 8.396735E+01 |
---------------------------------------
    evaluate .......................................: (300.00, 310.00)
 validation loss at iteration 1 on validation set | lm loss value: 4.430428E+00 |
"""


def test_step_of_a_log() -> None:
    """Times of the slower rank, in seconds; the pass behind the last step is not a step."""
    reader = StepReader()
    steps = [step for line in LOG.splitlines(keepends=True) if (step := reader.feed(line))]
    (step,) = steps
    assert step.iteration == 1
    assert (step.train, step.layers, step.inference) == pytest.approx((0.8125, 0.6, 0.21))
    assert (step.exchange, step.exposed, step.slots) == (0.0912, 0.0521, "2,3")
    assert step.fields["moe layer (ms)"] == 300.5
    assert step.fields["moe a2a (ms)"] == 120.25
    assert "model-and-optimizer-setup" not in step.timers


def test_one_of_several_jobs_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what its processes have started with it."""
    command = "sleep 60 & echo $!; exec sleep 60"
    jobs = [
        subprocess.Popen(
            ["sh", "-c", command],
            env=os.environ | {network.JOB_VARIABLE: str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 12)
    ]
    processes = [(job.pid, int(job.stdout.readline())) for job in jobs if job.stdout]

    def states() -> list[str]:
        names = [Path(f"/proc/{pid}/stat").read_text() for pids in processes for pid in pids]
        return [text.rsplit(")", 1)[1].split()[0] for text in names]

    def becomes(expected: list[str]) -> bool:
        deadline = time.monotonic() + 20
        while states() != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        return states() == expected

    monkeypatch.setattr(network, "_pids", lambda host: [pid for pair in processes for pid in pair])
    hosts = network.TwoHosts(("one", "none"))
    try:
        hosts.signal_job(1, signal.SIGSTOP)
        assert becomes(["T", "T", "S", "S"])
        hosts.signal_job(1, signal.SIGCONT)
        assert becomes(["S"] * 4)
    finally:
        for number in (1, 12):
            hosts.signal_job(number, signal.SIGKILL)
        for job in jobs:
            job.communicate()


def test_a_run_that_ends_too_early_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(hosts: network.TwoHosts, host: int, script: list[str], output: Any, *_: int) -> Any:
        command = ["sh", "-c", f"echo no memory on host {host}; exit {3 + host}"]
        return subprocess.Popen(command, stdout=output, text=True)

    monkeypatch.setattr(job, "start_node", start)
    monkeypatch.setattr(network, "_pids", lambda host: [])
    hosts = network.TwoHosts(("one", "none"))
    with (
        pytest.raises(
            network.BenchmarkError, match=r"exit codes \[3, 4\](.|\n)*no memory on host 1"
        ),
        job.Job(hosts, 0, ["script"], [], tmp_path / "run.log") as run,
    ):
        run.take(1)
    assert (tmp_path / "run.log.0").read_text() == "no memory on host 0\n"


class OneAtATime:
    """Stands for the hosts and their jobs: what was done, and by whom while who was running."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.rate: float | None = None
        self.taken: list[tuple[str, float | None, int]] = []

    def limit(self, rate: float | None) -> None:
        self.rate = rate

    def job(self, number: int, row: Contender, log: str, script: list[str]) -> "OneRun":
        return OneRun(self, row.name)


class OneRun:
    def __init__(self, machine: OneAtATime, name: str) -> None:
        self.machine, self.name = machine, name

    def __enter__(self) -> "OneRun":
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.running.discard(self.name)

    def pause(self) -> None:
        self.machine.running.remove(self.name)

    def resume(self) -> None:
        self.machine.running.add(self.name)

    def take(self, count: int) -> list[TrainingStep]:
        assert self.machine.running == {self.name}
        first = len(self.machine.taken)
        self.machine.taken += [(self.name, self.machine.rate, first + i) for i in range(count)]
        timers = {"forward-backward": 2.0, "all-grads-sync": 1.0, "evaluate": 1.0}
        # The time of a step is its place in `taken`.
        fields = "elapsed time per iteration (ms)"
        return [TrainingStep(i, {fields: 1e3 * (first + i)}, timers) for i in range(count)]


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One runs at a time, with the link's limit and without; the step of a change is dropped."""
    machine = OneAtATime()
    hosts: Any = machine
    bench = overlap_cluster.TwoHostBench(hosts, Sizes(), tmp_path, tmp_path, [])
    monkeypatch.setattr(type(bench), "job", lambda _, *options: machine.job(*options))
    settings = overlap_cluster.Settings((0.6,), 2, warmup=3, steps=2, calibration_steps=1)
    turns = bench.measure(ROWS, 0.6, layer(4e8), settings)
    names = [row.name for row in ROWS]
    assert [(one.contender, one.repetition) for one in turns[::2]] == [
        *((name, 0) for name in names),
        *((name, 1) for name in reversed(names)),
    ]
    assert [one.limited for one in turns] == [True, False] * 6
    warmup = machine.taken[: 3 * len(names)]
    assert [(name, rate) for name, rate, _ in warmup] == [(n, 4e8) for n in names for _ in range(3)]
    for one in turns:
        steps = [machine.taken[round(second)] for second in one.train]
        rate = 4e8 if one.limited else None
        assert [(name, at) for name, at, _ in steps] == [(one.contender, rate)] * 2
        # The one before ran at the same rate already, and does not count.
        before = round(one.train[0]) - 1
        assert machine.taken[before][:2] == (one.contender, rate)
        assert all(before not in map(round, other.train) for other in turns)


def test_hosts_of_two_ranks_have_turns_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that a model was trained for, each with it."""
    machine = OneAtATime()
    hosts: Any = machine
    lines: list[list[str]] = []
    bench = c2r_cluster.C2RBench(hosts, Sizes(), tmp_path, tmp_path, [])

    def start(_: Any, number: int, row: Contender, options: list[str], uniform: bool) -> OneRun:
        lines.append(options)
        assert not uniform
        return machine.job(number, row, "", [])

    monkeypatch.setattr(type(bench), "start", start)
    rows = c2r_cluster.contenders(8, "shortcut", tmp_path)
    with pytest.raises(network.BenchmarkError, match="none-top8 has no checkpoints"):
        bench.time(rows, tmp_path, 300, 2, 1)
    for name in ("none-top8", "pos2-top7"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    found = bench.time(rows, tmp_path, 300, 2, 1)
    assert [one.row.contender for one in found] == [row.name for row in rows]
    assert [Path(line[1]).parent.name for line in lines] == ["none-top8", *["pos2-top7"] * 5]
    # Stock Megatron has two steps before its turn, the others nine.
    before = [name for name, *_ in machine.taken[: 2 + 5 * 9]]
    assert before == ["top8"] * 2 + [row.name for row in rows[1:] for _ in range(9)]
    first = machine.taken[2 + 5 * 9 :][:8]
    assert [rate for _, rate, _ in first] == [300e6, 300e6, None, None] * 2
    assert c2r_cluster.times_table(found).splitlines()[-1].startswith("pos2 top7 node placed")


# The search for a rate. ---------------------------------------------------------------------------

MEGABYTES, OVERHEAD, OTHER = 40, 0.02, 0.5


def layer(rate: float | None, overhead: float = OVERHEAD) -> LayerTime:
    """A link that behaves as the model of the search says."""
    exchange = overhead + (0 if rate is None else MEGABYTES * 8e6 / rate)
    return LayerTime(rate, exchange, OTHER, inference_share=0.5)


@pytest.mark.parametrize("share", [0.15, 0.30, 0.60, 0.75])
@pytest.mark.parametrize("first_rate", [50e6, 400e6, 5e9])
def test_rate_is_found(share: float, first_rate: float) -> None:
    found = find_rate(layer, share, layer(None), first_rate, tolerance=0.01)
    assert found.share == pytest.approx(share, abs=0.01)
    assert found.rate is not None


def test_a_link_that_meets_the_share_is_measured_once() -> None:
    rates = []

    def measure(rate: float) -> LayerTime:
        rates.append(rate)
        return layer(rate)

    exact = find_rate(layer, 0.6, layer(None), 400e6, tolerance=1e-6).rate
    assert exact is not None
    find_rate(measure, 0.6, layer(None), exact, tolerance=0.01)
    assert rates == [exact]


def test_noise_ends_the_search_with_the_nearest_measurement() -> None:
    """Times that do not depend on the rate: no share is found, and the search ends."""
    measured = []

    def measure(rate: float) -> LayerTime:
        measured.append(replace(layer(None), rate=rate, exchange=0.1 + 0.01 * (len(measured) % 2)))
        return measured[-1]

    found = find_rate(measure, 0.6, layer(None), 400e6, tolerance=0.01)
    assert found.exchange == pytest.approx(0.11)
    assert all(time.rate is not None and time.rate > 0 for time in measured)


def test_a_share_below_that_of_the_unlimited_link_is_refused() -> None:
    with pytest.raises(network.BenchmarkError, match="without any limit"):
        find_rate(layer, 0.15, layer(None, overhead=0.2), 400e6, tolerance=0.01)


# From launches to tables. -------------------------------------------------------------------------


def turn(contender: str, limited: bool, repetition: int, seconds: float) -> TimedTurn:
    in_flight = [] if contender in ("top2", "shared") else [0.4, 0.4]
    return TimedTurn(
        contender=contender,
        share=0.6,
        limited=limited,
        repetition=repetition,
        train=[seconds, seconds],
        layers=[0.9 * seconds, 0.9 * seconds],
        inference=[0.3 * seconds, 0.3 * seconds],
        exchange=in_flight,
        exposed=[value / 40 for value in in_flight],
    )


ROWS = [row for row in contenders(Sizes()) if row.name in ("top2", "shared", "pos2")]
# The machine was three times as slow during the second repetition.
TURNS = [
    turn(name, limited, repetition, seconds * (1, 3)[repetition])
    for repetition in range(2)
    for limited, times in ((False, (1.2, 1.1, 1.0)), (True, (1.53, 1.2, 1.02)))
    for name, seconds in zip(("top2", "shared", "pos2"), times, strict=True)
]


def test_ratios_are_taken_within_a_repetition() -> None:
    rows = {row.contender: row for row in summarize(TURNS, ROWS)}
    pos2 = rows["pos2"]
    assert (pos2.speed.median, pos2.speed.low, pos2.speed.high) == pytest.approx((1.5,) * 3)
    assert pos2.unlimited.median == pytest.approx(1.02)
    assert pos2.hidden == pytest.approx(0.975)
    assert rows["top2"].hidden is None
    assert rows["top2"].unlimited.median == pytest.approx(1.275)
    free = c2r_cluster.unlimited_speed(TURNS, pos2)
    assert (free.median, free.low, free.high) == pytest.approx((1.2,) * 3)


def test_a_turn_has_what_its_steps_say() -> None:
    timers = {"forward-backward": 0.7, "all-grads-sync": 0.1, "evaluate": 0.2}
    stock = {"elapsed time per iteration (ms)": 800.0}
    shortcut = stock | {"a2a (ms)": 91.5, "a2a exposed (ms)": 0.5}
    one, other = (
        TimedTurn.of(
            "pos2", 0.6, True, 3, [TrainingStep(number, fields, timers, slots) for number in (7, 8)]
        )
        for fields, slots in ((shortcut, "1,3"), (stock, None))
    )
    assert one.train == [0.8, 0.8] and one.inference == [0.2, 0.2]
    assert one.layers == pytest.approx([0.6, 0.6])
    assert (one.exchange, one.exposed) == ([0.0915, 0.0915], [0.0005, 0.0005])
    assert (other.exchange, other.exposed) == ([], [])
    assert (one.slots, other.slots) == ("1,3", None)


def test_spread_and_hidden_share() -> None:
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert spread([1.0]) == 0
    assert hidden_share([turn("top2", True, 0, 1.0)]) is None


def test_goals() -> None:
    goals = {goal.claim: goal.reached for goal in judge(summarize(TURNS, ROWS))}
    assert goals["60%: training 1.49 times as fast as top-2"]
    assert not goals["60%: inference 1.82 times as fast as top-2"]
    assert goals["60%: pos2 not slower than stock top-1 + shared expert"]
    assert len(goals) == 3  # 60 % is beyond what fits behind the window


def test_goals_where_the_communication_fits() -> None:
    """Against the same run without a limit, and not at all beyond a share of 50 %."""

    def reached(turns: list[TimedTurn]) -> dict[str, bool]:
        rows = summarize([replace(one, share=0.3) for one in turns], ROWS)
        return {goal.claim: goal.reached for goal in judge(rows)}

    hides, near = (
        "30%: pos2 hides 97%",
        "30%: pos2, forward and backward at most 1.03 of the unlimited link",
    )
    goals = reached(TURNS)
    assert goals[hides] and goals[near]
    goals = reached([replace(one, exposed=[x / 20 for x in one.exchange]) for one in TURNS])
    assert not goals[hides] and goals[near]
    slower = [
        replace(one, layers=[1.02 * x for x in one.layers]) if one.limited else one for one in TURNS
    ]
    goals = reached(slower)
    assert goals[hides] and not goals[near]


def test_goal_of_the_adaptive_slot() -> None:
    slots = fixed_slots(ROWS[2])
    assert [row.options[-1] for row in slots] == [str(i) for i in range(len(window("pos2")) + 1)]
    turns = TURNS + [
        turn(row.name, limited, repetition, (0.9 + i / 10) * (1, 3)[repetition])
        for repetition in range(2)
        for limited in (True, False)
        for i, row in enumerate(slots)
    ]
    goals = judge(summarize(turns, [*ROWS, *slots]))
    (goal,) = (goal for goal in goals if "fixed slot" in goal.claim)
    assert not goal.reached
    assert goal.measured == "1.133 (pos2/slot0)"


ENVIRONMENT: dict[str, Any] = {
    "command": "python -m tools.benchmarks.overlap_cluster",
    "commit": "abc",
    "date": "2026-11-24",
    "machine": {
        "processor": "P",
        "cores": 2,
        "memory_gib": 8,
        "kernel": "6",
        "load_average": 0.1,
    },
    "versions": {"torch": "2.11.0"},
}


def test_report(tmp_path: Path) -> None:
    links = {0.6: layer(400e6)}
    rows = summarize(TURNS, ROWS)
    paths = write_report(
        tmp_path, ENVIRONMENT, {"seed": 1}, layer(None), links, TURNS, rows, judge(rows)
    )
    markdown, content = paths[0].read_text(), json.loads(paths[1].read_text())
    assert "Communication 60% of the top-2 MoE layer, 400 Mbit/s" in markdown
    assert "| pos2 | - | 2040 +- " in markdown
    assert content["links"][1]["wanted_share"] == 0.6
    assert content["links"][1]["share"] == pytest.approx(layer(400e6).share)
    assert len(content["turns"]) == len(TURNS)
    assert {"command", "commit", "date", "machine", "versions"} <= set(content["environment"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


@pytest.mark.parametrize("load, busy", [(0.5, False), (0.6, True)])
def test_a_busy_machine_is_named(load: float, busy: bool) -> None:
    machine = {**ENVIRONMENT["machine"], "load_average": load}
    assert ("was busy" in as_markdown({**ENVIRONMENT, "machine": machine})) == busy


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_pair(tmp_path, "name", "text", {"bad": object()})
    assert not list(tmp_path.iterdir())


# Operators of a pair of layers. -------------------------------------------------------------------


def test_a_wait_belongs_to_the_exchange() -> None:
    """Backward, the dispatch is waited for inside the step that started it."""
    names = [*(step.value for step in window("pos3")), "experts", "start_dispatch"]
    record = UnitRecord()
    for at, name in enumerate(names):
        duration = 9.0 if name == "start_dispatch" else 1.0
        record.steps.append(Span(Activity(name, "backward"), 10.0 * at, 10.0 * at + duration))
    for name, blocked in (("dispatch", 6.0), ("combine", 2.5)):
        record.exchanges.append(Exchange(Activity(name, "backward"), 0.0, 7.0, blocked, 100))
    times = operator_times(record, "backward")
    assert times.pop("others") == 9.0 - 6.0 - 2.5
    assert (times.pop("dispatch"), times.pop("combine")) == (7.0, 7.0)
    assert set(times.values()) == {1.0} and len(times) == len(window("pos3")) + 1


def test_communication_share_of_a_pair() -> None:
    one = {"dense_mlp": 50.0, "experts": 2.0, "dispatch": 3.0, "combine": 4.0, "others": 1.0}
    assert communication_share({"forward": one, "backward": one}) == 28 / (28 + 8 + 2)


# The command line. --------------------------------------------------------------------------------


def chosen(*argv: str) -> list[str]:
    args = overlap_cluster.parse_args(list(argv))
    sizes = Sizes(moe_every_layer=args.moe_every_layer)
    return [row.name for row in overlap_cluster.choose_rows(args, sizes)]


def test_contenders() -> None:
    everybody = ["top2", "shared", "pos1", "pos2", "pos3", "top3", "scmoe2"]
    assert chosen() == everybody
    assert chosen("--moe-every-layer") == ["top2", "shared", "pos1", "top3", "scmoe2"]
    assert chosen("--only", "scmoe2") == ["top2", "top3", "scmoe2"]
    assert chosen("--only", "pos2", "--slots", "pos2")[2] == "pos2/slot0"
    names = chosen("--quick", "--contender", "pos2/add=pos2 --scmoe-combine add")
    assert names == ["top2", "shared", "pos1", "pos2", "pos2/add"]
    top2, *_, pos3 = contenders(Sizes())
    line = ["--moe-router-topk", "2", "--scmoe-shortcut-position", "none"]
    assert top2.command_line(Sizes()) == line
    line = ["--moe-router-topk", "1", "--scmoe-shortcut-position", "pos3"]
    assert pos3.command_line(Sizes()) == [*line, *Sizes().shared_expert()]


def test_contenders_that_send_a_token_once() -> None:
    plain = c2r_cluster.contenders(8, "plain", None)
    assert [row.name for row in plain] == ["top8", "top8 rank", "top8 node"]
    shortcut = c2r_cluster.contenders(8, "shortcut", Path("a"))
    assert [row.name for row in shortcut] == [
        "top8",
        *(f"pos2 top7 {copies}" for copies in ("expert", "rank", "node")),
        *(f"pos2 top7 {copies} placed" for copies in ("rank", "node")),
    ]
    assert all(row.baseline == "top8" for row in [*plain, *shortcut])
    assert shortcut[-1].command_line(c2r_cluster.SIZES)[-4:] == [
        *("--scmoe-dispatch-copies", "node"),
        *("--scmoe-expert-placement", "a/pos2-top7/placement-node.json"),
    ]
    # One expert is one row, whichever way.
    names = [row.name for row in c2r_cluster.contenders(2, "shortcut", Path("a"))]
    assert names == ["top2", "pos2 top1 expert"]


def test_a_table_of_what_is_sent() -> None:
    found = {
        f"top8 {copies}": {"copies per token": x, "a2a (MB)": 4 * x, "a2a between nodes (MB)": x}
        for copies, x in (("expert", 8.0), ("node", 2.0))
    }
    lines = c2r_cluster.bytes_table(found).splitlines()
    assert lines[-1].split() == ["top8", "node", "2.00", "8", "4.00x", "2", "4.00x"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--only", "pos4"], "--only pos4: choose from top2"),
        (["--contender", "fast"], "write 'NAME=BASE OPTIONS'"),
        (["--contender", "fast=top9 --x"], "BASE one of top2"),
        (["--slots", "pos2", "--moe-every-layer"], "not a position of this layout"),
        (["--shares", "60"], "between 0 and 1"),
        (["--mbit", "0"], "is positive"),
        (["--mbit", "150", "--shares", "0.6"], "give one of them"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert overlap_cluster.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("overlap_cluster: error: ") and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "user, programs, message", [(1000, True, "need root"), (0, False, "install iproute2")]
)
def test_a_machine_without_root_or_iproute2_is_one_line(
    user: int,
    programs: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(network.os, "geteuid", lambda: user)
    monkeypatch.setattr(network.shutil, "which", lambda _: "/sbin/ip" if programs else None)
    assert overlap_cluster.main([]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_kernel_without_tbf_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode, stdout = 2, ""
        stderr = "Error: Specified qdisc kind is unknown.\n"

    monkeypatch.setattr(network.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(
        network.BenchmarkError, match=r"`tc .* failed: Error: Specified qdisc"
    ) as error:
        network.TwoHosts(("a", "b")).limit(1e6)
    assert "\n" not in str(error.value)
