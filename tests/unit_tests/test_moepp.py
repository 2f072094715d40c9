"""MoE++: zero, copy and constant experts, and the balancing loss that gives them more tokens.

Equal to (1), (3)-(5) and (7) of arXiv:2410.07348, written as loops over tokens in float64, output
and every gradient; with balanced, skewed, one-sided and empty routing.
"""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.routing import ROUTERS
from megatron_scmoe.planner.size import model_size
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block
from tests.unit_tests.test_variants import (
    EXPERTS,
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


def routed(moe: Any, z: Tensor) -> Tensor:
    """sum_i g_i E_i(z) (1), token by token: g the softmax over all experts, K of them."""
    constant = moe.at_home["constant"]
    rows = []
    for token in z.flatten(0, 1):
        probs = (moe.router.weight.double() @ token).softmax(-1, dtype=torch.float32).double()
        row = torch.zeros_like(token)
        for expert in probs.topk(K).indices.tolist():
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
        wanted = ROUTERS["heterogeneous"].routed_share(EXPERTS, sum(KINDS.values()), tau)
        assert sum(shares) / len(shares) == pytest.approx(float(wanted), rel=0.1)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_units_train_at_every_position(position: str) -> None:
    block = toy_block(case(position, router="heterogeneous", **LOSS))
    run_block(block, hidden_states()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_shares_and_sizes() -> None:
    """The paper's (8+4)E and (16+4)E: 1.2 and 1.5 routed experts a token at tau 0.75."""
    share = ROUTERS["heterogeneous"].routed_share
    assert 2 * share(8, 4, 0.75) == Fraction(6, 5) and 2 * share(16, 4, 0.75) == Fraction(3, 2)
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
