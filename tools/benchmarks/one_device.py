"""One GPU (or one core) and an emulated link: exposed time and speed against bandwidth.

    CUDA_DEVICE_MAX_CONNECTIONS=32 python -m tools.benchmarks.one_device --shape gpt2-moe-medium

The pair of layers of paper_shapes.py on one rank that stands for `--ranks`: the experts of one
rank, the rows of one rank, and all-to-alls that last as long as their bytes would take
(emulated_link.py). Bandwidths are chosen so that communication is the wanted share of the stock
top-2 MoE layer's time. Measured for stock top-2, stock top-1 + shared expert and every position:
all expert slots, and the ones that a run would choose from its own measurements. Before that, on
this device: overlap on equals off bit for bit, and the experts' implementations.

Writes one_device.md and .json to --output.
"""

from megatron_scmoe import start

start.replace_host_symbols()

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_scmoe.host.cpu import no_cuda_device
from megatron_scmoe.model.experts.grouped import GroupedExperts
from megatron_scmoe.overlap.measure.adaptive import FirstIterations, choose_routes
from megatron_scmoe.overlap.measure.cost import UnitTimes
from megatron_scmoe.overlap.schedule import Slots, default_slots, window
from megatron_scmoe.words import markdown_table
from tools.benchmarks.cluster_report import page, write_pair
from tools.benchmarks.contenders import Contender, contenders
from tools.benchmarks.emulated_link import Link, emulated_link
from tools.benchmarks.paper_shapes import (
    SHAPES,
    Inputs,
    Shape,
    add_sizes,
    build,
    host_config,
    measure_block,
    seconds,
    unit_of,
)
from tools.benchmarks.process_groups import one_rank, seed
from tools.benchmarks.provenance import describe


@dataclass
class BlockTimes:
    """One contender on one link; seconds of every step."""

    share: float
    """Of communication in the stock top-2 MoE layer's time; 0 without a limit."""
    contender: str
    slots: Slots | None
    chosen: bool
    """Whether a run would choose these slots; otherwise they are fixed."""
    training: list[float] = field(default_factory=list)
    """Forward + backward of the pair."""
    inference: list[float] = field(default_factory=list)
    in_flight: float = 0.0
    """Of the exchanges, forward + backward; mean."""
    exposed: float = 0.0
    peak_bytes: int = 0
    """Of memory on the device; 0 on the CPU."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Medians of training and inference."""
        return statistics.median(self.training), statistics.median(self.inference)


