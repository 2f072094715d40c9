"""How long the experts of one rank take, forward and backward: the host's, ours, ours in a loop.

    python -m tests.functional_tests.experts_speed

Prints a table in Markdown: milliseconds, the best of several rounds that take turns. SwiGLU, tokens
spread at random over the experts, one process, one thread.
"""

import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_scmoe.model.experts.grouped import GroupedExperts, GroupedLinear
from tests.distributed_utils import finalize, initialize
from tests.models import Case

ROUNDS = 9
# dtype, experts, hidden size, expert's hidden size, tokens
SHAPES = (
    (torch.float32, 8, 64, 48, 256),
    (torch.float32, 64, 64, 48, 1024),
    (torch.float32, 8, 256, 512, 2048),
    (torch.float32, 64, 256, 512, 2048),
    (torch.float32, 8, 1024, 1024, 1024),
    (torch.bfloat16, 64, 64, 48, 1024),
    (torch.bfloat16, 8, 256, 512, 2048),
)


def build(
    kind: type, dtype: torch.dtype, experts: int, hidden_size: int, ffn_size: int
) -> torch.nn.Module:
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    host = {"params_dtype": dtype, "hidden_size": hidden_size, "moe_ffn_hidden_size": ffn_size}
    host |= {"kv_channels": hidden_size // 4, "bias_activation_fusion": True}
    config = Case(host=host).host_config()
    submodules = LocalSpecProvider().grouped_mlp_modules(False).keywords["submodules"]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return kind(experts, config, submodules, groups)


def seconds(
    module: torch.nn.Module, rows: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor
) -> float:
    module.zero_grad()
    start = time.perf_counter()
    output, _ = module(rows, tokens, probs)
    output.backward(torch.ones_like(output))
    return time.perf_counter() - start


def main() -> None:
    names = ("SequentialMLP", "grouped_mm", "loop")
    print("| dtype | experts | h | expert ffn | tokens | " + " | ".join(names) + " |")
    print("|---|---|---|---|---|" + "---|" * len(names))
    for dtype, experts, hidden_size, ffn_size, num_tokens in SHAPES:
        sizes = (dtype, experts, hidden_size, ffn_size)
        modules = [build(SequentialMLP, *sizes), *(build(GroupedExperts, *sizes) for _ in "12")]
        assert modules[1].linear_fc1.use_grouped_mm and modules[1].linear_fc2.use_grouped_mm
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
        probs = torch.rand(num_tokens, generator=generator).requires_grad_()
        choice = torch.randint(experts, (num_tokens,), generator=generator)
        tokens = torch.bincount(choice, minlength=experts)
        rounds = []
        for _ in range(ROUNDS):
            times = [seconds(module, rows, tokens, probs) for module in modules[:2]]
            with mock.patch.object(GroupedLinear, "use_grouped_mm", False):
                times.append(seconds(modules[2], rows, tokens, probs))
            rounds.append(times)
        best = [f"{1e3 * min(times):.2f}" for times in zip(*rounds, strict=True)]
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | {experts} | {hidden_size} | {ffn_size} | {num_tokens} |", end=" ")
        print(" | ".join(best) + " |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        initialize(0, 1, Path(folder) / "store")
        main()
        finalize()
