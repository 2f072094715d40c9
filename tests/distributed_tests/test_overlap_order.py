"""The recorded order of steps: start before the dense work, wait after it, in both directions.

Every pair of slots, inside attention too, with and without chunks.
"""

from collections.abc import Callable
from typing import Any

import pytest
from torch import distributed as dist
from torch import nn

from megatron_scmoe.model import unit
from megatron_scmoe.model.unit import ShortcutLayer
from megatron_scmoe.overlap import branch
from megatron_scmoe.overlap.schedule import Slots
from tests.distributed_tests.test_overlap_parity import RECOMPUTE_ALL, inputs
from tests.distributed_utils import run_distributed
from tests.models import Case, build_block, run_block

WORLD_SIZE = 2
ATTENTION = ["qkv {}", "core {}", "projection {}"]
FIRST, SECOND = ([name.format(layer) for name in ATTENTION] for layer in (1, 2))
# The dense operators in front of each tap, and behind it (arXiv:2404.05019, figure 5). A pos1 unit
# holds the second layer only.
BEFORE_TAP = {"pos1": [], "pos2": FIRST, "pos3": []}
WINDOW = {
    "pos1": [*SECOND, "shared expert"],
    "pos2": ["mlp 1", *SECOND, "shared expert"],
    "pos3": [*FIRST, "mlp 1", *SECOND, "shared expert"],
}
SLOTS = [
    (position, Slots(forward, backward))
    for position in WINDOW
    for forward in range(len(WINDOW[position]) + 1)
    for backward in range(len(WINDOW[position]) + 1)
    if position == "pos2" or forward == backward
]


def expected_forward(position: str, slots: Slots, overlap: bool) -> list[str]:
    early, late = WINDOW[position][: slots.forward], WINDOW[position][slots.forward :]
    if overlap:
        dispatch, combine = ["start", *early, "wait"], ["start", *late, "wait"]
    else:
        dispatch, combine = ["start", "wait", *early], ["start", "wait", *late]
    return [*BEFORE_TAP[position], *dispatch, "experts", *combine]


def expected_backward(position: str, slots: Slots, overlap: bool) -> list[str]:
    """The window from its end; the experts between the operators that the backward slot says."""
    early = WINDOW[position][: slots.backward][::-1]
    late = WINDOW[position][slots.backward :][::-1]
    if overlap:
        combine, dispatch = ["start", *late, "wait"], ["start", *early, "wait"]
    else:
        combine, dispatch = [*late, "start", "wait"], ["start", "wait", *early]
    return [*combine, "experts", *dispatch, *BEFORE_TAP[position][::-1]]


class Recorder:
    """What starts and ends in this process, in order."""

    def __init__(self) -> None:
        self._events: list[tuple[str, str]] = []

    def take(self) -> list[str]:
        """The steps since the last call.

        An operator is one step: a transfer that starts or completes inside it is a failure.
        """
        events, self._events = self._events, []
        steps = []
        for before, (kind, name) in zip([("", ""), *events], events, strict=False):
            if kind == "end":
                assert before == ("begin", name), events
            if kind != "begin":
                steps.append(name)
        assert not events or events[-1][0] != "begin", events
        return steps

    def watch(self, name: str, module: nn.Module) -> None:
        """Record the forward and backward passes of a module."""
        module.register_forward_pre_hook(self._hook("begin", name))
        module.register_forward_hook(self._hook("end", name))
        module.register_full_backward_pre_hook(self._hook("begin", name))
        module.register_full_backward_hook(self._hook("end", name))

    def watch_attention(self, number: int, attention: nn.Module) -> None:
        modules = attention.linear_qkv, attention.core_attention, attention.linear_proj
        for name, module in zip(ATTENTION, modules, strict=True):
            self.watch(name.format(number), module)

    def watch_transfers(self, transfer: type) -> type:
        """A transfer class that records its launch and its completion."""
        record = self._hook

        class Recorded(transfer):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                record("point", "start")()

            def complete(self) -> list:
                received = super().complete()
                record("point", "wait")()
                return received

        return Recorded

    def _hook(self, kind: str, name: str) -> Callable[..., None]:
        return lambda *_: self._events.append((kind, name))


