"""Overlap on equals overlap off, bit for bit: outputs and every gradient.

2 and 4 ranks, uneven splits, full and selective recomputation, chunks, all-gather, two
micro-batches in flight.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch import distributed as dist

from megatron_scmoe.model.moe import ScMoELayer
from megatron_scmoe.overlap.schedule import POSITIONS, window
from tests.distributed_utils import run_distributed
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block
from tests.routing_cases import plan_selection, planned_logits

NUM_EXPERTS = 8
RECOMPUTE_ALL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
RECOMPUTE_SOME = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "layernorm", "mlp", "shared_experts", "moe"],
}


@dataclass(frozen=True)
class ParityModel:
    """What differs from a dropless top-1 model; the routing is the same on every rank."""

    routing: str = "skewed"
    topk: int = 1
    host: dict[str, Any] = field(default_factory=dict)
    scmoe: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "balanced": ParityModel("balanced"),
    "skewed": ParityModel("skewed"),
    "skewed, top-2": ParityModel("skewed", topk=2),
    "an empty expert, top-2": ParityModel("empty_expert", topk=2),
    "all to one": ParityModel("all_to_one"),
    "all to two": ParityModel("all_to_one", topk=2),
    "capacity": ParityModel(topk=2, host={"moe_expert_capacity_factor": 1.0}),
    "padded to capacity": ParityModel(
        topk=2,
        host={"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    ),
    "full recompute": ParityModel(topk=2, host=RECOMPUTE_ALL),
    "selective recompute": ParityModel(topk=2, host=RECOMPUTE_SOME),
    "shared norm, cg2": ParityModel(
        scmoe={"scmoe_shortcut_norm": "shared", "scmoe_combine": "cg2"}
    ),
    "shared norm, selective recompute": ParityModel(
        host=RECOMPUTE_SOME, scmoe={"scmoe_shortcut_norm": "shared"}
    ),
    "post norm, add": ParityModel(scmoe={"scmoe_post_norm": True, "scmoe_combine": "add"}),
    "allgather": ParityModel(topk=2, host={"moe_token_dispatcher_type": "allgather"}),
    "three chunks": ParityModel(topk=2, scmoe={"scmoe_num_chunks": 3}),
    "allgather, three chunks": ParityModel(
        topk=2,
        host={"moe_token_dispatcher_type": "allgather"},
        scmoe={"scmoe_num_chunks": 3},
    ),
}
EVERY_SLOT = ("skewed, top-2", "full recompute", "selective recompute")
# With one of these; the others at every slot, in flight and in both orders are slow.
HARDEST = "full recompute"
# Where it lies makes no difference to what is sent: at Pos-2; at the others they are slow.
AT_POS2 = (
    "balanced",
    "skewed",
    "an empty expert, top-2",
    "all to one",
    "padded to capacity",
    "post norm, add",
    "allgather",
)
FOUR_RANKS = (*EVERY_SLOT, "balanced", "an empty expert, top-2", "all to one", "capacity")

# One model: position, slot, variant.
Key = tuple[str, int, str]
DEFAULT_SLOTS = [(position, POSITIONS[position].default_slot) for position in POSITIONS]
SLOTS = [(position, slot) for position in POSITIONS for slot in range(len(window(position)) + 1)]
KEYS: dict[str, list[Key]] = {
    "2 ranks": [
        (position, slot, name)
        for position, slot in SLOTS
        for name in VARIANTS
        if name == HARDEST
        or (
            slot == POSITIONS[position].default_slot and (position == "pos2" or name not in AT_POS2)
        )
    ],
    "2 ranks, every slot": [
        (position, slot, name)
        for position, slot in SLOTS
        for name in EVERY_SLOT
        if slot != POSITIONS[position].default_slot and name != HARDEST
    ]
    + [
        (position, slot, name)
        for position, slot in DEFAULT_SLOTS
        for name in AT_POS2
        if position != "pos2"
    ],
    "4 ranks": [(position, slot, name) for position, slot in DEFAULT_SLOTS for name in FOUR_RANKS],
}
# With the order of the backward passes.
IN_FLIGHT: dict[str, list[tuple[Key, tuple[int, int]]]] = {
    "2 ranks": [
        ((position, slot, name), (1, 0))
        for position, slot in DEFAULT_SLOTS
        for name in (HARDEST, "shared norm, selective recompute")
    ],
    "2 ranks, every slot": [
        ((position, slot, name), order)
        for position, slot in DEFAULT_SLOTS
        for name in (*EVERY_SLOT, "shared norm, selective recompute")
        for order in ((1, 0), (0, 1))
    ],
    "4 ranks": [((position, slot, HARDEST), (0, 1)) for position, slot in DEFAULT_SLOTS],
}


def build(key: Key, overlap: bool) -> TransformerBlock:
    """Two units with random weights of order one, and a router that selects as planned."""
    position, slot, name = key
    variant = VARIANTS[name]
    case = Case(
        scmoe={
            "scmoe_shortcut_position": position,
            "scmoe_expert_slot": str(slot),
            "scmoe_overlap": overlap,
            **variant.scmoe,
        },
        host={
            "num_moe_experts": NUM_EXPERTS,
            "moe_router_topk": variant.topk,
            "expert_model_parallel_size": dist.get_world_size(),
            **variant.host,
        },
    )
    block = build_block(case)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in block.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.copy_(0.3 * noise)
    for module in block.modules():
        if isinstance(module, ScMoELayer):
            _plan_routing(module, variant, generator)
    return block


def _plan_routing(moe: ScMoELayer, variant: ParityModel, generator: torch.Generator) -> None:
    selection = plan_selection(variant.routing, SEQUENCE * BATCH, NUM_EXPERTS, variant.topk)
    planned = planned_logits(selection, NUM_EXPERTS, generator).view(SEQUENCE, BATCH, NUM_EXPERTS)
    gating = moe.router.gating
    moe.router.gating = lambda tokens: planned + 0.02 * torch.tanh(gating(tokens))


def inputs(number: int) -> Tensor:
    """A micro-batch of this rank."""
    generator = torch.Generator().manual_seed(100 * (number + 1) + dist.get_rank())
    shape = (SEQUENCE, BATCH, 16)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def train(block: TransformerBlock, order: tuple[int, ...], in_flight: bool) -> dict[str, Any]:
    """Outputs and gradients of micro-batches.

    Args:
        order: of the backward passes.
        in_flight: all forward passes first, in the order of their numbers; otherwise one
            micro-batch after the other, in `order`.
    """
    batches = {number: inputs(number) for number in order}
    outputs = {}
    for number in sorted(order) if in_flight else order:
        outputs[number] = run_block(block, batches[number])
        if not in_flight:
            _backward(outputs[number])
    if in_flight:
        for number in order:
            _backward(outputs[number])
    results = {f"output {number}": output.detach() for number, output in outputs.items()}
    results |= {f"input {number}": batch.grad for number, batch in batches.items()}
    return results | {name: parameter.grad for name, parameter in block.named_parameters()}


def _backward(output: Tensor) -> None:
    generator = torch.Generator().manual_seed(7)
    output.backward(torch.randn(output.shape, generator=generator, dtype=output.dtype))


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the tensors that are not bitwise equal; gradients nobody got must agree too."""
    assert expected.keys() == found.keys()
    return [
        name
        for name, value in expected.items()
        if (value is None) != (found[name] is None)
        or (value is not None and not torch.equal(value, found[name]))
    ]


