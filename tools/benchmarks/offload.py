"""What offloaded experts cost, and what fetching them early and keeping them gives back.

    python -m tools.benchmarks.offload --load runs/quickstart/checkpoints --mbytes-per-second 200

Five arms take turns on the same prompts and checkpoint:

    resident   all experts on the device
    on demand  fetched when they are due; nothing is kept
    LRU        fetched when they are due; what was used is kept
    early      fetched when the gate has spoken; nothing is kept
    both       fetched when the gate has spoken; what was used is kept: --scmoe-offload-experts

The slow memory is emulated: a copy takes the time that --mbytes-per-second gives it, by a thread
that sleeps, as a copy engine would leave the processor alone. Prompts are text of this repository;
the routing is the checkpoint's, or uniform with --uniform. Without --load the model is the command
line's, with random weights. Only one process.

Columns: time to the first token; tokens/s of decoding; bytes fetched for each decoded token; share
of the experts asked for that were there; time for which compute stood still for experts, and the
share of the fetching that ran behind compute, both while decoding and in the prompt; window and
transfer of a MoE layer in a decoding step, as planned (planner/fetch.py) and as measured; memory of
the device, weights and, on a GPU, the peak of what a turn allocates beside them, and the experts'
part of it; memory of the host for experts at home, which is pinned where there is a GPU.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any, NamedTuple

from megatron_scmoe import say, start

with say.user_errors():
    start.replace_host_symbols()

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_scmoe.arguments import parse
from megatron_scmoe.commands.generated_text import add_options
from megatron_scmoe.host.cpu import no_cuda_device
from megatron_scmoe.inference.cache_size import CacheSize
from megatron_scmoe.inference.generation import Limits, generate
from megatron_scmoe.inference.model import begin, join_job, load_model, prepare_generation
from megatron_scmoe.inference.offload import OffloadPlan, layers_of, offload_of, plan_offload
from megatron_scmoe.inference.sampling import Sampling
from megatron_scmoe.model.experts.offload import experts
from megatron_scmoe.model.experts.offload.cache import Account, ExpertCache, travelled
from megatron_scmoe.overlap import streams
from megatron_scmoe.planner.fetch import FetchTimes, fetch_times
from megatron_scmoe.words import duration, percent, size
from tools.benchmarks.cluster_report import table_of
from tools.benchmarks.provenance import as_markdown, describe
from tools.benchmarks.real_text import REPOSITORY

RESIDENT = "resident"
# Whether experts are fetched early, and kept.
ARMS = {
    "on demand": (False, False),
    "LRU": (False, True),
    "early": (True, False),
    "both": (True, True),
}


class ArmTurn(NamedTuple):
    """One run of an arm."""

    first_token: float
    tokens_per_second: float
    bytes_per_token: float
    hits: float
    exposed: float
    hidden: float
    prompt_hidden: float
    measured: FetchTimes
    """Of a layer in a decoding step."""
    prompt_measured: FetchTimes
    beside: int
    """Bytes allocated beside the weights, at most; 0 without a GPU."""
    tokens: list[list[int]]


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The tool's, and what is measured."""
    add_options(parser)
    group = parser.add_argument_group("benchmark")
    add = group.add_argument
    add("--mbytes-per-second", type=float, default=200.0, metavar="MB", help="Of the slow memory.")
    add("--batches", type=int, nargs="+", default=[1, 8], metavar="B", help="Prompts at a time.")
    add(
        "--prompt-tokens", type=int, nargs="+", default=[64, 512], metavar="N", help="Their length."
    )
    add(
        "--shares",
        type=float,
        nargs="+",
        default=[1 / 8, 1 / 4, 1 / 2],
        metavar="S",
        help="Of a layer's experts, that fit on the device.",
    )
    add("--repetitions", type=int, default=3, metavar="N", help="Turns of every arm.")
    add("--uniform", action="store_true", help="Route at random, to all experts alike.")
    return parser


def slow(rate: float) -> Any:
    """`streams.fetch` through a link of `rate` bytes/s."""

    def fetch(slots: Any, home: Any) -> streams.Flight:
        def copy() -> None:
            began = time.perf_counter()
            total = 0
            for slot, values in zip(slots, home, strict=True):
                slot.copy_(values)
                total += values.numel() * values.element_size()
            time.sleep(max(0.0, began + total / rate - time.perf_counter()))

        def exchange(_: Any, async_op: bool) -> Any:
            return [], [streams._thread("expert-fetch").submit(copy)]

        return streams.launch(exchange, slots, lane="weights")

    return fetch


