"""Tests of the oracle itself: hand-worked examples, torch's own operators, identities of the
equations, and Megatron's routing functions. Nothing here uses the package under test."""

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from tests import reference as ref
from tests.reference import OracleRouting, ReferenceConfig
from tests.routing_cases import CASES, plan_selection, routing_case, with_routing

CONFIG = ReferenceConfig(
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    ffn_hidden_size=12,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=6,
    moe_shared_expert_intermediate_size=10,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of products of tiny matrices: a second thread only makes them slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_exact(got: Tensor, want: Tensor) -> None:
    """Equal up to the rounding of float64."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def unit(
    config: ReferenceConfig, dense_half: bool = True, seed: int = 0, s: int = 4, b: int = 2
) -> tuple[dict[str, Tensor], Tensor]:
    """Random parameters of one unit and an input, (s, b, h)."""
    params = ref.random_parameters(ref.unit_shapes(config, dense_half), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(s, b, config.hidden_size, generator=generator, dtype=torch.float64)
    return params, hidden.requires_grad_()


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_zeros(params: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return params | {name: torch.zeros_like(params[name]) for name in names}


def log_odds(*probabilities: float) -> Tensor:
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.log(p / (1 - p))


# ---------------------------------------------------------------------------- dense operations


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norm_is_torchs(normalization: str) -> None:
    config = replace(CONFIG, normalization=normalization, layernorm_epsilon=0.1)
    x, weight, bias = 3 + random(5, 16), random(16, seed=1), random(16, seed=2)
    got = ref.norm({"n.weight": weight, "n.bias": bias}, "n", x, config)
    if normalization == "RMSNorm":
        want = F.rms_norm(x, (16,), weight, eps=0.1)
    else:
        want = F.layer_norm(x, (16,), weight, bias, eps=0.1)
    assert_exact(got, want)


def test_mlp_gates_with_the_first_half_of_fc1() -> None:
    x, gate, up, down = random(5, 16), random(6, 16, seed=1), random(6, 16, seed=2), random(16, 6)
    params = {"linear_fc1.weight": torch.cat([gate, up]), "linear_fc2.weight": down}
    want = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    assert_exact(ref.mlp(params, "", x, CONFIG), want)


def test_mlp_gelu_is_the_erf_form() -> None:
    x, up, down = random(5, 16), random(6, 16, seed=1), random(16, 6)
    params = {"linear_fc1.weight": up, "linear_fc2.weight": down}
    got = ref.mlp(params, "", x, replace(CONFIG, activation="gelu"))
    assert_exact(got, F.linear(F.gelu(F.linear(x, up)), down))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rotary_base", [None, 100.0])
def test_attention_is_scaled_dot_product_attention(groups: int, rotary_base: float | None) -> None:
    config = replace(CONFIG, num_query_groups=groups, rotary_base=rotary_base)
    s, b, d, per_group = 5, 2, 4, 4 // groups
    x = random(s, b, 16)
    qkv_weight, proj_weight = random((4 + 2 * groups) * d, 16, seed=1), random(16, 16, seed=2)
    params = {
        "self_attention.linear_qkv.weight": qkv_weight,
        "self_attention.linear_proj.weight": proj_weight,
    }
    qkv = F.linear(x, qkv_weight).view(s, b, groups, per_group + 2, d)
    query = qkv[:, :, :, :per_group].reshape(s, b, 4, d)
    key, value = qkv[:, :, :, per_group], qkv[:, :, :, per_group + 1]
    if rotary_base is not None:
        query, key = rotate_as_complex(query, rotary_base), rotate_as_complex(key, rotary_base)
    context = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        is_causal=True,
        enable_gqa=True,
    )
    want = F.linear(context.permute(2, 0, 1, 3).reshape(s, b, 16), proj_weight)
    assert_exact(ref.attention(params, "", x, config), want)


def rotate_as_complex(x: Tensor, base: float) -> Tensor:
    """RoPE as multiplication by exp(i * position * frequency). x: (s, b, heads, d)"""
    s, half = x.shape[0], x.shape[-1] // 2
    angles = torch.outer(
        torch.arange(s, dtype=x.dtype), base ** (-torch.arange(half, dtype=x.dtype) / half)
    )
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)[:, None, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_rope_keeps_norms_and_sees_only_relative_positions() -> None:
    config = replace(CONFIG, rotary_base=100.0)
    query, key = random(8, seed=1).expand(6, 8), random(8, seed=2).expand(6, 8)
    turned_query, turned_key = ref.rope(query, config), ref.rope(key, config)
    assert_exact(turned_query.norm(dim=-1), query.norm(dim=-1))
    products = turned_query @ turned_key.T
    assert_exact(products[1:, 1:], products[:-1, :-1])
    assert (products[0, 1:] - products[0, :-1]).abs().min() > 1e-3


@pytest.mark.parametrize("rotary_percent", [1.0, 0.5])
def test_rope_is_the_hosts(rotary_percent: float) -> None:
    x = random(7, 2, 3, 16)
    embedding = rotary_pos_embedding.RotaryEmbedding(
        16, rotary_percent, rotary_base=10000, use_cpu_initialization=True, cp_group=None
    )
    half = embedding.get_freqs_non_repeated(7)
    angles = torch.cat([half, half], dim=-1)[:, None, None, :]
    want = rope_utils._apply_rotary_pos_emb_bshd(x, angles)
    config = replace(
        CONFIG, rotary_base=10000, rotary_percent=rotary_percent, rotary_dtype=torch.float32
    )
    got = torch.stack(
        [torch.stack([ref.rope(x[:, i, j], config) for j in range(3)], dim=1) for i in range(2)],
        dim=1,
    )
    assert_exact(got, want)


# ---------------------------------------------------------------------------- gate, by hand


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"moe_router_pre_softmax": True}, {3: 0.4, 2: 0.3}),
        ({"moe_router_pre_softmax": False}, {3: 4 / 7, 2: 3 / 7}),
        ({"moe_router_pre_softmax": True, "moe_router_topk": 1}, {3: 0.4}),
        ({"moe_router_pre_softmax": False, "moe_router_topk": 1}, {3: 1.0}),
        ({"moe_router_topk_scaling_factor": 2.5}, {3: 1.0, 2: 0.75}),
    ],
)
def test_softmax_gate_by_hand(options: dict[str, Any], want: dict[int, float]) -> None:
    logits = 7 + torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    weights, selection = ref.gate(logits[None], replace(CONFIG, **options))
    assert selection == [list(want)]
    assert weights[0].tolist() == pytest.approx(list(want.values()), abs=1e-14)


@pytest.mark.parametrize(
    ("topk", "bias", "want"),
    [
        (2, None, {2: 0.6, 0: 0.4}),
        (1, None, {2: 0.75}),
        (2, [0, 0, 0, 1.0], {3: 0.1 / 0.85, 2: 0.75 / 0.85}),
        (1, [0, 0, 0, 1.0], {3: 0.1}),
    ],
)
def test_sigmoid_gate_by_hand(topk: int, bias: list | None, want: dict[int, float]) -> None:
    config = replace(CONFIG, moe_router_score_function="sigmoid", moe_router_topk=topk)
    expert_bias = None if bias is None else torch.tensor(bias)
    weights, selection = ref.gate(log_odds(0.5, 0.25, 0.75, 0.1)[None], config, expert_bias)
    assert selection == [list(want)]
    assert weights[0].tolist() == pytest.approx(list(want.values()), abs=1e-14)


def test_expert_bias_needs_sigmoid() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        ref.route_logits(random(3, 4), CONFIG, torch.zeros(4))


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_top_1_router_gradient_needs_pre_softmax(pre_softmax: bool) -> None:
    config = replace(CONFIG, moe_router_topk=1, moe_router_pre_softmax=pre_softmax)
    params, hidden = unit(config)
    trace = ref.trace_unit(params, hidden, config)
    router = ref.gradients(trace.output.square().sum(), params)["mlp.router.weight"]
    if pre_softmax:
        assert trace.routing.weights.max() < 1
        assert router.abs().max() > 1e-3
    else:
        assert torch.equal(trace.routing.weights, trace.routing.map.double())
        assert torch.equal(router, torch.zeros_like(router))


# ---------------------------------------------------------------------------- capacity, by hand

# Six tokens, two experts, K = 1, factor 1.0: three places each. Expert 0 is selected by tokens
# 0, 1, 3, 4, 5, of which two must go; expert 1 by token 2.
WEIGHTS = torch.tensor(
    [[0.6, 0], [0.9, 0], [0, 0.7], [0.8, 0], [0.5, 0], [0.95, 0]], dtype=torch.float64
)


@pytest.mark.parametrize(
    ("policy", "factor", "kept"),
    [
        ("probs", 1.0, [1, 3, 5]),
        ("position", 1.0, [0, 1, 3]),
        ("probs", 0.4, [1, 5]),
        ("position", 0.4, [0, 1]),
        ("probs", 1.4, [0, 1, 3, 4, 5]),
        ("position", 9.0, [0, 1, 3, 4, 5]),
    ],
)
def test_capacity_by_hand(policy: str, factor: float, kept: list[int]) -> None:
    config = replace(
        CONFIG,
        num_moe_experts=2,
        moe_router_topk=1,
        moe_expert_capacity_factor=factor,
        moe_token_drop_policy=policy,
    )
    weights = WEIGHTS.clone().requires_grad_()
    dropped = ref.drop_over_capacity(OracleRouting(weights, WEIGHTS > 0), config)
    assert dropped.map[:, 0].nonzero().flatten().tolist() == kept
    assert dropped.map[:, 1].nonzero().flatten().tolist() == [2]
    assert torch.equal(dropped.weights, WEIGHTS * dropped.map)
    (gradient,) = torch.autograd.grad(dropped.weights.sum(), weights)
    assert torch.equal(gradient, dropped.map.double())


def test_equal_weights_keep_the_earliest_token() -> None:
    config = replace(CONFIG, num_moe_experts=2, moe_router_topk=1, moe_expert_capacity_factor=0.5)
    weights = torch.tensor([[0.5, 0], [0.5, 0], [0.9, 0], [0.5, 0], [0.5, 0], [0.5, 0]])
    dropped = ref.drop_over_capacity(OracleRouting(weights, weights > 0), config)
    assert dropped.map[:, 0].nonzero().flatten().tolist() == [0, 2]


@pytest.mark.parametrize(
    ("num_tokens", "topk", "factor", "want"),
    [(12, 2, 1.0, 6), (13, 2, 1.0, 7), (12, 2, 1.25, 8), (12, 1, 1.25, 4), (1, 1, 0.1, 1)],
)
def test_capacity_rounds_up(num_tokens: int, topk: int, factor: float, want: int) -> None:
    config = replace(CONFIG, moe_router_topk=topk, moe_expert_capacity_factor=factor)
    assert ref.expert_capacity(num_tokens, config) == want


def test_capacity_counts_tokens_across_the_batch_sequence_position_first() -> None:
    """Eight tokens want expert 0, which has two places: both sequences' first position."""
    config = replace(
        CONFIG,
        moe_router_topk=1,
        moe_expert_capacity_factor=1.0,
        moe_token_drop_policy="position",
    )
    params, hidden = unit(config)
    params, _ = with_routing(params, hidden, config, "all_to_one")
    routed = ref.trace_unit(params, hidden, config).routed_output
    assert routed[0].abs().amin() > 0
    assert torch.equal(routed[1:], torch.zeros_like(routed[1:]))


# ---------------------------------------------------------------------------- losses, by hand


def test_load_balancing_loss_by_hand() -> None:
    """Three tokens, K = 1: f = [2/3, 1/3], P = mean of the softmax rows."""
    config = replace(CONFIG, num_moe_experts=2, moe_router_topk=1)
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
    loss = ref.load_balancing_loss(torch.log(probs), config, coeff=0.01)
    want = 0.01 * 2 * (2 / 3 * (1.7 / 3) + 1 / 3 * (1.3 / 3))
    assert loss.item() == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_load_balancing_loss_is_one_at_balance_and_larger_when_skewed(score_function: str) -> None:
    config = replace(CONFIG, moe_router_score_function=score_function)
    losses = {}
    for case in CASES:
        logits = routing_case(case, 16, 4, 2, 16).logits
        losses[case] = ref.load_balancing_loss(logits, config, coeff=1.0).item()
    # Equal counts make f_i = 1/E, and the mean scores of one token always sum to 1.
    assert losses.pop("balanced") == pytest.approx(1.0, abs=1e-12)
    assert min(losses.values()) > 1.05


def test_z_loss_by_hand() -> None:
    logits = torch.stack([torch.zeros(4), torch.full((4,), 2.0)]).double()
    want = 0.5 * (math.log(4) ** 2 + (2 + math.log(4)) ** 2) / 2
    assert ref.z_loss(logits, coeff=0.5).item() == pytest.approx(want, abs=1e-14)


# ---------------------------------------------------------------------------- against the host


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Megatron's moe_utils, its casts to float32 made casts to float64."""

    class Float64Torch:
        float32 = torch.float64

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(moe_utils, "torch", Float64Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return moe_utils


SCORES = [("softmax", False), ("softmax", True), ("sigmoid", False)]


def routing_config(
    score_function: str, pre_softmax: bool, topk: int, **more: Any
) -> ReferenceConfig:
    return replace(
        CONFIG,
        num_moe_experts=8,
        moe_router_topk=topk,
        moe_router_score_function=score_function,
        moe_router_pre_softmax=pre_softmax,
        **more,
    )


def host_route(
    module: ModuleType, logits: Tensor, config: ReferenceConfig, expert_bias: Tensor | None = None
) -> OracleRouting:
    """What TopKRouter.routing does without auxiliary losses."""
    weights, routing_map = module.topk_routing_with_score_function(
        logits,
        config.moe_router_topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=config.moe_router_score_function,
        expert_bias=expert_bias,
    )
    if config.moe_expert_capacity_factor is not None:
        weights, routing_map = module.apply_router_token_dropping(
            weights,
            routing_map,
            config.moe_router_topk,
            config.moe_expert_capacity_factor,
            config.moe_token_drop_policy,
        )
    return OracleRouting(weights, routing_map)


def assert_same_routing(logits: Tensor, got: OracleRouting, want: OracleRouting) -> None:
    """Same map, same weights, same gradient of a random function of the weights."""
    assert torch.equal(got.map, want.map)
    assert_exact(got.weights, want.weights)
    direction = random(*want.weights.shape, seed=9)
    (got_gradient,) = torch.autograd.grad(
        (got.weights * direction).sum(), logits, retain_graph=True
    )
    (want_gradient,) = torch.autograd.grad(
        (want.weights * direction).sum(), logits, retain_graph=True
    )
    assert_exact(got_gradient, want_gradient)


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize(
    ("score_function", "pre_softmax", "with_bias"),
    [(*scores, False) for scores in SCORES] + [("sigmoid", False, True)],
)
def test_routing_is_the_hosts(
    host: ModuleType, score_function: str, pre_softmax: bool, topk: int, with_bias: bool
) -> None:
    config = routing_config(
        score_function, pre_softmax, topk, moe_router_topk_scaling_factor=1.5 if topk == 3 else None
    )
    logits = random(37, 8).requires_grad_()
    expert_bias = random(8, seed=1) if with_bias else None
    got = ref.route_logits(logits, config, expert_bias)
    assert_same_routing(logits, got, host_route(host, logits, config, expert_bias))


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize(("score_function", "pre_softmax"), SCORES)
def test_router_score_dtype_float32_is_the_hosts_own_rounding(
    score_function: str, pre_softmax: bool, topk: int
) -> None:
    """The host untouched: float64 logits, float32 scores. Without the cast they are 1e-8 apart."""
    config = routing_config(score_function, pre_softmax, topk, router_score_dtype=torch.float32)
    logits = random(37, 8).requires_grad_()
    want = host_route(moe_utils, logits, config)
    assert_same_routing(logits, ref.route_logits(logits, config), want)
    if topk == 2:
        unrounded = ref.route_logits(logits, replace(config, router_score_dtype=None))
        assert (unrounded.weights - want.weights).abs().max() > 1e-9


@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0, 2.0, 9.0])
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_dropping_is_the_hosts(host: ModuleType, policy: str, topk: int, factor: float) -> None:
    config = routing_config(
        "softmax",
        True,
        topk,
        moe_expert_capacity_factor=factor,
        moe_token_drop_policy=policy,
        drop_ties="topk",
    )
    logits = random(37, 8) + torch.linspace(2, 0, 8, dtype=torch.float64)
    logits.requires_grad_()
    want = host_route(host, logits, config)
    assert_same_routing(logits, ref.route_logits(logits, config), want)
    first = ref.route_logits(logits, replace(config, drop_ties="first"))
    if policy == "probs":
        # No ties among random weights, so the rule for ties cannot matter.
        assert_same_routing(logits, first, want)
    else:
        # The host keeps as many tokens, but torch.topk need not return the earliest.
        assert torch.equal(first.map.sum(dim=0), want.map.sum(dim=0))


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_load_balancing_loss_is_the_hosts(host: ModuleType, score_function: str, topk: int) -> None:
    config = routing_config(score_function, False, topk)
    logits = random(37, 8).requires_grad_()
    routing_map, scores = host.compute_routing_scores_for_aux_loss(logits, topk, score_function)
    want = host.switch_load_balancing_loss_func(scores, routing_map.sum(dim=0), 37, topk, 8, 0.03)
    assert_same_loss(logits, ref.load_balancing_loss(logits, config, 0.03), want)