def record(
    position: str,
    slots: Slots,
    overlap: bool,
    recorder: Recorder,
    host: dict[str, Any] | None = None,
    num_chunks: int = 1,
) -> tuple[list[str], list[str]]:
    """Steps of the forward and of the backward pass of one unit."""
    case = Case(
        scmoe={
            "scmoe_shortcut_position": position,
            "scmoe_overlap": overlap,
            "scmoe_num_chunks": num_chunks,
        },
        host={"expert_model_parallel_size": dist.get_world_size(), **(host or {})},
        num_layers=2,
    )
    block = build_block(case)
    (unit,) = (layer for layer in block.layers if isinstance(layer, ShortcutLayer))
    unit.slots = slots
    if position != "pos1":
        recorder.watch_attention(1, unit.dense_layer.self_attention)
        recorder.watch("mlp 1", unit.dense_layer.mlp)
    recorder.watch_attention(2, unit.self_attention)
    recorder.watch("shared expert", unit.mlp.shared_experts)
    recorder.watch("experts", unit.mlp.experts)
    output = run_block(block, inputs(0))
    forward = recorder.take()
    output.sum().backward()
    return forward, recorder.take()


def record_all() -> dict[Any, tuple[list[str], list[str]]]:
    recorder = Recorder()
    branch.Transfer = recorder.watch_transfers(branch.Transfer)
    orders: dict[Any, tuple[list[str], list[str]]] = {
        (position, slots, overlap): record(position, slots, overlap, recorder)
        for position, slots in SLOTS
        for overlap in (True, False)
    }
    orders["recompute"] = record("pos2", Slots(1, 1), True, recorder, RECOMPUTE_ALL)
    orders["chunks"] = record("pos2", Slots(1, 2), True, recorder, num_chunks=2)
    unit.runs_ahead = lambda _: True
    orders["runs ahead"] = record("pos2", Slots(2, 0), True, recorder)
    ShortcutLayer.operators_ahead = 2
    orders["runs two ahead"] = record("pos2", Slots(3, 0), True, recorder)
    return orders


@pytest.fixture(scope="module")
def orders() -> list[dict[Any, tuple[list[str], list[str]]]]:
    """What each rank recorded."""
    return run_distributed(record_all, WORLD_SIZE, expert_model_parallel_size=WORLD_SIZE)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "sequential"])
@pytest.mark.parametrize(("position", "slots"), SLOTS)
def test_order(orders: list[dict], position: str, slots: Slots, overlap: bool) -> None:
    for recorded in orders:
        forward, backward = recorded[position, slots, overlap]
        assert forward == expected_forward(position, slots, overlap)
        assert backward == expected_backward(position, slots, overlap)


def test_order_written_out(orders: list[dict]) -> None:
    """The paper's example, figure 7; backward the experts run in the middle of the attention."""
    for recorded in orders:
        forward, backward = recorded["pos2", Slots(1, 3), True]
        assert " > ".join(forward) == (
            "qkv 1 > core 1 > projection 1 > start > mlp 1 > wait > experts > "
            "start > qkv 2 > core 2 > projection 2 > shared expert > wait"
        )
        assert " > ".join(backward) == (
            "start > shared expert > projection 2 > wait > experts > start > core 2 > qkv 2 > "
            "mlp 1 > wait > projection 1 > core 1 > qkv 1"
        )


def test_order_with_full_recompute(orders: list[dict]) -> None:
    """Backward runs the unit forward and then backward, both overlapped."""
    steps = expected_forward("pos2", Slots(1, 1), overlap=True)
    for recorded in orders:
        forward, backward = recorded["recompute"]
        assert forward == steps
        assert backward == steps + expected_backward("pos2", Slots(1, 1), overlap=True)


def test_experts_of_one_chunk_run_beside_the_exchange_of_the_other(orders: list[dict]) -> None:
    for recorded in orders:
        forward, backward = recorded["chunks"]
        assert " > ".join(forward[3:]) == (
            "start > start > mlp 1 > wait > experts > start > wait > experts > start > "
            "qkv 2 > core 2 > projection 2 > shared expert > wait > wait"
        )
        assert " > ".join(backward[:-3]) == (
            "start > start > shared expert > projection 2 > core 2 > wait > experts > start > "
            "wait > experts > start > qkv 2 > mlp 1 > wait > wait"
        )


def test_dense_work_is_enqueued_before_the_host_waits_for_the_numbers_of_rows(
    orders: list[dict],
) -> None:
    """Backward needs no numbers."""
    for recorded in orders:
        forward, backward = recorded["runs ahead"]
        assert forward[3:6] == ["mlp 1", "start", "qkv 2"]
        assert backward == expected_backward("pos2", Slots(2, 0), overlap=True)
        forward, backward = recorded["runs two ahead"]
        assert forward[3:7] == ["mlp 1", "qkv 2", "start", "core 2"]
        assert backward == expected_backward("pos2", Slots(3, 0), overlap=True)
