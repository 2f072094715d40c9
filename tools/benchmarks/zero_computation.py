"""What experts at home save, by tau: bytes, and time of one MoE layer (MoE++, table 3).

    torchrun --nproc-per-node 2 -m tools.benchmarks.zero_computation --output DIR

The MoE of a plain layer, with N routed experts alone and with zero, copy and constant experts
beside them, on the same tokens. Experts are drawn for every token where the balancing loss has its
least value: a routed expert gets tau times the tokens of one at home. In turns; the exchanges are
awaited at once. Writes zero_computation.md and .json to --output.
"""

from megatron_scmoe import start

start.replace_host_symbols()

import argparse
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_scmoe.model.moe import ScMoELayer
from megatron_scmoe.model.routing.choice import Routing
from megatron_scmoe.words import markdown_table
from tools.benchmarks.cluster_report import write_pair
from tools.benchmarks.contenders import Contender
from tools.benchmarks.paper_shapes import Shape, build, seconds
from tools.benchmarks.process_groups import launched_ranks
from tools.benchmarks.provenance import as_markdown, describe

KINDS = {"zero": 1, "copy": 1, "constant": 2}
TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
# 0.6B/(8+4)E of arXiv:2410.07348: table 2, and the gains of table 3 in expert forward time.
PAPER_GAIN = {0.1: 1.645, 0.25: 0.927, 0.5: 0.382, 0.75: 0.252, 1.0: 0.191}
TOPK = 2


@dataclass
class MeteredLayer:
    """One layer and what was measured of it."""

    name: str
    tau: float | None
    """None: routed experts alone."""
    moe: ScMoELayer
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    """Seconds of forward + backward."""
    bytes: int = 0
    """That this rank sent in one forward + backward."""
    routed: float = 0.0
    """Routed experts of a token."""


def arms(shape: Shape) -> list[MeteredLayer]:
    """The layer of routed experts, and one for every tau."""
    plain = Contender("moe", "none", TOPK, shared_expert=False)

    def layer(kinds: dict[str, int]) -> ScMoELayer:
        # LongCat's router makes it a unit of ours, whose stages can be called; it is not asked.
        options = {"scmoe_router": "longcat", "scmoe_experts_at_home": kinds}
        (moe,) = (
            module
            for module in build(shape, plain, 1, options, moe_layer_freq=1).modules()
            if isinstance(module, ScMoELayer)
        )
        return moe

    with_home = layer(KINDS)
    return [
        MeteredLayer("routed experts alone", None, layer({})),
        *(MeteredLayer(f"MoE++, tau {tau:g}", tau, with_home) for tau in TAUS),
    ]


