"""DeepEP and HybridEP through the host's managers: the oracle's results, launched early.

The kernels themselves are replaced (tests/deep_ep.py); they need GPUs. Every EP and expert TP of
test_expert_parallel.py, to 2e-6, because their router weights are float32; on equals off bitwise,
chunks, recomputation, capacity; order of launches and waits; bytes.
"""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_scmoe.overlap import branch
from megatron_scmoe.overlap.collectives import Fused
from megatron_scmoe.overlap.recorder import UnitRecorder
from megatron_scmoe.overlap.schedule import Slots
from tests import deep_ep
from tests.distributed_tests.test_expert_parallel import (
    LAYOUTS,
    NUM_EXPERTS,
    WORLD_SIZE,
    Problem,
    check,
    errors,
    pairs,
    solve,
)
from tests.distributed_tests.test_overlap_order import (
    Recorder,
    expected_backward,
    expected_forward,
    record,
)
from tests.distributed_tests.test_overlap_parity import differences, train
from tests.distributed_utils import run_distributed
from tests.models import BATCH, SEQUENCE, Case, build_block
from tests.selected import asked_for

# The kernels take router weights, and so their gradients, in float32 only.
TOLERANCE = 2e-6
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def flex(backend: str, position: str = "pos2", scmoe: dict | None = None, **host: Any) -> Case:
    options = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    options |= {"num_moe_experts": NUM_EXPERTS, "moe_router_topk": 2}
    return Case(
        scmoe={"scmoe_shortcut_position": position, **(scmoe or {})}, host={**options, **host}
    )


CASES = {
    **{
        f"{backend}, {at}": flex(backend, at)
        for backend in ("deepep", "hybridep")
        for at in ("pos1", "pos3")
    },
    "deepep, two chunks": flex("deepep", scmoe={"scmoe_num_chunks": 2}),
    "hybridep, two chunks": flex("hybridep", scmoe={"scmoe_num_chunks": 2}),
    "deepep, without overlap": flex("deepep", scmoe={"scmoe_overlap": False}),
    "deepep, recomputed": flex("deepep", **RECOMPUTED),
    "hybridep, recomputed": flex("hybridep", **RECOMPUTED),
}
SPREAD = {name: sizes for name, sizes in LAYOUTS.items() if name != "EP 1"}


def all_errors(
    problems: dict[str, Problem], wanted: list[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, float]]:
    deep_ep.install()
    result = {}
    for layout, sizes in SPREAD.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**sizes)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        deep_ep.fused_a2a.reset_hybrid_ep_buffer()
        for name, problem in problems.items():
            if (name, layout) not in wanted:
                continue
            deep_ep.calls.clear()
            result[name, layout] = errors(CASES[name], problem, sizes)
            assert deep_ep.calls.count("dispatch") == deep_ep.calls.count("combine") >= 2
    return result


@pytest.fixture(scope="module")
def problems(request: pytest.FixtureRequest) -> dict[str, Problem]:
    return {name: solve(CASES[name]) for name in asked_for(request, "case")}


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, problems: dict[str, Problem]
) -> list[dict[tuple[str, str], dict[str, float]]]:
    return run_distributed(all_errors, WORLD_SIZE, problems, asked_for(request, "case", "layout"))


@pytest.mark.parametrize(("case", "layout"), pairs(CASES, SPREAD, everywhere="deepep, two chunks"))
def test_layout_equals_oracle(
    problems: dict[str, Problem],
    found: list[dict[tuple[str, str], dict[str, float]]],
    case: str,
    layout: str,
) -> None:
    check(problems[case], [rank[case, layout] for rank in found], TOLERANCE)


BACKENDS = ("deepep", "hybridep")
IN_FLIGHT = {
    f"{backend}, {name}": flex(backend, **options)
    for backend in BACKENDS
    for name, options in {
        "two chunks": {"scmoe": {"scmoe_num_chunks": 2}},
        "recomputed": RECOMPUTED,
    }.items()
} | {"deepep, capacity": flex("deepep", moe_expert_capacity_factor=1.0)}


def compare_overlap(cases: dict[str, Case]) -> dict[str, list[str]]:
    """What two overlapped micro-batches in flight change against one after the other, waiting."""
    deep_ep.install()
    result = {}
    for name, case in cases.items():
        found = []
        for overlap in (False, True):
            own = Case({**case.scmoe, "scmoe_overlap": overlap}, case.host)
            tensor_parallel.model_parallel_cuda_manual_seed(1234)
            found.append(train(build_block(own), (1, 0), in_flight=overlap))
        result[name] = differences(*found)
    return result


def test_on_equals_off() -> None:
    for result in run_distributed(compare_overlap, 2, IN_FLIGHT, expert_model_parallel_size=2):
        assert result == {name: [] for name in IN_FLIGHT}


def record_order() -> dict[str, Any]:
    """Steps of a unit forward and backward, and the calls of the backend."""
    deep_ep.install()
    recorder = Recorder()
    branch.Transfer = recorder.watch_transfers(branch.Transfer)
    found = {}
    for backend in BACKENDS:
        deep_ep.calls.clear()
        host = flex(backend).host
        found[backend] = (*record("pos2", Slots(2, 3), True, recorder, host), deep_ep.calls[:])
    return found


def test_order() -> None:
    """In backward a combine travels as a dispatch, and the other way."""
    slots = Slots(2, 3)
    for rank in run_distributed(record_order, 2, expert_model_parallel_size=2):
        for backend in BACKENDS:
            forward, backward, calls = rank[backend]
            assert forward == expected_forward("pos2", slots, True)
            assert backward == expected_backward("pos2", slots, True)
            assert calls == ["dispatch", "combine"] * 2


def bytes_on_record() -> tuple[list[int], int]:
    """What the exchanges of one unit report, and the rows that DeepEP was to send elsewhere."""
    deep_ep.install()
    recorder = UnitRecorder()
    block = build_block(Case(flex("deepep").scmoe, flex("deepep").host, num_layers=2))
    (unit,) = block.layers
    unit.mlp.recorder = recorder
    train(block, (0,), in_flight=False)
    (rows,) = deep_ep.rows_leaving
    return [exchange.bytes for exchange in recorder.take().exchanges], rows


def test_bytes_of_a_rank_without_rows() -> None:
    rows_to = torch.tensor([0, 1, 2])
    fused = Fused(lambda rows: (rows,), None, rows_to)  # type: ignore[arg-type]
    assert fused.bytes_sent([torch.empty(0, 4)]) == 3 * 4 * 4


def test_bytes_on_record() -> None:
    for reported, rows in run_distributed(bytes_on_record, 2, expert_model_parallel_size=2):
        assert 0 < rows <= SEQUENCE * BATCH
        assert reported == [rows * 16 * 8] * 4  # hidden size, float64