class Bench:
    """One shape on one device.

    Args:
        ranks: expert parallel ranks that this one stands among.
        steps: counted steps of a turn.
        host_options: fields of Megatron's config, for every contender.
    """

    def __init__(
        self, shape: Shape, inputs: Inputs, ranks: int, steps: int, **host_options: Any
    ) -> None:
        # One rank holds its share of the experts.
        self.shape = replace(shape, num_experts=shape.num_experts // ranks)
        self.inputs = inputs
        self.ranks = ranks
        self.steps = steps
        self.num_layers = 1 if shape.moe_every_layer else 2
        self.host_options = host_options

    def build(self, contender: Contender, **scmoe_options: Any) -> Any:
        return build(self.shape, contender, self.num_layers, scmoe_options, **self.host_options)

    def links(self, shares: list[float]) -> dict[float, Link]:
        """Links by share, first the one without a limit."""
        top2 = contenders(self.shape)[0]
        (moe,) = (m for m in self.build(top2).modules() if isinstance(m, MoELayer))
        hidden_states = self.inputs.hidden_states.detach().clone().requires_grad_()
        link = Link(None, self.ranks)
        with emulated_link(link):
            times = [
                seconds(lambda: moe(hidden_states)[0].backward(self.inputs.grad))
                for _ in range(1 + self.steps)
            ]
        other = statistics.median(times[1:])
        sent = link.bytes / len(times)
        found = {0.0: Link(None, self.ranks)}
        for share in shares:
            found[share] = Link(sent / (other * share / (1 - share)), self.ranks)
        return found

    def run(self, links: dict[float, Link], repetitions: int) -> list[BlockTimes]:
        """Everybody on every link, in turns."""
        blocks = {contender: self.build(contender) for contender in contenders(self.shape)}
        results = [
            BlockTimes(share, contender.name, slots, chosen)
            for share, link in links.items()
            for contender, block in blocks.items()
            for slots, chosen in self._slots(contender, block, link)
        ]
        by_name = {contender.name: block for contender, block in blocks.items()}
        for repetition in range(repetitions):
            for result in results:
                self.measure(result, by_name[result.contender], links[result.share], repetition)
            print(f"repetition {repetition + 1}/{repetitions} done", flush=True)
        return results

    def _slots(
        self, contender: Contender, block: Any, link: Link
    ) -> Iterator[tuple[Slots | None, bool]]:
        """Fixed ones, and last the ones that a run would choose."""
        if contender.position == "none":
            yield None, False
            return
        for slot in range(len(window(contender.position)) + 1):
            yield Slots(slot, slot), False
        yield self.choose(block, link, contender)[0], True

    def choose(
        self, block: Any, link: Link, contender: Contender
    ) -> tuple[Slots, tuple[UnitTimes, UnitTimes]]:
        """As a run does in its first iterations: the slots, and the times behind the choice."""
        unit = unit_of(block)
        unit.slots = default_slots(contender.position)
        first = FirstIterations(contender.position)
        times = None
        with emulated_link(link):
            while times is None:
                assert first.phase is not None
                unit.recorder.records_steps = first.phase.records_steps
                self.inputs.train(block)
                times = first.observe([unit.recorder.take()])
        unit.recorder.records_steps = False
        slots, _ = choose_routes(contender.position, (), *times)
        return slots, times

    def measure(self, result: BlockTimes, block: Any, link: Link, repetition: int) -> None:
        """Add a turn to the result; `repetition` counts from 0."""
        unit = unit_of(block)
        if result.slots is not None:
            unit.slots = result.slots
            unit.recorder.take()
        if not no_cuda_device():
            torch.cuda.reset_peak_memory_stats()
        with emulated_link(link):
            training, inference = measure_block(block, self.inputs, self.steps)
            if result.slots is None:
                before = link.seconds
                self.inputs.train(block)
                in_flight = exposed = link.seconds - before
            else:
                exchanges = unit.recorder.take().exchanges
                passes = len(exchanges) / 4  # dispatch and combine, forward and backward
                exposed = sum(exchange.blocked for exchange in exchanges) / passes
                in_flight = sum(x.end - x.begin for x in exchanges) / passes
        result.training += training
        result.inference += inference
        result.exposed += (exposed - result.exposed) / (repetition + 1)
        result.in_flight += (in_flight - result.in_flight) / (repetition + 1)
        if not no_cuda_device():
            result.peak_bytes = max(result.peak_bytes, torch.cuda.max_memory_allocated())

    def bitwise(self, link: Link) -> dict[str, bool]:
        """By position: whether overlap changes no bit of the output and of any gradient."""
        found = {}
        for contender in contenders(self.shape):
            if contender.position == "none":
                continue
            results = []
            for overlap in (False, True):
                seed()
                block = self.build(contender, scmoe_overlap=overlap)
                self.inputs.hidden_states.grad = None
                with emulated_link(link):
                    output = self.inputs.forward(block)
                    output.backward(self.inputs.grad)
                grads = [parameter.grad for parameter in block.parameters()]
                results.append([output.detach(), self.inputs.hidden_states.grad, *grads])
            pairs = zip(*results, strict=True)
            found[contender.name] = all(torch.equal(*pair) for pair in pairs)
        return found


# Experts. -----------------------------------------------------------------------------------------


def expert_kinds() -> dict[str, Callable[..., Any]]:
    """Implementations by name; Transformer Engine's where it is installed and a GPU runs it."""
    sequential = LocalSpecProvider().grouped_mlp_modules(False)
    kinds = {
        "SequentialMLP": sequential,
        "grouped_mm": partial(GroupedExperts, **sequential.keywords),
    }
    # Without it the host's provider falls back to sequential experts.
    if HAVE_TE and not no_cuda_device():
        kinds["Transformer Engine"] = TESpecProvider().grouped_mlp_modules(True)
    return kinds


def measure_experts(bench: Bench, topk: int) -> dict[str, dict[str, float]]:
    """Seconds of forward + backward by precision and implementation, tokens spread evenly."""
    dtypes = [torch.float32] if no_cuda_device() else [torch.float32, torch.bfloat16]
    device = torch.cuda.current_device()
    num_tokens = bench.inputs.hidden_states[..., 0].numel() * topk
    num_experts = bench.shape.num_experts
    found: dict[str, dict[str, float]] = {}
    for dtype in dtypes:
        config = host_config(bench.shape, contenders(bench.shape)[0], bench.num_layers)
        config.params_dtype = dtype
        rows = torch.randn(num_tokens, bench.shape.hidden_size, dtype=dtype, device=device)
        rows.requires_grad_()
        probs = torch.rand(num_tokens, device=device)
        sizes = torch.full((num_experts,), num_tokens // num_experts)
        sizes[0] += num_tokens - int(sizes.sum())
        times = {}
        for name, kind in expert_kinds().items():
            groups = ProcessGroupCollection.use_mpu_process_groups()
            experts = kind(num_experts, config, pg_collection=groups).cuda()

            def once(experts: Any = experts, args: Any = (rows, sizes, probs)) -> None:
                experts(*args)[0].sum().backward()
                experts.zero_grad(set_to_none=True)

            taken = [seconds(once) for _ in range(1 + bench.steps)]
            times[name] = statistics.median(taken[1:])
        found[str(dtype).removeprefix("torch.")] = times
    return found


# Reporting. ---------------------------------------------------------------------------------------


def sections(
    links: dict[float, Link],
    results: list[BlockTimes],
    experts: dict[str, dict[str, float]],
    bitwise: dict[str, bool],
) -> dict[str, list[str]]:
    """Stock layers, and the chosen and best slots of each position, on every link."""
    found = {
        "Overlap on and off": [
            f"{name}: {'bitwise equal' if same else '**DIFFER**'}" for name, same in bitwise.items()
        ]
    }
    names = list(next(iter(experts.values())))
    rows = [
        (dtype, *(f"{times[name] * 1e3:.2f}" for name in names)) for dtype, times in experts.items()
    ]
    found["Experts, forward + backward ms"] = markdown_table(("precision", *names), rows)
    unlimited = {(r.contender, r.slots): r for r in results if r.share == 0}
    columns = (
        *("contender", "slots", "forward + backward ms", "speed", "exposed ms", "hidden"),
        *("/ unlimited", "inference ms", "speed", "peak MiB"),
    )
    for share, link in links.items():
        mine = [result for result in results if result.share == share]
        limit = link.bytes_per_s
        name = "without a limit" if limit is None else f"{limit / 1e9:.3f} GB/s, share {share:.0%}"
        table = [_row(note, result, mine[0], unlimited) for note, result in _shown(mine)]
        found[f"Link {name}"] = markdown_table(columns, table)
    return found


def _shown(mine: list[BlockTimes]) -> Iterator[tuple[str, BlockTimes]]:
    """Stock layers; of each position the chosen slots and the best fixed one."""
    for name in dict.fromkeys(result.contender for result in mine):
        *fixed, last = (result for result in mine if result.contender == name)
        yield (f"{name}, chosen" if last.chosen else name), last
        if fixed:
            yield f"{name}, best fixed", min(fixed, key=lambda result: result.seconds)


def _row(
    name: str,
    result: BlockTimes,
    top2: BlockTimes,
    unlimited: dict[tuple[str, Slots | None], BlockTimes],
) -> tuple[str, ...]:
    training, inference = result.seconds
    free = unlimited.get((result.contender, result.slots))
    hidden = "-"
    if result.slots is not None and result.in_flight:
        hidden = f"{1 - result.exposed / result.in_flight:.1%}"
    return (
        name,
        "-" if result.slots is None else f"{result.slots.forward},{result.slots.backward}",
        f"{training * 1e3:.2f}",
        f"{top2.seconds[0] / training:.2f}x",
        f"{result.exposed * 1e3:.2f}",
        hidden,
        "-" if free is None else f"{training / free.seconds[0]:.3f}",
        f"{inference * 1e3:.2f}",
        f"{top2.seconds[1] / inference:.2f}x",
        f"{result.peak_bytes / 2**20:.0f}" if result.peak_bytes else "-",
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="one_device", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="overlap-cluster", help="sizes of the pair of layers")
    add("--ranks", type=int, default=4, metavar="N", help="expert parallel ranks of the job")
    add(
        "--shares",
        type=float,
        nargs="+",
        default=[0.15, 0.3, 0.6, 0.75],
        metavar="SHARE",
        help="of communication in the top-2 MoE layer's time",
    )
    add_sizes(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    environment = describe()
    shape = SHAPES[args.shape]
    inputs = Inputs.draw(shape, args.seq_length, args.micro_batch_size)
    bench = Bench(shape, inputs, args.ranks, args.steps)
    settings = {**asdict(shape), **vars(args), "output": str(args.output)}
    device = "CPU" if no_cuda_device() else torch.cuda.get_device_name()
    settings["device"] = device
    settings["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset")
    links = bench.links(args.shares)
    bitwise = bench.bitwise(links[max(links)])
    print("overlap on = off:", bitwise, flush=True)
    experts = measure_experts(bench, topk=1)
    results = bench.run(links, args.repetitions)
    title = f"One device: {args.shape} on {device}"
    tables = sections(links, results, experts, bitwise)
    markdown = page(title, environment, settings, tables)
    content = {
        "environment": environment,
        "settings": settings,
        "bitwise": bitwise,
        "experts": experts,
        "bytes_per_s": {share: link.bytes_per_s for share, link in links.items()},
        "results": [asdict(result) for result in results],
    }
    write_pair(args.output, "one_device", markdown, content)
    print(markdown, "written to ", args.output, sep="")
    if not all(bitwise.values()):
        sys.exit(1)


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the options, in one line."""
    experts = SHAPES[args.shape].num_experts
    if args.ranks < 2 or experts % args.ranks or experts // args.ranks < 2:
        return f"--ranks {args.ranks}: {experts} experts are not two or more for each."
    if min(args.steps, args.repetitions) < 1:
        return "--steps and --repetitions are at least 1."
    if not all(0 < share < 1 for share in args.shares):
        return "--shares are between 0 and 1, for example 0.6."
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if (wrong := check(args)) is not None:
        print(f"one_device: error: {wrong}", file=sys.stderr)
        return 2
    with one_rank():
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
