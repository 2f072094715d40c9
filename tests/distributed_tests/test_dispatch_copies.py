"""A token that is sent once: the numbers of a row for every expert, with fewer bytes.

Bit for bit where the order of the sums allows it, which is every model of top-1 and top-2 and every
routing with one expert of a token on a rank; overlap on and off are bitwise equal always. Against
the oracle, over layouts: test_expert_parallel.py.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch import distributed as dist

from megatron_scmoe.model.dispatch import COPIES, alltoall
from megatron_scmoe.model.moe import ScMoELayer
from tests.distributed_tests.test_overlap_parity import (
    RECOMPUTE_ALL,
    RECOMPUTE_SOME,
    differences,
    inputs,
)
from tests.distributed_utils import run_distributed
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block
from tests.routing_cases import planned_logits
from tests.selected import asked_for

WORLD_SIZE, EXPERTS, HIDDEN = 4, 8, 16
RANKS_PER_NODE = 2
TOKENS = SEQUENCE * BATCH
ONCE = tuple(copies for copies in COPIES if copies != "expert")
ALONE = {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}


@dataclass(frozen=True)
class CopiesModel:
    """What differs from a dropless model at Pos-2."""

    topk: int = 3
    bitwise: tuple[str, ...] = ()
    """Ways of sending with which the sums have the order of a row for every expert."""
    selection: list[list[int]] | None = None
    """Experts of every token, on every rank; None for those that random weights choose."""
    multiple: int = 1
    """Of rows, that an expert is given by every rank."""
    host: dict[str, Any] = field(default_factory=dict)
    scmoe: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "top-1": CopiesModel(1, bitwise=ONCE),
    "top-2": CopiesModel(2, bitwise=ONCE),
    "one expert on each rank": CopiesModel(
        4,
        bitwise=("rank",),  # a node sums two of the four first
        selection=[[2 * rank + (token + rank) % 2 for rank in range(4)] for token in range(TOKENS)],
    ),
    "top-5, grouped experts": CopiesModel(5, host={"moe_grouped_gemm": True}),
    "every expert": CopiesModel(8),
    "all to one rank": CopiesModel(2, bitwise=ONCE, selection=[[2, 3]] * TOKENS),
    "capacity": CopiesModel(host={"moe_expert_capacity_factor": 1.0}),
    "padded to capacity": CopiesModel(
        host={"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    ),
    "padded for quantisation": CopiesModel(multiple=4),
    "three chunks": CopiesModel(scmoe={"scmoe_num_chunks": 3}),
    "more chunks than tokens": CopiesModel(scmoe={"scmoe_num_chunks": TOKENS + 2}),
    "full recompute": CopiesModel(host=RECOMPUTE_ALL),
    "selective recompute": CopiesModel(host=RECOMPUTE_SOME, scmoe={"scmoe_num_chunks": 2}),
    "experts at home": CopiesModel(
        scmoe={"scmoe_experts_at_home": {"zero": 2, "copy": 3}},
    ),
    "two gates": CopiesModel(
        1,
        bitwise=ONCE,
        host=ALONE,
        scmoe={"scmoe_dual_gating": "separate", "scmoe_combine": "add"},
    ),
    "without a shortcut": CopiesModel(
        host=ALONE, scmoe={"scmoe_shortcut_position": "none", "scmoe_combine": "add"}
    ),
    "bf16": CopiesModel(2, host={"params_dtype": torch.bfloat16, "bf16": True}),
}

# What is left of them is seen elsewhere: tops of 1 and 8 between those of others, a capacity where
# rows are padded to it, and the engine, which is the same for every way of sending, in
# test_overlap_parity.py.
SLOW = (
    "top-1",
    "every expert",
    "all to one rank",
    "capacity",
    "more chunks than tokens",
    "selective recompute",
    "without a shortcut",
)
ON_AND_OFF = ("top-2", "three chunks", "full recompute", "two gates", *SLOW)


def build(model: CopiesModel, copies: str, overlap: bool = True) -> TransformerBlock:
    """Two units with random weights of order one, the same for all ways of sending."""
    case = Case(
        scmoe={
            "scmoe_dispatch_copies": copies,
            "scmoe_ranks_per_node": RANKS_PER_NODE,
            "scmoe_overlap": overlap,
            **model.scmoe,
        },
        host={
            "num_moe_experts": EXPERTS,
            "moe_router_topk": model.topk,
            "expert_model_parallel_size": WORLD_SIZE,
            **model.host,
        },
    )
    block = build_block(case)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in block.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.3 * noise)
    for moe in layers(block):
        # The host's config wants FP8 with it.
        moe.token_dispatcher.config.moe_router_padding_for_quantization = model.multiple > 1
        if model.selection is not None:
            planned = planned_logits(model.selection, EXPERTS, generator)
            planned = planned.view(SEQUENCE, BATCH, EXPERTS)
            gating = moe.router.gating
            moe.router.gating = lambda z, gating=gating, planned=planned: (
                planned + 0.02 * torch.tanh(gating(z))
            )
    return block


def layers(block: TransformerBlock) -> list[ScMoELayer]:
    return [module for module in block.modules() if isinstance(module, ScMoELayer)]


def distance(expected: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest difference, relative to the largest element of the tensor."""
    assert expected.keys() == found.keys()
    return max(
        ((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)).item()
        for name, value in expected.items()
        if value is not None
    )