def test_z_loss_is_the_hosts(host: ModuleType) -> None:
    logits = random(37, 8).requires_grad_()
    assert_same_loss(logits, ref.z_loss(logits, 0.03), host.z_loss_func(logits, 0.03))


def assert_same_loss(logits: Tensor, got: Tensor, want: Tensor) -> None:
    assert_exact(got, want)
    (got_gradient,) = torch.autograd.grad(got, logits)
    (want_gradient,) = torch.autograd.grad(want, logits)
    assert want_gradient.abs().max() > 1e-6
    assert_exact(got_gradient, want_gradient)


# ---------------------------------------------------------------------------- experts, combine


def test_routed_experts_are_the_weighted_sum_of_all_experts() -> None:
    """Every expert on every token, then the weights: zero where not routed."""
    params, _ = unit(CONFIG)
    tokens = random(9, 16)
    routing = ref.reference_route(params["mlp.router.weight"], tokens, CONFIG)
    experts = [f"mlp.experts.local_experts.{e}." for e in range(4)]
    fc1 = torch.stack([params[e + "linear_fc1.weight"] for e in experts])
    fc2 = torch.stack([params[e + "linear_fc2.weight"] for e in experts])
    gate, up = torch.einsum("th,efh->tef", tokens, fc1).chunk(2, dim=-1)
    outputs = torch.einsum("tef,ehf->teh", F.silu(gate) * up, fc2)
    want = torch.einsum("te,teh->th", routing.weights, outputs)
    assert_exact(ref.routed_experts(params, tokens, routing, CONFIG), want)


