"""Shortcut units against the oracle, in float64: output and every gradient.

One block of units (tests/models.py) and the oracle (tests/reference.py) get the same random
parameters, the same input and the same gradient of the output. Every position, combine, norm and
post-norm, top-k 1 to 3, MoE in every, every second and every fourth layer; balanced, skewed,
empty-expert and all-to-one routing, with and without capacity; to 1e-10. Every slot gives the same
bits.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_logging
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_scmoe.checks.shortcut import check_model
from megatron_scmoe.overlap.schedule import POSITIONS, window
from tests.models import Case, build_block, parameters_by_expert, run_block
from tests.reference import (
    UnitTrace,
    dense_layer_shapes,
    gradients,
    load_balancing_loss,
    norm,
    random_parameters,
    reference_block,
    trace_unit,
    unit_shapes,
    z_loss,
)
from tests.routing_cases import CASES, with_routing

pytestmark = pytest.mark.usefixtures("single_rank")

TOLERANCE = 1e-10
# Where float32 enters by different roads: the host computes router scores in float32 whatever the
# model's precision is; torch's sigmoid of a matrix and of its rows differ in the last bit, and the
# balancing loss sums the scores in another order than the oracle.
FLOAT32_SCORES = 1e-6
# The same sum of gradients in another order.
ORDER = 1e-12
SHAPE = (5, 2, 16)  # [s, b, h]; no more tokens than h, so that routing can be planned
COMBINES = ("add", "cg1", "cg2")

Layers = list[dict[str, Tensor]]


@dataclass
class Computed:
    """What two computations of the same block are compared by."""

    output: Tensor
    gradients: dict[str, Tensor]


def random_tensor(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_layers(case: Case) -> tuple[Layers, dict[str, Tensor]]:
    """The oracle's parameters of every block layer, and of the final norm."""
    config = case.reference_config()
    expert_bias = case.host.get("moe_router_enable_expert_bias", False)
    # A Pos-1 unit has no dense half: what stands in front of it is a plain layer.
    dense_half = config.position != "pos1" and case.moe_frequency > 1
    period = [dense_layer_shapes(config)] * (case.moe_frequency - 1 - dense_half)
    period.append(unit_shapes(config, dense_half, expert_bias))
    shapes = period * (case.num_layers // case.moe_frequency)
    final = {"final_layernorm.weight": (config.hidden_size,)}
    if config.normalization == "LayerNorm":
        final["final_layernorm.bias"] = (config.hidden_size,)
    layers = [random_parameters(shape, seed) for seed, shape in enumerate(shapes)]
    return layers, random_parameters(final, seed=99)


def block_tensors(block: TransformerBlock) -> dict[str, Tensor]:
    """Everything in the block that the oracle has too, by name."""
    tensors: dict[str, Tensor] = dict(parameters_by_expert(block))
    biases = {n: buffer for n, buffer in block.named_buffers() if n.endswith("expert_bias")}
    return tensors | biases


def flatten(layers: Layers, final: dict[str, Tensor]) -> dict[str, Tensor]:
    """The oracle's parameters under the block's names."""
    named = {f"layers.{i}.{n}": t for i, layer in enumerate(layers) for n, t in layer.items()}
    return named | final


def make_block(case: Case, parameters: dict[str, Tensor]) -> TransformerBlock:
    """A block with exactly these parameters."""
    block = build_block(case)
    tensors = block_tensors(block)
    assert tensors.keys() == parameters.keys()
    for name, tensor in tensors.items():
        tensor.data.copy_(parameters[name])
    return block


def run(block: TransformerBlock, padding_mask: Tensor | None = None) -> Computed:
    """Output and gradients of a block, through .backward() as in training."""
    hidden_states = random_tensor(1).requires_grad_()
    block.zero_grad()
    output = run_block(block, hidden_states, padding_mask)
    output.backward(random_tensor(2))
    tensors = {"input": hidden_states, **dict(parameters_by_expert(block))}
    # The host leaves None for an expert that no token visited.
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in tensors.items()}
    return Computed(output.detach(), {name: grad.clone() for name, grad in grads.items()})


