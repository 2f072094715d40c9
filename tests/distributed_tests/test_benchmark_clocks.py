"""The benchmarks' clocks see every operator and exchange, and change no value."""

import torch

from megatron_scmoe.overlap.schedule import POSITIONS, window
from tests.distributed_utils import run_distributed

SEQUENCE, BATCH = 8, 2


def _operators() -> dict:
    from tools.benchmarks.contenders import contenders
    from tools.benchmarks.paper_shapes import (
        Inputs,
        Operators,
        Shape,
        build,
        measure_block,
        measured_file,
    )

    shape = Shape(16, 32, 4, 2, 4, False, True)
    inputs = Inputs.draw(shape, SEQUENCE, BATCH)
    blocks = {one: build(shape, one, num_layers=2) for one in contenders(shape)}
    runs = {one: measure_block(block, inputs, steps=2)[0] for one, block in blocks.items()}
    operators = Operators(shape, inputs)
    operators.measure(steps=2)
    return measured_file("here", operators.seconds(), runs)


def test_every_operator_of_a_unit_is_timed() -> None:
    """In both directions, with the names that the planner knows."""
    measured, _ = run_distributed(_operators, 2, expert_model_parallel_size=2)
    names = {step.value for step in window("pos3")} | {"experts", "dispatch", "combine"}
    for direction in ("forward", "backward"):
        assert set(measured[direction]) == names
        assert min(measured[direction].values()) > 0
    assert measured["rest"] > 0
    assert [run["position"] for run in measured["runs"]] == ["none", "none", "pos1", "pos2", "pos3"]
    assert [run.get("slot") for run in measured["runs"]] == [
        None,
        None,
        *(POSITIONS[position].default_slot for position in ("pos1", "pos2", "pos3")),
    ]


def _stock_layer(timed: bool) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from tools.benchmarks.contenders import Contender
    from tools.benchmarks.meter_moe_layer import LayerClock, timed_forward
    from tools.benchmarks.paper_shapes import Inputs, Shape, build

    clock = LayerClock()
    if timed:
        MoELayer.forward = timed_forward(MoELayer.forward, clock)
        torch.distributed.all_to_all_single = clock.exchange(torch.distributed.all_to_all_single)
    torch.manual_seed(torch.distributed.get_rank())
    shape = Shape(16, 32, 4, 4, 4, False, False)
    block = build(shape, Contender("top2", "none", 2, False), num_layers=2)
    inputs = Inputs.draw(shape, SEQUENCE, BATCH)
    readings = []
    output = block(hidden_states=inputs.hidden_states, **inputs.attention)
    readings.append(dict(clock.seconds))
    output.sum().backward()
    readings.append(dict(clock.seconds))
    with torch.no_grad():
        block(hidden_states=inputs.hidden_states, **inputs.attention)
    readings.append(dict(clock.seconds))
    assert inputs.hidden_states.grad is not None
    return [output.detach(), inputs.hidden_states.grad], readings


def test_the_clock_of_stock_moe_layers() -> None:
    """It grows forward, backward and without gradients, each in its own field, exchanges inside
    layers; output and gradient stay as they are, bit for bit."""
    plain = run_distributed(_stock_layer, 2, False, expert_model_parallel_size=2)
    timed = run_distributed(_stock_layer, 2, True, expert_model_parallel_size=2)
    for (expected, _), (actual, (forward, backward, inference)) in zip(plain, timed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
        for training, without in (
            ("moe layer", "moe layer inference"),
            ("moe a2a", "moe a2a inference"),
        ):
            assert 0 < forward[training] < backward[training] == inference[training]
            assert forward[without] == backward[without] == 0 < inference[without]
        assert backward["moe a2a"] < backward["moe layer"]
        assert inference["moe a2a inference"] < inference["moe layer inference"]
