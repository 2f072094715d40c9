"""The model of streams and memory (tests/stream_model.py) on two ranks: uneven splits, every
dispatcher, micro-batches in flight."""

import pytest
import torch
from torch import Tensor

from megatron_scmoe.overlap.schedule import POSITIONS
from tests import deep_ep
from tests.distributed_tests.test_flex_dispatcher import flex
from tests.distributed_tests.test_overlap_parity import train
from tests.distributed_utils import run_distributed
from tests.models import Case, build_block
from tests.selected import asked_for
from tests.stream_model import StreamModel

WORLD_SIZE = 2


def routed(dispatcher: str, position: str, **scmoe: int) -> Case:
    return Case(
        scmoe={"scmoe_shortcut_position": position, **scmoe},
        host={"moe_token_dispatcher_type": dispatcher, "moe_router_topk": 2},
    )


def once(copies: str, ranks_per_node: int) -> Case:
    return Case(
        scmoe={
            "scmoe_dispatch_copies": copies,
            "scmoe_ranks_per_node": ranks_per_node,
            "scmoe_num_chunks": 2,
        },
        host={"moe_router_topk": 3},
    )


CASES = {
    **{
        f"{dispatcher}, {position}, {chunks}": routed(dispatcher, position, scmoe_num_chunks=chunks)
        for dispatcher in ("alltoall", "allgather")
        for position in POSITIONS
        for chunks in (1, 2)
    },
    "once to a rank": once("rank", 1),
    "once to a node of one rank": once("node", 1),
    "once to a node of two": once("node", 2),
    **{
        f"{backend}, {chunks}": flex(backend, scmoe={"scmoe_num_chunks": chunks})
        for backend in ("deepep", "hybridep")
        for chunks in (1, 2)
    },
}


def hazards(names: list[str]) -> dict[str, tuple[list[str], bool, int]]:
    """By case: what went wrong, whether no result changed, and orders that were asked for."""
    deep_ep.install()
    found = {}
    for name in names:
        case = CASES[name]
        results: list[dict[str, Tensor | None]] = []
        model = StreamModel()
        torch.manual_seed(0)
        block = build_block(case)
        results.append(train(block, (0, 1), in_flight=True))
        block.zero_grad()
        with model:
            results.append(train(block, (0, 1), in_flight=True))
        equal = all(
            (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
            for a, b in zip(results[0].values(), results[1].values(), strict=True)
        )
        found[name] = model.hazards, equal, model.orders["wait of side"]
    return found


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> list[dict[str, tuple[list[str], bool, int]]]:
    names = asked_for(request, "case")
    return run_distributed(hazards, WORLD_SIZE, names, expert_model_parallel_size=WORLD_SIZE)


@pytest.mark.parametrize(
    "case",
    # With one chunk there is nothing that two chunks do not have.
    [pytest.param(name, marks=pytest.mark.slow if name.endswith(", 1") else ()) for name in CASES],
)
def test_no_memory_is_touched_early(
    found: list[dict[str, tuple[list[str], bool, int]]], case: str
) -> None:
    for rank in found:
        problems, equal, orders = rank[case]
        assert problems == [] and equal and orders >= 16
