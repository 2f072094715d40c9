"""Times of a unit from its record, and the slots that follow from them.

Records, metrics and traces are complete: every pass and chunk, the bytes of every exchange.
"""

import json
import math
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from megatron_scmoe.model.unit import ShortcutLayer
from megatron_scmoe.overlap.measure.adaptive import (
    ALONE,
    BESIDE,
    WARM_UP,
    FirstIterations,
    Phase,
    SlowDown,
    choose_routes,
    describe_choice,
    slow_down,
    unit_times,
)
from megatron_scmoe.overlap.measure.cost import UnitTimes
from megatron_scmoe.overlap.measure.each_iteration import UnitTracker
from megatron_scmoe.overlap.measure.time_left import TimeLeft
from megatron_scmoe.overlap.measure.trace import TraceWriter
from megatron_scmoe.overlap.recorder import Activity, Direction, Exchange, Span, UnitRecord
from megatron_scmoe.overlap.schedule import POSITIONS, Slots, Step, window
from tests.distributed_utils import run_distributed
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block

PARTS = {"dense_mlp": 4.0, "qkv": 3.0, "core_attention": 2.0, "projection": 1.0}
PARTS |= {"shared_expert": 5.0, "experts": 6.0}


def record_of(
    passes: int = 2,
    chunks: int = 1,
    scale: float = 1.0,
    dispatch: float = 7.0,
    combine: float = 8.0,
) -> UnitRecord:
    """Passes of a Pos-2 unit whose parts take PARTS seconds forward and twice that backward."""
    record = UnitRecord()
    for number in range(1, passes + 1):
        for direction, factor in (("forward", scale), ("backward", 2 * scale)):
            at = 1000.0 * number
            for name, seconds in PARTS.items():
                parts = chunks if name == "experts" else 1
                for chunk in range(parts):
                    activity = Activity(name, direction, chunk, number)  # type: ignore[arg-type]
                    end = at + factor * seconds / parts
                    record.steps.append(Span(activity, at, end))
            for name, seconds in (("dispatch", dispatch), ("combine", combine)):
                for chunk in range(chunks):  # one after the other
                    activity = Activity(name, direction, chunk, number)  # type: ignore[arg-type]
                    begin = at + chunk * scale * seconds / chunks
                    end = begin + scale * seconds / chunks
                    record.exchanges.append(Exchange(activity, begin, end, 0.5, 1000 + chunk))
    return record


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize(("direction", "factor"), [("forward", 1), ("backward", 2)])
def test_times_are_means_over_passes(direction: Direction, factor: float, chunks: int) -> None:
    times = unit_times(record_of(chunks=chunks), direction, "pos2")
    expected = [factor * PARTS[step.value] for step in window("pos2")]
    assert times.dense == pytest.approx(expected)
    assert times.experts == pytest.approx(factor * PARTS["experts"])
    assert (times.dispatch, times.combine) == pytest.approx((7.0, 8.0))


def test_a_pass_that_is_not_on_record() -> None:
    with pytest.raises(ValueError, match="no backward pass on record"):
        unit_times(UnitRecord(), "backward", "pos2")


def test_directions_choose_for_themselves() -> None:
    """A long combine wants the experts early, a long dispatch wants them late."""
    dense = (1.0,) * 5
    forward = UnitTimes(dense, experts=1.0, dispatch=1.0, combine=4.0)
    backward = UnitTimes(dense, experts=1.0, dispatch=4.0, combine=1.0)
    assert choose_routes("pos2", (), forward, backward) == (Slots(1, 4), ())
    text = describe_choice("pos2", Slots(1, 4), Slots(2, 2), forward, backward).splitlines()
    assert text[0].startswith("expert slot 1 forward (ms: dense_mlp 1000.00, ")
    assert "predicted 6000.00 with 0.00 exposed; slot 2, so far: 7000.00, 1000.00" in text[0]
    assert text[1].startswith("expert slot 4 backward")


def test_slow_down_is_of_dense_operators_only() -> None:
    alone = (UnitTimes((1.0, 3.0), 1.0, 1.0, 1.0), UnitTimes((2.0, 2.0), 1.0, 1.0, 1.0))
    beside = (UnitTimes((1.5, 3.5), 9.0, 9.0, 9.0), UnitTimes((2.0, 4.0), 9.0, 9.0, 9.0))
    assert slow_down(beside, alone) == SlowDown(forward=1.25, backward=1.5)
    nothing = UnitTimes((0.0, 0.0), 1.0, 1.0, 1.0)
    assert math.isnan(slow_down((beside[0], nothing), (alone[0], nothing)).backward)