def draw(
    arm: MeteredLayer, experts: int, tokens: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weights and map, [T, N + H]: K experts of every token."""
    at_home = sum(KINDS.values()) if arm.tau is not None else 0
    wanted = torch.ones(experts + at_home)
    wanted[:experts] = 1.0 if arm.tau is None else arm.tau
    chosen = torch.multinomial(wanted.expand(tokens, -1), TOPK, generator=random)
    routing_map = torch.zeros(tokens, len(wanted), dtype=torch.bool).scatter(1, chosen, True)
    probs = routing_map.float() / TOPK
    device = torch.cuda.current_device()
    return probs.to(device).requires_grad_(), routing_map.to(device)


def forward(moe: ScMoELayer, z: Tensor, routing: Routing) -> Tensor:
    """The stages of the MoE, every exchange awaited at once; [s, b, h] to [s, b, h]."""
    tokens = moe.depart(z, routing, overlap=False)
    for chunk in tokens.chunks:
        chunk.start_dispatch()
        chunk.wait_dispatch()
        chunk.experts()
        chunk.start_combine()
    tokens.branch.wait()
    return tokens.output()


def turn(arm: MeteredLayer, z: Tensor, grad: Tensor, routing: Routing, steps: int) -> None:
    """Some steps of one arm, after one that does not count; z and grad [s, b, h]."""
    for step in range(-1, steps):
        with torch.no_grad():
            ahead = seconds(lambda: forward(arm.moe.eval(), z, routing))
        arm.moe.train()
        arm.moe.recorder.begin_pass(z)
        both = seconds(lambda: forward(arm.moe, z, routing).backward(grad))
        exchanges = arm.moe.recorder.take().exchanges
        if step >= 0:
            arm.forward.append(ahead)
            arm.both.append(both)
            arm.bytes = sum(exchange.bytes for exchange in exchanges)


def measure(args: argparse.Namespace) -> list[MeteredLayer]:
    """All arms in turns."""
    heads = args.hidden_size // 64 or 1
    shape = Shape(
        args.hidden_size, args.ffn_hidden_size, heads, heads, args.num_experts, True, llama=True
    )
    found = arms(shape)
    rank = torch.distributed.get_rank()
    random = torch.Generator().manual_seed(rank)
    device = torch.cuda.current_device()
    z = torch.randn(args.tokens, 1, args.hidden_size, device=device, requires_grad=True)
    grad = torch.randn_like(z)
    choices = [draw(arm, args.num_experts, args.tokens, random) for arm in found]
    for repetition in range(args.repetitions):
        for arm, (probs, routing_map) in zip(found, choices, strict=True):
            routing = Routing.of_columns(probs, routing_map, args.num_experts)
            arm.routed = routing.routing_map.sum().item() / args.tokens
            turn(arm, z, grad, routing, args.steps)
        if rank == 0:
            print(f"repetition {repetition + 1}/{args.repetitions} done", flush=True)
    return found


def report(found: list[MeteredLayer]) -> tuple[str, list[dict[str, Any]]]:
    """The table, and its numbers."""
    base = found[0]
    rows, numbers = [], []
    for arm in found:
        forward, both = statistics.median(arm.forward), statistics.median(arm.both)
        paper = PAPER_GAIN.get(arm.tau) if arm.tau is not None else None
        numbers.append(
            {
                "arm": arm.name,
                "tau": arm.tau,
                "routed_per_token": arm.routed,
                "bytes": arm.bytes,
                "forward_seconds": forward,
                "both_seconds": both,
            }
        )
        rows.append(
            [
                arm.name,
                f"{arm.routed:.3f}",
                f"{arm.routed / TOPK:.3f}",
                f"{arm.bytes / base.bytes if base.bytes else float('nan'):.3f}",
                f"{forward * 1e3:.1f}",
                f"{statistics.median(base.forward) / forward - 1:+.1%}",
                f"{both * 1e3:.1f}",
                f"{statistics.median(base.both) / both - 1:+.1%}",
                "" if paper is None else f"{paper:+.1%}",
            ]
        )
    header = [
        "layer",
        "routed experts a token",
        "share of slots",
        "bytes, of the first",
        "forward ms",
    ]
    header += ["gain", "forward + backward ms", "gain", "paper's gain, forward"]
    return "\n".join(markdown_table(header, rows)), numbers


def run(args: argparse.Namespace) -> None:
    environment = describe()
    found = measure(args)
    if torch.distributed.get_rank() == 0:
        table, numbers = report(found)
        write_pair(
            args.output,
            "zero_computation",
            f"# Experts at home, by tau\n\n{as_markdown(environment)}\n\n{table}\n",
            {
                "environment": environment,
                "ranks": torch.distributed.get_world_size(),
                "sizes": {name: value for name, value in vars(args).items() if name != "output"},
                "layers": numbers,
            },
        )
        print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default, text in (
        ("--hidden-size", 768, "width of a token"),
        ("--ffn-hidden-size", 2048, "width inside an expert"),
        ("--num-experts", 8, "routed experts, of all ranks"),
        ("--tokens", 2048, "tokens of a rank"),
        ("--steps", 3, "counted steps of a turn"),
        ("--repetitions", 5, "turns of every layer"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where both files go"
    )
    args = parser.parse_args()
    with launched_ranks(args.num_experts):
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
