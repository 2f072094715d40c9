"""Whether communication is hidden, at one setting of CUDA_DEVICE_MAX_CONNECTIONS.

The variable is read when a process first touches the device: each setting is a part of its own. A
pair of layers of GPT3-MoE-XL, as on one rank of four. Its exchanges are of two kinds:

    emulated    they last as long as their bytes would take, and take nothing from compute
                (tools/benchmarks/emulated_link.py); the link's rate makes communication 15, 30 or
                60 % of the stock top-2 MoE layer
    to itself   the backend copies the rows from this GPU to this GPU, again and again until it has
                taken as long: multiprocessors and memory are shared with compute

    training     exposed: time for which compute stood still in waits, at most 2 % of the time in
                 flight wherever the window is long enough at the chosen slots
    prefill      a forward pass without gradients, against the same without a limit: 98 % hidden
    slow-down    the dense operators beside exchanges, against the same without overlap
    trace        of torch.profiler: transfers beside kernels, and where compute stands still
    hole         the time behind the route in which the host does not know the numbers of rows yet
    attention    experts in the middle of it: in this order, and with the same bits
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from statistics import mean, median
from typing import Any, Literal

import torch

from megatron_scmoe.overlap.measure.cost import UnitTimes, slot_seconds
from megatron_scmoe.overlap.recorder import UnitRecord
from megatron_scmoe.overlap.schedule import POSITIONS, Slots, Step, window
from tools.benchmarks.contenders import Contender, contenders
from tools.benchmarks.emulated_link import Link, emulated_link
from tools.benchmarks.one_device import Bench, BlockTimes
from tools.benchmarks.paper_shapes import SHAPES, Inputs, unit_of
from tools.benchmarks.process_groups import one_rank, seed
from tools.gpu_proof import timing
from tools.gpu_proof.kernels import (
    Kernel,
    beside_s,
    busiest_stream,
    holes,
    intervals,
    profile,
    total_s,
)
from tools.gpu_proof.layers import (
    RANKS,
    TINY,
    describe_layers,
    exchanges_to_itself,
    fastest,
)
from tools.gpu_proof.results import Results
from tools.gpu_proof.timing import do_steps, in_turns

SHARES = (0.15, 0.3, 0.6)
MOST_EXPOSED = 0.02
BESIDE_COMPUTE = 0.9
"""Of the transfers' time in a trace, in which the host is slower than in a run."""
MOST_REPETITIONS = 200
REPETITIONS = 3
RECORDS, PASSES = 5, 3
TRANSFER, PRODUCT = ("nccl", "DtoD", "spin_kernel"), ("gemm", "nvjet", "cutlass", "xmma")
"""Parts of the names of kernels that move rows, and that multiply matrices."""


def run(results: Results, device: torch.device, seconds: float) -> None:
    """See the module."""
    deadline = time.monotonic() + seconds
    connections = os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    at = f"{connections} connections"
    # At the setting that is not for overlap one position says it.
    positions = POSITIONS if connections != "1" else ("pos2",)
    missing = None if device.type == "cuda" else "CUDA"
    with one_rank():
        proof = HiddenPart(results, device, at)
        steps = [
            *(
                timing.PartStep(f"{position}, {at}", partial(proof.position, position), 8)
                for position in positions
            ),
            timing.PartStep(f"slow-down, {at}", proof.slow_down, 6),
            timing.PartStep(f"trace, {at}", proof.trace, 6, missing),
            timing.PartStep(f"hole behind the route, {at}", proof.hole, 3),
            timing.PartStep(f"experts inside attention, {at}", proof.inside_attention, 3),
        ]
        do_steps(results, steps, deadline)


