"""C2R's router: a token's other experts are partners of its best one.

The rule as loops over tokens in float64, output and every gradient; without a constraint the
host's router, bit for bit.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_scmoe.c2r import lists
from megatron_scmoe.c2r.lists import Lists
from megatron_scmoe.model.routing.partners import CollaborationRouter, read_lists
from tests.models import Case, build_block
from tests.unit_tests.test_variants import (
    HIDDEN,
    MOE,
    assert_close,
    by_stages,
    gradients,
    hidden_states,
    toy_block,
)

EXPERTS = 6
SCORES: dict[str, dict[str, Any]] = {
    "softmax in front": {},
    "softmax behind": {"moe_router_pre_softmax": False},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid and bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}
LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def partners(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    everyone = np.arange(EXPERTS)
    return np.stack([rng.permutation(np.delete(everyone, expert)) for expert in everyone])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Other partners in every layer."""
    path = tmp_path / "lists.json"
    lists.write(path, Lists(EXPERTS, {number: partners(number) for number in (2, 4)}))
    return path


def case(file: Path, top_t: int, topk: int = 2, position: str = "pos2", **host: Any) -> Case:
    return Case(
        scmoe={
            "scmoe_shortcut_position": position,
            "scmoe_combine": "add",
            "scmoe_router": "c2r",
            "scmoe_c2r_lists": str(file),
            "scmoe_c2r_top_t": top_t,
        },
        host={"num_moe_experts": EXPERTS, "moe_router_topk": topk, **host},
    )


def chosen(scores: list[float], of_layer: np.ndarray, top_t: int, topk: int) -> list[int]:
    """The rule: the best expert, then the best of its first partners."""
    best = max(range(EXPERTS), key=lambda expert: scores[expert])
    candidates = [int(partner) for partner in of_layer[best][:top_t]]
    candidates.sort(key=lambda expert: -scores[expert])
    return [best, *candidates[: topk - 1]]