def run_case(case: Case) -> Computed:
    return run(make_block(case, flatten(*random_layers(case))))


def run_oracle(case: Case, layers: Layers, final: dict[str, Tensor]) -> Computed:
    hidden_states = random_tensor(1).requires_grad_()
    output = reference_block(
        layers, hidden_states, case.reference_config(), case.moe_frequency, final
    )
    loss = (output * random_tensor(2)).sum()
    grads = gradients(loss, {"input": hidden_states, **flatten(layers, final)})
    return Computed(output.detach(), grads)


def assert_close(actual: Computed, expected: Computed, tolerance: float = TOLERANCE) -> None:
    assert actual.gradients.keys() == expected.gradients.keys()
    options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(actual.output, expected.output, **options)
    for name, grad in expected.gradients.items():
        torch.testing.assert_close(
            actual.gradients[name], grad, **options, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_bitwise(actual: Computed, expected: Computed) -> None:
    assert torch.equal(actual.output, expected.output)
    differing = [
        n for n, g in expected.gradients.items() if not torch.equal(g, actual.gradients[n])
    ]
    assert not differing


def assert_equals_oracle(case: Case, tolerance: float = TOLERANCE) -> None:
    layers, final = random_layers(case)
    actual = run(make_block(case, flatten(layers, final)))
    assert_close(actual, run_oracle(case, layers, final), tolerance)
    # Every parameter took part: a comparison of zeros would say nothing.
    experts = {n for n in actual.gradients if ".local_experts." in n}
    assert all(g.abs().max() > 0 for n, g in actual.gradients.items() if n not in experts)
    assert any(actual.gradients[n].abs().max() > 0 for n in experts)


def unit_case(position: str, host: dict[str, Any] | None = None, **scmoe: Any) -> Case:
    """One unit: a pair, for Pos-1 a single layer."""
    layers = 1 if position == "pos1" else 2
    options = {"scmoe_shortcut_position": position, **scmoe}
    return Case(scmoe=options, host=host or {}, moe_frequency=layers, num_layers=layers)


# The paper's axes. ------------------------------------------------------------------------------

AXES = [
    pytest.param(frequency, *values, id="-".join(map(str, (*values, f"freq{frequency}"))))
    for frequency in (1, 2, 4)
    for values in itertools.product(
        ("pos1",) if frequency == 1 else POSITIONS,
        COMBINES,
        ("own", "shared"),
        ("nopost", "post"),
        (1, 2, 3),
    )
]


@pytest.mark.parametrize(("frequency", "position", "combine", "norm", "post", "topk"), AXES)
def test_oracle(
    frequency: int, position: str, combine: str, norm: str, post: str, topk: int
) -> None:
    case = Case(
        scmoe={
            "scmoe_shortcut_position": position,
            "scmoe_combine": combine,
            "scmoe_shortcut_norm": norm,
            "scmoe_post_norm": post == "post",
        },
        host={"moe_router_topk": topk},
        moe_frequency=frequency,
        # Two units in a row wherever that is cheap.
        num_layers=max(2, frequency) if frequency != 2 else 4,
    )
    assert_equals_oracle(case)


HOST_OPTIONS = {
    "post-softmax": {"moe_router_topk": 2, "moe_router_pre_softmax": False},
    "sigmoid-top1": {"moe_router_score_function": "sigmoid"},
    "sigmoid-top2-bias": {
        "moe_router_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "scaling-factor": {"moe_router_topk_scaling_factor": 2.5},
    "layernorm": {"normalization": "LayerNorm"},
    "gelu": {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
    "grouped-experts": {"moe_grouped_gemm": True, "moe_router_topk": 2},
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("options", HOST_OPTIONS.values(), ids=HOST_OPTIONS.keys())
def test_oracle_with_host_option(position: str, options: dict[str, Any]) -> None:
    tolerance = FLOAT32_SCORES if "moe_router_score_function" in options else TOLERANCE
    assert_equals_oracle(unit_case(position, options, scmoe_post_norm=True), tolerance)


def test_layernorm_with_shared_norm() -> None:
    case = unit_case("pos3", {"normalization": "LayerNorm"}, scmoe_shortcut_norm="shared")
    assert_equals_oracle(case)


# Routing. ---------------------------------------------------------------------------------------

CAPACITIES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "probs": {"moe_expert_capacity_factor": 1.0},
    "position": {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "position"},
    "padded": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("routing", CASES)
def test_routing_case(position: str, topk: int, capacity: str, routing: str) -> None:
    case = unit_case(position, {"moe_router_topk": topk, **CAPACITIES[capacity]})
    config = case.reference_config()
    (unit,), final = random_layers(case)
    unit, selection = with_routing(unit, random_tensor(1), config, routing)

    with torch.no_grad():
        kept = trace_unit(unit, random_tensor(1), config).routing.map.sum(dim=0)
    planned = torch.tensor([sum(e in row for row in selection) for e in range(4)])
    if capacity == "dropless":
        assert kept.tolist() == planned.tolist()
    elif routing in ("skewed", "all_to_one"):
        assert kept.sum() < planned.sum()

    actual = run(make_block(case, flatten([unit], final)))
    assert_close(actual, run_oracle(case, [unit], final))


def test_more_capacity_than_tokens_drops_nothing() -> None:
    layers, final = random_layers(unit_case("pos2"))
    case = unit_case("pos2", {"moe_expert_capacity_factor": 4.0})
    parameters = flatten(layers, final)
    assert_bitwise(run(make_block(case, parameters)), run_case(unit_case("pos2")))


# Losses of the router. --------------------------------------------------------------------------

LOSSES: dict[str, dict[str, Any]] = {
    "aux": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3},
    "z": {"moe_z_loss_coeff": 0.2},
}
LOSSES["both"] = {**LOSSES["aux"], **LOSSES["z"]}


@pytest.fixture
def fresh_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host sizes its global tracker for the first model that it sees."""
    monkeypatch.setattr(moe_logging, "_MOE_METRICS_TRACKER", MoEMetricsTracker())
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def run_oracle_with_losses(case: Case, valid: Tensor) -> Computed:
    """The losses of the tokens in `valid`, [T], are part of what is differentiated."""
    config, host = case.reference_config(), case.host
    (unit,), final = random_layers(case)
    hidden_states = random_tensor(1).requires_grad_()
    trace: UnitTrace = trace_unit(unit, hidden_states, config)
    output = norm(final, "final_layernorm", trace.output, config)
    loss = (output * random_tensor(2)).sum()
    logits = trace.logits[valid]
    if "moe_aux_loss_coeff" in host:
        loss = loss + load_balancing_loss(logits, config, host["moe_aux_loss_coeff"])
    if "moe_z_loss_coeff" in host:
        loss = loss + z_loss(logits, host["moe_z_loss_coeff"])
    tensors = {"input": hidden_states, **flatten([unit], final)}
    return Computed(output.detach(), gradients(loss, tensors))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("padding", [False, True], ids=["all-valid", "padding"])
@pytest.mark.usefixtures("fresh_tracker")
def test_router_losses(position: str, loss: str, topk: int, padding: bool) -> None:
    case = unit_case(position, {"moe_router_topk": topk, **LOSSES[loss]})
    parameters = flatten(*random_layers(case))
    sequence, batch, _ = SHAPE
    mask = torch.zeros(batch, sequence, dtype=torch.bool)  # [b, s], True for padding
    if padding:
        mask[0, -2:] = True
        mask[1, -1:] = True
    actual = run(make_block(case, parameters), mask if padding else None)
    tolerance = TOLERANCE if loss == "z" else FLOAT32_SCORES
    assert_close(actual, run_oracle_with_losses(case, ~mask.T.ravel()), tolerance)
    without = run_case(replace(case, host={"moe_router_topk": topk}))
    router = next(name for name in parameters if name.endswith("router.weight"))
    assert not torch.allclose(actual.gradients[router], without.gradients[router], rtol=1e-3)


def test_padding_reaches_nothing_but_the_losses() -> None:
    block = make_block(unit_case("pos2"), flatten(*random_layers(unit_case("pos2"))))
    mask = torch.tensor([[False] * 3 + [True] * 2] * 2)
    assert_bitwise(run(block, mask), run(block))


# Multi-latent attention. ------------------------------------------------------------------------

# Keys of 2 + 2 features, values of 3.
MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 2,
    "qk_pos_emb_head_dim": 2,
    "v_head_dim": 3,
    "rope_type": "rope",
    "num_query_groups": 4,
}


# Schedule. --------------------------------------------------------------------------------------

SLOTS = [(position, slot) for position in POSITIONS for slot in range(len(window(position)) + 1)]


@pytest.mark.parametrize(("position", "slot"), SLOTS)
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_slot_changes_order_only(position: str, slot: int, attention: str) -> None:
    """Every slot, overlapped or not, gives the same bits: the choice cannot be seen in a loss."""
    host = MLA if attention == "mla" else {}

    def case(slot: int, overlap: bool) -> Case:
        return Case(
            scmoe={
                "scmoe_shortcut_position": position,
                "scmoe_expert_slot": str(slot),
                "scmoe_overlap": overlap,
            },
            host={"moe_router_topk": 2, **host},
        )

    parameters = fresh_parameters(case(slot, True))
    overlapped = run(make_block(case(slot, True), parameters))
    sequential = run(make_block(case(slot, False), parameters))
    assert_bitwise(overlapped, sequential)
    first = run(make_block(case(0, False), parameters))
    assert_bitwise(overlapped, first)


def fresh_parameters(case: Case) -> dict[str, Tensor]:
    """Random parameters under the block's names, for blocks that the oracle does not know."""
    shapes = {name: tuple(p.shape) for name, p in build_block(case).named_parameters()}
    return random_parameters(shapes, seed=3)


# Gates. -----------------------------------------------------------------------------------------


def test_top1_after_the_softmax_is_refused() -> None:
    case = unit_case("pos2")
    config = case.host_config()
    config.moe_router_pre_softmax = False
    with pytest.raises(ValueError, match="--moe-router-pre-softmax"):
        check_model(config, case.scmoe_config())


def test_cg1_is_the_hosts_shared_expert_gate() -> None:
    """c SE(x) with c = Sigmoid(W x), and the routed output as it is: (14)(15)."""
    gated = build_block(unit_case("pos2", scmoe_combine="cg1")).layers[0].mlp
    plain = build_block(unit_case("pos2", scmoe_combine="add")).layers[0].mlp
    assert gated.shared_experts.use_shared_expert_gate
    assert not plain.shared_experts.use_shared_expert_gate
    plain.shared_experts.load_state_dict(gated.shared_experts.state_dict(), strict=False)
    x = random_tensor(5)
    gate = torch.sigmoid(x @ gated.shared_experts.gate_weight.T)
    shared, ungated = gated.shared_expert(x), plain.shared_expert(x)
    assert shared.routed_weight is None
    torch.testing.assert_close(shared.output, gate * ungated.output, rtol=0, atol=1e-12)
    assert torch.equal(shared.output, gated.shared_experts(x))


def test_cg2_gates_both_outputs() -> None:
    mlp = build_block(unit_case("pos2", scmoe_combine="cg2")).layers[0].mlp
    shared = mlp.combine_gate(random_tensor(5), torch.ones(SHAPE, dtype=torch.float64))
    assert shared.routed_weight.shape == (*SHAPE[:2], 1)
    torch.testing.assert_close(shared.output + shared.routed_weight, torch.ones_like(shared.output))


# Recomputation. ---------------------------------------------------------------------------------

# What is recomputed, and a module of a unit that must then run twice.
RECOMPUTED = {
    "core_attn": "self_attention.core_attention",
    "layernorm": "pre_mlp_layernorm",
    "mlp": "dense_layer.mlp",
    "shared_experts": "mlp.shared_experts",
    "moe": "mlp.experts",
}
RECOMPUTATIONS: dict[str, dict[str, Any]] = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "all": {"recompute_granularity": "selective", "recompute_modules": list(RECOMPUTED)},
}
for name in RECOMPUTED:
    RECOMPUTATIONS[name] = {"recompute_granularity": "selective", "recompute_modules": [name]}


def count_calls(block: TransformerBlock, names: list[str]) -> dict[str, int]:
    """Forward calls of the first unit's modules during one training step."""
    calls = dict.fromkeys(names, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    modules = dict(block.layers[0].named_modules())
    handles = [modules[name].register_forward_hook(count(name)) for name in names]
    run(block)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("norm", ["own", "shared"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("recompute", RECOMPUTATIONS)
def test_recomputation_is_exact(recompute: str, position: str, norm: str) -> None:
    options = {
        "scmoe_shortcut_position": position,
        "scmoe_shortcut_norm": norm,
        "scmoe_post_norm": True,
    }
    plain = Case(scmoe=options, host={"moe_router_topk": 2})
    case = replace(plain, host={**plain.host, **RECOMPUTATIONS[recompute]})
    parameters = fresh_parameters(plain)
    recomputed, expected = (run(make_block(c, parameters)) for c in (case, plain))
    if recompute in ("layernorm", "all"):
        # Here the host sums a norm's own two gradients before it adds the others', stock layers
        # included.
        assert torch.equal(recomputed.output, expected.output)
        assert_close(recomputed, expected, ORDER)
    else:
        assert_bitwise(recomputed, expected)


@pytest.mark.parametrize("recompute", ["full", *RECOMPUTED])
def test_recomputation_takes_place(recompute: str) -> None:
    case = unit_case("pos2", RECOMPUTATIONS[recompute])
    calls = count_calls(build_block(case), list(RECOMPUTED.values()))
    expected = {RECOMPUTED[recompute]} if recompute in RECOMPUTED else set(RECOMPUTED.values())
    if recompute == "moe":  # the unit recomputes both kinds of experts
        expected.add(RECOMPUTED["shared_experts"])
    assert {name for name, number in calls.items() if number == 2} == expected
    assert all(number == 1 for name, number in calls.items() if name not in expected)


# Other ways to run. -----------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_no_token_sees_a_later_one(position: str, attention: str) -> None:
    """Dropless routing decides token by token, and every path around it is causal."""
    case = Case(scmoe={"scmoe_shortcut_position": position}, host=MLA if attention == "mla" else {})
    block = make_block(case, fresh_parameters(case))
    hidden_states = random_tensor(1)
    changed = hidden_states.clone()
    changed[3] += 1
    before, after = run_block(block, hidden_states), run_block(block, changed)
    torch.testing.assert_close(before[:3], after[:3], rtol=0, atol=1e-12)
    assert not torch.allclose(before[3:], after[3:], atol=1e-3)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.usefixtures("fresh_tracker")
def test_evaluation_gives_the_training_output(position: str) -> None:
    case = unit_case(position, LOSSES["both"])
    block = make_block(case, flatten(*random_layers(case)))
    training = run(block).output
    block.eval()
    with torch.no_grad():
        output = run_block(block, random_tensor(1))
    assert torch.equal(output, training)
    assert not output.requires_grad


def test_moe_layer_has_no_forward_of_its_own() -> None:
    mlp = build_block(unit_case("pos2")).layers[0].mlp
    with pytest.raises(RuntimeError, match="schedule of ShortcutLayer"):
        mlp(random_tensor(1))
