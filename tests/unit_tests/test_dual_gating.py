"""Units with two gates, DGMoE: (23) and appendix A.2 of arXiv:2404.05019.

Equal to the oracle in float64, output and every gradient, at every position, with gate weights of
one or of two, with and without the rule of distinct experts; balanced, skewed, empty-expert and
all-to-one routing of both gates. No bit depends on when anything runs.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_scmoe.model.dual_gating import CURRENT, DualGatingLayer
from megatron_scmoe.overlap.measure.cost import (
    RoutedTimes,
    SlotCost,
    UnitTimes,
    best_slots,
    slot_seconds,
    slot_seconds_of_routes,
)
from megatron_scmoe.overlap.schedule import POSITIONS, Route, Slots, window
from tests.models import Case
from tests.reference import gradients, load_balancing_loss, norm, trace_unit, z_loss
from tests.routing_cases import CASES, plan_selection, planned_logits
from tests.unit_tests.test_layer import (
    FLOAT32_SCORES,
    SHAPE,
    Computed,
    assert_bitwise,
    assert_close,
    assert_equals_oracle,
    flatten,
    fresh_tracker,
    make_block,
    random_layers,
    random_tensor,
    run,
    run_oracle,
)

assert fresh_tracker  # a fixture

pytestmark = pytest.mark.usefixtures("single_rank")

GATES = ("shared", "separate")
TOKENS, EXPERTS = SHAPE[0] * SHAPE[1], 4


def dual_case(
    position: str = "pos2",
    gates: str = "shared",
    distinct: bool = True,
    units: int = 1,
    **host: Any,
) -> Case:
    """Of one unit or several; for Pos-1 a unit is a single layer."""
    layers = 1 if position == "pos1" else 2
    scmoe = {
        "scmoe_shortcut_position": position,
        "scmoe_combine": "add",
        "scmoe_dual_gating": gates,
        "scmoe_distinct_experts": distinct,
    }
    return Case(scmoe, host, moe_frequency=layers, num_layers=layers * units)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("distinct", [True, False], ids=["distinct", "any"])
@pytest.mark.parametrize("norm", ["own", "shared"])
def test_oracle(position: str, gates: str, distinct: bool, norm: str) -> None:
    case = dual_case(position, gates, distinct, units=2)
    case.scmoe |= {"scmoe_shortcut_norm": norm, "scmoe_post_norm": norm == "shared"}
    assert_equals_oracle(case)


HOST_OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "expert bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "scaling factor": {"moe_router_topk_scaling_factor": 2.5},
    "layernorm": {"normalization": "LayerNorm"},
    "all-gather": {"moe_token_dispatcher_type": "allgather"},
    "grouped experts": {"moe_grouped_gemm": True},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm"]},
}


@pytest.mark.parametrize("name", HOST_OPTIONS)
def test_oracle_with_host_option(name: str) -> None:
    host = HOST_OPTIONS[name]
    tolerance = FLOAT32_SCORES if "moe_router_score_function" in host else 1e-10
    assert_equals_oracle(dual_case("pos2", "separate", **host), tolerance)


# Routing. ---------------------------------------------------------------------------------------

WIDE = {"hidden_size": 32, "kv_channels": 8}  # the rows of both gates are linearly independent
CAPACITIES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"moe_expert_capacity_factor": 1.0},
    "padded": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
}


def wide_tensor(seed: int) -> Tensor:
    shape = (*SHAPE[:2], WIDE["hidden_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planned(unit: dict[str, Tensor], case: Case, routings: tuple[str, str]) -> None:
    """Let both gates route the tokens of `wide_tensor(1)` as planned, by one weight or two."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        trace = trace_unit(unit, wide_tensor(1), case.reference_config())
        read = [tokens.flatten(0, 1) for tokens in (trace.routed_input, trace.shared_input)]
        wanted = [
            planned_logits(plan_selection(routing, TOKENS, EXPERTS, 1), EXPERTS, random)
            for routing in routings
        ]
        if case.scmoe["scmoe_dual_gating"] == "shared":
            weights = {"router": torch.linalg.pinv(torch.cat(read)) @ torch.cat(wanted)}
        else:
            pairs = zip(("router", "current_router"), read, wanted, strict=True)
            weights = {name: torch.linalg.pinv(tokens) @ to for name, tokens, to in pairs}
    for name, weight in weights.items():
        unit[f"mlp.{name}.weight"] = weight.T.contiguous().requires_grad_()


