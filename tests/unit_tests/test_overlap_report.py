"""Traces with known times -> the numbers of the report; what cannot be read is one line."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scmoe.commands import overlap_report
from megatron_scmoe.commands.trace_report.advice import advise
from megatron_scmoe.commands.trace_report.analysis import Figures, Traffic, analyse
from megatron_scmoe.commands.trace_report.picture import draw
from megatron_scmoe.commands.trace_report.report_text import render, slot_name
from megatron_scmoe.commands.trace_report.traces import TracedRun, read_run
from megatron_scmoe.overlap.measure.cost import UnitTimes
from megatron_scmoe.overlap.measure.each_iteration import traced_parameters
from megatron_scmoe.overlap.measure.trace import TraceWriter
from megatron_scmoe.overlap.recorder import Activity, Direction, Exchange, Span, UnitRecord
from megatron_scmoe.overlap.schedule import Slots
from megatron_scmoe.words import change, duration, numbers, size

MS = 1e-3
# A Pos-1 unit with its experts behind the QKV projection: name, begin, end in seconds.
STEPS: dict[Direction, list[tuple[str, float, float]]] = {
    "forward": [
        ("route", 0, 1),
        ("start_dispatch", 1, 2),
        ("qkv", 2, 5),
        ("wait_dispatch", 5, 6),
        ("experts", 6, 10),
        ("core_attention", 10, 12),
        ("projection", 12, 13),
        ("shared_expert", 13, 16),
        ("wait_combine", 16, 19),
        ("merge", 19, 20),
    ],
    "backward": [
        ("shared_expert", 50, 56),
        ("projection", 56, 58),
        ("core_attention", 58, 62),
        ("experts", 62, 70),
        ("qkv", 70, 76),
    ],
}
# Name, begin, end, exposed, kilobytes.
EXCHANGES: dict[Direction, list[tuple[str, float, float, float, int]]] = {
    "forward": [("dispatch", 2, 6, 1, 8), ("combine", 10, 19, 3, 9)],
    "backward": [("combine", 50, 59, 0, 9), ("dispatch", 70, 80, 4, 10)],
}
FORWARD = UnitTimes((3 * MS, 2 * MS, 1 * MS, 3 * MS), 4 * MS, 4 * MS, 9 * MS)
BACKWARD = UnitTimes((6 * MS, 4 * MS, 2 * MS, 6 * MS), 8 * MS, 10 * MS, 9 * MS)
FACTS: dict[str, Any] = {
    "scmoe_shortcut_position": "pos1",
    "scmoe_num_chunks": 1,
    "scmoe_overlap": True,
    "num_layers": 4,
    "hidden_size": 64,
    "seq_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "num_experts": 8,
    "moe_router_topk": 1,
    "moe_token_dispatcher_type": "alltoall",
    "world_size": 2,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "overlap_grad_reduce": False,
    "use_distributed_optimizer": False,
    "dense_parameters": 10_000,
    "shared_expert_parameters": 2_000,
    "expert_parameters": 40_000,
    "gradient_bytes": 4,
    "parameter_bytes": 2,
    "params_dtype": "float32",
    "backend": "gloo",
    "expert_parallel_ranks": [0, 1],
    "compute_slow_down": 1.0625,
}


def record_of(
    late: float = 0.0, passes: int = 2, chunks: int = 1, exchanges: bool = True
) -> UnitRecord:
    """Passes 100 ms apart; `late` ms later than planned."""
    record = UnitRecord()
    for number in range(1, passes + 1):
        origin = 100 * number + late
        for direction in STEPS:
            for name, begin, end in STEPS[direction]:
                parts = chunks if name == "experts" else 1
                for chunk in range(parts):
                    activity = Activity(name, direction, chunk, number)
                    length = (end - begin) / parts
                    at = origin + begin + chunk * length
                    record.steps.append(Span(activity, at * MS, (at + length) * MS))
            for name, begin, end, blocked, kilobytes in EXCHANGES[direction] if exchanges else ():
                for chunk in range(chunks):  # together in flight
                    activity = Activity(name, direction, chunk, number)
                    times = (origin + begin) * MS, (origin + end) * MS, blocked * MS
                    record.exchanges.append(Exchange(activity, *times, kilobytes * 1000))
    return record


def write_run(
    folder: Path,
    late: tuple[float, ...] = (0.0, 0.0),
    slots: dict[int, Slots] | None = None,
    layers: tuple[int, ...] = (2, 4),
    facts: dict[str, Any] | None = None,
    **record: Any,
) -> Path:
    """A trace for each rank, by the writer that runs use."""
    everyone = list(range(len(late)))
    for rank, delay in enumerate(late):
        own = FACTS | {"world_size": len(late), "expert_parallel_ranks": everyone} | (facts or {})
        writer = TraceWriter(folder, rank, own)
        for iteration, pair in (slots or {8: Slots(1, 1), 9: Slots(1, 1)}).items():
            # A second layer is a second later.
            records = {layer: record_of(delay + 1e3 * layer, **record) for layer in layers}
            writer.add(iteration, records, pair)
    return folder


def figures_of(folder: Path, **options: Any) -> tuple[TracedRun, Figures]:
    run = read_run(write_run(folder, **options))
    return run, analyse(run)


def close(seconds: float) -> Any:
    """Traces hold whole quarters of a microsecond."""
    return pytest.approx(seconds, abs=2e-6)


# Numbers. ---------------------------------------------------------------------------------------


def test_exposed_and_hidden(tmp_path: Path) -> None:
    """An iteration of a rank: 2 layers x 2 passes."""
    _, figures = figures_of(tmp_path)
    assert figures.total.in_flight == close(4 * 32 * MS)
    assert figures.total.exposed == close(4 * 8 * MS)
    assert figures.total.hidden_share == pytest.approx(0.75, abs=1e-4)
    assert list(figures.layers) == [
        (layer, direction, name)
        for layer in (2, 4)
        for direction in EXCHANGES
        for name, *_ in EXCHANGES[direction]  # in the order of time
    ]
    assert figures.layers[4, "backward", "dispatch"].exposed == close(2 * 4 * MS)
    assert figures.layers[4, "backward", "dispatch"].hidden == close(2 * 6 * MS)
    assert figures.layers[2, "backward", "combine"].hidden_share == pytest.approx(1)


def test_what_is_sent(tmp_path: Path) -> None:
    """An iteration of a rank, 2 layers x 2 passes: 36 kB each, a quarter of it to another node."""
    for rank in range(2):
        writer = TraceWriter(tmp_path, rank, FACTS | {"scmoe_dispatch_copies": "rank"})
        record = record_of()
        record.exchanges = [x._replace(bytes_between_nodes=x.bytes // 4) for x in record.exchanges]
        record.tokens_per_expert = torch.tensor([10, 10 + 20 * rank])
        writer.add(8, {2: record, 4: record_of(1e3)}, Slots(1, 1), 1.5)
    run = read_run(tmp_path)
    figures = analyse(run)
    assert figures.traffic == Traffic(sent=4 * 36_000, between_nodes=18_000, copies=1.5, load=4 / 3)
    text = " ".join(render(run, figures).split())
    assert (
        "Sent 144 kB to other ranks an iteration, 18.0 kB of it to other nodes, 1.50 rows of a "
        "token, one for each rank, the busiest rank has 1.33 x the mean rows" in text
    )


@pytest.mark.parametrize("chunks", [1, 2])
def test_cost_of_every_slot(tmp_path: Path, chunks: int) -> None:
    _, figures = figures_of(tmp_path, chunks=chunks, facts={"scmoe_num_chunks": chunks})
    forward, backward = figures.directions["forward"], figures.directions["backward"]
    for own, times in ((forward, FORWARD), (backward, BACKWARD)):
        assert own.times.dense == close(times.dense)
        for part in ("experts", "dispatch", "combine"):
            assert getattr(own.times, part) == close(getattr(times, part))
    # max(before, dispatch) + experts + max(after, combine)
    assert [cost.seconds for cost in forward.costs] == close([x * MS for x in (17, 17, 18, 19, 22)])
    assert [cost.seconds for cost in backward.costs] == close(
        [x * MS for x in (36, 30, 27, 29, 35)]
    )
    assert (forward.slot, forward.best) == (1, 1)
    assert (backward.slot, backward.best) == (1, 2)
    assert forward.measured == close(17 * MS)  # the formula's assumptions hold here
    assert backward.measured == close(30 * MS)
    assert forward.exposed == close(chunks * 4 * MS)
    assert forward.launching == close(1 * MS)


def test_bandwidth(tmp_path: Path) -> None:
    """Bytes / time in flight; the wait for a late rank is told apart."""
    _, figures = figures_of(tmp_path, late=(0.0, 1.0))
    link = figures.links["forward", "dispatch"]
    assert link is not None and link.size == 8000
    for speed in (link.least, link.median, link.most):
        assert speed == pytest.approx(8000 / (4 * MS), rel=1e-3)
    # 3 ms of rank 0's exchange and 4 ms of that of rank 1 lie behind the start of the last.
    median = (8000 / (3 * MS) + 8000 / (4 * MS)) / 2
    assert link.together == pytest.approx(median, rel=1e-3)


def test_an_exchange_that_sends_nothing_has_no_bandwidth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for direction, exchanges in EXCHANGES.items():
        monkeypatch.setitem(EXCHANGES, direction, [(*own[:4], 0) for own in exchanges])
    run, figures = figures_of(tmp_path)
    assert set(figures.links.values()) == {None}
    assert "What the link gave" in render(run, figures)


def test_late_rank(tmp_path: Path) -> None:
    run, figures = figures_of(tmp_path, late=(0.0, 2.0, 0.5))
    assert [own.late for own in figures.ranks.values()] == close([0, 2 * MS, 0.5 * MS])
    assert [own.last for own in figures.ranks.values()] == [0, 1, 0]
    assert figures.ranks[1].compute == close(4 * (9 + 4 + 18 + 8) * MS)
    (line,) = (line for line in advise(run, figures) if " is late" in line)
    assert line.startswith("Rank 1 is late: it starts 100.0% of its exchanges last, 2.00 ms after")


def test_the_example_is_typical(tmp_path: Path) -> None:
    """Not the unit that is far from the others; of the rank that is asked for."""
    run = read_run(write_run(tmp_path))
    place = analyse(run).example["forward"].place
    slow = run.records[place]
    slow.exchanges[:] = [x._replace(end=x.end + 1) for x in slow.exchanges]
    again = TracedRun(run.facts, run.groups, run.parameters, run.slots, (), run.records)
    for rank in (None, 0, 1):
        example = analyse(again, rank).example
        assert example["forward"].place == example["backward"].place != place
        assert rank in (None, example["forward"].place.rank)


def test_iterations_with_other_slots_are_left_out(tmp_path: Path) -> None:
    slots = {5: Slots(3, 3), 6: Slots(1, 1), 7: Slots(1, 1)}
    run, figures = figures_of(tmp_path, slots=slots)
    assert (run.iterations, run.left_out) == ((6, 7), (5,))
    assert figures.total.in_flight == close(4 * 32 * MS)
    assert "6-7 (5 ran with other slots and are left out)" in render(run, figures)


def test_a_killed_run(tmp_path: Path) -> None:
    """One rank has written an iteration less."""
    write_run(tmp_path)
    path = tmp_path / "rank-00001.json"
    trace = json.loads(path.read_text())
    del trace["otherData"]["expert_slots"]["9"]
    trace["traceEvents"] = [
        event for event in trace["traceEvents"] if event["args"].get("iteration") != 9
    ]
    path.write_text(json.dumps(trace))
    assert read_run(tmp_path).iterations == (8,)


def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    """Each rank has layers of its own: a layer's mean is over the ranks that have it."""
    for rank, layer in enumerate((2, 4)):
        facts = FACTS | {"expert_parallel_ranks": [rank], "world_size": 4}
        TraceWriter(tmp_path, rank, facts).add(8, {layer: record_of()}, Slots(1, 1))
    run = read_run(tmp_path)
    figures = analyse(run)
    assert figures.total.in_flight == close(2 * 32 * MS)
    assert figures.layers[4, "forward", "combine"].in_flight == close(2 * 9 * MS)
    assert "0-1 of 4 (the others have no unit" in render(run, figures)