def scores_of(router: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What weights are made of, and what selects, [T, N] each. A float32 sigmoid of one number is
    not always that of many at once."""
    logits = tokens @ router.weight.double().T
    if router.score_function == "sigmoid":
        scores = logits.float().sigmoid().double()
        bias = 0 if router.expert_bias is None else router.expert_bias
        return scores, scores + bias
    if router.config.moe_router_pre_softmax:
        scores = logits.softmax(-1, dtype=torch.float32).double()
        return scores, scores
    return logits, logits


def routed(moe: Any, z: Tensor, of_layer: np.ndarray, top_t: int, topk: int) -> Tensor:
    """sum_i G(z)_i E_i(z), token by token."""
    rows, tokens = [], z.flatten(0, 1)
    for token, scores, selecting in zip(tokens, *scores_of(moe.router, tokens), strict=True):
        experts = chosen(selecting.tolist(), of_layer, top_t, topk)
        weights = scores[experts]
        if moe.router.score_function == "sigmoid":
            weights = (weights.float() / (weights.float().sum() + 1e-20)).double()
        elif not moe.config.moe_router_pre_softmax:
            weights = weights.softmax(-1, dtype=torch.float32).double()
        row = torch.zeros_like(token)
        for weight, expert in zip(weights, experts, strict=True):
            output, _ = moe.experts.local_experts[expert](token[None, None])
            row = row + weight * output[0, 0]
        rows.append(row)
    return torch.stack(rows).view_as(z)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("topk", "top_t"), [(2, 1), (2, 3), (3, 2), (3, 4), (3, 5)])
def test_equals_the_rule(file: Path, topk: int, top_t: int, scores: str) -> None:
    for chunks, position, host in ((1, "pos2", {}), (3, "none", MOE)):
        this = case(file, top_t, topk, position, **SCORES[scores], **host)
        this.scmoe["scmoe_num_chunks"] = chunks
        for layer, number in zip(toy_block(this).layers[-2:], (2, 4), strict=True):
            moe: Any = layer.mlp
            if not isinstance(getattr(moe, "router", None), CollaborationRouter):
                continue  # without a shortcut the dense layer is one of the block's
            if moe.router.expert_bias is not None:
                moe.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
            x, z = hidden_states(), hidden_states()
            found = gradients(moe, by_stages(moe, x, z), x, z)
            wanted = routed(moe, z, partners(number), top_t, topk)
            assert_close(found, gradients(moe, moe.shared_experts_compute(x) + wanted, x, z))


def router(cls: Any, host: dict[str, Any], top_t: int | None = None) -> Any:
    """The host's, or ours, with one weight."""
    config = Case(host={"num_moe_experts": EXPERTS, **host}).host_config()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    options = {} if top_t is None else {"top_t": top_t, "given": Lists(EXPERTS, {2: partners()})}
    made = cls(config=config, pg_collection=groups, **options)
    made.set_layer_number(2)
    noise = torch.randn(EXPERTS, HIDDEN, generator=torch.manual_seed(3))
    made.weight.data = noise.to(made.weight.dtype)
    if made.expert_bias is not None:
        made.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    return made


def passed(made: Any, z: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
    """Everything that a pass leaves behind."""
    tracker = get_moe_metrics_tracker()
    tracker.clear()
    z = z.detach().requires_grad_()
    made.weight.grad = None
    probs, routing_map = made(z, padding)
    (probs * torch.linspace(-1, 1, probs.numel()).view_as(probs)).sum().backward()
    found = {"probs": probs.detach(), "map": routing_map, "z": z.grad, "weight": made.weight.grad}
    found |= {name: metric.values.clone() for name, metric in tracker.metrics.items()}
    if made.local_tokens_per_expert is not None:
        found["counts"] = made.local_tokens_per_expert.clone()
    return found


HOSTS: dict[str, dict[str, Any]] = {
    **{name: {"moe_router_topk": 2, **options} for name, options in SCORES.items()},
    "top-1": {"moe_router_topk": 1},
    "top-3, scaled": {"moe_router_topk": 3, "moe_router_topk_scaling_factor": 2.5},
    **{
        name: {
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": name,
            "moe_aux_loss_coeff": 0.3,
            "moe_z_loss_coeff": 0.01,
        }
        for name in LOSSES
    },
    "capacity": {
        "moe_router_topk": 2,
        "moe_expert_capacity_factor": 0.6,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.3,
    },
    "float64 scores": {"moe_router_topk": 2, "moe_router_dtype": "fp64"},
}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("name", HOSTS)
def test_all_partners_are_no_constraint(name: str) -> None:
    """T = N - 1 is the host's router bit for bit, and a smaller T is not."""
    z = hidden_states()
    padding = torch.zeros(z.shape[:2], dtype=torch.bool)
    padding[-2:, 0] = True
    # The host adds up counts for the bias without regard to the shape of the mask, and fails.
    for mask in (None,) if "bias" in name else (None, padding):
        wanted = passed(router(TopKRouter, HOSTS[name]), z, mask)
        found = passed(router(CollaborationRouter, HOSTS[name], EXPERTS - 1), z, mask)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    least = max(1, HOSTS[name]["moe_router_topk"] - 1)
    constrained = passed(router(CollaborationRouter, HOSTS[name], least), z, mask)
    is_same = torch.equal(constrained["map"], wanted["map"])
    assert is_same == (HOSTS[name]["moe_router_topk"] == 1)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("loss", LOSSES)
def test_balancing_losses_count_what_the_rule_chooses(loss: str) -> None:
    """E sum_i f_i P_i, f_i of the rule; the gradient follows."""
    topk, top_t = 2, 1
    made = router(CollaborationRouter, HOSTS[loss] | {"moe_z_loss_coeff": None}, top_t)
    tracker = get_moe_metrics_tracker()
    tracker.clear()
    z = hidden_states()
    probs, _ = made(z)
    (probs * 0).sum().backward()
    found = made.weight.grad.clone()
    made.weight.grad = None
    total: Any = 0.0
    samples = z.detach().unbind(1) if loss == "seq_aux_loss" else [z.detach().flatten(0, 1)]
    for tokens in samples:
        scores, _ = scores_of(made, tokens)
        counts = [0] * EXPERTS
        for of_token in scores:
            for expert in chosen(of_token.tolist(), partners(), top_t, topk):
                counts[expert] += 1
        shares = torch.tensor(counts) / (topk * len(tokens))
        total = total + EXPERTS * (shares * scores.mean(0)).sum() / len(samples)
    logged = tracker.metrics[LOSSES[loss]].values.sum()
    torch.testing.assert_close(logged.double(), total.detach(), rtol=1e-6, atol=0)
    (0.3 * total).backward()
    torch.testing.assert_close(found, made.weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("single_rank")
def test_the_partners_are_a_part_of_the_checkpoint(file: Path) -> None:
    """A router without a file has those that are loaded."""
    block = build_block(case(file, 2))
    state = block.state_dict()
    for place, number in enumerate((2, 4)):
        name = f"layers.{place}.mlp.router.partners"
        assert torch.equal(state[name], torch.from_numpy(partners(number)))
    sharded = block.sharded_state_dict()
    assert [key for key in sharded if key.endswith("mlp.router.partners")]
    other = case(file, 2)
    other.scmoe["scmoe_c2r_lists"] = None
    without = build_block(other)
    assert not without.layers[0].mlp.router.partners.any()
    without.load_state_dict(state)
    z = hidden_states()
    found, wanted = (b.layers[1].mlp.choose_experts(z, None) for b in (without, block))
    assert torch.equal(found.routing_map, wanted.routing_map)


def test_a_file_that_changes_is_read_again(file: Path) -> None:
    assert read_lists(str(file)) is read_lists(str(file))
    lists.write(file, Lists(EXPERTS, {2: partners(7)}))
    np.testing.assert_array_equal(read_lists(str(file)).layers[2], partners(7))