class Maps:
    """Routings of a block's layers, as they are sent."""

    def __init__(self, block: TransformerBlock) -> None:
        self.of_chunks: list[Tensor] = []
        for moe in layers(block):
            moe.token_dispatcher.prepare = self._watching(moe.token_dispatcher.prepare)

    def _watching(self, prepare: Any) -> Any:
        def watched(chunks: Any, waited: Any) -> Any:
            self.of_chunks += [chunk.routing_map.clone() for chunk in chunks]
            return prepare(chunks, waited)

        return watched


def train(block: TransformerBlock) -> dict[str, Any]:
    """Output and every gradient of one micro-batch, a different one on every rank."""
    batch = inputs(0).detach().to(block.config.params_dtype).requires_grad_()
    output = run_block(block, batch)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"output": output.detach(), "input": batch.grad, **gradients}


def compare(name: str) -> dict[str, dict[str, Any]]:
    """Every way of sending once against a row for every expert."""
    model = MODELS[name]
    alltoall.get_align_size_for_quantization = (  # type: ignore[attr-defined]
        lambda _: model.multiple
    )
    expected = train(build(model, "expert"))
    routers = [value for name, value in expected.items() if name.endswith("router.weight")]
    for value in (expected["output"], expected["input"], *routers):
        assert value.abs().max() > 0
    found = {}
    for copies in ONCE:
        on = train(build(model, copies))
        off = train(build(model, copies, overlap=False)) if name in ON_AND_OFF else on
        found[copies] = {
            "not bitwise": differences(expected, on),
            "distance": distance(expected, on),
            "overlap": differences(off, on),
        }
    return found


def evaluated(copies: str) -> bool:
    """Whether evaluation gives the output of training."""
    model = MODELS["top-2"]
    block = build(model, copies).eval()
    with torch.no_grad():
        output = run_block(block, inputs(0))
    return torch.equal(output, train(build(model, copies))["output"])


def traffic(copies: str) -> dict[str, Any]:
    """What one pass of a block sends, and what the routing says that it should."""
    calls: Counter[str] = Counter()
    originals = {
        name: getattr(dist, name) for name in ("all_to_all_single", "all_gather_into_tensor")
    }

    def counted(name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **named)

        return call

    block = build(MODELS["three chunks"], copies)
    maps = Maps(block)
    for name in originals:
        setattr(dist, name, counted(name))
    try:
        run_block(block, inputs(0)).sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    exchanges = [x for moe in layers(block) for x in moe.recorder.take().exchanges]
    sent, crossed = (
        {
            (name, direction): sum(
                getattr(x, size) for x in exchanges if x.activity[:2] == (name, direction)
            )
            for name in ("dispatch", "combine")
            for direction in ("forward", "backward")
        }
        for size in ("bytes", "bytes_between_nodes")
    )
    return {
        "calls": dict(calls),
        "sent": sent,
        "crossed": crossed,
        "maps": torch.stack(maps.of_chunks),
    }


def everything(names: list[str]) -> dict[Any, Any]:
    torch.use_deterministic_algorithms(True)
    found: dict[Any, Any] = {name: compare(name) for name in names}
    found |= {("evaluated", copies): evaluated(copies) for copies in ONCE}
    return found | {copies: traffic(copies) for copies in COPIES}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    names = asked_for(request, "name")
    return run_distributed(everything, WORLD_SIZE, names, expert_model_parallel_size=WORLD_SIZE)


