"""What the proof on a GPU computes: times, overlaps of kernels, errors, verdicts."""

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from torch import distributed

from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.experts.grouped import GroupedExperts
from megatron_scmoe.overlap.collectives import AllToAll, Transfer
from megatron_scmoe.overlap.measure.cost import UnitTimes
from megatron_scmoe.overlap.recorder import (
    Activity,
    Direction,
    Span,
    UnitRecord,
    UnitRecorder,
)
from megatron_scmoe.overlap.schedule import Slots
from megatron_scmoe.planner.size import model_size
from tools.benchmarks.contenders import Contender
from tools.benchmarks.paper_shapes import NO_OPTIONS, Shape, build
from tools.gpu_proof import fast, generation, layers, main_job, transformer_engine
from tools.gpu_proof.hidden import (
    dense_s,
    first_begun,
    forward_s,
    hidden_outcome,
    report_trace,
    unavoidable_share,
)
from tools.gpu_proof.kernels import (
    Hole,
    Kernel,
    beside_s,
    busiest_stream,
    holes,
    intervals,
    read_kernels,
    total_s,
)
from tools.gpu_proof.layers import (
    copy_weights,
    error,
    errors,
    exchanges_to_itself,
    gradients,
    largest,
    on_disk,
)
from tools.gpu_proof.results import ProofFinding, Results, read_findings
from tools.gpu_proof.runs import ProofRun
from tools.gpu_proof.timing import PartStep, Rates, Timing, do_steps, in_turns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results("part", tmp_path)


def outcomes(results: Results) -> dict[str, str]:
    return {finding.name: finding.outcome for finding in read_findings(results.folder)}


def last(results: Results) -> ProofFinding:
    return read_findings(results.folder)[-1]


# Kernels. -----------------------------------------------------------------------------------------


def event(name: str, stream: int, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}


# Microseconds. Two transfers of 20 beside products, of which one comes out of a hole of 20.
TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        event("nvjet_tst_256x128", 7, 1020.0, 10.0),
        event("silu", 7, 1010.0, 10.0),
        event("gelu", 7, 1000.0, 10.0),
        event("sm90_xmma_gemm", 7, 1050.0, 30.0),
        event("ncclDevKernel_SendRecv", 20, 1005.0, 20.0),
        event("ncclDevKernel_SendRecv", 20, 1040.0, 20.0),
        event("Memcpy DtoH (Device -> Pinned)", 20, 1031.0, 2.0, "gpu_memcpy"),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 990.0, "dur": 500.0, "tid": 1},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "step", "ts": 1000.0, "dur": 80.0},
        {"ph": "i", "cat": "kernel", "name": "instant", "ts": 1000.0},
    ]
}


def test_kernels_of_a_trace() -> None:
    kernels = read_kernels(TRACE)
    assert [kernel.name for kernel in kernels][:3] == [
        "gelu",
        "ncclDevKernel_SendRecv",
        "silu",
    ]
    assert len(kernels) == 7
    assert busiest_stream(kernels) == 7
    compute = [kernel for kernel in kernels if kernel.stream == 7]
    transfers = [kernel for kernel in kernels if "nccl" in kernel.name]
    assert total_s(intervals(compute)) == pytest.approx(60e-6)
    assert beside_s(intervals(transfers), intervals(compute)) == pytest.approx(30e-6)
    (hole,) = holes(compute)
    assert hole == Hole(pytest.approx(20e-6), "nvjet_tst_256x128", "sm90_xmma_gemm")