def test_units_of_which_nothing_is_trained(single_rank: None) -> None:
    """They have no backward pass, and the run goes on."""
    forward_only = record_of()
    forward_only.steps = [s for s in forward_only.steps if s.activity.direction == "forward"]
    first = FirstIterations("pos2")
    found = [first.observe([forward_only]) for _ in range(8)]
    for times in (found[4], found[7]):
        assert times is not None
        assert times[0].window > 0 and times[1] == UnitTimes((0.0,) * 5, 0.0, 0.0, 0.0)


def test_a_slow_down_that_is_no_number_is_not_reported() -> None:
    """It would be no JSON in a trace."""
    times, nothing = UnitTimes((1.0,), 1.0, 1.0, 1.0), UnitTimes((0.0,), 0.0, 0.0, 0.0)
    tracker = UnitTracker("pos2", overlap=True, measures_slots=True)
    tracker._beside = times, nothing
    found = SimpleNamespace(phase=BESIDE, observe=lambda _: (times, nothing))
    tracker._first = found  # type: ignore[assignment]
    tracker._measure(8, [])
    assert tracker._slow_down is None


def watch(rank_scale: dict[int, float]) -> list[tuple[Phase | None, object]]:
    first = FirstIterations("pos2")
    seen = []
    while first.phase is not None:
        phase = first.phase
        scale = rank_scale[dist.get_rank()]
        # One iteration is disturbed; dense work takes twice as long beside exchanges.
        disturbed = 50.0 if not any(before is phase for before, _ in seen) else 1.0
        scale *= disturbed * (2.0 if phase is BESIDE else 1.0)
        records = [record_of(scale=scale)] if scale else []
        if not phase.records_steps:
            records = [UnitRecord()] * len(records)
        seen.append((phase, first.observe(records)))
    return seen


def test_all_ranks_conclude_from_the_same_times() -> None:
    """The mean over ranks that have units; a slow iteration does not count."""
    # Rank 2 is a pipeline stage without a unit.
    results = run_distributed(watch, 3, {0: 1.0, 1: 3.0, 2: 0.0})
    assert results[0] == results[1] == results[2]
    assert [phase for phase, _ in results[0]] == [WARM_UP] * 2 + [BESIDE] * 3 + [ALONE] * 3
    assert [phase.overlap for phase, _ in results[0]] == [True] * 5 + [False] * 3
    found = [times for _, times in results[0] if times is not None]
    assert [times is not None for _, times in results[0]] == [
        *[False] * 4,
        True,
        False,
        False,
        True,
    ]
    for factor, (forward, backward) in zip((2, 1), found, strict=True):
        dense = [factor * 2 * PARTS[step.value] for step in window("pos2")]
        assert forward.dense == pytest.approx(dense)
        assert backward.experts == pytest.approx(factor * 4 * PARTS["experts"])
        assert forward.dispatch == pytest.approx(factor * 14.0)
    assert slow_down(*found) == pytest.approx((2.0, 2.0))


# What a real unit records. ----------------------------------------------------------------------

RECOMPUTED = {
    "core": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@pytest.mark.parametrize("recompute", [None, *RECOMPUTED])
@pytest.mark.parametrize("position", POSITIONS)
def test_recording_changes_nothing_and_misses_nothing(
    single_rank: None, position: str, recompute: str | None
) -> None:
    case = Case(
        scmoe={"scmoe_shortcut_position": position, "scmoe_num_chunks": 2},
        host={"moe_router_topk": 2, **(RECOMPUTED[recompute] if recompute else {})},
        num_layers=2,
    )
    results = []
    for recorded in (False, True):
        torch.manual_seed(0)
        block = build_block(case)
        (unit,) = (layer for layer in block.layers if isinstance(layer, ShortcutLayer))
        unit.slots = Slots(1, 3)
        unit.recorder.records_steps = recorded
        x = torch.randn(SEQUENCE, BATCH, 16, dtype=torch.float64).requires_grad_()
        output = run_block(block, x)
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in block.parameters()]
        results.append([output, x.grad, *gradients])
    assert all(map(torch.equal, *results))

    record = unit.recorder.take()
    assert record.tokens_per_expert is not None
    forwards = 2 if recompute == "full" else 1
    # A backward pass has the number of the forward pass whose graph it is.
    numbers = {
        direction: {
            s.activity.pass_number for s in record.steps if s.activity.direction == direction
        }
        for direction in ("forward", "backward")
    }
    assert numbers == {"forward": set(range(1, forwards + 1)), "backward": {forwards}}
    assert record.tokens_per_expert.sum() == forwards * SEQUENCE * BATCH * 2
    for direction, passes in (("forward", forwards), ("backward", 1)):
        names = [s.activity.name for s in record.steps if s.activity.direction == direction]
        for step in window(position):
            assert names.count(step.value) >= passes, (direction, step)
        assert names.count(Step.EXPERTS.value) == 2 * passes
        chunks = [
            s.activity.chunk for s in record.steps if s.activity[:2] == ("experts", direction)
        ]
        assert sorted(chunks) == sorted([0, 1] * passes)
        times = unit_times(record, direction, position)  # type: ignore[arg-type]
        assert times.experts > 0 and all(
            seconds > 0
            for step, seconds in zip(window(position), times.dense, strict=True)
            if recompute is None or "core" not in step.value
        )
    for before, after in zip(record.steps, record.steps[1:], strict=False):
        assert before.begin <= before.end <= after.begin