def test_a_dropped_assignment_contributes_nothing() -> None:
    params, _ = unit(CONFIG)
    tokens = random(3, 16)
    nowhere = OracleRouting(torch.ones(3, 4).double(), torch.zeros(3, 4, dtype=torch.bool))
    got = ref.routed_experts(params, tokens, nowhere, CONFIG)
    assert torch.equal(got, torch.zeros(3, 16).double())


@pytest.mark.parametrize(
    ("combine", "name", "row", "want"),
    [
        ("add", None, None, (1.0, 1.0)),
        ("cg1", "mlp.shared_experts.gate_weight", 0.0, (0.5, 1.0)),
        ("cg1", "mlp.shared_experts.gate_weight", math.log(3), (0.75, 1.0)),
        ("cg2", "mlp.combine_gate.weight", 0.0, (0.5, 0.5)),
        ("cg2", "mlp.combine_gate.weight", math.log(3), (0.75, 0.25)),
    ],
)
def test_combine_by_hand(
    combine: str, name: str | None, row: float | None, want: tuple[float, float]
) -> None:
    """The gate reads x = e_0, so its first logit is `row` and (cg2) its second is zero."""
    x, shared, routed = torch.zeros(3, 2, 16).double(), random(3, 2, 16), random(3, 2, 16, seed=1)
    x[..., 0] = 1
    params = {}
    if name is not None and row is not None:
        params[name] = torch.zeros(2 if combine == "cg2" else 1, 16).double()
        params[name][0, 0] = row
    got = ref.combine(params, x, shared, routed, replace(CONFIG, combine=combine))
    assert_exact(got, want[0] * shared + want[1] * routed)