# Advice. ----------------------------------------------------------------------------------------


def advice_of(folder: Path, **options: Any) -> str:
    return "\n".join(advise(*figures_of(folder, **options)))


def test_advice_on_what_does_not_fit(tmp_path: Path) -> None:
    text = advice_of(tmp_path)
    assert "Forward: the exchanges take 13.0 ms, the dense work that can hide them 9.00 ms" in text
    assert "(--scmoe-num-chunks 2) or widen the window" in text
    assert "Backward: the exchanges take 19.0 ms" in text


def test_nothing_to_gain_where_all_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the formula says."""
    for direction, exchanges in EXCHANGES.items():
        hidden = [(name, begin, end, 0.0, sent) for name, begin, end, _, sent in exchanges]
        monkeypatch.setitem(EXCHANGES, direction, hidden)
    (line,) = advice_of(tmp_path).splitlines()
    assert line.startswith("100.0% of the communication is hidden: another schedule has nothing")


def test_gradients_beside_the_exchanges(tmp_path: Path) -> None:
    """Two ranks, EP 2: dense parameters are all-reduced over both, experts with nobody."""
    run, figures = figures_of(tmp_path / "all-reduce")
    own = figures.data_parallel
    assert (own.sent, own.shared) == (10_000 * 2 * 4 / 2, 2_000 * 2 * 4 / 2)
    assert run.num_microbatches == 2
    speeds = sorted(link.median for link in figures.links.values() if link is not None)
    assert own.speed == pytest.approx((speeds[1] + speeds[2]) / 2)
    text = render(run, figures)
    assert "40.0 kB of gradients an iteration, " in text
    assert "8.00 kB are the shared experts'; without --overlap-grad-reduce" in text
    sharded = {"use_distributed_optimizer": True, "expert_model_parallel_size": 1}
    _, figures = figures_of(tmp_path / "sharded", facts=sharded)
    assert figures.data_parallel.sent == (10_000 + 40_000) * (4 + 2) / 2


def test_what_a_trace_says_of_parameters() -> None:
    """Experts are what the host does not reduce over all ranks; a gradient has its own type."""
    layer = torch.nn.ModuleDict(
        {
            "router": torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16),
            "shared_experts": torch.nn.Linear(3, 5, bias=False, dtype=torch.bfloat16),
            "experts": torch.nn.Linear(3, 7, bias=False, dtype=torch.bfloat16),
        }
    )
    layer["experts"].weight.allreduce = False
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    assert traced_parameters([torch.nn.ModuleDict({"mlp": layer})]) == {
        "dense_parameters": 21,
        "shared_expert_parameters": 15,
        "expert_parameters": 21,
        "gradient_bytes": 4,
        "parameter_bytes": 2,
    }


def test_advice_on_gradients(tmp_path: Path) -> None:
    """Where they take longer than what is hidden."""
    _, figures = figures_of(tmp_path / "few")
    assert figures.data_parallel.speed is not None
    many = int(figures.total.hidden * figures.data_parallel.speed / 4) + 1
    facts = {"shared_expert_parameters": many, "dense_parameters": many}
    assert "more micro-batches than 2" in advice_of(tmp_path / "many", facts=facts)
    for name, other in {
        "fewer": {"shared_expert_parameters": many - 2},
        "overlapped": {"overlap_grad_reduce": True},
    }.items():
        assert "shared experts" not in advice_of(tmp_path / name, facts=facts | other)


def test_advice_on_slots(tmp_path: Path) -> None:
    """47 ms with slots 1 and 1, 44 with 1 and 2."""
    text = advice_of(tmp_path)
    assert "With --scmoe-expert-slot 1,2 a unit is predicted to take 6.4% less time" in text
    slots = {8: Slots(1, 2)}
    assert "--scmoe-expert-slot" not in advice_of(tmp_path / "best", slots=slots)


def test_advice_without_overlap(tmp_path: Path) -> None:
    run, figures = figures_of(tmp_path, facts={"scmoe_overlap": False})
    text = "\n".join(advise(run, figures))
    assert "--no-scmoe-overlap" in text and "--scmoe-expert-slot" not in text
    assert "without overlap (chosen)" in render(run, figures)


def test_advice_on_what_the_formula_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the formula says" not in advice_of(tmp_path / "as predicted")
    later = [
        (name, at + 5, end + 5) if at >= 10 else (name, at, end)
        for name, at, end in STEPS["forward"]
    ]
    monkeypatch.setitem(STEPS, "forward", later)
    monkeypatch.setitem(EXCHANGES, "forward", [("dispatch", 2, 6, 1, 8), ("combine", 15, 24, 3, 9)])
    assert "a pass takes 22.0 ms, the formula says 17.0 ms: time passes" in advice_of(
        tmp_path / "a"
    )
    blocked = [("dispatch", 2, 6, 4, 8), ("combine", 15, 24, 8, 9)]
    monkeypatch.setitem(EXCHANGES, "forward", blocked)
    assert "12.0 ms are exposed, not 4.00 ms" in advice_of(tmp_path / "b")


def test_advice_on_row_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [
        ("start_dispatch", -8, 2) if own[0] == "start_dispatch" else own for own in STEPS["forward"]
    ]
    monkeypatch.setitem(STEPS, "forward", waiting)
    assert "Forward: compute stands still for 10.0 ms a pass before" in advice_of(tmp_path)


# Text and picture. ------------------------------------------------------------------------------


def test_text_has_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert overlap_report.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for line in (
        "Hidden      75.0% of the communication, 96.0 ms of 128 ms an iteration, mean over ranks",
        "Exposed     32.0 ms an iteration",
        "Unit        forward 17.0 ms, 4.00 ms of it exposed, backward 30.0 ms, 4.00 ms of it",
        "Slots       1 forward, 1 backward",
        "Iterations  8-9",
        "Compute     1.062 x its time alone",
    ):
        assert f"\n{line}" in f"\n{text}", line
    rows = {tuple(re.split(r"\s{2,}", line)) for line in text.splitlines()}
    assert ("layer 2 forward dispatch", "8.00 ms", "6.00 ms", "2.00 ms", "75.0%") in rows
    assert ("2: between core attention and projection (least time)", "27.0 ms") in {
        row[:2] for row in rows
    }
    assert ("1: between QKV and core attention (chosen)", "30.0 ms", "4.00 ms", "0.0%") in rows
    assert ("dispatch forward", "8.00 kB", *4 * ("2.00 MB/s",)) in rows


def test_a_slow_down_that_was_not_measured(tmp_path: Path) -> None:
    run, figures = figures_of(tmp_path, facts={"compute_slow_down": None})
    assert "Compute  " not in render(run, figures)


def test_text_timeline_is_to_scale(tmp_path: Path) -> None:
    """20 ms are 72 columns."""
    run, figures = figures_of(tmp_path)
    lanes = dict(
        re.findall(r"^(\w[\w ]+?) *\|(.*)\|$", render(run, figures).split("\n\nBackward")[0], re.M)
    )
    assert lanes["experts"] == " " * 22 + "#" * 14 + " " * 36  # 6-10 ms
    assert lanes["dispatch"] == " " * 7 + "#" * 11 + "!" * 4 + " " * 50  # 2-5, exposed to 6
    assert lanes["combine"] == " " * 36 + "#" * 22 + "!" * 10 + " " * 4  # 10-16, exposed to 19


def test_picture_is_to_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shades lie where compute stood still, in ms from the begin of the pass."""
    from matplotlib.axes import Axes

    shaded = []
    monkeypatch.setattr(Axes, "axvspan", lambda _, begin, end, **look: shaded.append((begin, end)))
    _, figures = figures_of(tmp_path / "traces")
    picture = tmp_path / "overlap.png"
    draw(figures, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    expected = [(5, 6), (16, 19), (26, 30)]
    assert sorted(shaded) == [pytest.approx(pair, abs=2e-3) for pair in expected]


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_run(tmp_path / "traces")
    refuses(tmp_path, capsys, r"--picture needs matplotlib: pip install 'megatron-scmoe\[plot\]'")


def test_words() -> None:
    seconds = (0, 1.234e-3, 9.9999e-3, 12.34e-3, 99.96e-3, 1.3994)
    assert [duration(x) for x in seconds] == [
        "0.00 ms",
        "1.23 ms",
        "10.0 ms",
        "12.3 ms",
        "100 ms",
        "1399 ms",
    ]
    assert numbers((3, 1, 2, 7)) == "1-3, 7"
    assert [size(x) for x in (0, 999, 1000, 12_340, 2.5e9, 9e16)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "12.3 kB",
        "2.50 GB",
        "90000 TB",
    ]
    assert [change(x, 10.0) for x in (10.001, 12, 9)] == ["0.0%", "+20.0%", "-10.0%"]
    assert slot_name("pos3", 0) == "before dense QKV"
    assert slot_name("pos3", 4) == "between MLP and QKV"
    assert slot_name("pos3", 8) == "after shared expert"


# Errors. ----------------------------------------------------------------------------------------


def edit(path: Path, change_: Any) -> None:
    trace = json.loads(path.read_text())
    change_(trace)
    path.write_text(json.dumps(trace))


def no_folder(folder: Path) -> None:
    pass


def no_trace(folder: Path) -> None:
    folder.mkdir()


def cut_off(folder: Path) -> None:
    path = write_run(folder) / "rank-00001.json"
    path.write_text(path.read_text()[:-100])


def no_object(folder: Path) -> None:
    (write_run(folder) / "rank-00001.json").write_text("[]")


def another_version(folder: Path) -> None:
    def change_(trace: dict[str, Any]) -> None:
        for event in trace["traceEvents"]:
            event["args"].pop("bytes", None)

    edit(write_run(folder) / "rank-00001.json", change_)


def without_a_fact(folder: Path) -> None:
    edit(write_run(folder) / "rank-00001.json", lambda trace: trace["otherData"].pop("world_size"))


def another_model(folder: Path) -> None:
    edit(
        write_run(folder) / "rank-00001.json",
        lambda trace: trace["otherData"].update(hidden_size=128),
    )


def another_day(folder: Path) -> None:
    def change_(trace: dict[str, Any]) -> None:
        for event in trace["traceEvents"]:
            if "ts" in event:
                event["ts"] += 24 * 3600 * 1e6

    edit(write_run(folder) / "rank-00001.json", change_)


def other_iterations(folder: Path) -> None:
    def change_(trace: dict[str, Any]) -> None:
        trace["otherData"]["expert_slots"] = {"20": [1, 1]}

    edit(write_run(folder) / "rank-00001.json", change_)


def nothing_sent(folder: Path) -> None:
    write_run(folder, exchanges=False)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (no_folder, "traces is not a folder; give what --scmoe-trace-dir was"),
        (no_trace, r"no rank-\*.json in .*: was the run given --scmoe-trace-dir"),
        (cut_off, "rank-00001.json is no trace that this version has written: "),
        (no_object, "rank-00001.json is no trace that this version has written: "),
        (another_version, "rank-00001.json is no trace .* has written: 'bytes' is missing"),
        (without_a_fact, "rank-00001.json is no trace .* written: 'world_size' is missing"),
        (another_model, "rank-00000.json and .* not of one run: hidden_size is 64 and 128; empty"),
        (another_day, "not of one run: their iteration 8 began 86400 s apart; empty"),
        (other_iterations, "they share no iteration with the same expert slots; empty"),
        (nothing_sent, "hold no exchange: with one expert parallel rank nothing is sent"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, message: str
) -> None:
    prepare(tmp_path / "traces")
    refuses(tmp_path, capsys, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "7"], r"--rank 7 is not in the traces; there are \[0, 1\]"),
        (["--rank", "x"], "argument --rank: invalid int value: 'x' .see --help"),
        (["--picture", "nowhere/overlap.png"], "nowhere/overlap.png"),
        (["--picture", "overlap.doc"], "--picture overlap.doc: Format 'doc' is not supported"),
    ],
)
def test_options_are_refused_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "traces")
    refuses(tmp_path, capsys, message, *options)