def test_trace_is_chromes_format(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "traces", 3, {"scmoe_shortcut_position": "pos2"})
    writer.add(10, {2: record_of(passes=1)}, Slots(1, 1))
    writer.add(11, {2: record_of(passes=1)}, Slots(2, 1))
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == "rank-00003.json"
    trace = json.loads(path.read_text())
    slots = {"10": [1, 1], "11": [2, 1]}
    assert trace["otherData"] == {
        "scmoe_shortcut_position": "pos2",
        "expert_slots": slots,
        "expert_rows": {"10": 0, "11": 0},
        "copies_per_token": {"10": None, "11": None},
    }
    lanes = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert len(lanes) == 8
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * (2 * len(PARTS) + 4)
    for event in events:
        assert event["name"] == f"layer 2 {event['args']['step']}"
        assert lanes[event["tid"]].endswith(event["cat"])
    mlp = next(e for e in events if e["args"]["step"] == "dense_mlp" and e["cat"] == "backward")
    assert mlp["dur"] == pytest.approx(8e6)
    assert lanes[mlp["tid"]] == "dense compute, backward"
    exchanges = [event["args"] for event in events if "bytes" in event["args"]]
    assert {args["step"] for args in exchanges} == {"dispatch", "combine"}
    assert {(args["bytes"], args["blocked_us"], args["pass"]) for args in exchanges} == {
        (1000, 5e5, 1)
    }


def test_nothing_overlaps_in_a_lane(tmp_path: Path) -> None:
    """Viewers drop what does. Chunks travel together; steps follow each other to the nanosecond."""
    record = UnitRecord()
    at = 1e-3 / 3
    for number in range(50):
        activity = Activity("experts", "forward", number % 2)
        record.steps.append(Span(activity, at, at + 1.23e-4 / 7))
        at += 1.23e-4 / 7
    for chunk in range(3):
        activity = Activity("dispatch", "forward", chunk)
        record.exchanges.append(Exchange(activity, 0.1 + chunk * 1e-3, 0.2, 0.0, 8))
    of_route = Activity("dispatch", "forward", 0, route=1)
    record.exchanges.append(Exchange(of_route, 0.15, 0.25, 0.0, 8))
    TraceWriter(tmp_path, 0, {}).add(1, {2: record}, Slots(1, 1))
    events = json.loads((tmp_path / "rank-00000.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    lanes: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            lane = lanes.setdefault(names[event["tid"]], [])
            lane.append((event["ts"], event["ts"] + event["dur"]))
    exchanges = ["dispatch, forward", "dispatch 2, forward", "dispatch 3, forward"]
    exchanges.append("dispatch 1 of route 1, forward")
    assert list(lanes) == ["experts, forward", *exchanges]
    for lane in lanes.values():
        assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(lane)))


def test_time_left_is_that_of_the_last_iterations() -> None:
    left = TimeLeft()
    assert left.after(40, 1000, now=7.0) == ""  # the first after a resume
    assert left.after(42, 1000, now=11.0) == "0:31:56"
    for iteration in range(43, 600):  # ten times as slow from here on
        text = left.after(iteration, 1000, now=11.0 + 20.0 * (iteration - 42))
    assert text == str(timedelta(seconds=20 * (1000 - 599)))
    assert left.after(1000, 1000, now=1e6) == ""