# ---------------------------------------------------------------------------- units


def output(params: dict[str, Tensor], hidden: Tensor, **options: Any) -> Tensor:
    return ref.reference_unit(params, hidden, replace(CONFIG, **options))


def test_positions_agree_exactly_when_what_lies_between_them_is_zero() -> None:
    params, hidden = unit(CONFIG)
    pos1, pos2, pos3 = (output(params, hidden, position=p) for p in ("pos1", "pos2", "pos3"))
    assert min((pos1 - pos2).abs().max(), (pos2 - pos3).abs().max()) > 1e-3

    no_mlp = with_zeros(params, "dense_layer.mlp.linear_fc2.weight")
    pos1, pos2, pos3 = (output(no_mlp, hidden, position=p) for p in ("pos1", "pos2", "pos3"))
    assert torch.equal(pos1, pos2)
    assert (pos2 - pos3).abs().max() > 1e-3

    no_attention = with_zeros(params, "dense_layer.self_attention.linear_proj.weight")
    pos1, pos2, pos3 = (output(no_attention, hidden, position=p) for p in ("pos1", "pos2", "pos3"))
    assert torch.equal(pos2, pos3)
    assert (pos1 - pos2).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("position", "reader"),
    [
        ("pos1", "input_layernorm"),
        ("pos2", "dense_layer.pre_mlp_layernorm"),
        ("pos3", "dense_layer.input_layernorm"),
    ],
)
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_shared_norm_is_the_norm_that_reads_the_tap(
    position: str, reader: str, normalization: str
) -> None:
    config = replace(CONFIG, position=position, normalization=normalization)
    params, hidden = unit(config)
    own = ref.reference_unit(params, hidden, config)
    copied = dict(params)
    without = dict(params)
    for name in params:
        if name.startswith("shortcut_layernorm"):
            copied[name] = params[name.replace("shortcut_layernorm", reader)]
            del without[name]
    shared = ref.reference_unit(without, hidden, replace(config, shortcut_norm="shared"))
    assert torch.equal(ref.reference_unit(copied, hidden, config), shared)
    assert (own - shared).abs().max() > 1e-3


