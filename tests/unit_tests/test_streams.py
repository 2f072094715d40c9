"""The engine as on a GPU, by a model of its streams and of its allocator (tests/stream_model.py).

Every exchange travels, in a group of one rank: forward, backward, chunks, evaluation,
recomputation, every dispatcher, micro-batches in flight. Orders that are left out and mistakes that
are made are seen; the host waits once a unit, behind the first dense operator.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.token_dispatcher import _DeepepManager
from torch import Tensor, nn
from torch.distributed import group

from megatron_scmoe.model.dispatch import alltoall, flex
from megatron_scmoe.model.dispatch.alltoall import AllToAllDispatcher, AllToAllTrip
from megatron_scmoe.model.experts.offload.experts import Offload, OffloadedExperts
from megatron_scmoe.model.unit import ShortcutLayer
from megatron_scmoe.overlap import branch, streams
from megatron_scmoe.overlap.branch import RoutedBranch
from megatron_scmoe.overlap.collectives import AllGather, AllToAll, PerTensor
from megatron_scmoe.overlap.schedule import POSITIONS, Slots
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block
from tests.stream_model import StreamModel

pytestmark = pytest.mark.usefixtures("single_rank", "everything_travels")


@pytest.fixture
def everything_travels() -> Iterator[None]:
    with mock.patch.object(PerTensor, "moves", lambda _: True):
        yield


FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
TOP2 = {"moe_router_topk": 2}
TWO_GATES = {"scmoe_dual_gating": "shared", "scmoe_combine": "add"}
MOEPP = {
    "scmoe_router": "heterogeneous",
    "scmoe_experts_at_home": {"zero": 1, "copy": 1, "constant": 2},
    "scmoe_gating_residual": True,
    "scmoe_renormalise": True,
    "scmoe_gate_layers": 2,
}
MOEPP_HOST = {
    "moe_expert_capacity_factor": 1.1,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
}
LONGCAT = {
    "scmoe_router": "longcat",
    "scmoe_combine": "add",
    "scmoe_shortcut_norm": "shared",
    "scmoe_experts_at_home": {"copy": 2},
}
LONGCAT_HOST = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"scmoe": {"scmoe_num_chunks": 3}},
    "waiting": {"scmoe": {"scmoe_overlap": False}},
    "all-gather": {"host": {"moe_token_dispatcher_type": "allgather"}},
    "all-gather, chunks": {
        "scmoe": {"scmoe_num_chunks": 2},
        "host": {"moe_token_dispatcher_type": "allgather"},
    },
    "dropping": {"host": {"moe_expert_capacity_factor": 0.5}},
    "padded to capacity": {
        "host": {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True}
    },
    "a copy for a rank": {"scmoe": {"scmoe_dispatch_copies": "rank"}},
    "two gates": {"scmoe": TWO_GATES, "host": {"moe_router_topk": 1}},
    "gates of two weights, chunks": {
        "scmoe": {**TWO_GATES, "scmoe_dual_gating": "separate", "scmoe_num_chunks": 2},
        "host": {"moe_router_topk": 1},
    },
    "experts at home": {"scmoe": MOEPP, "host": MOEPP_HOST},
    "LongCat": {"scmoe": LONGCAT, "host": LONGCAT_HOST},
    "recomputed": {"host": FULL},
    "experts recomputed": {"host": MOE},
}


def make(
    position: str, scmoe: dict | None = None, host: dict | None = None, num_units: int = 2
) -> nn.Module:
    torch.manual_seed(0)
    case = Case(
        scmoe={"scmoe_shortcut_position": position, **(scmoe or {})},
        host={**TOP2, **(host or {})},
        num_layers=2 * num_units,
    )
    return build_block(case)


def units_of(block: nn.Module) -> list[ShortcutLayer]:
    return [layer for layer in block.layers if isinstance(layer, ShortcutLayer)]


def step(block: nn.Module, model: AbstractContextManager[Any]) -> list[Tensor | None]:
    """Output and gradients of one forward and backward pass, or the output in evaluation."""
    torch.manual_seed(1)
    x = torch.randn(SEQUENCE, BATCH, 16, dtype=torch.float64, requires_grad=block.training)
    block.zero_grad()
    with model, torch.set_grad_enabled(block.training):
        output = run_block(block, x)
        if block.training:
            output.square().sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("position", POSITIONS)
def test_no_memory_is_touched_early(position: str, variant: str, training: bool) -> None:
    block = make(position, **VARIANTS[variant]).train(training)
    expected = step(block, nullcontext())
    for slots in (None, Slots(0, 4), Slots(2, 1)):
        for unit in units_of(block):
            unit.slots = slots or unit.slots
        model = StreamModel()
        found = step(block, model)
        assert model.hazards == []
        assert model.orders["wait of side"] >= 4  # there was something to order
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("operators", [1, 2, 3])
def test_operators_that_run_ahead_touch_nothing_either(operators: int) -> None:
    block = make("pos3")
    for unit in units_of(block):
        unit.slots, unit.operators_ahead = Slots(6, 2), operators
    model = StreamModel()
    step(block, model)
    assert model.hazards == []


# Every order is needed. ------------------------------------------------------------------------

# One unit asks for these: counts, dispatch, combine, and the two ways back.
NEEDED = [
    *(("wait of side", number) for number in range(5)),
    # Nobody reads the counts on the device unless the permutation is fused.
    *(("wait of compute", number) for number in range(1, 5)),
    ("wait of host", 0),
]


@pytest.mark.parametrize("dropped", NEEDED, ids=lambda order: f"{order[0]} {order[1]}")
@pytest.mark.parametrize("position", POSITIONS)
def test_an_order_that_is_not_kept_is_seen(position: str, dropped: tuple[str, int]) -> None:
    model = StreamModel(dropped)
    step(make(position, num_units=1), model)
    assert model.orders[dropped[0]] > dropped[1]
    assert model.hazards != []


def allocated_where_compute_runs(model: StreamModel) -> AbstractContextManager[Any]:
    """What fills the side stream's exchanges was freed behind the point that it waits for."""

    def exchange(self: PerTensor, sent: list[Tensor], async_op: bool) -> Any:
        cuda = streams._cuda(sent[0])
        assert cuda is not None
        with cuda.stream(model.compute):
            buffers = [self.buffer(tensor) for tensor in sent]
        pairs = zip(buffers, sent, strict=True)
        return buffers, [self.issue(buffer, tensor, async_op) for buffer, tensor in pairs]

    return mock.patch.object(PerTensor, "exchange", exchange)


