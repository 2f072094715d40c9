"""The unit on this device computes what it computes on the CPU, whatever its streams do.

Every exchange travels, in a group of one rank: from its memory to its memory, by NCCL on a GPU.

    branch       backward at all, and in the order that hides exchanges; received rows are never
                 in memory that compute still uses, with 1 to 5 operators ahead; an exchange and
                 compute take the time of one of them; what the host pays for an exchange
    units        output and every gradient against the CPU's in float64, in fp32 and bf16: every
                 position, combine, norm, with the post-norm, chunks, all-gather, dropping, two
                 gates, experts at home, LongCat-Flash's router; at every slot the same bits
    bit for bit  every pair of slots, overlap off, recomputation, micro-batches in flight,
                 evaluation; with exchanges that are late, and with compute that is late
    pressure     200 steps with hardly any free memory, overlap on and off: the same losses; and
                 how much memory waits for a device that is behind its host
    sanitizer    torch's CUDA sanitizer: accesses of the same memory without an order; of memory
                 that was freed and handed out again it knows nothing

An order that is missing changes nothing where both sides are quick. So exchanges and compute are
made late, and what an exchange fills is NaN before. Routing is planned, and uneven: one expert gets
nothing.

Shapes: s sequence, b batch, h hidden, T = s*b, E experts
"""

from megatron_scmoe import start

start.replace_host_symbols()

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import group

from megatron_scmoe.model.moe import ScMoELayer
from megatron_scmoe.model.unit import ShortcutLayer
from megatron_scmoe.overlap.branch import RoutedBranch
from megatron_scmoe.overlap.collectives import AllToAll, PerTensor
from megatron_scmoe.overlap.recorder import UnitRecorder
from megatron_scmoe.overlap.schedule import POSITIONS, Slots, default_slots, window
from tools.benchmarks.emulated_link import sleep_on_stream
from tools.benchmarks.paper_shapes import Inputs, Shape, build, unit_of
from tools.benchmarks.process_groups import one_rank, seed
from tools.gpu_proof.layers import LayerPair, errors, largest, precision
from tools.gpu_proof.results import Results
from tools.gpu_proof.timing import PartStep, do_steps

# ||found - expected|| / ||expected||. bf16 has 8 bits, and products follow each other.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
PRESSURE_STEPS = 200
PRESSURE = (1.1, 1.5, 2.5)
"""What is left of the device's memory, as a multiple of what a step had at its peak; the first that
suffices."""
LATE_S = 2e-3
"""Longer than all other work of a unit of this size."""


@dataclass(frozen=True)
class Size:
    """Of everything that is computed here."""

    shape: Shape
    length: int
    batch: int = 2


SIZES = {
    "cuda": Size(Shape(256, 512, 4, 2, 8, False, True), length=128),
    "cpu": Size(Shape(32, 48, 2, 2, 8, False, True), length=16),
}


@dataclass(frozen=True)
class UnitCase(LayerPair):
    """A pair of layers whose results are known."""

    any_precision: bool = True
    """Whether rounding decides nothing: which tokens are dropped, it does."""
    rounding: float = 1.0
    """Times the tolerance. What an expert at home gives is as large as what it reads, so that the
    router's gradient is a difference of large numbers."""

    def build(self, size: Size, dtype: torch.dtype, **scmoe: Any) -> Any:
        """The block in a precision, with planned routing; the same weights every time."""
        seed()
        host = {"moe_router_force_load_balancing": False, **precision(dtype), **self.host}
        block = build(size.shape, self.contender, 2, {**self.scmoe, **scmoe}, **host)
        plan_routing(unit_of(block))
        return block