def test_without_routed_output_the_unit_is_two_dense_layers() -> None:
    """(7) without its last term is (9) with the shared expert in place of the MLP."""
    config = replace(CONFIG, moe_shared_expert_intermediate_size=CONFIG.ffn_hidden_size)
    params, hidden = unit(config)
    params = with_zeros(
        params, *(f"mlp.experts.local_experts.{e}.linear_fc2.weight" for e in range(4))
    )
    second = {
        name.replace("mlp.shared_experts.", "mlp."): value
        for name, value in params.items()
        if not name.startswith(("dense_layer.", "mlp.experts.", "mlp.router.", "shortcut_"))
    }
    middle = ref.reference_dense_layer(
        {name: value for name, value in params.items() if name.startswith("dense_layer.")},
        hidden,
        config,
        "dense_layer.",
    )
    want = ref.reference_dense_layer(second, middle, config)
    assert_exact(ref.reference_unit(params, hidden, config), want)


def test_dense_layer_is_pre_norm_attention_then_pre_norm_mlp() -> None:
    params = ref.random_parameters(ref.dense_layer_shapes(CONFIG), seed=0)
    hidden = random(4, 2, 16)
    x = F.rms_norm(hidden, (16,), params["input_layernorm.weight"], eps=1e-5)
    middle = hidden + ref.attention(params, "", x, CONFIG)
    x = F.rms_norm(middle, (16,), params["pre_mlp_layernorm.weight"], eps=1e-5)
    want = middle + ref.mlp(params, "mlp.", x, CONFIG)
    got = ref.reference_dense_layer(params, hidden, CONFIG)
    assert_exact(got, want)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("combine", ["add", "cg1", "cg2"])