class WatchedCache(ExpertCache):
    """Knows how long its windows were: from the gate until the experts were due."""

    like = torch.empty(0)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.account.keeps_arrivals = True
        self._opened: dict[tuple[int, ...], streams.Moment] = {}
        self._windows: list[tuple[streams.Moment, streams.Moment]] = []

    def announce(self, experts: Sequence[int]) -> None:
        self._opened[tuple(experts)] = streams.moment(self.like)
        super().announce(experts)

    def take(self, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        opened = self._opened.pop(tuple(experts), None)
        if opened is not None:
            self._windows.append((opened, streams.moment(self.like)))
        yield from super().take(experts)

    def window(self, clock: streams.Clock) -> float:
        """Seconds of all."""
        return sum(clock.seconds(end) - clock.seconds(begin) for begin, end in self._windows)


class Fetched(NamedTuple):
    """Of all layers so far."""

    asked: float
    fetched: float
    in_flight: float
    exposed: float
    window: float

    @classmethod
    def of(cls, caches: list[WatchedCache]) -> "Fetched":
        accounts: list[Account] = [cache.account for cache in caches]
        clock = streams.Clock(WatchedCache.like)
        return cls(
            sum(account.asked for account in accounts),
            sum(account.fetched for account in accounts),
            *travelled(accounts, clock),
            sum(cache.window(clock) for cache in caches),
        )

    @property
    def hidden(self) -> float:
        return 1 - self.exposed / self.in_flight if self.in_flight else 1.0

    def of_layer(self, passes: int) -> FetchTimes:
        """Mean of one layer in one pass."""
        return FetchTimes(self.window / passes, self.in_flight / passes)


def take_turn(
    model: Any, prompts: list[list[int]], args: Any, plan: OffloadPlan, limits: Limits
) -> ArmTurn:
    """Generate once, and look at the caches after the prompt and at the end."""
    caches = [layer.cache for layer in layers_of(model)]
    seen: list[Fetched] = []

    def watch(_number: int, _token: int) -> None:
        if not seen:
            seen.append(Fetched.of(caches))

    # Of uniform routing: all arms need the same experts.
    model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
    sampling = Sampling(greedy=True)
    before = allocated_bytes(reset=True)
    found, speed = generate(model, prompts, sampling, limits, len(prompts), watch)
    beside = allocated_bytes() - before
    prompt, whole = seen[0], Fetched.of(caches)
    decoding = Fetched(*(b - a for a, b in zip(prompt, whole, strict=True)))
    return ArmTurn(
        speed.prefill_seconds,
        speed.decode_tokens / speed.decode_seconds,
        decoding.fetched * plan.expert_bytes / speed.decode_tokens,
        1 - decoding.fetched / decoding.asked if decoding.asked else 1.0,
        decoding.exposed,
        decoding.hidden,
        prompt.hidden,
        decoding.of_layer(plan.layers * (limits.new_tokens - 1)),
        prompt.of_layer(plan.layers),
        beside,
        [each.tokens for each in found],
    )


def allocated_bytes(reset: bool = False) -> int:
    """At most, of a GPU's memory; 0 without one.

    Args:
        reset: from now on; gives what is allocated now.
    """
    if no_cuda_device():
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def reached_flops(model: Any, rows: int) -> float:
    """FLOP/s of products of so many rows with the first weights of all dense MLPs, one behind the
    other, as a pass meets them: those of few rows read weights for longer than they compute."""
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith("linear_fc1.weight") and ".experts." not in name
    ]
    tokens = weights[0].new_ones(rows, weights[0].shape[1])
    times = []
    with torch.inference_mode():
        for _ in range(4):
            begin = streams.moment(tokens)
            for weight in weights:
                torch.nn.functional.linear(tokens, weight)
            end = streams.moment(tokens)
            clock = streams.Clock(tokens)
            times.append(clock.seconds(end) - clock.seconds(begin))
    # The first is a warm-up.
    return 2 * rows * sum(weight.numel() for weight in weights) / statistics.median(times[1:])


def weight_bytes(model: Any) -> int:
    """Of all experts too."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


def median(turns: list[ArmTurn], name: str) -> float:
    return statistics.median(getattr(turn, name) for turn in turns)


def slots_of(args: Any, share: float) -> int:
    """Experts of a layer on the device; a token's at least."""
    return max(args.moe_router_topk, int(share * args.num_experts))


def in_prompt(planned: FetchTimes, turns: dict[tuple[str, int], list[ArmTurn]]) -> str:
    """Window and transfer of a prompt's pass, as planned and as measured."""
    (*_, (name, _)) = turns  # the last arm fetches early, into most slots
    assert name == "both"
    measured = [turn.prompt_measured for turn in [*turns.values()][-1]]
    found = FetchTimes(*map(statistics.median, zip(*measured, strict=True)))
    return ", ".join(
        f"{what} {duration(mine)} as planned, {duration(theirs)} measured"
        for what, mine, theirs in zip(FetchTimes._fields, planned, found, strict=True)
    )


