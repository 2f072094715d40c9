"""Units with two routed branches over the same experts, and tensors carried from unit to unit.

Toys, defined here on nothing but the unit's public parts: the second route reads the current
representation and avoids the experts of the first; the carrying unit adds the router's logits of
the unit before. Outputs and all gradients equal loops over tokens, in float64; overlap on equals
off bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_scmoe.model.routing.choice import Routing
from megatron_scmoe.model.specs import block_config, scmoe_block_spec
from megatron_scmoe.model.unit import ShortcutLayer, UnitPass
from megatron_scmoe.overlap.measure.adaptive import FirstIterations, Phase, choose_routes
from megatron_scmoe.overlap.schedule import POSITIONS, Route, Slots, Task
from tests.distributed_utils import run_distributed
from tests.models import Case, run_block

SEQUENCE, BATCH, HIDDEN, EXPERTS = 6, 2, 16, 4
CURRENT = 7  # dense operators of the pair in front of the current representation
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm"]}


class TwoRoutes(ShortcutLayer):
    """Independent top-1 gates on the preceding and on the current representation."""

    further_routes = (Route(CURRENT, Slots(1, 0)),)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gates = nn.ParameterList([torch.empty(EXPERTS, HIDDEN) for _ in range(2)])

    def tapped_norm(self, tapped: Tensor, route: int) -> Tensor:
        if route == 0:
            return super().tapped_norm(tapped, route)
        return self.pre_mlp_layernorm(tapped)

    def choose_experts(
        self, run: UnitPass, task: Task, z: Tensor, padding_mask: Tensor | None
    ) -> Routing:
        logits = (z @ self.gates[task.route].T).flatten(0, 1)
        if task.route == 1:
            logits = logits.masked_fill(run.taps[0].routing.routing_map, -torch.inf)
        return top_1(logits)


class Carrying(ShortcutLayer):
    """A gate whose logits go on to the next unit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gates = nn.ParameterList([torch.empty(EXPERTS, HIDDEN)])

    def choose_experts(
        self, run: UnitPass, task: Task, z: Tensor, padding_mask: Tensor | None
    ) -> Routing:
        logits = z @ self.gates[0].T
        run.carried = logits if run.carried is None else logits + run.carried
        return top_1(run.carried.flatten(0, 1))


def top_1(logits: Tensor) -> Routing:
    """The expert with the largest logit, from logits, [T, E]."""
    routing_map = nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).bool()
    return Routing(logits.softmax(dim=-1) * routing_map, routing_map)


def build(kind: type[ShortcutLayer], case: Case) -> TransformerBlock:
    config, scmoe = case.host_config(), case.scmoe_config()
    spec = scmoe_block_spec(config, scmoe)
    for layer in spec.layer_specs:
        layer.module = kind
    groups = ProcessGroupCollection.use_mpu_process_groups()
    block = TransformerBlock(config=block_config(config, scmoe), spec=spec, pg_collection=groups)
    block.to(torch.float64)
    local = block.layers[0].mlp.local_expert_indices
    for name, parameter in block.named_parameters():
        # The same weights on all ranks; an expert's by its number over all.
        head, _, tail = name.partition("local_experts.")
        if tail:
            index, _, rest = tail.partition(".")
            name = f"{head}{local[int(index)]}.{rest}"
        random = torch.Generator().manual_seed(sum(map(ord, name)) * 31 + len(name))
        scale = 1.0 if "norm" in name else parameter.shape[-1] ** -0.5
        values = torch.randn(parameter.shape, dtype=torch.float64, generator=random) * scale
        parameter.data.copy_(values)
    return block


# Loops over tokens; the dense layers are the host's. ----------------------------------------------


def experts_of(unit: ShortcutLayer, z: Tensor, logits: Tensor) -> Tensor:
    """Each token's best expert, weighted, one by one; z [s, b, h], logits [s, b, E]."""
    rows = []
    for token, of_token in zip(z.flatten(0, 1), logits.flatten(0, 1), strict=True):
        best = int(of_token.argmax())
        output, _ = unit.mlp.experts.local_experts[best](token[None, None])
        rows.append(of_token.softmax(dim=-1)[best] * output[0, 0])
    return torch.stack(rows).view_as(z)