def test_merged_output_is_added_to_the_current_representation(
    combine: str, post_norm: bool
) -> None:
    config = replace(CONFIG, combine=combine, post_norm=post_norm)
    params, hidden = unit(config)
    trace = ref.trace_unit(params, hidden, config)
    x = F.rms_norm(trace.attention_output, (16,), params["pre_mlp_layernorm.weight"], eps=1e-5)
    assert_exact(trace.shared_input, x)
    merged = ref.combine(params, x, trace.shared_output, trace.routed_output, config)
    if post_norm:
        merged = F.rms_norm(merged, (16,), params["post_layernorm.weight"], eps=1e-5)
    assert_exact(trace.output, trace.attention_output + merged)


def test_without_a_dense_half_the_tap_is_the_units_input() -> None:
    config = replace(CONFIG, position="pos1")
    params, hidden = unit(config, dense_half=False)
    assert torch.equal(ref.trace_unit(params, hidden, config).tap, hidden)
    with pytest.raises(ValueError, match="pos2 taps the dense half"):
        ref.reference_unit(params, hidden, replace(config, position="pos2"))


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_a_token_sees_its_own_sequence_up_to_itself(position: str) -> None:
    params, hidden = unit(CONFIG)
    before = output(params, hidden, position=position)
    changed = hidden.detach().clone()
    changed[2, 1] += 1.0
    touched = (output(params, changed, position=position) != before).any(dim=-1)
    assert touched.nonzero().tolist() == [[2, 1], [3, 1]]


