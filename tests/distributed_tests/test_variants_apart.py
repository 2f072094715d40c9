"""Toy variants on two ranks that share the experts: each rank's tokens get what they get alone.

Tokens with K, fewer or no rows, under every dispatcher (DeepEP and HybridEP by tests/deep_ep.py),
in one exchange and in chunks; what is computed at home is added once.
"""

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_scmoe.overlap.recorder import UnitRecorder
from tests import deep_ep
from tests.distributed_utils import run_distributed
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block
from tests.toy_variants import registered

HIDDEN, K = 16, 2
DISPATCHERS = {
    "alltoall": {"moe_token_dispatcher_type": "alltoall"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "dense": {"moe_token_dispatcher_type": "dense"},
    "deepep": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
    "hybridep": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
}
# The kernels take router weights in float32 only.
TOLERANCE = {"deepep": 2e-6, "hybridep": 2e-6}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
CASES = [
    *((name, chunks, False) for name in DISPATCHERS for chunks in (1, 2)),
    ("alltoall", 2, True),
    ("deepep", 1, True),
]


def results(dispatcher: str, chunks: int, recomputed: bool) -> dict[str, Tensor]:
    """Output and all gradients of this rank's tokens, experts by their number over all."""
    case = Case(
        scmoe={
            "scmoe_combine": "tanh",
            "scmoe_experts_at_home": {"fixed": 3},
            "scmoe_num_chunks": chunks,
        },
        host={"moe_router_topk": K, **DISPATCHERS[dispatcher], **(MOE if recomputed else {})},
    )
    block = build_block(case)
    local = block.layers[0].mlp.local_expert_indices
    parameters = {}
    for name, parameter in block.named_parameters():
        head, _, tail = name.partition("local_experts.")
        index, _, rest = tail.partition(".")
        name = f"{head}{local[int(index)]}.{rest}" if tail else name
        random = torch.Generator().manual_seed(sum(map(ord, name)) * 31 + len(name))
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=random)
        parameter.data.copy_(noise * (1.0 if "norm" in name else parameter.shape[-1] ** -0.5))
        parameters[name] = parameter
    random = torch.Generator().manual_seed(torch.distributed.get_rank())
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, generator=random)
    x.requires_grad_()
    counts: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitRecorder, "routed", lambda _, rows: counts.append(rows))
        output = run_block(block, x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert x.grad is not None
    found = {"output": output.detach(), "input": x.grad, "rows": torch.cat(counts).sum()}
    for name, parameter in parameters.items():
        grad = parameter.grad
        found[name] = torch.zeros_like(parameter) if grad is None else grad
    return found


def all_results(cases: list[tuple[str, int, bool]]) -> list[dict[str, Tensor]]:
    deep_ep.install()
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        deep_ep.fused_a2a.reset_hybrid_ep_buffer()
    with registered():
        return [results(*case) for case in cases]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    """By rank."""
    return [found[0] for found in run_distributed(all_results, 2, [("alltoall", 1, False)])]


@pytest.fixture(scope="module")
def together() -> list[list[dict[str, Tensor]]]:
    """By rank and case."""
    return run_distributed(all_results, 2, CASES, expert_model_parallel_size=2)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_ranks_share_the_experts(
    alone: list[dict[str, Tensor]], together: list[list[dict[str, Tensor]]], number: int
) -> None:
    """An expert's gradient is the sum; one at home has that of the rank's own tokens."""
    tolerance = TOLERANCE.get(CASES[number][0], 1e-10)
    for rank, cases in enumerate(together):
        for name, value in cases[number].items():
            if name == "rows":
                continue
            wanted = alone[rank][name]
            if ".mlp.experts." in name:
                wanted = alone[0][name] + alone[1][name]
            torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance, msg=name)
    if CASES[number][0] != "dense":
        # Nothing is sent in the place of what a token gets at home.
        sent = sum(cases[number]["rows"] for cases in together)
        assert sent == sum(found["rows"] for found in alone)
    assert {name for name in alone[0] if ".at_home." in name} <= together[0][number].keys()