TWO_GATES = {
    "moe_router_topk": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
}
# Among twelve experts the router's gradient feels bf16's rounding of its logits.
BALANCED = {
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
    "moe_router_dtype": "fp32",
}
# Dropped by their place, which no precision changes.
IN_ORDER = {"moe_expert_capacity_factor": 1.1, "moe_token_drop_policy": "position"}
NEW_SYSTEMS = [
    *(
        UnitCase(
            f"two gates, {weights} weights, {position}",
            position,
            {"scmoe_dual_gating": weights, "scmoe_combine": "add"},
            TWO_GATES,
        )
        for weights, position in (("shared", "pos2"), ("separate", "pos1"), ("separate", "pos3"))
    ),
    UnitCase(
        "experts at home",
        scmoe={
            "scmoe_router": "heterogeneous",
            "scmoe_experts_at_home": {"zero": 1, "copy": 1, "constant": 2},
            "scmoe_renormalise": True,
            "scmoe_gate_layers": 2,
        },
        host={**BALANCED, **IN_ORDER},
    ),
    UnitCase(
        "LongCat",
        scmoe={
            "scmoe_router": "longcat",
            "scmoe_experts_at_home": {"copy": 4},
            "scmoe_combine": "add",
            "scmoe_shortcut_norm": "shared",
        },
        host={**BALANCED, "moe_shared_expert_gate": False},
        rounding=3,
    ),
]
CHUNKS = UnitCase("3 chunks", scmoe={"scmoe_num_chunks": 3})
OTHERS = [
    UnitCase("post-norm", scmoe={"scmoe_post_norm": True}),
    CHUNKS,
    UnitCase("all-gather", host={"moe_token_dispatcher_type": "allgather"}),
    UnitCase("dropping", host={"moe_expert_capacity_factor": 1.0}, any_precision=False),
    UnitCase(
        "padded to capacity",
        host={"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        any_precision=False,
    ),
    *NEW_SYSTEMS,
]
UNITS = [
    *(
        UnitCase(
            f"{position} {combine} {norm}",
            position,
            {"scmoe_combine": combine, "scmoe_shortcut_norm": norm},
            {"moe_shared_expert_gate": combine == "cg1"},
        )
        for position in POSITIONS
        for combine in ("add", "cg1", "cg2")
        for norm in ("own", "shared")
    ),
    *OTHERS,
]
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}


def run(results: Results, device: torch.device, seconds: float) -> None:
    """See the head of this file."""
    deadline = time.monotonic() + seconds
    on_gpu = device.type == "cuda"

    def late(what: str, made_late: Callable[[], AbstractContextManager[None]]) -> None:
        with made_late():
            check_bits(results, device, f"late {what}")

    def units() -> None:
        lines = _errors_of(child, deadline - time.monotonic())
        if child.returncode != 0:
            raise RuntimeError(f"the CPU's reference: {lines[-1]}")
        expected = torch.load(reference, weights_only=True)
        for dtype in TOLERANCE:
            check_units(results, device, expected, dtype)

    def sanitizer() -> None:
        check_sanitizer(results, deadline - time.monotonic())

    steps = [
        PartStep("branch", partial(check_branch, results, device), 0),
        PartStep("bit for bit", partial(late, "exchanges", _late_exchanges), 0),
        PartStep("bit for bit", partial(late, "compute", _late_compute), 0),
        PartStep("units", units, 0),
        PartStep("pressure", partial(check_pressure, results, device), 20 if on_gpu else 0),
        PartStep(
            "memory reserved beyond what is allocated",
            partial(measure_reserved, results),
            10,
            None if on_gpu else "CUDA's allocator",
        ),
        PartStep("sanitizer", sanitizer, 30, None if on_gpu else "CUDA"),
    ]
    with tempfile.TemporaryDirectory() as folder, one_rank(), _everything_travels():
        reference = Path(folder) / "reference.pt"
        child = _start(["reference", str(reference), device.type], hide_device=True)
        do_steps(results, steps, deadline)


# The branch alone. --------------------------------------------------------------------------------