def test_renumbering_the_experts_changes_nothing() -> None:
    params, hidden = unit(CONFIG)
    order = [2, 0, 3, 1]
    renumbered = dict(params)
    renumbered["mlp.router.weight"] = params["mlp.router.weight"][order]
    for new, old in enumerate(order):
        for linear in ("linear_fc1.weight", "linear_fc2.weight"):
            renumbered[f"mlp.experts.local_experts.{new}.{linear}"] = params[
                f"mlp.experts.local_experts.{old}.{linear}"
            ]
    assert_exact(output(renumbered, hidden), output(params, hidden))


@pytest.mark.parametrize(
    "options",
    [
        {"position": "pos1", "combine": "cg1", "rotary_base": 100.0},
        {"position": "pos2", "combine": "cg2", "post_norm": True, "activation": "gelu"},
        {
            "position": "pos3",
            "shortcut_norm": "shared",
            "normalization": "LayerNorm",
            "moe_router_score_function": "sigmoid",
            "moe_expert_capacity_factor": 0.5,
        },
    ],
    ids=lambda options: options["position"],
)
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    config = replace(
        CONFIG,
        hidden_size=6,
        num_attention_heads=2,
        num_query_groups=1,
        ffn_hidden_size=3,
        num_moe_experts=3,
        moe_ffn_hidden_size=2,
        moe_shared_expert_intermediate_size=2,
        **options,
    )
    params, hidden = unit(config, s=3, b=1)
    names = list(params)

    def run(hidden: Tensor, *values: Tensor) -> Tensor:
        return ref.reference_unit(dict(zip(names, values, strict=True)), hidden, config)

    assert torch.autograd.gradcheck(run, (hidden, *params.values()), fast_mode=True)


def test_an_unvisited_expert_has_zero_gradients() -> None:
    params, hidden = unit(CONFIG)
    params, _ = with_routing(params, hidden, CONFIG, "empty_expert")
    gradients = ref.gradients(ref.reference_unit(params, hidden, CONFIG).square().sum(), params)
    largest = [
        gradients[f"mlp.experts.local_experts.{e}.linear_fc1.weight"].abs().max().item()
        for e in range(4)
    ]
    assert largest[3] == 0.0
    assert min(largest[:3]) > 1e-6
    assert gradients.keys() == params.keys()


# ---------------------------------------------------------------------------- blocks


def layer_stack(moe_frequency: int) -> list[dict[str, Tensor]]:
    """Two periods of layers."""
    layers = []
    for period in range(2):
        for i in range(moe_frequency - 2):
            shapes = ref.dense_layer_shapes(CONFIG)
            layers.append(ref.random_parameters(shapes, seed=10 * period + i))
        shapes = ref.unit_shapes(CONFIG, dense_half=moe_frequency > 1)
        layers.append(ref.random_parameters(shapes, seed=10 * period + 9))
    return layers


