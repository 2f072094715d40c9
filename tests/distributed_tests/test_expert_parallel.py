"""Experts and tensors spread over ranks: the oracle's outputs and gradients, in every layout.

EP 1 = EP 2 = EP 4; expert TP, TP with sequence parallelism; all-to-all and all-gather; grouped
experts.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch import distributed as dist

from tests.distributed_utils import run_distributed
from tests.models import SEQUENCE, Case, build_block, parameters_by_expert, run_block
from tests.reference import (
    Parameters,
    dense_layer_shapes,
    gradients,
    random_parameters,
    reference_block,
    unit_shapes,
)
from tests.selected import asked_for

WORLD_SIZE = 4
BATCH = 4  # sequences over all ranks
TOLERANCE = 1e-10

# TP is always with sequence parallelism; what is left of the four ranks is data parallel.
LAYOUTS = {
    "EP 1": {},
    "EP 2": {"expert_model_parallel_size": 2},
    "EP 4": {"expert_model_parallel_size": 4},
    "TP 2, EP 2": {
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "expert_model_parallel_size": 2,
    },
    "TP 2, expert TP 2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "TP 2, expert TP 2, EP 2": {
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
        "expert_model_parallel_size": 2,
    },
}
# A mistake in any one of them is seen in the last; the first and the others are slow but for one
# model.
HARDEST = ("EP 4", "TP 2, expert TP 2, EP 2")
# Two experts on two ranks would not tell an order of chunks from its inverse.
NUM_EXPERTS = 8
CASES = {
    "pos1": Case(
        scmoe={
            "scmoe_shortcut_position": "pos1",
            "scmoe_combine": "cg2",
            "scmoe_shortcut_norm": "shared",
        },
        host={"num_moe_experts": NUM_EXPERTS, "moe_router_topk": 2},
    ),
    "pos2": Case(host={"num_moe_experts": NUM_EXPERTS}),
    "pos2, allgather, two chunks": Case(
        scmoe={"scmoe_num_chunks": 2},
        host={
            "num_moe_experts": NUM_EXPERTS,
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": "allgather",
        },
    ),
    "pos2, grouped experts": Case(
        host={"num_moe_experts": NUM_EXPERTS, "moe_router_topk": 2, "moe_grouped_gemm": True}
    ),
    "pos2, sent once to a rank, two chunks": Case(
        scmoe={"scmoe_dispatch_copies": "rank", "scmoe_num_chunks": 2},
        host={"num_moe_experts": NUM_EXPERTS, "moe_router_topk": 4},
    ),
    "pos2, sent once to a node": Case(
        scmoe={"scmoe_dispatch_copies": "node", "scmoe_ranks_per_node": 2},
        host={"num_moe_experts": NUM_EXPERTS, "moe_router_topk": 4},
    ),
    "pos3": Case(
        scmoe={"scmoe_shortcut_position": "pos3", "scmoe_post_norm": True},
        host={
            "num_moe_experts": NUM_EXPERTS,
            "moe_router_topk": 2,
            "normalization": "LayerNorm",
        },
    ),
}


def pairs(cases: Iterable[str], layouts: Iterable[str], everywhere: str) -> list[Any]:
    """Cases at layouts, slow where neither is the hardest one.

    Args:
        everywhere: a case that is not slow at any layout.
    """
    return [
        pytest.param(
            case,
            layout,
            marks=() if layout in HARDEST or case == everywhere else pytest.mark.slow,
        )
        for case in cases
        for layout in layouts
    ]


@dataclass
class Problem:
    """One model over the whole batch, and the oracle's answer."""

    parameters: dict[str, Tensor]
    """By the block's names, experts numbered over all ranks."""
    hidden_states: Tensor
    weights: Tensor
    """The loss is (output * weights).sum(); like the hidden states [s, b, h]."""
    output: Tensor
    gradients: dict[str, Tensor]
    """Of the parameters, and of "hidden_states"."""