def check_branch(results: Results, device: torch.device) -> None:
    """What the streams do, seen from one branch."""
    rows, hidden = (4096, 2048) if device.type == "cuda" else (64, 32)
    assert group.WORLD is not None
    collective = AllToAll(group.WORLD, [rows], [rows])
    x = torch.randn(rows, hidden, device=device, requires_grad=True)
    weight = torch.randn(hidden, hidden, device=device, requires_grad=True)
    collective.exchange([x.detach()], False)  # the communicator is made

    order: list[str] = []
    output, dense = _through(collective, x * 1, lambda rows: rows @ weight, order)
    (output.sum() + dense.sum()).backward()
    expected = torch.ones_like(x) @ weight.detach().T + 6
    assert x.grad is not None
    close = torch.allclose(x.grad, expected, rtol=1e-3, atol=1e-1)
    results.check("backward through a branch", close)
    results.check(
        "the gradients that depart are awaited behind the dense backward",
        order == ["dense", "depart"],
        " > ".join(order),
    )

    if device.type == "cpu":
        for name in ("receive buffers", "an exchange beside compute"):
            results.skipped(name, "needs CUDA's streams")
    else:
        _check_receive_buffers(results, collective, x.detach())
        _check_beside_compute(results, collective, x.detach())
    _measure_host_cost(results, collective, x.detach())


def _through(
    collective: AllToAll, x: Tensor, work: Callable[[Tensor], Tensor], order: list[str]
) -> tuple[Tensor, Tensor]:
    """Rows through a branch, and dense work beside it; notes the order of the backward pass."""

    def dense_backward(_: Tensor) -> None:
        time.sleep(0.05)  # a thread that does not keep the order would be earlier
        order.append("dense")

    branch = RoutedBranch()
    returned = branch._returned_gradients

    def noted() -> list[Tensor | None]:
        order.append("depart")
        return returned()

    branch._returned_gradients = noted  # type: ignore[method-assign]
    (leg,) = branch.depart([[x]])
    dense = x * 3
    dense.register_hook(dense_backward)
    leg.send(collective)
    (received,) = leg.receive()
    leg.send_back(collective, work(received))
    (dense,) = branch.turn((dense,))
    dense = dense * 2
    branch.wait()
    (output,) = branch.arrive()
    return output, dense


@torch.no_grad()
def _check_receive_buffers(results: Results, collective: AllToAll, x: Tensor) -> None:
    """The block that a dense operator has just freed is the first that an allocator hands out."""
    for operators in range(1, 6):
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        rows = x.clone()
        (leg,) = RoutedBranch().depart([[rows]])
        sleep_on_stream(0.1)
        seen = []
        for _ in range(operators):
            temporary = torch.full_like(rows, 7.0)
            seen.append(temporary * 1)
            address = temporary.data_ptr()
            del temporary
        leg.send(collective)
        (received,) = leg.receive()
        torch.cuda.synchronize()
        right = torch.equal(received, rows) and all(bool((t == 7).all()) for t in seen)
        same = received.data_ptr() == address
        results.check(
            f"receive buffer, {operators} operators ahead",
            right and not same,
            "in memory that compute had freed" if same else "",
        )


