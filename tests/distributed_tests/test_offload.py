"""Experts that are at home in host memory or in a file give the bits of those that are resident."""

from typing import Any

import pytest
import torch

from megatron_scmoe.inference.generation import Continuation, Limits, generate
from megatron_scmoe.inference.sampling import Sampling
from megatron_scmoe.model.experts.offload.experts import Offload, OffloadedExperts
from megatron_scmoe.model.moe import MoELayer
from tests.distributed_tests.test_inference import MODELS, PROMPTS, VOCABULARY, build_model, quiet

GROUPED = {"moe_grouped_gemm": True, "params_dtype": torch.float32}
CASES: dict[str, tuple[str, Offload, dict[str, Any]]] = {
    **{
        f"{name} on disk": (name, Offload("disk", 2), {"moe_router_topk": 2})
        for name in ("none", "pos1", "pos2", "pos3", "latent", "chunks")
    },
    "experts at home": ("experts at home", Offload("cpu", 2), {}),
    "LongCat": ("LongCat", Offload("disk", 2), {}),
    "two gates": ("two gates", Offload("disk", 2), {}),
    "two gates, one slot": ("two gates", Offload("cpu", 1), {}),
    "one slot": ("pos2", Offload("cpu", 1), {}),
    "room for all": ("pos2", Offload("cpu", 9), {}),
    "on demand": ("pos2", Offload("disk", 2, early=False), {}),
    "nothing kept": ("pos2", Offload("disk", 2, keeps=False), {}),
    "grouped": ("pos2", Offload("disk", 2), GROUPED),
    "grouped, none": ("none", Offload("disk", 3), GROUPED | {"moe_router_topk": 2}),
}


def written(model: torch.nn.Module) -> list[Continuation]:
    return generate(model, PROMPTS, Sampling(seed=5), Limits(5, VOCABULARY, None), 2, quiet)[0]


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("name", CASES)
def test_offloaded_experts_give_the_bits_of_resident_ones(name: str) -> None:
    kind, offload, changes = CASES[name]
    host, scmoe = MODELS[kind]
    resident = build_model(host | changes, scmoe)
    model = build_model(host | changes, {**scmoe, "scmoe_offload": offload})
    model.load_state_dict(resident.state_dict())
    layers = [module for module in model.modules() if isinstance(module, OffloadedExperts)]
    assert len(layers) == len([m for m in resident.modules() if isinstance(m, MoELayer)]) > 0
    assert written(model) == written(resident)
    for layer in layers:
        account = layer.cache.account
        assert 0 < account.fetched <= account.asked
        if not offload.keeps:
            assert account.fetched == account.asked