def sent_is_freed_at_once(model: StreamModel) -> AbstractContextManager[Any]:
    def launch(*args: Any) -> Any:
        flight = streams.launch(*args)
        flight._sent = []  # type: ignore[attr-defined]
        return flight

    return mock.patch("megatron_scmoe.overlap.collectives.launch", launch)


def ready_too_early(model: StreamModel) -> AbstractContextManager[Any]:
    early = model.compute.record_event()
    return mock.patch.object(branch, "now", lambda _: early)


def copied_to_the_host_where_compute_runs(model: StreamModel) -> AbstractContextManager[Any]:
    def to_host(self: Any) -> Any:
        return streams._Coming(streams._to_host(self._received[0]), model.compute.record_event())

    return mock.patch.object(streams._StreamFlight, "to_host", to_host)


def received_before_the_wait(model: StreamModel) -> AbstractContextManager[Any]:
    def wait(self: Any) -> list[Tensor]:
        return self._received

    return mock.patch.object(streams._StreamFlight, "wait", wait)


@pytest.mark.parametrize(
    "mistake",
    [
        allocated_where_compute_runs,
        sent_is_freed_at_once,
        ready_too_early,
        copied_to_the_host_where_compute_runs,
        received_before_the_wait,
    ],
)
def test_a_mistake_is_seen(
    mistake: Callable[[StreamModel], AbstractContextManager[Any]],
) -> None:
    block, model = make("pos2"), StreamModel()
    for unit in units_of(block):
        unit.slots = Slots(2, 2)
    with mistake(model):
        step(block, model)
    assert model.hazards != []


# What a unit alone does not show. --------------------------------------------------------------


@contextmanager
def two_branches(model: StreamModel) -> Iterator[None]:
    """The rows of one are used and freed while the host prepares the launch of the other."""
    with model, torch.no_grad():
        collective = AllToAll(group.WORLD, [4], [4])
        first, second = RoutedBranch(), RoutedBranch()
        (there,) = first.depart([[torch.randn(4, 3)]])
        there.send(collective)
        (other,) = second.depart([[torch.randn(4, 3)]])
        (rows,) = there.receive()
        rows = rows * 2
        other.send(collective)
        other.receive()
        yield


def test_received_memory_goes_back_when_compute_is_done_with_it() -> None:
    with two_branches(model := StreamModel()):
        assert model.hazards == []
    with two_branches(model := StreamModel(("record_stream", 0))):
        assert model.hazards != []