def test_time_is_counted_once() -> None:
    """Whichever intervals overlap, contain or touch each other."""
    these = [(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (3.0, 4.0)]
    assert total_s(these) == 5.0
    assert beside_s(these, [(0.5, 1.5), (1.0, 2.5), (3.5, 5.5)]) == 3.0
    assert beside_s(these, []) == 0.0


def test_a_kernel_inside_another_makes_no_hole() -> None:
    kernels = [Kernel("long", 7, 0.0, 4.0), Kernel("in", 7, 1.0, 2.0), Kernel("end", 7, 5.0, 6.0)]
    assert holes(kernels) == [Hole(1.0, "long", "end")]


def beside(*transfers: tuple[float, float]) -> list[Kernel]:
    """Compute from 0 to 3 on two streams, with a hole from 1.5 to 2 and a copy of its own, and
    these transfers."""
    compute = [
        Kernel("Memcpy DtoD", 7, 0.0, 0.5),
        Kernel("gemm", 7, 0.5, 1.0),
        Kernel("grouped gemm", 21, 1.0, 1.5),
        Kernel("gemm", 7, 2.0, 3.0),
    ]
    return [*compute, *(Kernel("ncclDevKernel", 20, *transfer) for transfer in transfers)]


def test_a_trace_is_judged(results: Results) -> None:
    report_trace(results, "hidden", beside((0.25, 1.0), (2.0, 2.5)))
    assert last(results).outcome == "passed"
    assert last(results).values["beside_compute_share"] == 1.0
    assert last(results).values["transfers_s"] == 1.25
    assert last(results).values["beside_products_share"] == pytest.approx(0.8)
    assert "500000 us, grouped gemm to gemm" in last(results).note
    report_trace(results, "half of it", beside((1.0, 2.0)))
    assert last(results).outcome == "failed"
    report_trace(results, "none", beside())
    assert last(results).outcome == "failed" and "no transfer" in last(results).note


# Times. -------------------------------------------------------------------------------------------


def test_median_and_spread() -> None:
    timing = Timing([1.0, 2.0, 3.0, 4.0, 9.0])
    assert (timing.median_s, timing.spread_share) == (3.0, pytest.approx(2 / 3))
    assert Timing([2.0]).spread_share == 0.0


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    times = in_turns({name: lambda n=name: calls.append(n) for name in "ab"}, CPU, 2, steps=1)
    # Each turn calls once without counting, then once; the first turn warms up.
    assert "".join(calls) == "bbaa" + "aabb" + "bbaa"
    assert [len(timing.seconds) for timing in times.values()] == [2, 2]


def test_times_of_a_device_are_seconds() -> None:
    """Events count milliseconds; here they are the CPU backend's."""
    times = in_turns({"sleep": lambda: time.sleep(0.02)}, CUDA, turns=2, steps=2)
    assert 0.02 <= times["sleep"].median_s < 2


def test_floor() -> None:
    rates = Rates(flops_per_s=100.0, bytes_per_s=10.0)
    assert (rates.floor_s(50, 1), rates.floor_s(50, 20)) == (0.5, 2.0)


def test_steps_end_with_the_time(results: Results) -> None:
    done: list[str] = []

    def fail() -> None:
        raise RuntimeError("broken")

    steps = [
        PartStep("without a GPU", lambda: done.append("gpu"), 1, missing="CUDA"),
        PartStep("broken", fail, 1),
        PartStep("too long", lambda: done.append("long"), 60),
        PartStep("short", lambda: done.append("short"), 1),
    ]
    do_steps(results, steps, deadline=time.monotonic() + 30)
    assert done == ["short"]
    assert outcomes(results) == {
        "without a GPU": "skipped",
        "broken": "failed",
        "too long": "skipped",
    }
    notes = [finding.note for finding in read_findings(results.folder)]
    assert notes == ["needs CUDA", "RuntimeError: broken", "less than 60 s were left"]


def test_goals_are_those_of_a_gpu(results: Results) -> None:
    rehearsal = Results("part", results.folder, rehearsal=True)
    rehearsal.goal("on a CPU", False, speed_ratio=0.5)
    results.goal("missed", False, speed_ratio=0.5)
    results.goal("reached", True, speed_ratio=1.5)
    expected = {"on a CPU": "measured", "missed": "failed", "reached": "passed"}
    assert outcomes(results) == expected


# Hidden. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "noise", "outcome"),
    [
        (0.98, 0.0, "passed"),
        (0.97, 0.0, "failed"),
        (0.97, 0.015, "failed"),
        (0.97, 0.05, "measured"),
        (1.01, 0.05, "measured"),
        (0.5, 0.1, "failed"),
        (1.1, 0.05, "passed"),
    ],
)
def test_hidden_or_not(hidden: float, noise: float, outcome: str) -> None:
    assert hidden_outcome(hidden, noise) == outcome


def test_what_no_slot_can_hide() -> None:
    """Forward 1 of 4 s, backward nothing of 4 s."""
    forward = UnitTimes(dense=(1.0, 2.0), experts=1.0, dispatch=2.0, combine=2.0)
    backward = UnitTimes(dense=(2.0, 4.0), experts=2.0, dispatch=2.0, combine=2.0)
    assert unavoidable_share((forward, backward), Slots(1, 1)) == 1 / 8
    alone = UnitTimes(dense=(1.0, 1.0), experts=1.0, dispatch=0.0, combine=0.0)
    assert unavoidable_share((alone, alone), Slots(0, 0)) == 0.0


def span(name: str, direction: Direction, begin: float, end: float) -> Span:
    return Span(Activity(name, direction), begin, end)