@pytest.mark.parametrize("moe_frequency", [1, 2, 4])
def test_block_applies_its_layers_in_order(moe_frequency: int) -> None:
    config = replace(CONFIG, position="pos1" if moe_frequency == 1 else "pos2")
    layers, hidden = layer_stack(moe_frequency), random(3, 2, 16)
    final = {"final_layernorm.weight": random(16, seed=3)}
    got = ref.reference_block(layers, hidden, config, moe_frequency, final)
    for params in layers:
        is_unit = "mlp.router.weight" in params
        step: Callable = ref.reference_unit if is_unit else ref.reference_dense_layer
        hidden = step(params, hidden, config)
    want = F.rms_norm(hidden, (16,), final["final_layernorm.weight"], eps=1e-5)
    assert_exact(got, want)
    for wrong in {1, 2, 4} - {moe_frequency}:
        with pytest.raises(ValueError, match=f"do not have frequency {wrong}"):
            ref.reference_block(layers, hidden, config, wrong)


# ---------------------------------------------------------------------------- refusals


def test_parameters_must_be_exactly_those_that_are_read() -> None:
    params, hidden = unit(CONFIG)
    fewer = {name: value for name, value in params.items() if name != "mlp.router.weight"}
    more = params | {"mlp.combine_gate.weight": torch.zeros(2, 16)}
    misshapen = params | {"mlp.router.weight": torch.zeros(5, 16).double()}
    for wrong, message in (
        (fewer, r"missing: \['mlp.router.weight'\]"),
        (more, r"nobody reads: \['mlp.combine_gate.weight'\]"),
        (misshapen, r"mlp.router.weight has shape \(5, 16\), expected \(4, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ref.reference_unit(wrong, hidden, CONFIG)


@pytest.mark.parametrize("field", sorted(ref._CHOICES))
def test_config_refuses_unknown_choices(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        ReferenceConfig(**(vars(CONFIG) | {field: "other"}))


def test_the_oracle_does_not_import_what_it_judges() -> None:
    for name in ("reference.py", "routing_cases.py"):
        imported = set()
        for node in ast.walk(ast.parse((Path(ref.__file__).parent / name).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
        assert "torch" in imported
        assert not [module for module in imported if module.startswith("megatron")]


# ---------------------------------------------------------------------------- routing cases


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "topk"), [(16, 4, 1), (16, 4, 2), (30, 8, 3)]
)
def test_routing_cases_have_the_load_they_promise(
    num_tokens: int, num_experts: int, topk: int
) -> None:
    total = num_tokens * topk
    loads = {}
    for case in CASES:
        selection = plan_selection(case, num_tokens, num_experts, topk)
        assert all(len(set(experts)) == topk for experts in selection)
        loads[case] = [sum(e in experts for experts in selection) for e in range(num_experts)]
        assert sum(loads[case]) == total
    assert max(loads["balanced"]) - min(loads["balanced"]) <= 1
    assert max(loads["skewed"]) >= 1.9 * total / num_experts
    assert loads["skewed"] == sorted(loads["skewed"], reverse=True)
    assert min(loads["skewed"]) > 0 or num_tokens < 2 ** (num_experts - 1)
    assert loads["empty_expert"][-1] == 0
    assert min(loads["empty_expert"][:-1]) > 0
    assert loads["all_to_one"] == [num_tokens] * topk + [0] * (num_experts - topk)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("score_function", "pre_softmax"), SCORES)
@pytest.mark.parametrize("topk", [1, 3])
def test_routing_cases_are_routed_as_planned(
    case: str, score_function: str, pre_softmax: bool, topk: int
) -> None:
    config = routing_config(score_function, pre_softmax, topk)
    made = routing_case(case, 21, 8, topk, hidden_size=16, seed=5)
    for scale in (1.0, 0.3):
        logits = scale * made.tokens @ made.router_weight.T
        assert_exact(logits, scale * made.logits)
        assert ref.gate(logits, config)[1] == made.selection


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_units_are_routed_as_planned(case: str, position: str) -> None:
    config = replace(CONFIG, position=position)
    params, hidden = unit(config)
    planned, selection = with_routing(params, hidden, config, case)
    routing = ref.trace_unit(planned, hidden, config).routing
    assert [row.nonzero().flatten().tolist() for row in routing.map] == [
        sorted(experts) for experts in selection
    ]


def test_units_that_cannot_be_routed_as_planned_are_refused() -> None:
    params, hidden = unit(CONFIG, s=9, b=2)
    with pytest.raises(ValueError, match="linearly independent"):
        with_routing(params, hidden, CONFIG, "balanced")