@pytest.mark.parametrize("dropped", [None, ("record_stream", None)])
def test_an_exchange_that_nobody_waits_for(dropped: tuple[str, None] | None) -> None:
    gather = AllGather(group.WORLD)
    with StreamModel(dropped) as model:
        sent = torch.randn(4, 3)
        flight = streams.launch(gather.exchange, [sent])
        del sent, flight
        torch.zeros(4, 3)  # the same memory
    assert (model.hazards == []) == (dropped is None)


def test_what_has_to_be_copied_is_not_ready() -> None:
    with StreamModel() as model:
        sent = torch.randn(3, 4)
        ready = streams.now(sent)
        streams.launch(AllGather(group.WORLD).exchange, [sent.T], ready).wait()
    assert model.hazards == []


def test_the_numbers_of_rows_do_not_queue_behind_rows() -> None:
    """Of another branch whose rows are still on their way."""
    with StreamModel() as model:
        rows, counts = torch.randn(4, 3), torch.arange(4)
        gather = AllGather(group.WORLD)
        travelling = streams.launch(gather.exchange, [rows])
        asked = streams.launch(gather.exchange, [counts], lane="counts")
        assert travelling._side is not asked._side  # type: ignore[attr-defined]
        asked.to_host().wait()
        done = model.host
        assert travelling._side.name not in done  # type: ignore[attr-defined]
        for flight in (travelling, asked):
            flight.wait()


ONE_UNIT_WAITS = 7
"""Of either stream for the other: counts, dispatch, four experts, combine."""


@pytest.mark.parametrize(
    ("dropped", "is_seen"),
    [
        (None, False),
        # A slot is filled again, and computed with, that compute still reads.
        *((("wait of side", number), True) for number in (4, 5)),
        *((("wait of compute", number), True) for number in (2, 3, 4, 5)),
    ],
)
def test_experts_that_come_from_the_host(dropped: tuple[str, int] | None, is_seen: bool) -> None:
    """Into two slots, four of them, while the dense work of the window runs."""
    resident = make("pos2", num_units=1).eval()
    expected = step(resident, nullcontext())
    block = make("pos2", {"scmoe_offload": Offload("cpu", 2)}, num_units=1).eval()
    block.load_state_dict(resident.state_dict())
    model = StreamModel(dropped)
    experts = [layer for layer in block.modules() if isinstance(layer, OffloadedExperts)]
    model.is_on_host(*(weight for layer in experts for weight in layer.parameters()))
    found = step(block, model)
    assert (model.hazards != []) == is_seen
    assert model.orders["wait of side"] == model.orders["wait of compute"] == ONE_UNIT_WAITS
    assert torch.equal(found[0], expected[0])


# Times. ----------------------------------------------------------------------------------------