@torch.no_grad()
def _check_beside_compute(results: Results, collective: AllToAll, x: Tensor) -> None:
    """0.1 s of compute beside 0.1 s of exchange."""
    exchange, wanted = AllToAll.exchange, 0.1

    def slow(self: AllToAll, sent: list[Tensor], async_op: bool) -> Any:
        sleep_on_stream(wanted)
        return exchange(self, sent, async_op)

    recorder = UnitRecorder()
    recorder.begin_pass(x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with mock.patch.object(AllToAll, "exchange", slow):
        (leg,) = RoutedBranch(recorder=recorder).depart([[x]])
        torch.cuda.synchronize()
        begin.record()
        leg.send(collective)
        sleep_on_stream(wanted)
        leg.receive()
        end.record()
        end.synchronize()
    (found,) = recorder.take().exchanges
    together = begin.elapsed_time(end) / 1e3
    in_flight = found.end - found.begin
    results.check(
        "an exchange beside compute",
        together < 1.2 * wanted
        and 0.9 * wanted < in_flight < 1.2 * wanted
        and found.blocked < 0.02,
        together_seconds=together,
        in_flight_seconds=in_flight,
        blocked_seconds=found.blocked,
    )


@torch.no_grad()
def _measure_host_cost(results: Results, collective: AllToAll, x: Tensor) -> None:
    recorder = UnitRecorder()
    recorder.begin_pass(x)
    repetitions = 200
    for repetition in range(2 * repetitions):  # the first half warms up
        if repetition == repetitions:
            _synchronize(x.device)
            recorder.take()
            began = time.perf_counter()
        (leg,) = RoutedBranch(recorder=recorder).depart([[x[:1]]])
        leg.send(AllToAll(collective.group, [1], [1]))
        leg.receive()
    host = (time.perf_counter() - began) / repetitions
    _synchronize(x.device)
    began = time.perf_counter()
    recorder.take()
    results.measured(
        "what an exchange costs the host",
        f"one row, {x.shape[1]} wide; its times are read once an iteration",
        launch_seconds=host,
        read_seconds=(time.perf_counter() - began) / repetitions,
    )


# Units. -------------------------------------------------------------------------------------------


def check_units(
    results: Results,
    device: torch.device,
    expected: dict[str, dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Output and all gradients against the CPU's, from the same weights; the same bits wherever
    the experts run."""
    size = SIZES[device.type]
    for variant in UNITS:
        name = f"{str(dtype).removeprefix('torch.')}: {variant.name}"
        if dtype == torch.bfloat16 and not variant.any_precision:
            continue
        with results.guarded(name):
            block = variant.build(size, dtype)
            theirs = dict(expected[variant.name])
            weights = {key: theirs.pop(key) for key in list(theirs) if key.startswith("weight ")}
            with torch.no_grad():
                for key, parameter in block.named_parameters():
                    parameter.copy_(weights[f"weight {key}"])
            found = step(block, size, dtype)
            differences = errors({key: value.cpu() for key, value in found.items()}, theirs)
            worst = max(differences, key=differences.__getitem__)
            # Forward the one way, backward the other; every pair is among the bits.
            last, different = len(window(variant.position)), []
            for forward in range(last + 1):
                unit_of(block).slots = Slots(forward, last - forward)
                if not _same(step(block, size, dtype), found):
                    different.append(str(unit_of(block).slots))
            results.check(
                name,
                largest(differences.values()) < variant.rounding * TOLERANCE[dtype]
                and not different,
                f"other bits at slots {' '.join(different)}" if different else worst,
                relative_error=differences[worst],
            )


def write_reference(path: Path, size: Size) -> None:
    """Weights, outputs and gradients of all variants, in float64 on the CPU."""
    found = {}
    with one_rank(), _everything_travels():
        for variant in UNITS:
            block = variant.build(size, torch.float64)
            with torch.no_grad():
                for parameter in block.parameters():
                    if parameter.dim() == 1:  # norms, all the same until something tells them apart
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
            weights = {f"weight {k}": p.detach().clone() for k, p in block.named_parameters()}
            found[variant.name] = weights | step(block, size, torch.float64)
    torch.save(found, path)


def plan_routing(unit: ShortcutLayer) -> None:
    """Let a router choose what is planned, the same on every device and in every precision.

    Its own logits, [T, E], keep their gradients; they only cannot change the order. Expert E - 1
    is never chosen.
    """
    # Both gates of one weight have one plan: what the first has taken the second wants.
    second = getattr(unit.mlp, "current_router", None)
    for number, router in enumerate([unit.mlp.router, *([] if second is None else [second])]):
        router.gating = partial(_planned, router.gating, number)


def _planned(
    gating: Callable[..., Tensor], number: int, hidden_states: Tensor, *args: Any, **options: Any
) -> Tensor:
    logits = torch.tanh(gating(hidden_states, *args, **options))
    return _plan(number, logits.shape, logits.dtype, logits.device) + 0.2 * logits


@lru_cache
def _plan(number: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ranks of the experts for every token, as logits, [..., E]. Copied to the device once: each
    copy waits for it."""
    *tokens, num_experts = shape
    generator = torch.Generator().manual_seed(5 + number)
    # The last ones are chosen more often.
    order = torch.rand(*tokens, num_experts - 1, generator=generator)
    order *= torch.linspace(0.3, 1.0, num_experts - 1)
    plan = torch.full(shape, -1.0)
    plan[..., :-1] = order.argsort(dim=-1).argsort(dim=-1).float()
    return plan.to(device, dtype)


def inputs(size: Size, dtype: torch.dtype, number: int = 0) -> Inputs:
    """A micro-batch, the same on every device."""
    device = torch.cuda.current_device()
    found = Inputs.draw(size.shape, size.length, size.batch, dtype)
    generator = torch.Generator().manual_seed(11 + number)
    x, grad = (
        torch.randn(found.hidden_states.shape, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    found.hidden_states = x.to(device, dtype).requires_grad_()
    found.grad = grad.to(device, dtype)
    return found


def step(
    block: Any, size: Size, dtype: torch.dtype, micro_batches: int = 1, in_flight: bool = False
) -> dict[str, Tensor]:
    """Outputs and gradients by name.

    Args:
        in_flight: all forward passes in front of all backward passes.
    """
    block.zero_grad(set_to_none=True)
    batches = [inputs(size, dtype, number) for number in range(micro_batches)]
    outputs = []
    for batch in batches:
        outputs.append(batch.forward(block))
        if not in_flight:
            outputs[-1].backward(batch.grad)
    if in_flight:
        for output, batch in zip(outputs, batches, strict=True):
            output.backward(batch.grad)
    found: dict[str, Tensor] = {}
    for number, (output, batch) in enumerate(zip(outputs, batches, strict=True)):
        assert batch.hidden_states.grad is not None
        found[f"output {number}"] = output.detach()
        found[f"gradient of input {number}"] = batch.hidden_states.grad
    return found | {
        f"gradient of {name}": parameter.grad for name, parameter in block.named_parameters()
    }


# Bit for bit. -------------------------------------------------------------------------------------


def check_bits(results: Results, device: torch.device, when: str) -> None:
    """What must change no bit of any output and gradient."""
    size = SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for position in POSITIONS:
        variant = UnitCase(position, position)
        block = variant.build(size, dtype)
        unit = unit_of(block)
        expected = step(block, size, dtype, micro_batches=2)
        places = range(len(window(position)) + 1)
        different = []
        for forward in places:
            for backward in places if position == "pos2" else [forward]:
                unit.slots = Slots(forward, backward)
                if not _same(step(block, size, dtype, micro_batches=2), expected):
                    different.append(str(unit.slots))
        name = f"{when}, {position}"
        results.check(f"{name}: every slot", not different, " ".join(different))
        different = []
        unit.slots = Slots(places[-1], POSITIONS[position].default_slot)
        for operators in (0, 2, 3):
            unit.operators_ahead = operators
            if not _same(step(block, size, dtype, micro_batches=2), expected):
                different.append(f"{operators} ahead")
        results.check(f"{name}: operators ahead", not different, " ".join(different))
        unit.operators_ahead = 1
        unit.slots = default_slots(position)
        unit.overlap = False
        same = _same(step(block, size, dtype, micro_batches=2), expected)
        results.check(f"{name}: overlap off", same)
        unit.overlap = True
        same = _same(step(block, size, dtype, micro_batches=2, in_flight=True), expected)
        results.check(f"{name}: two micro-batches in flight", same)
        block.eval()
        with torch.no_grad():
            output = inputs(size, dtype).forward(block)
        results.check(f"{name}: evaluation", torch.equal(output, expected["output 0"]))
        for kind, options in (("full", FULL), ("selective", SELECTIVE)):
            recomputed = UnitCase(position, position, host=options).build(size, dtype)
            same = _same(step(recomputed, size, dtype, micro_batches=2), expected)
            results.check(f"{name}: {kind} recomputation", same)
    for variant in (CHUNKS, *NEW_SYSTEMS):
        found = []
        for overlap in (True, False):
            block = variant.build(size, dtype, scmoe_overlap=overlap)
            found.append(step(block, size, dtype, micro_batches=2, in_flight=overlap))
        results.check(f"{when}, {variant.name}: overlap off", _same(*found))


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@contextmanager
def _late_exchanges() -> Iterator[None]:
    """They begin late and end late, and fill memory that is NaN until then."""

    def exchange(self: PerTensor, sent: list[Tensor], async_op: bool) -> Any:
        _sleep(sent[0])
        buffers = [self.buffer(tensor) for tensor in sent]
        for buffer in buffers:
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
        pairs = zip(buffers, sent, strict=True)
        works = [self.issue(buffer, tensor, async_op) for buffer, tensor in pairs]
        _sleep(sent[0])
        return buffers, works

    with mock.patch.object(PerTensor, "exchange", exchange):
        yield


@contextmanager
def _late_compute() -> Iterator[None]:
    """It is late in front of what leaves, forward and backward."""
    depart, turn_back = ScMoELayer.depart, RoutedBranch._turn_back

    def late_departure(self: ScMoELayer, z: Tensor, *args: Any, **options: Any) -> Any:
        _sleep(z)
        return depart(self, z, *args, **options)

    def late_turn(self: RoutedBranch) -> None:
        if torch.cuda.is_available():
            sleep_on_stream(LATE_S)
        turn_back(self)

    with (
        mock.patch.object(ScMoELayer, "depart", late_departure),
        mock.patch.object(RoutedBranch, "_turn_back", late_turn),
    ):
        yield


def _sleep(like: Tensor) -> None:
    if like.is_cuda:
        sleep_on_stream(LATE_S)


# Pressure. ----------------------------------------------------------------------------------------


def check_pressure(results: Results, device: torch.device) -> None:
    """Many steps, in memory that is handed out again at once."""
    size = SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    steps = PRESSURE_STEPS if device.type == "cuda" else 3
    losses, free = [], []
    for overlap in (True, False):
        block = UnitCase("pos2").build(size, dtype, scmoe_overlap=overlap)
        found, left = _train_in_little_memory(block, size, dtype, steps)
        losses.append(found)
        free.append(left)
    finite = bool(torch.isfinite(losses[0]).all())
    first = next((i for i, same in enumerate((losses[0] == losses[1]).tolist()) if not same), None)
    learnt = losses[0][-1] < losses[0][0]
    results.check(
        f"{steps} steps under memory pressure",
        finite and first is None and bool(learnt),
        "" if first is None else f"losses differ from step {first} on",
        free_bytes=free[0],
        first_loss=losses[0][0].item(),
        last_loss=losses[0][-1].item(),
    )


def _train(block: Any, size: Size, dtype: torch.dtype, steps: int) -> Tensor:
    """Losses of a regression, [steps]."""
    batch = inputs(size, dtype)
    # The loss is a mean, and bf16 rounds small steps away.
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    losses = []
    for number in range(steps):
        output = batch.forward(block)
        loss = (output.float() - batch.grad.float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Sizes of every kind come and go, and what they leave behind is not zero.
        torch.full((1 + number % 7, *output.shape), torch.nan, device=output.device)
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def _train_in_little_memory(
    block: Any, size: Size, dtype: torch.dtype, steps: int
) -> tuple[Tensor, int]:
    """Losses, and the bytes that were free beside what the model holds; 0 on the CPU.

    Raises:
        RuntimeError: no multiple of PRESSURE suffices.
    """
    if not torch.cuda.is_available():
        return _train(block, size, dtype, steps), 0
    weights = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    _train(block, size, dtype, 2)
    peak = torch.cuda.max_memory_allocated() - held
    for multiple in PRESSURE:
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(weights[name])
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        left = round(peak * multiple)
        ballast = torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda")
        try:
            return _train(block, size, dtype, steps), left
        except torch.cuda.OutOfMemoryError:
            continue
        finally:
            del ballast
    raise RuntimeError(f"{PRESSURE[-1]} times the peak of a step, {peak} bytes, do not suffice")


def measure_reserved(results: Results) -> None:
    """What the allocator holds back: rows that were received, and that the host has freed, come
    back when the device has passed them. Eight pairs, whose backward never waits for the device."""
    size = Size(Shape(1024, 4096, 16, 16, 8, False, True), length=2048)
    reserved = {}
    for travels in (False, True):
        block = UnitCase("pos2").build(size, torch.bfloat16)
        with mock.patch.object(PerTensor, "moves", lambda _, travels=travels: travels):
            for _ in range(2):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                batch = inputs(size, torch.bfloat16)
                hidden_states: Tensor = batch.hidden_states
                for _ in range(8):
                    hidden_states = block(hidden_states=hidden_states, **batch.attention)
                hidden_states.backward(batch.grad)
                del hidden_states
        peaks = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        reserved[travels] = peaks[0] - peaks[1]
    allocated = peaks[1]
    results.measured(
        "memory reserved beyond what is allocated",
        "8 pairs forward and backward, with exchanges and without",
        with_exchanges_bytes=reserved[True],
        without_bytes=reserved[False],
        allocated_bytes=allocated,
    )


# Children. ----------------------------------------------------------------------------------------


def check_sanitizer(results: Results, seconds: float) -> None:
    """One step of every position and dispatcher in a process that torch watches."""
    child = _start(["sanitizer"], hide_device=False)
    lines = _errors_of(child, seconds)
    note = "" if child.returncode == 0 else " | ".join(lines[-6:])[:500]
    results.check("torch's CUDA sanitizer", child.returncode == 0, note)


def run_sanitized() -> None:
    """What the sanitizer watches; it raises at what is not ordered."""
    from torch.cuda._sanitizer import enable_cuda_sanitizer

    enable_cuda_sanitizer()
    issue = AllToAll.issue

    def written(self: AllToAll, buffer: Tensor, sent: Tensor, async_op: bool) -> Any:
        # The collective's operator does not say that it writes; a copy does, of the same bits.
        work = issue(self, buffer, sent, async_op)
        buffer.copy_(sent)
        return work

    size = SIZES["cuda"]
    variants = [*(UnitCase(position, position) for position in POSITIONS), *OTHERS]
    with (
        one_rank(),
        _everything_travels(),
        mock.patch.object(AllToAll, "issue", written),
    ):
        for variant in variants:
            block = variant.build(size, torch.bfloat16)
            step(block, size, torch.bfloat16, micro_batches=2, in_flight=True)
            torch.cuda.synchronize()


@contextmanager
def _everything_travels() -> Iterator[None]:
    with mock.patch.object(PerTensor, "moves", lambda _: True):
        yield


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _start(job: list[str], hide_device: bool) -> subprocess.Popen[str]:
    """Another process of this module."""
    environment = dict(os.environ, PYTHONWARNINGS="ignore")
    if hide_device:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        [sys.executable, "-m", "tools.gpu_proof.right", *job],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _errors_of(child: subprocess.Popen[str], seconds: float) -> list[str]:
    """What a child says until its end, which comes within these seconds."""
    try:
        _, errors = child.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        child.kill()
        _, errors = child.communicate()
        errors += f"\nnot done within {seconds:.0f} s"
    return [line for line in errors.splitlines() if line.strip()]


if __name__ == "__main__":
    if sys.argv[1] == "reference":
        write_reference(Path(sys.argv[2]), SIZES[sys.argv[3]])
    else:
        run_sanitized()