def compare_overlap(keys: list[Key]) -> dict[Key, list[str]]:
    """What differs between overlap on, at every slot, and off, by model."""
    result = {}
    without: dict[tuple[str, str], dict[str, Any]] = {}
    for key in keys:
        position, _, name = key
        if (position, name) not in without:
            expected = train(build(key, overlap=False), (0,), in_flight=False)
            routers = [value for name, value in expected.items() if name.endswith("router.weight")]
            for value in (expected["output 0"], expected["input 0"], *routers):
                assert value.abs().max() > 0
            without[position, name] = expected
        found = train(build(key, overlap=True), (0,), in_flight=False)
        result[key] = differences(without[position, name], found)
    return result


def compare_in_flight(
    keys: list[tuple[Key, tuple[int, int]]],
) -> dict[tuple[Key, tuple[int, int]], list[str]]:
    """What differs between two overlapped micro-batches in flight and one after the other.

    The reference runs them in the order of the backward passes, so that gradients are summed in
    the same order.
    """
    result = {}
    for key, order in keys:
        expected = train(build(key, overlap=False), order, in_flight=False)
        found = train(build(key, overlap=True), order, in_flight=True)
        result[key, order] = differences(expected, found)
    return result


def compare(which: str) -> dict[Any, list[str]]:
    return compare_overlap(KEYS[which]) | compare_in_flight(IN_FLIGHT[which])


@pytest.mark.parametrize(
    "which",
    ["2 ranks", pytest.param("2 ranks, every slot", marks=pytest.mark.slow), "4 ranks"],
)
def test_on_equals_off(which: str) -> None:
    world_size = int(which[0])
    results = run_distributed(compare, world_size, which, expert_model_parallel_size=world_size)
    for rank, result in enumerate(results):
        assert len(result) == len(KEYS[which]) + len(IN_FLIGHT[which])
        different = {key: names for key, names in result.items() if names}
        assert not different, f"rank {rank}"