def test_steps_of_a_record() -> None:
    record = UnitRecord(
        steps=[
            span("qkv", "forward", 0.0, 1.0),
            span("experts", "forward", 1.0, 5.0),
            span("projection", "forward", 5.0, 5.5),
            span("projection", "backward", 6.0, 6.25),
            span("experts", "backward", 6.25, 9.0),
            span("projection", "backward", 9.0, 9.25),
            span("qkv", "backward", 9.25, 10.0),
        ]
    )
    assert dense_s(record) == 1.0 + 0.5 + 0.25 + 0.25 + 0.75
    assert forward_s(record) == 5.5
    names = ["qkv", "experts", "projection"]
    assert first_begun(record, names) == (names, names[::-1])


# Waits and experts that travel. -------------------------------------------------------------------


COUNTS = ("event", "megatron_scmoe/overlap/streams.py:271 wait", 4)


@pytest.mark.parametrize(
    ("waits", "outcome"),
    [
        ([COUNTS, ("event", "megatron_scmoe/overlap/streams.py:140 __init__", 2)], "passed"),
        ([(*COUNTS[:2], 5)], "failed"),
        ([COUNTS, ("copy", "megatron_scmoe/model/routing/x.py:1 routing", 4)], "failed"),
        ([COUNTS, ("copy", "megatron/core/transformer/moe/moe_utils.py:1 permute", 4)], "failed"),
        ([COUNTS, ("copy", "megatron/core/timers.py:1 stop", 9)], "passed"),
    ],
)
def test_waits_of_a_unit(results: Results, waits: list[tuple[str, str, int]], outcome: str) -> None:
    main_job._check_waits(results, ProofRun("run", 0, "", 1.0, waits=waits))
    assert last(results).outcome == outcome