class HiddenPart:
    """One shape, one setting."""

    def __init__(self, results: Results, device: torch.device, at: str) -> None:
        self._results = results
        self._device = device
        self._at = at
        tiny = device.type == "cpu"
        shape = TINY if tiny else SHAPES["gpt3-moe-xl"]
        size = (16, 2) if tiny else (2048, 4)
        self._turns = 2 if tiny else 9
        inputs = Inputs.draw(shape, *size, dtype=torch.bfloat16)
        options = fastest(device)
        self._bench = Bench(shape, inputs, RANKS, steps=1 if tiny else 3, **options)
        self._contenders = {one.name: one for one in contenders(shape)}
        self._links = self._bench.links(list(SHARES))

    # Exposed, by share. ---------------------------------------------------------------------------

    def position(self, name: str) -> None:
        """Training and prefill on every link."""
        block = self._unit(name)
        free, _ = self._measure(name, block, 0.0)
        for share in SHARES:
            result, times = self._measure(name, block, share)
            self._training(result, free, times)
            self._prefill(result, block, times)

    def _measure(
        self, name: str, block: Any, share: float
    ) -> tuple[BlockTimes, tuple[UnitTimes, UnitTimes]]:
        """At the slots that a run would choose, and the times behind the choice."""
        link = self._links[share]
        slots, times = self._bench.choose(block, link, self._contenders[name])
        result = BlockTimes(share, name, slots, True)
        for repetition in range(REPETITIONS):
            self._bench.measure(result, block, link, repetition)
        return result, times

    def _training(
        self, result: BlockTimes, free: BlockTimes, times: tuple[UnitTimes, UnitTimes]
    ) -> None:
        assert result.slots is not None
        name = f"{result.contender}, {result.share:.0%}, {self._at}: training"
        expected = unavoidable_share(times, result.slots)
        values = {
            "exposed_share": result.exposed / result.in_flight,
            "unavoidable_share": expected,
            "in_flight_s": result.in_flight,
            "forward_backward_s": result.seconds[0],
            # Where the host is late compute stands still outside of waits.
            "exposed_by_step_share": (result.seconds[0] - free.seconds[0]) / result.in_flight,
            "over_unlimited_ratio": result.seconds[0] / free.seconds[0],
        }
        note = f"slots {result.slots}; {describe_layers(self._device)}"
        if expected > MOST_EXPOSED:
            self._results.measured(name, f"does not fit; {note}", **values)
            return
        passed = values["exposed_share"] <= MOST_EXPOSED
        self._results.goal(name, passed, note, **values)

    def _prefill(self, result: BlockTimes, block: Any, times: tuple[UnitTimes, UnitTimes]) -> None:
        assert result.slots is not None
        name = f"{result.contender}, {result.share:.0%}, {self._at}: prefill"
        link = self._links[result.share]
        calls = {
            "link": partial(self._forward, block, link),
            "free": partial(self._forward, block, self._links[0.0]),
        }
        block.eval()
        timings = in_turns(calls, self._device, self._turns, steps=4)
        before = link.seconds
        calls["link"]()
        in_flight = link.seconds - before
        block.train()
        on_link, free = timings["link"], timings["free"]
        hidden = 1 - (on_link.median_s - free.median_s) / in_flight
        noise = sum(one.spread_share * one.median_s for one in (on_link, free)) / in_flight
        forward = slot_seconds(times[0], result.slots.forward)
        fits = forward.exposed <= MOST_EXPOSED * times[0].communication
        values = {
            "hidden_share": hidden,
            "noise_share": noise,
            "in_flight_s": in_flight,
            "forward_s": on_link.median_s,
            "forward_unlimited_s": free.median_s,
        }
        outcome = hidden_outcome(hidden, noise) if fits else "measured"
        note = "" if fits else "does not fit"
        if outcome == "measured":
            note = note or "the spread is too wide to tell"
            self._results.measured(name, note, **values)
        else:
            self._results.goal(name, outcome == "passed", note, **values)

    def _forward(self, block: Any, link: Link) -> None:
        with emulated_link(link), torch.no_grad():
            self._bench.inputs.forward(block)

    # Beside each other. ---------------------------------------------------------------------------

    def slow_down(self) -> None:
        """Dense operators with exchanges in flight, against the same without overlap."""
        for kind, travel in self._kinds.items():
            seconds = {}
            for overlap in (False, True):
                records = self._records(self._unit("pos2", overlap=overlap), travel)
                seconds[overlap] = median(map(dense_s, records)) / PASSES
            in_flight = mean(x.end - x.begin for r in records for x in r.exchanges)
            self._results.measured(
                f"slow-down of dense operators, {kind}, {self._at}",
                describe_layers(self._device),
                slow_down_share=seconds[True] / seconds[False] - 1,
                dense_beside_exchanges_s=seconds[True],
                dense_alone_s=seconds[False],
                mean_exchange_s=in_flight,
            )

    def trace(self) -> None:
        """Of forward and backward. The second trace stays in the folder, for Perfetto."""
        path = self._results.folder / f"trace, {self._at}.json".replace(", ", "-").replace(" ", "-")
        for kind, travel in self._kinds.items():
            block = self._unit("pos2")
            with travel():
                for _ in range(3):
                    self._bench.inputs.train(block)
                kernels = profile(partial(self._bench.inputs.train, block), path)
            report_trace(self._results, f"trace, {kind}, {self._at}", kernels)

    @cached_property
    def _kinds(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """Both kinds of exchanges, as long as on the link with 30 %."""
        link = self._links[0.3]
        emulated = partial(emulated_link, link)
        block = self._unit("pos2")

        def exchange_s(travel: Callable[[], AbstractContextManager[None]]) -> float:
            records = self._records(block, travel)
            return median(x.end - x.begin for record in records for x in record.exchanges)

        wanted, once = exchange_s(emulated), exchange_s(partial(exchanges_to_itself, 1))
        repetitions = min(MOST_REPETITIONS, max(1, round(wanted / once)))
        return {"emulated": emulated, "to itself": partial(exchanges_to_itself, repetitions)}

    # The order of things. -------------------------------------------------------------------------

    def hole(self) -> None:
        """The compute stream between the operator in front of the launch and the one behind."""
        for position in POSITIONS:
            records = self._records(self._unit(position), partial(emulated_link, self._links[0.3]))
            seconds = {
                step: [
                    span.end - span.begin
                    for record in records
                    for span in record.steps
                    if span.activity.name == step.value and span.activity.direction == "forward"
                ]
                for step in (Step.PREPARE_DISPATCH, Step.START_DISPATCH)
            }
            self._results.measured(
                f"hole behind the route, {position}, {self._at}",
                "the host waits for the numbers of rows; preparing permutes, starting computes "
                "nothing",
                prepare_dispatch_s=median(seconds[Step.PREPARE_DISPATCH]),
                start_dispatch_s=median(seconds[Step.START_DISPATCH]),
                longest_start_dispatch_s=max(seconds[Step.START_DISPATCH]),
                forward_s=median(map(forward_s, records)) / PASSES,
            )

    def inside_attention(self) -> None:
        """Between core and projection, forward and backward, at Pos-1."""
        slots = (Slots(0, 0), Slots(2, 2))
        outputs = {}
        for slot in slots:
            seed()
            block = self._unit("pos1", slot)
            seed()
            outputs[slot] = self._bench.inputs.train(block)
        same = torch.equal(*outputs.values())
        records = self._records(block, partial(emulated_link, self._links[0.3]))
        wanted = [Step.CORE_ATTENTION.value, Step.EXPERTS.value, Step.PROJECTION.value]
        orders = [first_begun(record, wanted) for record in records]
        forward = all(forward == wanted for forward, _ in orders)
        backward = all(backward == wanted[::-1] for _, backward in orders)
        self._results.check(
            f"experts inside attention, {self._at}",
            same and forward and backward,
            f"same bits: {same}; in this order forward: {forward}, backward: {backward}",
        )

    # Doing it. ------------------------------------------------------------------------------------

    def _unit(self, position: str, slots: Slots | None = None, overlap: bool = True) -> Any:
        """A block with this unit, at its default slots."""
        contender: Contender = self._contenders[position]
        block = self._bench.build(contender, scmoe_overlap=overlap)
        if slots is not None:
            unit_of(block).slots = slots
        return block

    def _records(
        self, block: Any, travel: Callable[[], AbstractContextManager[None]]
    ) -> list[UnitRecord]:
        """All steps of PASSES passes in a row, RECORDS times; one before them warms up."""
        unit = unit_of(block)
        unit.recorder.records_steps = True
        with travel():
            records = []
            for _ in range(1 + RECORDS):
                for _ in range(PASSES):
                    self._bench.inputs.train(block)
                records.append(unit.recorder.take())
        unit.recorder.records_steps = False
        return records[1:]


def report_trace(results: Results, name: str, kernels: list[Kernel]) -> None:
    """Whether transfers ran beside compute."""
    main = busiest_stream(kernels)
    transfers = [k for k in kernels if k.stream != main and _is(k, TRANSFER)]
    if not transfers:
        others = {kernel.name for kernel in kernels if kernel.stream != main}
        results.check(name, False, f"no transfer on another stream than compute: {others}")
        return
    # Transformer Engine spreads grouped GEMM over streams of its own.
    side = {transfer.stream for transfer in transfers}
    compute = [kernel for kernel in kernels if kernel.stream not in side]
    moving, busy = intervals(transfers), intervals(compute)
    products = intervals(kernel for kernel in compute if _is(kernel, PRODUCT))
    longest = holes(compute)[:3]
    share = beside_s(moving, busy) / total_s(moving)
    results.check(
        name,
        share >= BESIDE_COMPUTE,
        "compute stands still for at most "
        + "; ".join(
            f"{x.seconds * 1e6:.0f} us, {x.before[:50]} to {x.after[:50]}" for x in longest
        ),
        beside_compute_share=share,
        beside_products_share=beside_s(moving, products) / total_s(moving),
        transfers_s=total_s(moving),
        compute_s=total_s(busy),
    )


# Arithmetic. --------------------------------------------------------------------------------------


def unavoidable_share(times: tuple[UnitTimes, UnitTimes], slots: Slots) -> float:
    """Of the communication, for which the window is too short at these slots; both directions."""
    costs = [slot_seconds(one, slot) for one, slot in zip(times, slots, strict=True)]
    communication = math.fsum(one.communication for one in times)
    return math.fsum(cost.exposed for cost in costs) / communication if communication else 0.0


def hidden_outcome(hidden: float, noise: float) -> Literal["passed", "failed", "measured"]:
    """98 % hidden, or not, or a difference of times that the noise does not resolve."""
    if noise > MOST_EXPOSED and abs(hidden - (1 - MOST_EXPOSED)) < noise:
        return "measured"
    return "passed" if hidden >= 1 - MOST_EXPOSED else "failed"


def dense_s(record: UnitRecord) -> float:
    """Seconds of the dense operators, forward and backward."""
    names = {step.value for step in window("pos3")}
    return sum(span.end - span.begin for span in record.steps if span.activity.name in names)


def first_begun(record: UnitRecord, names: list[str]) -> tuple[list[str], list[str]]:
    """These steps in the order in which they began, forward and backward; none twice, though a step
    may be interrupted."""
    spans = sorted(record.steps, key=lambda span: span.begin)
    forward, backward = (
        dict.fromkeys(
            span.activity.name
            for span in spans
            if span.activity.direction == direction and span.activity.name in names
        )
        for direction in ("forward", "backward")
    )
    return list(forward), list(backward)


def forward_s(record: UnitRecord) -> float:
    """Seconds of all steps forward."""
    return sum(s.end - s.begin for s in record.steps if s.activity.direction == "forward")


def _is(kernel: Kernel, parts: tuple[str, ...]) -> bool:
    return any(part.lower() in kernel.name.lower() for part in parts)