def refuses(folder: Path, capsys: pytest.CaptureFixture[str], message: str, *options: str) -> None:
    output = folder / "overlap.png"
    arguments = [str(folder / "traces"), "--picture", str(output), *options]
    assert overlap_report.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert re.match(rf"[\w.-]+: error: .*{message}", printed.err), printed.err
    assert not output.exists()


def test_two_routes_are_told_apart(tmp_path: Path) -> None:
    """A second route with half the times of the first, behind the projection."""
    everyone = [0, 1]
    for rank in everyone:
        facts = FACTS | {"expert_parallel_ranks": everyone, "further_taps": [7]}
        writer = TraceWriter(tmp_path, rank, facts)
        record = record_of()
        for spans in (record.steps, record.exchanges):
            for span in list(spans):
                if span.activity.name in ("experts", "dispatch", "combine"):
                    end = (span.begin + span.end) / 2
                    activity = span.activity._replace(route=1)
                    spans.append(span._replace(activity=activity, end=end))
        writer.add(8, {2: record}, Slots(1, 1))
    run = read_run(tmp_path)
    figures = analyse(run)
    own = figures.directions["forward"]
    assert own.times.dense == pytest.approx(FORWARD.dense, abs=2e-6)
    for route, factor in zip(own.times.routes, (1, 0.5), strict=True):
        wanted = (factor * 4 * MS, factor * 4 * MS, factor * 9 * MS)
        assert tuple(route) == pytest.approx(wanted, abs=2e-6)
    # At the last slot: 6 of attention, dispatch 1 (2), experts 1 (2), the shared expert (3) beside
    # combine 1, experts 0 (4), combine 0 (9).
    assert own.costs[4].seconds == close((6 + 2 + 2 + 3 + 4 + 9) * MS)
    text = render(run, figures)
    assert "experts of route 1" in text and "the other where it costs least" in text