def row_of(
    name: str,
    slots: int,
    turns: list[ArmTurn],
    args: Any,
    plan: OffloadPlan,
    planned: FetchTimes,
    weights: int,
) -> dict[str, str]:
    """One arm.

    Args:
        planned: of a layer in a decoding step.
        weights: bytes of all, resident.
    """
    steps = args.max_new_tokens - 1
    on_device = replace(plan, slots=slots).device_bytes
    device = weights - plan.home_bytes + on_device + median(turns, "beside")
    measured = FetchTimes(
        *map(statistics.median, zip(*(turn.measured for turn in turns), strict=True))
    )
    times = {
        f"{what}{source}, ms": "-" if not seconds else f"{seconds * 1e3:.1f}"
        for what, *both in zip(FetchTimes._fields, planned, measured, strict=True)
        for source, seconds in zip((" planned", ""), both, strict=True)
    }
    return {
        "experts on the device, a layer": f"{slots} of {plan.experts}",
        "arm": name,
        "first token, ms": f"{median(turns, 'first_token') * 1e3:.0f}",
        "tokens/s": f"{median(turns, 'tokens_per_second'):.1f}",
        "fetched a token": size(median(turns, "bytes_per_token")),
        "there": percent(median(turns, "hits")),
        "waited, ms a step": f"{median(turns, 'exposed') * 1e3 / steps:.1f}",
        "hidden": percent(median(turns, "hidden")),
        "hidden, prompt": percent(median(turns, "prompt_hidden")),
        **times,
        "device memory": size(device),
        "of experts": size(on_device),
        "host memory": size(plan.home_bytes if plan.tier == "cpu" and name != RESIDENT else 0),
    }


def main() -> int:
    begin()
    with say.user_errors():
        environment = describe()
        args = parse(options)
        args.prompt, args.prompt_file = ["-"], None
        if args.scmoe_offload_experts == "none":
            args.scmoe_offload_experts = "disk"
        with redirect_stdout(StringIO()):
            config, tokenizer = prepare_generation(args, offloads=True)
        config.transformer.moe_router_force_load_balancing = args.uniform
        numbers = sorted({slots_of(args, share) for share in args.shares})
        args.scmoe_expert_cache_size = CacheSize(experts=numbers[-1])
        plan = plan_offload(args, config, max(args.prompt_tokens) + args.max_new_tokens)
        assert plan is not None
    with redirect_stdout(StringIO()):
        join_job(None)
        resident = load_model(config)
        config.scmoe.scmoe_offload = offload_of(plan)
        # The weights will be the resident model's.
        config.transformer.perform_initialization = False
        offloaded = load_model(config)
        if args.load is None:
            offloaded.load_state_dict(resident.state_dict())
    WatchedCache.like = next(resident.parameters()).new_empty(0)
    experts.fetch = slow(args.mbytes_per_second * 1e6)
    text = tokenizer.tokenize((REPOSITORY / "docs" / "log.md").read_text())
    transfer = plan.expert_bytes / args.mbytes_per_second / 1e6
    whole = weight_bytes(resident)
    print(as_markdown(environment))
    print(
        f"\n{plan.layers} MoE layers of {plan.experts} experts of {size(plan.expert_bytes)}, top-"
        f"{args.moe_router_topk}, {args.scmoe_shortcut_position}; one takes {transfer * 1e3:.1f} "
        f"ms at {args.mbytes_per_second:g} MB/s. {args.max_new_tokens} tokens, median of "
        f"{args.repetitions} turns; routing {'uniform' if args.uniform else 'of the checkpoint'}."
    )
    for batch, length in itertools.product(args.batches, args.prompt_tokens):
        prompts = [text[i * length : (i + 1) * length] for i in range(batch)]
        limits = Limits(args.max_new_tokens, tokenizer.vocab_size, end=None)
        turns: dict[tuple[str, int], list[ArmTurn]] = defaultdict(list)
        generate(resident, prompts, Sampling(greedy=True), limits, batch, lambda *_: None)
        for _ in range(args.repetitions):
            turns[RESIDENT, plan.experts].append(take_turn(resident, prompts, args, plan, limits))
            for slots, (arm, (early, keeps)) in itertools.product(numbers, ARMS.items()):
                for layer in layers_of(offloaded):
                    layer.early = early
                    layer.cache = WatchedCache(slots, layer._fetch, keeps)
                turns[arm, slots].append(take_turn(offloaded, prompts, args, plan, limits))
        expected = turns[RESIDENT, plan.experts][0].tokens
        same = all(turn.tokens == expected for each in turns.values() for turn in each)

        def planned(tokens: int, keys: int, slots: int = 0) -> FetchTimes:
            reached = reached_flops(resident, tokens)
            return fetch_times(args, config, tokens, keys, reached, transfer, slots)

        print(
            f"\nBatch {batch}, prompts of {length} tokens; the same text from every arm: {same}. "
            f"Of a layer in the prompt: {in_prompt(planned(batch * length, length // 2), turns)}.\n"
        )
        rows = [
            row_of(
                name, slots, each, args, plan, planned(batch, length, slots if keeps else 0), whole
            )
            for (name, slots), each in turns.items()
            for _, keeps in [ARMS.get(name, (False, True))]
        ]
        print("\n".join(table_of(rows)), flush=True)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
