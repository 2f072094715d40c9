"""How fast the modelling code for Hugging Face is beside transformers' own Mixtral.

    python -m tools.benchmarks.huggingface_speed [--dtype bfloat16] [--device cuda]

Both have the same sizes, the same weights and the same function, a MoE without a shortcut in every
layer: their logits are compared first. They take turns, so that other work on the machine hits
both; seconds are CPU seconds of this process where the device is the CPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from megatron_scmoe.huggingface.configuration_scmoe import ScMoEConfig
from megatron_scmoe.huggingface.modeling_scmoe import ScMoEForCausalLM
from tools.benchmarks.provenance import as_markdown, describe

VOCABULARY = 4096


def models(arguments: argparse.Namespace) -> dict[str, Any]:
    """The two, with the same weights."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "num_key_value_heads": max(1, arguments.hidden // 256),
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            **sizes,
            intermediate_size=arguments.expert_size,
            num_local_experts=arguments.experts,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    scmoe = ScMoEForCausalLM(
        ScMoEConfig(
            **sizes,
            moe_intermediate_size=arguments.expert_size,
            num_experts=arguments.experts,
            moe_layers=list(range(arguments.layers)),
            shortcut_position="none",
            pre_softmax=False,
        )
    )
    scmoe.load_state_dict(mixtral.state_dict())
    dtype = getattr(torch, arguments.dtype)
    return {
        name: model.to(arguments.device, dtype).eval()
        for name, model in (("Mixtral", mixtral), ("ScMoE", scmoe))
    }


def tasks(arguments: argparse.Namespace) -> dict[str, Callable[[Any], None]]:
    """What is measured, each for one model."""
    random = torch.Generator().manual_seed(1)
    shape = arguments.batch, arguments.length
    ids = torch.randint(VOCABULARY, shape, generator=random).to(arguments.device)

    def forward(model: Any) -> None:
        with torch.no_grad():
            model(ids)

    def train(model: Any) -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    def generate(model: Any) -> None:
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(ids[:, :8], max_new_tokens=32, min_new_tokens=32, **options)

    return {"forward": forward, "forward and backward": train, "generate 32 tokens": generate}


def seconds(task: Callable[[], None], device: str) -> float:
    """Of one run: CPU seconds, or wall clock with a device that works by itself."""
    if device == "cpu":
        start = time.process_time()
        task()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    task()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    for name, default, text in (
        ("--hidden", 512, "hidden size"),
        ("--layers", 4, "layers"),
        ("--experts", 8, "of a layer"),
        ("--expert-size", 896, "of one expert"),
        ("--batch", 4, "sequences"),
        ("--length", 256, "of a sequence"),
        ("--repetitions", 9, "turns of each"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where they run (default: cpu)")
    arguments = parser.parse_args()
    both = models(arguments)
    ids = torch.arange(64, device=arguments.device)[None]
    with torch.no_grad():
        logits = [model(ids).logits.float() for model in both.values()]
    difference = (logits[0] - logits[1]).abs().max().item()
    print(as_markdown(describe()))
    print(f"\nlargest difference of logits: {difference:.1e}\n")
    print("| | Mixtral, s | ScMoE, s | ScMoE / Mixtral (quartiles) |\n|---|---|---|---|")
    for name, task in tasks(arguments).items():
        found: dict[str, list[float]] = {kind: [] for kind in both}
        for repetition in range(arguments.repetitions + 1):
            for kind, model in both.items():
                spent = seconds(partial(task, model), arguments.device)
                if repetition > 0:  # the first warms up
                    found[kind].append(spent)
        ratios = [s / m for m, s in zip(found["Mixtral"], found["ScMoE"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = [statistics.median(found[kind]) for kind in both]
        print(
            f"| {name} | {medians[0]:.3f} | {medians[1]:.3f} | "
            f"{middle:.3f} ({low:.3f} to {high:.3f}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
