"""MoE++: zero, copy and constant experts, and the balancing loss that gives them more tokens.

Equal to (1) and (3)-(8) of arXiv:2410.07348, written as loops over tokens in float64, output
and every gradient; with balanced, skewed, one-sided and empty routing.
"""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.model.routing import ROUTERS
from megatron_scmoe.planner.size import model_size
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block
from tests.unit_tests.test_variants import (
    EXPERTS,
    FULL,
    HIDDEN,
    MOE,
    K,
    assert_close,
    by_stages,
    gradients,
    hidden_states,
    toy_block,
)

KINDS = {"zero": 1, "copy": 1, "constant": 2}
COLUMNS = EXPERTS + sum(KINDS.values())
TAU = 0.75
LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}


def case(position: str = "pos2", chunks: int = 1, router: str = "topk", **host: Any) -> Case:
    return Case(
        scmoe={
            "scmoe_shortcut_position": position,
            "scmoe_combine": "add",
            "scmoe_router": router,
            "scmoe_experts_at_home": KINDS,
            "scmoe_num_chunks": chunks,
        },
        host={"moe_router_topk": K, "moe_router_pre_softmax": True, **host},
    )


def gate(moe: Any, token: Tensor, before: Tensor | None = None) -> Tensor:
    """G(x), of one layer or two, with the logits before (6)."""
    router = moe.router
    inner = getattr(router, "inner_weight", None)
    if inner is not None:
        token = (inner @ token).tanh()
    logits = router.weight @ token
    return logits if before is None else logits + router.residual_weight @ before


def routed(moe: Any, z: Tensor, logits: Tensor | None = None, released: bool = False) -> Tensor:
    """sum_i g_i E_i(z) (1), token by token: g the softmax over all experts, K of them.

    `released`: as the released code has it, with twice the input and without the weight of chosen
    zero experts.
    """
    constant = moe.at_home["constant"]
    rows = []
    for number, token in enumerate(z.flatten(0, 1)):
        given = gate(moe, token) if logits is None else logits.flatten(0, 1)[number]
        probs = given.softmax(-1, dtype=torch.float32).double()
        row = torch.zeros_like(token)
        chosen = probs.topk(K).indices.tolist()
        if released:
            left = [expert for expert in chosen if expert != EXPERTS]
            probs, token = probs / probs[left].sum(), 2 * token
            probs = probs.masked_fill(torch.arange(COLUMNS) == EXPERTS, 0)
        for expert in chosen:
            if expert < EXPERTS:
                output = moe.experts.local_experts[expert](token[None, None])[0][0, 0]
            elif expert == EXPERTS:
                output = torch.zeros_like(token)  # (3)
            elif expert == EXPERTS + 1:
                output = token  # (4)
            else:
                number = expert - EXPERTS - 2
                a = (constant.mix_weight[number] @ token).softmax(-1)
                output = a[0] * token + a[1] * constant.vector[number]  # (5)
            row = row + probs[expert] * output
        rows.append(row)
    return torch.stack(rows).view_as(z)


ROUTINGS = {
    "balanced": None,
    "skewed": [3.0, 0, 0, 0, 0, 0, 2.0, 0],
    "no routed expert": [-50.0] * EXPERTS + [0.0] * 4,
    "no expert at home": [0.0] * EXPERTS + [-50.0] * 4,
    "all to one": [50.0, -50, -50, -50, 49.0, -50, -50, -50],
}


def steer(moe: Any, scores: list[float] | None, z: Tensor) -> None:
    """Let every token of z, whose first element is 1, prefer some experts."""
    if scores is not None:
        moe.router.weight.data[:, 0] = torch.tensor(scores)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_equals_the_equations(dispatcher: str, routing: str) -> None:
    for chunks, host in ((1, {}), (3, MOE)):
        options = {"moe_token_dispatcher_type": dispatcher, **host}
        moe: Any = toy_block(case(chunks=chunks, **options)).layers[0].mlp
        x, z = hidden_states(), hidden_states().detach()
        z[..., 0] = 1
        z.requires_grad_()
        steer(moe, ROUTINGS[routing], z)
        rows = set(moe.choose_experts(z, None).routing_map.sum(dim=1).tolist())
        expected = {"no routed expert": {0}, "no expert at home": {K}, "all to one": {1}}
        assert rows == expected.get(routing, rows)
        if routing == "balanced":
            assert rows == {0, 1, 2}
        found = gradients(moe, by_stages(moe, x, z), x, z)
        wanted = gradients(moe, moe.shared_experts_compute(x) + routed(moe, z), x, z)
        assert_close(found, wanted)