def reference(block: TransformerBlock, hidden_states: Tensor, rotary: Tensor) -> Tensor:
    length = hidden_states.shape[0]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    carried: Tensor | float = 0.0

    def attend(layer: Any, x: Tensor) -> Tensor:
        return layer._forward_attention(x, attention_mask=mask, rotary_pos_emb=rotary)[0]

    for unit in block.layers:
        at = [hidden_states]  # pos3
        at.append(attend(unit.dense_layer, at[-1]))  # pos2
        at.append(unit.dense_layer._forward_mlp(at[-1]))  # pos1
        current = attend(unit, at[-1])
        x = unit.pre_mlp_layernorm(current)
        position = unit._scmoe.scmoe_shortcut_position
        z = unit.shortcut_layernorm(at[{"pos3": 0, "pos2": 1}[position]])
        logits = z @ unit.gates[0].T
        if isinstance(unit, TwoRoutes):
            taken = nn.functional.one_hot(logits.argmax(dim=-1), EXPERTS).bool()
            others = (x @ unit.gates[1].T).masked_fill(taken, -torch.inf)
            routed = experts_of(unit, z, logits) + experts_of(unit, x, others)
        else:
            carried = logits + carried
            routed = experts_of(unit, z, carried)
        hidden_states = current + unit.mlp.shared_expert(x).merge(routed)
    return block.final_layernorm(hidden_states)


# Checks. ------------------------------------------------------------------------------------------


def tokens() -> Tensor:
    """Of this rank."""
    random = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    shape = SEQUENCE, BATCH, HIDDEN
    return torch.randn(shape, dtype=torch.float64, generator=random).requires_grad_()


def results(block: TransformerBlock, output: Tensor, x: Tensor) -> dict[str, Tensor]:
    block.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert x.grad is not None
    found = {"output": output.detach(), "input": x.grad}
    for name, parameter in block.named_parameters():
        if ".router." in name:
            continue  # the host's, whose place the toys' gates take
        # An expert without tokens does not occur in the loops.
        unused = parameter.grad is None and ".experts." in name
        found[name] = torch.zeros_like(parameter) if unused else parameter.grad.clone()
    return found


def through_the_engine(block: TransformerBlock) -> dict[str, Tensor]:
    x = tokens()
    return results(block, run_block(block, x), x)


@contextmanager
def rotary_of_run_block() -> Iterator[list[Tensor]]:
    """What `run_block` hands to the layers."""
    seen: list[Tensor] = []
    forward = TransformerBlock.forward

    def noting(self: TransformerBlock, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["rotary_pos_emb"])
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerBlock, "forward", noting)
        yield seen


def case_of(position: str, chunks: int = 1, units: int = 2, **host: Any) -> Case:
    scmoe = {"scmoe_shortcut_position": position, "scmoe_num_chunks": chunks}
    return Case(scmoe=scmoe, host=host, num_layers=2 * units)


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert different == []