@pytest.mark.parametrize("copies", ONCE)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS],
)
def test_sending_once_gives_the_numbers_of_sending_to_every_expert(
    found: list[dict[Any, Any]], name: str, copies: str
) -> None:
    tolerance = 5e-2 if "bf16" in MODELS[name].host else 1e-12
    for rank in found:
        result = rank[name][copies]
        assert result["overlap"] == []
        assert result["distance"] <= tolerance
        if copies in MODELS[name].bitwise:
            # On a node, rows reach an expert in another order: its weights' gradients are sums
            # over them.
            others = [x for x in result["not bitwise"] if copies == "rank" or ".experts." not in x]
            assert others == []


@pytest.mark.parametrize("name", ["top-5, grouped experts"])
def test_the_models_tell_orders_of_sums_apart(found: list[dict[Any, Any]], name: str) -> None:
    """Otherwise the bitwise comparisons would show nothing."""
    assert any(rank[name][copies]["not bitwise"] for rank in found for copies in ONCE)


@pytest.mark.parametrize("copies", ONCE)
def test_evaluation_sends_the_same(found: list[dict[Any, Any]], copies: str) -> None:
    assert all(rank["evaluated", copies] for rank in found)


def distinct_ranks(maps: Tensor, own: int) -> int:
    """Other ranks with experts of a token, summed over tokens, one by one."""
    each = EXPERTS // WORLD_SIZE
    return sum(
        len({int(expert) // each for expert in token.nonzero().flatten()} - {own})
        for token in maps.flatten(0, -2)
    )


def test_rows_leave_once_for_every_rank(found: list[dict[Any, Any]]) -> None:
    rows = HIDDEN * 8
    for own, rank in enumerate(found):
        result = rank["rank"]
        ranks = distinct_ranks(result["maps"], own)
        experts = int(result["maps"].sum()) - int(
            result["maps"].unflatten(-1, (4, 2))[..., own, :].sum()
        )
        assert 0 < ranks < experts
        assert result["sent"]["combine", "backward"] == ranks * rows
        # With the weights of both experts of a rank.
        assert result["sent"]["dispatch", "forward"] == ranks * (rows + 2 * 8)
        assert rank["expert"]["sent"]["combine", "backward"] == experts * rows


def test_a_row_crosses_once_for_every_node(found: list[dict[Any, Any]]) -> None:
    """To the other node of two, and from there to the other rank of two."""
    rows = HIDDEN * 8
    handed_on = wanted = 0
    back = "combine", "backward"
    for own, rank in enumerate(found):
        sent, crossed = rank["node"]["sent"], rank["node"]["crossed"]
        tokens = [
            {int(expert) // 2 for expert in token.nonzero()}
            for token in rank["node"]["maps"].flatten(0, -2)
        ]
        node, place = divmod(own, RANKS_PER_NODE)
        crossing = sum(any(rank // RANKS_PER_NODE != node for rank in token) for token in tokens)
        assert crossing > 0 and crossed[back] == crossing * rows
        # With the weights of all four experts of the node.
        assert crossed["dispatch", "forward"] == crossing * (rows + 4 * 8)
        assert crossed[back] < rank["rank"]["crossed"][back] < rank["rank"]["sent"][back]
        # What a rank hands on is of others too: counted over all ranks.
        handed_on += sent[back] - crossed[back]
        wanted += sum(rank % RANKS_PER_NODE != place for token in tokens for rank in token)
    assert handed_on == wanted * rows


@pytest.mark.parametrize("copies", COPIES)
def test_numbers_of_rows_are_exchanged_once_for_a_unit(
    found: list[dict[Any, Any]], copies: str
) -> None:
    units = 2
    for rank in found:
        assert rank[copies]["calls"]["all_gather_into_tensor"] == units


def test_weights_and_rows_are_what_is_exchanged(found: list[dict[Any, Any]]) -> None:
    """There with their weights, back without; the same for their gradients."""
    units, chunks = 2, 3
    for rank in found:
        assert rank["rank"]["calls"]["all_to_all_single"] == units * chunks * (2 + 1 + 1 + 2)
