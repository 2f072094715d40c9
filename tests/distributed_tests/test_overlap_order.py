"""The recorded order of steps: start before the dense work, wait after it, in both directions."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import distributed as dist
from torch import nn

from megatron_scmoe.overlap import all_to_all
from megatron_scmoe.shortcut_layer import ShortcutLayer
from tests.distributed_tests.test_overlap_parity import RECOMPUTE_ALL, inputs
from tests.distributed_utils import run_distributed
from tests.models import Case, build_block, run_block

WORLD_SIZE = 2
DENSE = ["attention 1", "mlp 1", "attention 2", "shared expert"]
# The dense operators in front of each tap, and behind it (arXiv:2404.05019, figure 5). A pos1 unit
# holds the second layer only.
BEFORE_TAP = {"pos1": [], "pos2": DENSE[:1], "pos3": []}
WINDOW = {"pos1": DENSE[2:], "pos2": DENSE[1:], "pos3": DENSE}
SLOTS = [(position, slot) for position in WINDOW for slot in range(len(WINDOW[position]) + 1)]


def expected_forward(position: str, slot: int, overlap: bool) -> list[str]:
    early, late = WINDOW[position][:slot], WINDOW[position][slot:]
    if overlap:
        dispatch, combine = ["start", *early, "wait"], ["start", *late, "wait"]
    else:
        dispatch, combine = ["start", "wait", *early], ["start", "wait", *late]
    return [*BEFORE_TAP[position], *dispatch, "experts", *combine]


def expected_backward(position: str, slot: int, overlap: bool) -> list[str]:
    """The forward list from the end, where a wait starts the mirrored exchange."""
    mirrored = {"start": "wait", "wait": "start"}
    return [
        mirrored.get(step, step) for step in reversed(expected_forward(position, slot, overlap))
    ]


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

    def watch_transfers(self, transfer: type) -> type:
        """A transfer class that records its launch and its completion."""
        record = self._hook

        class Recorded(transfer):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                record("point", "start")()

            def complete(self) -> tuple:
                received = super().complete()
                record("point", "wait")()
                return received

        return Recorded

    def _hook(self, kind: str, name: str) -> Callable[..., None]:
        return lambda *_: self._events.append((kind, name))


def record(
    position: str, slot: int, overlap: bool, host: dict[str, Any], recorder: Recorder
) -> tuple[list[str], list[str]]:
    """Steps of the forward and of the backward pass of one unit."""
    case = Case(
        scmoe={
            "scmoe_shortcut_position": position,
            "scmoe_expert_slot": slot,
            "scmoe_overlap": overlap,
        },
        host={"expert_model_parallel_size": dist.get_world_size(), **host},
        num_layers=2,
    )
    block = build_block(case)
    (unit,) = (layer for layer in block.layers if isinstance(layer, ShortcutLayer))
    if position != "pos1":
        recorder.watch("attention 1", unit.dense_layer.self_attention)
        recorder.watch("mlp 1", unit.dense_layer.mlp)
    recorder.watch("attention 2", unit.self_attention)
    recorder.watch("shared expert", unit.mlp.shared_experts)
    recorder.watch("experts", unit.mlp.experts)
    output = run_block(block, inputs(0))
    forward = recorder.take()
    output.sum().backward()
    return forward, recorder.take()


def record_all() -> dict[Any, tuple[list[str], list[str]]]:
    recorder = Recorder()
    all_to_all._Transfer = recorder.watch_transfers(all_to_all._Transfer)
    orders = {
        (position, slot, overlap): record(position, slot, overlap, {}, recorder)
        for position, slot in SLOTS
        for overlap in (True, False)
    }
    orders["recompute"] = record("pos2", 1, True, RECOMPUTE_ALL, recorder)
    return orders


@pytest.fixture(scope="module")
def orders() -> list[dict[Any, tuple[list[str], list[str]]]]:
    """What each rank recorded."""
    return run_distributed(record_all, WORLD_SIZE, expert_model_parallel_size=WORLD_SIZE)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "sequential"])
@pytest.mark.parametrize(("position", "slot"), SLOTS)
def test_order(orders: list[dict], position: str, slot: int, overlap: bool) -> None:
    for recorded in orders:
        forward, backward = recorded[position, slot, overlap]
        assert forward == expected_forward(position, slot, overlap)
        assert backward == expected_backward(position, slot, overlap)


def test_order_written_out(orders: list[dict]) -> None:
    """The paper's example, figure 7: two operators behind the experts, one in front."""
    for recorded in orders:
        forward, backward = recorded["pos2", 1, True]
        assert " > ".join(forward) == (
            "attention 1 > start > mlp 1 > wait > experts > "
            "start > attention 2 > shared expert > wait"
        )
        assert " > ".join(backward) == (
            "start > shared expert > attention 2 > wait > "
            "experts > start > mlp 1 > wait > attention 1"
        )


def test_order_with_full_recompute(orders: list[dict]) -> None:
    """Backward runs the unit forward and then backward, both overlapped."""
    steps = expected_forward("pos2", 1, overlap=True)
    for recorded in orders:
        forward, backward = recorded["recompute"]
        assert forward == steps
        assert backward == steps + expected_backward("pos2", 1, overlap=True)