@pytest.mark.parametrize(
    ("position", "capacity", "gates", "distinct"),
    [
        *product(POSITIONS, ["dropless"], GATES, [True, False]),
        *product(["pos2"], ["capacity", "padded"], GATES, [True]),
    ],
)
def test_routing_cases(
    position: str, capacity: str, gates: str, distinct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each routing of both gates, and some pairs of two."""
    monkeypatch.setattr("tests.unit_tests.test_layer.random_tensor", wide_tensor)
    case = dual_case(position, gates, distinct, **WIDE, **CAPACITIES[capacity])
    for routings in [*zip(CASES, CASES, strict=True), CASES[:2], CASES[:0:-2]]:
        (unit,), final = random_layers(case)
        planned(unit, case, routings)
        block = make_block(case, flatten([unit], final))
        actual = run(block)
        assert_close(actual, run_oracle(case, [unit], final))

        trace = trace_unit(unit, wide_tensor(1), case.reference_config())
        plans = [plan_selection(routing, TOKENS, EXPERTS, 1) for routing in routings]
        assert trace.selection == plans[0]  # the rule changes nothing of it
        (unit_layer,) = [layer for layer in block.layers if hasattr(layer, "slots")]
        same = sum(a == b for a, b in zip(*plans, strict=True))
        assert unit_layer.recorder.take().same_choices.tolist() == [same, TOKENS]
        if capacity == "dropless":
            both = trace.routing.map & trace.current_routing.map
            assert both.sum() == (0 if distinct else same)


@pytest.mark.usefixtures("fresh_tracker")
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("loss", ["aux", "z"])
def test_both_gates_have_their_losses(gates: str, loss: str) -> None:
    """The current gate's balancing loss counts what is not taken; padding counts in none."""
    host: dict[str, Any] = {"moe_z_loss_coeff": 0.2}
    if loss == "aux":
        host = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3}
    case = dual_case("pos2", gates, **host)
    (unit,), final = random_layers(case)
    sequence, batch, _ = SHAPE
    mask = torch.zeros(batch, sequence, dtype=torch.bool)  # [b, s], True for padding
    mask[0, -2:] = True
    valid = ~mask.T.ravel()
    actual = run(make_block(case, flatten([unit], final)), mask)

    config = case.reference_config()
    hidden_states = random_tensor(1).requires_grad_()
    trace = trace_unit(unit, hidden_states, config)
    assert trace.selection is not None and trace.current_logits is not None
    taken = [row for row, counts in zip(trace.selection, valid, strict=True) if counts]
    output = norm(final, "final_layernorm", trace.output, config)
    total = (output * random_tensor(2)).sum()
    for logits, out in ((trace.logits[valid], None), (trace.current_logits[valid], taken)):
        if loss == "aux":
            total = total + load_balancing_loss(logits, config, 0.3, out)
        else:
            total = total + z_loss(logits, 0.2)
    tensors = {"input": hidden_states, **flatten([unit], final)}
    expected = Computed(output.detach(), gradients(total, tensors))
    assert_close(actual, expected, 1e-10 if loss == "z" else FLOAT32_SCORES)
    assert taken != [[int(row.argmax())] for row in trace.current_logits[valid]]


# When it runs. ----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_no_bit_depends_on_when_it_runs(position: str) -> None:
    case = dual_case(position, "separate", units=2)
    parameters = flatten(*random_layers(case))
    first = run(make_block(case, parameters))
    last = len(window(position))
    for slots, second, overlap in product(
        [Slots(0, 0), Slots(1, last), Slots(last, 0), Slots(last, last)],
        [Slots(0, 0), Slots(1, 0), Slots(1, 1)],
        [True, False],
    ):
        block = make_block(case, parameters)
        for unit in block.layers:
            unit.slots, unit.overlap = slots, overlap
            unit.further_routes = (Route(unit.further_routes[CURRENT - 1].tap, second),)
        assert_bitwise(run(block), first)


@pytest.mark.parametrize("name", ["full", "chunks"])
def test_recomputation_and_chunks(name: str) -> None:
    case = dual_case("pos2", "shared", units=2)
    parameters = flatten(*random_layers(case))
    plain = run(make_block(case, parameters))
    if name == "full":
        full = {"recompute_granularity": "full", "recompute_method": "uniform"}
        other = replace(case, host={**full, "recompute_num_layers": 1})
        assert_bitwise(run(make_block(other, parameters)), plain)
    else:
        other = replace(case, scmoe={**case.scmoe, "scmoe_num_chunks": 3})
        assert_close(run(make_block(other, parameters)), plain)


# What it costs. ---------------------------------------------------------------------------------


def test_only_the_routes_hide_the_exchanges_of_the_second() -> None:
    """Pos-2, by hand: at slot 1 the current route's exchanges are exposed; at the last slot the
    experts of each route run beside an exchange of the other."""
    experts, dispatch, combine = routed = RoutedTimes(5.0, 3.0, 2.0)
    times = UnitTimes((4.0, 1.0, 1.0, 1.0, 0.0), *routed, further=(routed,))
    further = DualGatingLayer.further_routes
    compute = times.window + 2 * experts
    for slot, exposed in ((1, dispatch + combine), (5, combine)):
        cost = slot_seconds_of_routes(times, slot, "pos2", further, "forward")
        hidden = 2 * (dispatch + combine) - exposed
        assert cost == SlotCost(compute + exposed, exposed, hidden)
    mirrored = slot_seconds_of_routes(times, 5, "pos2", further, "backward")
    assert mirrored.exposed == dispatch or mirrored.exposed == combine
    for direction in ("forward", "backward"):
        assert best_slots(times, "pos2", further, direction)[0] == 5
    alone = replace(times, further=())
    assert slot_seconds_of_routes(alone, 1, "pos2", (), "forward") == slot_seconds(alone, 1)
