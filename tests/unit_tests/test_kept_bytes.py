"""Between forward and backward a unit holds what autograd has saved, and nothing else.

Storages are counted, whoever holds them.
"""

import gc
import weakref
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_scmoe.model.unit import ShortcutLayer
from megatron_scmoe.overlap.branch import Leg, RoutedBranch
from megatron_scmoe.overlap.collectives import PerTensor
from megatron_scmoe.overlap.own_graph import OwnGraph
from megatron_scmoe.overlap.schedule import POSITIONS
from tests.distributed_utils import run_distributed
from tests.kept_bytes import Alive, KeptBytes
from tests.models import BATCH, Case, build_block, run_block

LENGTH = 48
# Half of the tokens' hidden states, [T, h]. Counts are smaller, and what a fused exchange keeps of
# the way that rows went.
SMALL = LENGTH * BATCH * 16 * 8 // 2


def held(case: Case) -> list[int]:
    """Bytes of every larger piece of memory that is alive and not saved."""
    block = build_block(case)
    x = torch.randn(LENGTH, BATCH, 16, dtype=torch.float64, requires_grad=True)
    run_block(block, x)  # buffers of the host are allocated
    kept = KeptBytes([block])
    with kept.measure(), Alive() as alive:
        output = run_block(block, x)
    found = alive.without(kept, output)
    output.sum().backward()
    assert kept.now == 0
    return [nbytes for nbytes in found if nbytes >= SMALL]


def case_of(position: str, **host: Any) -> Case:
    scmoe = {"scmoe_shortcut_position": position, "scmoe_num_chunks": host.pop("chunks", 1)}
    return Case(scmoe=scmoe, host={"moe_router_topk": 2, **host}, num_layers=2)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("travels", [True, False])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("position", POSITIONS)
def test_nothing_else_is_held(position: str, dispatcher: str, chunks: int, travels: bool) -> None:
    with mock.patch.object(PerTensor, "moves", lambda _: travels):
        assert held(case_of(position, moe_token_dispatcher_type=dispatcher, chunks=chunks)) == []


@pytest.mark.usefixtures("single_rank")
def test_what_a_branch_holds_is_seen() -> None:
    send_back = Leg.send_back

    def keeping(self: Any, collective: Any, rows: torch.Tensor) -> None:
        self.root = rows
        send_back(self, collective, rows)

    with mock.patch.object(Leg, "send_back", keeping):
        assert held(case_of("pos2")) == [2 * LENGTH * BATCH * 16 * 8]


@pytest.mark.usefixtures("single_rank")
def test_gradients_of_rows_do_not_outlive_their_use() -> None:
    """What came back is gone when the experts, which have used it, are still at work."""
    returned: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    graph = OwnGraph()
    (entered,) = graph.enter([torch.randn(4, 3)])
    entered.register_hook(lambda _: alive.append(returned[0]() is not None))
    graph.leave([entered * 2])
    gradient = torch.randn(4, 3)
    expected = 2 * gradient
    returned.append(weakref.ref(gradient.untyped_storage()))
    grads = [gradient]
    del gradient
    (found,) = graph.backward(grads)
    assert torch.equal(found, expected)
    assert alive == [False]


@pytest.mark.usefixtures("single_rank")
def test_a_pass_that_fails_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    branches: list[weakref.ref[RoutedBranch]] = []
    depart = RoutedBranch.depart

    def noting(self: RoutedBranch, cargo: Any) -> list[Leg]:
        branches.append(weakref.ref(self))
        return depart(self, cargo)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(RoutedBranch, "depart", noting)
    # Behind the turn, and in front of the shared expert, which keeps its gate's score until the
    # next pass.
    monkeypatch.setattr(ShortcutLayer, "attention", fail)
    block = build_block(case_of("pos2"))
    x = torch.randn(LENGTH, BATCH, 16, dtype=torch.float64, requires_grad=True)
    with suppress(MemoryError):  # pytest.raises would keep the frames
        run_block(block, x)
    gc.collect()
    assert [branch() for branch in branches] == [None]


def held_by_fused_exchanges() -> dict[str, list[int]]:
    from tests import deep_ep
    from tests.distributed_tests.test_flex_dispatcher import flex

    deep_ep.install()
    return {backend: held(flex(backend)) for backend in ("deepep", "hybridep")}


def test_fused_exchanges_hold_nothing_either() -> None:
    for found in run_distributed(held_by_fused_exchanges, 2, expert_model_parallel_size=2):
        assert found == {"deepep": [], "hybridep": []}
