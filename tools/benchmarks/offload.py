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
the routing is the checkpoint's, or uniform with --uniform. Only one process.

Columns: time to the first token; tokens/s of decoding; bytes fetched for each decoded token; share
of the experts asked for that were there; time for which compute stood still for experts, and the
share of the fetching that ran behind compute, both while decoding and in the prompt.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

from megatron_scmoe import say, start

with say.user_errors():
    start.replace_host_symbols()

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.arguments import parse_args

from megatron_scmoe.commands.generated_text import add_options
from megatron_scmoe.inference.cache_size import CacheSize
from megatron_scmoe.inference.generation import Limits, generate
from megatron_scmoe.inference.model import join_job, load_model, prepare_generation
from megatron_scmoe.inference.offload import OffloadPlan, layers_of, offload_of, plan_offload
from megatron_scmoe.inference.sampling import Sampling
from megatron_scmoe.model.experts.offload import experts
from megatron_scmoe.model.experts.offload.cache import Account, ExpertCache
from megatron_scmoe.overlap import streams
from megatron_scmoe.words import percent, size
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
    prompt_exposed: float
    prompt_hidden: float
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


def totals(accounts: list[Account]) -> tuple[int, int, float, float]:
    """Asked, fetched, seconds in flight and exposed."""
    clock = streams.Clock(torch.zeros(()))
    times = [arrival.times(clock) for account in accounts for arrival in account.arrivals]
    return (
        sum(account.asked for account in accounts),
        sum(account.fetched for account in accounts),
        sum(end - begin for begin, end, _ in times),
        sum(blocked for *_, blocked in times),
    )


def take_turn(
    model: Any, prompts: list[list[int]], args: Any, plan: OffloadPlan, limits: Limits
) -> ArmTurn:
    """Generate once, and look at the caches after the prompt and at the end."""
    layers = layers_of(model)
    accounts = [layer.cache.account for layer in layers]
    for account in accounts:
        account.keeps_arrivals = True
    seen: list[tuple[int, int, float, float]] = []

    def watch(_number: int, _token: int) -> None:
        if not seen:
            seen.append(totals(accounts))

    # Of uniform routing: all arms need the same experts.
    model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
    sampling = Sampling(greedy=True)
    found, speed = generate(model, prompts, sampling, limits, len(prompts), watch)
    prompt, whole = seen[0], totals(accounts)
    asked, fetched, flight, blocked = (b - a for a, b in zip(prompt, whole, strict=True))
    return ArmTurn(
        speed.prefill_seconds,
        speed.decode_tokens / speed.decode_seconds,
        fetched * plan.expert_bytes / speed.decode_tokens,
        1 - fetched / asked if asked else 1.0,
        blocked,
        1 - blocked / flight if flight else 1.0,
        prompt[3],
        1 - prompt[3] / prompt[2] if prompt[2] else 1.0,
        [each.tokens for each in found],
    )


def median(turns: list[ArmTurn], name: str) -> float:
    return statistics.median(getattr(turn, name) for turn in turns)


def main() -> int:
    start.one_rank_by_itself()
    with say.user_errors():
        args = parse_args(options)
        args.prompt, args.prompt_file = ["-"], None
        if args.scmoe_offload_experts == "none":
            args.scmoe_offload_experts = "disk"
        args.scmoe_expert_cache_size = CacheSize(experts=10**6)
        environment = describe()
        with redirect_stdout(StringIO()):
            config, tokenizer = prepare_generation(args, offloads=True)
        config.transformer.moe_router_force_load_balancing = args.uniform
        plan = plan_offload(args, config, max(args.prompt_tokens) + args.max_new_tokens)
        assert plan is not None
    with redirect_stdout(StringIO()):
        join_job(None)
        resident = load_model(config)
        config.scmoe.scmoe_offload = offload_of(plan)
        offloaded = load_model(config)
    experts.fetch = slow(args.mbytes_per_second * 1e6)
    text = tokenizer.tokenize((REPOSITORY / "docs" / "log.md").read_text())
    transfer = plan.expert_bytes / args.mbytes_per_second / 1e6
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
            for share, (arm, (early, keeps)) in itertools.product(args.shares, ARMS.items()):
                slots = max(args.moe_router_topk, int(share * plan.experts))
                for layer in layers_of(offloaded):
                    layer.early = early
                    layer.cache = ExpertCache(slots, layer._fetch, keeps)
                turns[arm, slots].append(take_turn(offloaded, prompts, args, plan, limits))
        expected = turns[RESIDENT, plan.experts][0].tokens
        same = all(turn.tokens == expected for each in turns.values() for turn in each)
        print(
            f"\nBatch {batch}, prompts of {length} tokens; the same text from every arm: {same}.\n"
        )
        rows = [
            {
                "experts on the device, a layer": f"{slots} of {plan.experts}",
                "arm": name,
                "first token, ms": f"{median(each, 'first_token') * 1e3:.0f}",
                "tokens/s": f"{median(each, 'tokens_per_second'):.1f}",
                "fetched a token": size(median(each, "bytes_per_token")),
                "there": percent(median(each, "hits")),
                "waited, ms a token": (
                    f"{median(each, 'exposed') * 1e3 / (args.max_new_tokens - 1):.1f}"
                ),
                "hidden": percent(median(each, "hidden")),
                "hidden, prompt": percent(median(each, "prompt_hidden")),
            }
            for (name, slots), each in turns.items()
        ]
        print("\n".join(table_of(rows)), flush=True)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