PAIRS = [position for position, at in POSITIONS.items() if at.is_pair]
TOYS = [(TwoRoutes, 2), (Carrying, 3)]


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", PAIRS)
@pytest.mark.parametrize(("kind", "units"), TOYS, ids=["two routes", "carried"])
def test_equals_loops_over_tokens(kind: type[ShortcutLayer], units: int, position: str) -> None:
    block = build(kind, case_of(position, units=units))
    with rotary_of_run_block() as rotary:
        found = through_the_engine(block)
    x = tokens()
    wanted = results(block, reference(block, x, rotary[0]), x)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert ".experts." in name or value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    ("chunks", "host"),
    [
        pytest.param(1, {}, id="1-"),
        pytest.param(1, FULL, id="1-recomputed"),
        pytest.param(1, MOE, id="1-moe recomputed"),
        pytest.param(3, {}, id="3-"),
        pytest.param(3, FULL, id="3-recomputed", marks=pytest.mark.slow),
        pytest.param(3, MOE, id="3-moe recomputed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("kind", "units"), TOYS, ids=["two routes", "carried"])
def test_no_bit_depends_on_when_it_runs(
    kind: type[ShortcutLayer], units: int, chunks: int, host: dict[str, Any]
) -> None:
    """Overlap on and off at the same slots, and recomputation of whole units; nor at which slots,
    but for the order in which an expert's gradients of three chunks and two routes are summed."""
    plain = build(kind, case_of("pos2", chunks, units))
    block = build(kind, case_of("pos2", chunks, units, **host))
    other = block if host is MOE else plain  # recomputed norms round differently
    several = [Slots(1, 0), Slots(0, 1), Slots(0, 0)] if kind is TwoRoutes else [Slots(1, 0)]
    at_first = through_the_engine(plain)
    for slots, second in product([Slots(1, 3), Slots(0, 0), Slots(5, 5), Slots(4, 1)], several):
        for unit in (*plain.layers, *block.layers):
            unit.slots = slots
            if kind is TwoRoutes:
                unit.further_routes = (Route(CURRENT, second),)
        found = through_the_engine(block)
        for unit in other.layers:
            unit.overlap = False
        assert_equal(found, through_the_engine(other))
        for unit in other.layers:
            unit.overlap = True
        for name, value in found.items():
            if chunks == 1 or ".experts." not in name:
                assert host is MOE or torch.equal(value, at_first[name])
            torch.testing.assert_close(value, at_first[name], rtol=1e-10, atol=1e-10, msg=name)


def measured_on_two_ranks() -> tuple[list[bool], list[list[float]], list[str]]:
    """Whether both ranks' tracker would see every part of every route; the slots it would choose,
    and names whose bits differ with them."""
    block = build(TwoRoutes, case_of("pos2"))
    before = through_the_engine(block)
    for unit in block.layers:
        unit.recorder.take()
        unit.recorder.records_steps = True
    through_the_engine(block)
    first = FirstIterations("pos2", num_routes=2)
    first._phases = [Phase(1, records_steps=True, overlap=True)]
    times = first.observe([unit.recorder.take() for unit in block.layers])
    assert times is not None
    parts = [[*one.dense, *(x for route in one.routes for x in route)] for one in times]
    slots, further = choose_routes("pos2", TwoRoutes.further_routes, *times)
    for unit in block.layers:
        unit.recorder.records_steps = False
        unit.slots, unit.further_routes = slots, further
    after = through_the_engine(block)
    different = [name for name in before if not torch.equal(before[name], after[name])]
    return [len(one) == 5 + 2 * 3 for one in parts], parts, different


def test_every_route_is_measured() -> None:
    ranks = run_distributed(measured_on_two_ranks, 2, expert_model_parallel_size=2)
    assert ranks[0] == ranks[1]
    complete, parts, different = ranks[0]
    assert all(complete) and different == []
    assert all(seconds > 0 for direction in parts for seconds in direction)


@pytest.mark.usefixtures("single_rank")
def test_measured_slots_of_all_routes_are_kept() -> None:
    case = case_of("pos2")
    case.scmoe["scmoe_measured_slots"] = [1, 3, 0, 1]
    for unit in build(TwoRoutes, case).layers:
        assert (unit.slots, unit.further_routes) == (Slots(1, 3), (Route(CURRENT, Slots(0, 1)),))


def of_two_ranks(position: str) -> tuple[list[str], dict[str, Tensor]]:
    """Names whose bits differ without overlap; the results, experts by their number over all."""
    block = build(TwoRoutes, case_of(position, chunks=2))
    found = through_the_engine(block)
    for unit in block.layers:
        unit.overlap = False
    alone = through_the_engine(block)
    different = [name for name in found if not torch.equal(found[name], alone[name])]
    local = block.layers[0].mlp.local_expert_indices
    by_number = {}
    for name, value in found.items():
        head, _, tail = name.partition("local_experts.")
        index, _, rest = tail.partition(".")
        by_number[f"{head}{local[int(index)]}.{rest}" if tail else name] = value
    return different, by_number


@pytest.mark.parametrize("position", PAIRS)
def test_two_ranks_share_the_experts(position: str) -> None:
    """Each rank's tokens get what they get alone; an expert's gradient is the sum."""
    together = run_distributed(of_two_ranks, 2, position, expert_model_parallel_size=2)
    alone = run_distributed(of_two_ranks, 2, position)
    assert [different for different, _ in together + alone] == [[]] * 4
    for rank, (_, found) in enumerate(together):
        for name, value in found.items():
            wanted = alone[rank][1][name]
            if ".mlp.experts." in name:
                wanted = alone[0][1][name] + alone[1][1][name]
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10, msg=name)