class FarEvent:
    """Of a device whose time goes on when it is told to. As CUDA's, its distance from another one
    is a float32 of milliseconds: three days away, one step is 16 of them."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: object = None) -> None:
        self._at = FarEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FarEvent") -> float:
        return torch.tensor(1e3 * (end._at - self._at), dtype=torch.float32).item()


class FarCuda:
    """Streams that keep every order by themselves."""

    Event = FarEvent

    def Stream(self, device: torch.device, priority: int) -> "FarCuda":
        return self

    def current_stream(self, device: torch.device) -> "FarCuda":
        return self

    def stream(self, stream: object) -> AbstractContextManager[None]:
        return nullcontext()

    def record_event(self) -> FarEvent:
        event = FarEvent()
        event.record()
        return event

    def wait_event(self, event: FarEvent) -> None:
        pass


def test_times_are_exact_after_days(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FarCuda()
    monkeypatch.setattr(streams, "_cuda", lambda _: cuda)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(FarEvent, "now", 0.0)
    monkeypatch.setattr(streams, "perf_counter", lambda: FarEvent.now)
    sent = torch.zeros(1)
    streams.Clock(sent)  # of an iteration long ago
    FarEvent.now = begin = 3 * 24 * 3600.0

    def exchange(tensors: list[Tensor], async_op: bool) -> tuple[list[Tensor], list[None]]:
        FarEvent.now += 1.3e-3
        return tensors, []

    flight = streams.launch(exchange, [sent])
    flight.wait()
    FarEvent.now += 1.0
    found = flight.times(streams.Clock(sent))
    assert found == pytest.approx((begin, begin + 1.3e-3, 0.0), rel=0, abs=1e-6)
    assert found[1] - found[0] == pytest.approx(1.3e-3, rel=1e-4)


# The host. --------------------------------------------------------------------------------------


def host_waits(block: nn.Module, model: StreamModel) -> list[str]:
    """Waits of the host and first dense operators, in the order of one forward pass, and in
    training of a backward pass."""
    found: list[str] = []

    def note_waits() -> None:
        found.extend(event for event in model.events if event.startswith("host waits"))
        model.events.clear()

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            note_waits()
            found.append(name)

        return hook

    for unit in units_of(block):
        if isinstance(unit.mlp.token_dispatcher, AllToAllDispatcher):
            orders = unit.mlp.token_dispatcher.by_expert, unit.mlp.token_dispatcher.by_rank
            model.is_on_host(*orders)
        position = unit._scmoe.scmoe_shortcut_position
        first = {
            "pos1": unit.self_attention.linear_qkv,
            "pos2": unit.dense_layer.mlp if position == "pos2" else None,
            "pos3": unit.dense_layer.self_attention.linear_qkv if position == "pos3" else None,
        }[position]
        first.register_forward_hook(note("dense"))
        unit.register_forward_hook(note("end"))
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))  # as training does in every step
    step(block, model)
    note_waits()
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "waiting"])
@pytest.mark.parametrize("position", POSITIONS)
def test_the_host_waits_once_a_unit_and_not_before_dense_work(
    position: str, variant: str, training: bool
) -> None:
    block = make(position, **VARIANTS[variant]).train(training)
    found = host_waits(block, StreamModel())
    expected = ["dense", "host waits", "end"]
    if variant == "padded to capacity":
        # It is known beforehand: tensors of the host's, which the model takes for the device's.
        found = [event for event in found if not event.startswith("host waits in ")]
        expected = ["dense", "end"]
    if "gates" in variant:
        # Once for each gate: what the second one chooses depends on all that stands in front of it.
        expected = ["dense", "host waits", "host waits", "end"]
    passes = 2 if training and variant == "recomputed" else 1
    assert found == expected * len(units_of(block)) * passes


def test_padding_for_quantisation_adds_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alltoall, "get_align_size_for_quantization", lambda _: 4)
    block = make("pos2").eval()
    for unit in units_of(block):
        unit.mlp.token_dispatcher.config.moe_router_padding_for_quantization = True
    found = host_waits(block, StreamModel())
    # The host assigns a number to a mask, which is no copy on a device.
    found = [event for event in found if "lift_fresh" not in event]
    assert found == ["dense", "host waits", "end"] * 2


def test_deep_eps_indices_are_spread_without_a_wait() -> None:
    """As the host spreads them, with the same gradient."""
    indices = torch.tensor([[2, 0], [-1, 1], [-1, -1], [1, -1]])
    host = SimpleNamespace(num_local_experts=3)
    spread = {
        "ours": partial(flex._multihot, 3),
        "the host's": partial(_DeepepManager._indices_to_multihot, host),
    }
    found = {}
    for name, function in spread.items():
        probs = torch.arange(1.0, 9.0).view(4, 2).requires_grad_()
        with StreamModel() as model:
            routing_map, weights = function(indices, probs)
            (weights * torch.arange(12.0).view(4, 3)).sum().backward()
        waits = [event for event in model.events if event.startswith("host waits")]
        found[name] = [routing_map, weights.detach(), probs.grad], waits
    assert found["ours"][1] == [] and found["the host's"][1] != []
    assert all(map(torch.equal, found["ours"][0], found["the host's"][0]))


@pytest.mark.parametrize(
    ("put_in", "seen"),
    [
        (lambda rows: rows[0].cpu(), "cpu"),
        (lambda rows: torch.tensor(len(rows)), "aten.lift_fresh.default"),
        (lambda rows: rows[1][[1, 0]], "aten.lift_fresh.default"),
    ],
    ids=["cpu", "a number for the device", "a list as an index"],
)
def test_a_wait_that_was_put_in_is_seen(
    put_in: Callable[[list[Tensor]], object], seen: str
) -> None:
    expert_input = AllToAllTrip.expert_input

    def waiting(self: AllToAllTrip, received: list[Tensor]) -> Any:
        put_in(received)
        return expert_input(self, received)

    with mock.patch.object(AllToAllTrip, "expert_input", waiting):
        found = host_waits(make("pos2").eval(), StreamModel())
    assert found == ["dense", "host waits", f"host waits in {seen}", "end"] * 2


def test_one_rank_alone_waits_once_too() -> None:
    """No exchange, and still it knows the numbers of rows behind a dense operator only."""
    with mock.patch.object(PerTensor, "moves", lambda _: False):
        block = make("pos2").eval()
        assert host_waits(block, StreamModel()) == ["dense", "host waits", "end"] * 2