def test_an_expert_that_did_not_come_is_noticed(
    single_rank: None, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = generation.experts.fetch
    monkeypatch.setattr(
        generation.experts, "fetch", lambda slots, home: fetch(slots, [x * 0 for x in home])
    )
    generation.GenerationPart(results, CPU).compare(generation.SYSTEMS[0])
    found = outcomes(results)
    assert found.pop("cached, pos1") == "passed"
    assert set(found.values()) == {"failed"} and len(found) == len(generation.ARMS)


# Memory. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fast.MODELS)
def test_memory_beside_the_report(
    name: str, single_rank: None, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes are those of a GPU, where they are only counted; the training is not done."""

    def train(
        model: ScMoEModelConfig, seq_length: int, micro_batch_size: int, device: torch.device
    ) -> tuple[float, float, float]:
        # bf16 weights, fp32 gradients, main parameters and two states of Adam.
        state = 18 * model_size(model, seq_length, micro_batch_size).parameters
        return 1.04 * state, 0.0, 0.9 * state

    monkeypatch.setattr(fast, "_train", train)
    proof = fast.FastPart(results, CUDA, Rates(1.0, 1.0))
    proof.memory(name, "local")
    state, kept, peak = read_findings(results.folder)
    assert (state.outcome, kept.outcome, peak.outcome) == ("passed", "failed", "failed")
    assert state.values["over_report_ratio"] == pytest.approx(1.04)
    assert state.values["reported_mib"] + kept.values["reported_mib"] == pytest.approx(
        peak.values["reported_mib"]
    )
    assert peak.values["reported_mib"] < 70 * 1024, "it fits an H100"


# Errors. ------------------------------------------------------------------------------------------


def test_errors() -> None:
    right = torch.tensor([3.0, 4.0])
    assert error(torch.tensor([3.0, 4.5]), right) == pytest.approx(0.1)
    assert error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
    assert math.isnan(error(torch.tensor([math.nan, 4.0]), right))
    assert largest([0.1, 0.3]) == pytest.approx(0.3)
    for numbers in ([math.nan, 0.1], [0.1, math.nan]):
        assert math.isnan(largest(numbers))
    with pytest.raises(ValueError, match="other tensors"):
        errors({"output": right}, {"gradient": right})


SHAPE = Shape(16, 32, 2, 1, 4, False, True)
UNIT = Contender("pos2", "pos2", 1, True)
LOCAL_OPTIONS = {*transformer_engine.GROUPED, "moe_router_dtype"}


def test_weights_of_another_implementation(single_rank: None) -> None:
    one, other = build(SHAPE, UNIT, 2), build(SHAPE, UNIT, 2, moe_grouped_gemm=True)
    copy_weights(one, other)
    found = on_disk(other)
    assert len(found) > 20
    assert all(torch.equal(weight, found[place]) for place, weight in on_disk(one).items())
    with pytest.raises(ValueError, match="shortcut_layernorm"):
        copy_weights(one, build(SHAPE, UNIT, 2, {"scmoe_shortcut_norm": "shared"}))


def test_a_gradient_that_never_came_is_nan(single_rank: None) -> None:
    block = build(SHAPE, UNIT, 2, NO_OPTIONS)
    for name, parameter in block.named_parameters():
        if "router" not in name:
            parameter.grad = torch.ones_like(parameter)
    nan = [name for name, gradient in gradients(block).items() if gradient.isnan().any()]
    assert len(nan) == 1 and "router" in nan[0]


def test_other_values_are_noticed(
    single_rank: None, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = transformer_engine.Blocks(results, CPU)
    blocks.check(transformer_engine.LOCAL_CASE)
    assert last(results).outcome == "passed" and last(results).values["worst_error"] > 0
    # Weights that differ by an eighth in one matrix.
    built = blocks._build

    def build_other(case: Any, **scmoe: Any) -> Any:
        block = built(case, **scmoe)
        block.layers[0].self_attention.linear_proj.register_forward_pre_hook(
            lambda module, arguments: (arguments[0] * 1.125, *arguments[1:])
        )
        return block

    monkeypatch.setattr(blocks, "_build", build_other)
    blocks.check(transformer_engine.LOCAL_CASE)
    assert last(results).outcome == "failed"


def test_checks_of_transformer_engine(
    single_rank: None, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With local layers in place of those that need a GPU: no check misses what it compares."""

    class Local(LocalSpecProvider):
        def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
            sequential = super().grouped_mlp_modules(False)
            return partial(GroupedExperts, **sequential.keywords) if moe_use_grouped_gemm else None

    monkeypatch.setattr(transformer_engine, "TESpecProvider", Local)
    monkeypatch.setattr(transformer_engine, "GROUPED_TE", transformer_engine.GROUPED)
    blocks = transformer_engine.Blocks(results, CPU)
    built = blocks._build

    def build_local(case: layers.LayerPair, **scmoe: Any) -> Any:
        host = {name: value for name, value in case.host.items() if name in LOCAL_OPTIONS}
        return built(replace(case, host=host), **scmoe)

    monkeypatch.setattr(blocks, "_build", build_local)
    for case in transformer_engine.CASES:
        blocks.check(case)
    blocks.check_fp8()
    blocks.check_delayed_scaling()
    transformer_engine.check_empty_experts(results, CPU)
    assert set(outcomes(results).values()) == {"passed"}
    assert len(outcomes(results)) == len(transformer_engine.CASES) + 2 + 1 + 5
    (delayed,) = (f for f in read_findings(results.folder) if "delayed" in f.name)
    assert set(delayed.values.values()) == {0.0}, "slots change no bit"


@pytest.mark.parametrize(
    ("installed", "fails", "missing"),
    [
        (False, True, "Transformer Engine"),
        (True, True, "a Transformer Engine that runs here, not RuntimeError: no kernel image"),
        (True, False, None),
    ],
)
def test_a_transformer_engine_that_does_not_run(
    monkeypatch: pytest.MonkeyPatch, installed: bool, fails: bool, missing: str | None
) -> None:
    """It is imported where its build has no machine code for the GPU."""

    def linear_error(device: torch.device) -> float:
        if fails:
            raise RuntimeError("no kernel image\nis available")
        return 1e-3

    monkeypatch.setattr(layers, "HAVE_TE", installed)
    monkeypatch.setattr(layers, "linear_error", linear_error)
    monkeypatch.setattr(
        layers, "missing_transformer_engine", layers.missing_transformer_engine.__wrapped__
    )
    assert layers.missing_transformer_engine(CUDA) == missing
    assert layers.missing_transformer_engine(CPU) == "CUDA"
    local = "transformer_impl" not in layers.fastest(CUDA)
    assert local == (missing is not None)


def test_exchanges_of_a_lone_rank(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = torch.arange(6.0).view(3, 2)
    launches: list[int] = []
    issue = AllToAll.issue
    monkeypatch.setattr(
        AllToAll, "issue", lambda *arguments: (launches.append(1), issue(*arguments))[1]
    )
    recorder = UnitRecorder()

    def travel() -> torch.Tensor:
        log = recorder, Activity("dispatch", "forward")
        (received,) = Transfer(AllToAll(distributed.group.WORLD, [3], [3]), [sent], log).complete()
        return received

    with exchanges_to_itself(3):
        received = travel()
    assert torch.equal(received, sent) and received.data_ptr() != sent.data_ptr()
    assert len(launches) == 3 and len(recorder.take().exchanges) == 1
    assert travel().data_ptr() == sent.data_ptr() and len(launches) == 3