def solve(case: Case) -> Problem:
    """Ask the oracle."""
    config = case.reference_config()
    is_pos1 = config.position == "pos1"
    layers: list[Parameters] = []
    for layer in range(case.num_layers if is_pos1 else case.num_layers // 2):
        if is_pos1 and layer % 2 == 0:
            shapes = dense_layer_shapes(config)
        else:
            shapes = unit_shapes(config, dense_half=not is_pos1)
        layers.append(random_parameters(shapes, seed=layer))
    norm = {"final_layernorm.weight": (config.hidden_size,)}
    if config.normalization == "LayerNorm":
        norm["final_layernorm.bias"] = (config.hidden_size,)
    final = random_parameters(norm, seed=100)

    generator = torch.Generator().manual_seed(200)
    hidden_states, weights = torch.randn(
        2, SEQUENCE, BATCH, config.hidden_size, generator=generator, dtype=torch.float64
    )
    hidden_states.requires_grad_()
    output = reference_block(layers, hidden_states, config, case.moe_frequency, final)
    parameters = {f"layers.{i}.{name}": p for i, ps in enumerate(layers) for name, p in ps.items()}
    parameters |= final
    found = gradients((output * weights).sum(), {"hidden_states": hidden_states, **parameters})
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return Problem(values, hidden_states.detach(), weights, output.detach(), found)


def own_part(name: str, whole: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, as Megatron's layers split it."""
    if ".experts." in name:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
    if "linear_qkv" in name:
        return whole.chunk(size)[rank]
    if "linear_fc1" in name:  # SwiGLU's gate and up projection, one above the other
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    if "linear_proj" in name or "linear_fc2" in name:
        return whole.chunk(size, dim=1)[rank]
    return whole


def global_name(name: str, num_local_experts: int) -> str:
    """A parameter's name with its expert numbered over all ranks."""
    first = parallel_state.get_expert_model_parallel_rank() * num_local_experts
    return re.sub(
        r"local_experts\.(\d+)", lambda m: f"local_experts.{first + int(m.group(1))}", name
    )


def own_tokens(whole: Tensor) -> Tensor:
    """This rank's part of [s, b, h]: samples over data parallel ranks, sequence over TP."""
    whole = whole.chunk(parallel_state.get_data_parallel_world_size(), dim=1)[
        parallel_state.get_data_parallel_rank()
    ]
    return whole.chunk(parallel_state.get_tensor_model_parallel_world_size())[
        parallel_state.get_tensor_model_parallel_rank()
    ]


def summed(name: str, parameter: Tensor) -> Tensor:
    """The gradient over all tokens, as the host's reductions make it (with sums, no means)."""
    grad = parameter.grad.clone()
    if getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
    if ".experts." in name:
        dist.all_reduce(grad, group=parallel_state.get_expert_data_parallel_group())
    else:
        dist.all_reduce(grad, group=parallel_state.get_data_parallel_group())
    return grad


def errors(case: Case, problem: Problem, layout: dict[str, int]) -> dict[str, float]:
    """Largest differences from the oracle by name: output, input gradient, every parameter.

    layout: that of the current process groups.
    """
    sequence_parallel = layout.get("tensor_model_parallel_size", 1) > 1
    host = {**case.host, **layout, "sequence_parallel": sequence_parallel}
    block = build_block(Case(case.scmoe, host, case.moe_frequency, case.num_layers))
    num_local_experts = block.config.num_moe_experts // layout.get("expert_model_parallel_size", 1)
    names = {name: global_name(name, num_local_experts) for name, _ in parameters_by_expert(block)}
    for name, parameter in parameters_by_expert(block):
        parameter.data.copy_(own_part(name, problem.parameters[names[name]]))

    hidden_states = own_tokens(problem.hidden_states).contiguous().requires_grad_()
    output = run_block(block, hidden_states)
    (output * own_tokens(problem.weights)).sum().backward()

    def error(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        return (found - expected).abs().max().item()

    result = {
        "output": error(output, own_tokens(problem.output)),
        "hidden_states": error(hidden_states.grad, own_tokens(problem.gradients["hidden_states"])),
    }
    for name, parameter in parameters_by_expert(block):
        expected = own_part(name, problem.gradients[names[name]])
        result[names[name]] = error(summed(name, parameter), expected)
    return result


def all_errors(
    problems: dict[str, Problem], wanted: list[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, float]]:
    result = {}
    for layout, sizes in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**sizes)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        for name, problem in problems.items():
            if (name, layout) in wanted:
                result[name, layout] = errors(CASES[name], problem, sizes)
    return result


@pytest.fixture(scope="module")
def problems(request: pytest.FixtureRequest) -> dict[str, Problem]:
    return {name: solve(CASES[name]) for name in asked_for(request, "case")}


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, problems: dict[str, Problem]
) -> list[dict[tuple[str, str], dict[str, float]]]:
    """The errors of every rank."""
    return run_distributed(all_errors, WORLD_SIZE, problems, asked_for(request, "case", "layout"))


@pytest.mark.parametrize(
    ("case", "layout"), pairs(CASES, LAYOUTS, everywhere="pos2, grouped experts")
)
def test_layout_equals_oracle(
    problems: dict[str, Problem],
    found: list[dict[tuple[str, str], dict[str, float]]],
    case: str,
    layout: str,
) -> None:
    check(problems[case], [rank[case, layout] for rank in found], TOLERANCE)


def check(problem: Problem, ranks: list[dict[str, float]], tolerance: float) -> None:
    """Every error of every rank, of everything that the oracle has, is within the tolerance."""
    compared = {name for errors in ranks for name in errors}
    assert compared == {"output", *problem.gradients}
    wrong = {
        f"rank {rank}, {name}": error
        for rank, errors in enumerate(ranks)
        for name, error in errors.items()
        if not error <= tolerance
    }
    assert not wrong