@pytest.mark.usefixtures("single_rank")
def test_the_balancing_loss_is_the_weighted_one() -> None:
    """(7), with the host's factor E / K, by its gradient; tau 1 is the host's loss."""
    grads = {}
    for router, tau in (("heterogeneous", TAU), ("heterogeneous", 1.0), ("topk", TAU)):
        block_case = case(router=router, **LOSS)
        block_case.scmoe["scmoe_tau"] = tau
        moe: Any = toy_block(block_case).layers[0].mlp
        moe.router.weight.grad = None
        z = hidden_states()
        probs, _ = moe.route(z)
        (probs * 0).sum().backward()
        grads[router, tau] = moe.router.weight.grad.clone()

        weight = moe.router.weight.detach().double().requires_grad_()
        scores = (z.detach().flatten(0, 1) @ weight.T).softmax(-1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(K).indices, 1.0)
        eta = torch.ones(COLUMNS, dtype=torch.float64)
        eta[EXPERTS:] = tau if router == "heterogeneous" else 1.0
        loss = 0.5 * COLUMNS / K * (eta * chosen.mean(0) * scores.mean(0)).sum()
        loss.backward()
        torch.testing.assert_close(grads[router, tau].double(), weight.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(grads["heterogeneous", 1.0], grads["topk", TAU])
    assert not torch.equal(grads["heterogeneous", TAU], grads["topk", TAU])


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("counted", ["slots", "tokens"])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_tokens_over_capacity_are_dropped(policy: str, counted: str) -> None:
    """(8): every expert keeps its first C_i tokens, those with the largest weights or in order."""
    gamma = 0.6
    drop = {"moe_expert_capacity_factor": gamma, "moe_token_drop_policy": policy}
    block_case = case(router="heterogeneous", **LOSS, **drop)
    block_case.scmoe["scmoe_capacity_of"] = counted
    moe: Any = toy_block(block_case).layers[0].mlp
    z = hidden_states()
    routing = moe.choose_experts(z, None)
    tokens = SEQUENCE * BATCH
    slots = tokens * (K if counted == "slots" else 1)
    scores = (z.flatten(0, 1) @ moe.router.weight.T).softmax(-1, dtype=torch.float32).double()
    chosen = scores.topk(K).indices
    left = torch.zeros_like(scores, dtype=torch.bool)
    dropped = 0
    for expert in range(COLUMNS):
        eta = TAU if expert < EXPERTS else 1.0
        capacity = math.ceil(gamma * eta * slots / (TAU * EXPERTS + COLUMNS - EXPERTS))
        takers = [t for t in range(tokens) if expert in chosen[t]]
        if policy == "probs":
            takers.sort(key=lambda t: -scores[t, expert])
        dropped += len(takers[capacity:])
        left[takers[:capacity], expert] = True
    assert dropped > 0
    assert torch.equal(routing.routing_map, left[:, :EXPERTS])
    torch.testing.assert_close(routing.probs, (scores * left)[:, :EXPERTS])
    torch.testing.assert_close(routing.at_home, (scores * left)[:, EXPERTS:])
    # The paper's example has capacities for all slots, its print for a part of them.
    assert sum(moe.router.capacities(3000)) == pytest.approx(
        gamma * slots / tokens * 3000, rel=0.01
    )


@pytest.mark.usefixtures("single_rank")
def test_the_released_code() -> None:
    """Two layers of gate, twice the input, and no weight for a zero expert."""
    block_case = case(router="heterogeneous", **LOSS)
    block_case.scmoe |= {
        "scmoe_gate_layers": 2,
        "scmoe_renormalise": True,
        "scmoe_input_scale": 2.0,
    }
    moe: Any = toy_block(block_case).layers[0].mlp
    moe.eval()  # without the loss
    x, z = hidden_states(), hidden_states()
    chosen = torch.stack([gate(moe, token) for token in z.flatten(0, 1)]).topk(K).indices
    assert (chosen == EXPERTS).any()
    found = gradients(moe, by_stages(moe, x, z), x, z)
    wanted = gradients(moe, moe.shared_experts_compute(x) + routed(moe, z, released=True), x, z)
    assert_close(found, wanted)


def with_residual(position: str, **host: Any) -> Case:
    block_case = case(position, router="heterogeneous", **LOSS, **host)
    block_case.scmoe["scmoe_gating_residual"] = True
    return block_case


@pytest.mark.usefixtures("single_rank")
def test_logits_are_handed_on() -> None:
    """(6), from the first MoE layer to the second, and their gradients back."""
    block = toy_block(with_residual("pos2")).eval()
    first, second = (layer.mlp for layer in block.layers)
    assert first.router.residual_weight is None
    x, z = hidden_states(), hidden_states()

    def both(compute: Any) -> dict[str, Tensor]:
        for moe in (first, second):
            for parameter in moe.parameters():
                parameter.grad = None
        output = compute()
        found = gradients(second, output, x, z)
        return {**found, "first": first.router.weight.grad}

    def by_loops() -> Tensor:
        tokens = z.flatten(0, 1)
        before = [gate(first, token) for token in tokens]
        logits = [gate(second, *pair) for pair in zip(tokens, before, strict=True)]
        stacked = torch.stack(logits).view(*z.shape[:2], COLUMNS)
        return second.shared_experts_compute(x) + routed(second, z, stacked)

    def handed_on() -> Tensor:
        logits = first.choose_experts(z, None).logits
        return by_stages(second, x, z, logits)

    assert_close(both(handed_on), both(by_loops))


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3", "none"])
def test_the_residual_crosses_units_and_recomputation(position: str) -> None:
    """The same bits with and without overlap, and with full recomputation."""
    found = []
    for host in ({}, FULL):
        for overlap in (True, False):
            block_case = with_residual(position, **host)
            block_case.scmoe["scmoe_overlap"] = overlap
            block = toy_block(block_case)
            output = run_block(block, hidden_states())
            output.square().mean().backward()
            grads = {name: p.grad for name, p in block.named_parameters()}
            found.append({"output": output.detach(), **grads})
    assert all(grad is not None for grad in found[0].values())
    for others in found[1:]:
        assert all(torch.equal(found[0][name], others[name]) for name in found[0])
    carried = [name for name in found[0] if name.endswith("router.residual_weight")]
    assert len(carried) == 1 and found[0][carried[0]].abs().max() > 0


@pytest.mark.usefixtures("single_rank")
def test_the_loss_leads_to_the_papers_shares() -> None:
    """Section 3: K tau N / (tau N + Z) routed experts a token, from the loss alone, within 10 %."""
    for tau in (0.25, 0.75):
        block_case = case(router="heterogeneous", **{**LOSS, "moe_aux_loss_coeff": 1.0})
        block_case.scmoe["scmoe_tau"] = tau
        moe: Any = build_block(block_case).layers[0].mlp
        optimizer = torch.optim.Adam([moe.router.weight], lr=3e-3)
        random = torch.Generator().manual_seed(3)
        shares = []
        for step in range(400):
            shape = 64, 4, HIDDEN
            z = torch.randn(shape, dtype=torch.float64, generator=random)
            probs, routing_map = moe.route(z)
            optimizer.zero_grad()
            (probs * 0).sum().backward()
            optimizer.step()
            if step >= 300:
                shares.append(routing_map[:, :EXPERTS].sum().item() / routing_map.sum().item())
        host, scmoe = block_case.host_config(), block_case.scmoe_config()
        wanted = ROUTERS["heterogeneous"].routed_share(host, sum(KINDS.values()), scmoe)
        assert sum(shares) / len(shares) == pytest.approx(float(wanted), rel=0.1)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3", "none"])
def test_units_train_at_every_position(position: str) -> None:
    block = toy_block(case(position, router="heterogeneous", **LOSS))
    run_block(block, hidden_states()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_shares_and_sizes() -> None:
    """The paper's (8+4)E and (16+4)E: 1.2 and 1.5 routed experts a token at tau 0.75."""
    share = ROUTERS["heterogeneous"].routed_share
    for experts, wanted in ((8, Fraction(6, 5)), (16, Fraction(3, 2))):
        host = case(num_moe_experts=experts).host_config()
        assert 2 * share(host, 4, ScMoEConfig(scmoe_tau=0.75)) == wanted
    host = case(router="heterogeneous", **LOSS).host_config()
    size = {}
    for kinds in ({}, KINDS):
        scmoe = ScMoEConfig(
            scmoe_shortcut_position="pos2",
            scmoe_router="heterogeneous" if kinds else "topk",
            scmoe_experts_at_home=kinds,
            scmoe_combine="add",
        )
        model = ScMoEModelConfig(transformer=host, vocab_size=64, scmoe=scmoe)
        size[len(kinds)] = model_size(model, SEQUENCE, BATCH)
    layers = sum(host.moe_layer_freq)
    # A column of the router for each, and 3 h for each constant expert.
    more = layers * (4 * HIDDEN + 2 * 3 * HIDDEN)
    assert size[3].parameters - size[0].parameters == more
    assert size[3].model_flops < size[0].model_flops


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("gate_layers", [1, 2])
def test_the_gate_is_counted(gate_layers: int) -> None:
    block_case = with_residual("pos2")
    block_case.scmoe["scmoe_gate_layers"] = gate_layers
    block, host, scmoe = (
        build_block(block_case),
        block_case.host_config(),
        block_case.scmoe_config(),
    )
    model = ScMoEModelConfig(transformer=host, vocab_size=64, scmoe=scmoe)
    counted = model_size(model, SEQUENCE, BATCH).layers
    for layer in block.layers:
        parameters = [*layer.mlp.router.parameters(), *layer.shortcut_layernorm.parameters()]
        operator = counted[layer.attention_number - 1].operators["router"]
        assert operator.weights.total == sum(p.numel() for p in parameters)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", ["none", "pos1"])
def test_a_residual_in_every_layer_is_saved_and_loaded(position: str, tmp_path: Path) -> None:
    """The first layer has none, so that layers are no one tensor on disk."""
    block_case = with_residual(position)
    block_case.moe_frequency = 1
    model = ScMoEModelConfig(
        transformer=block_case.host_config(),
        vocab_size=64,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
        scmoe=block_case.scmoe_config(),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    saved, loaded = (
        ScMoEModelBuilder(model).build_model(groups, pre_process=True, post_process=True)
        for _ in range(2)
    )
    for layer, value in enumerate(saved.decoder.layers[1:]):
        value.mlp.router.residual_weight.data.fill_(layer)
    dist_checkpointing.save(saved.sharded_state_dict(), tmp_path)
    loaded.load_state_dict(dist_checkpointing.load(loaded.sharded_state_dict(), tmp_path))
    for ours, theirs in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
