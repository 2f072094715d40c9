"""Experts that lie on other ranks: the bits of those that lie in their order, and checkpoints that
know no difference.

A token has two experts at most, so that sums have one order wherever its experts lie.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_scmoe.c2r import placement
from megatron_scmoe.c2r.placement import Placement
from tests import deep_ep
from tests.distributed_utils import run_distributed
from tests.models import SEQUENCE, Case, build_block, parameters_by_expert, run_block

WORLD_SIZE = 4
BATCH = 2
EXPERTS = 8
LAYERS = (2, 4)  # the MoE layers
TWO = {"num_moe_experts": EXPERTS, "moe_router_topk": 2}
AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
CASES: dict[str, Case] = {
    "pos2": Case(host={**TWO, **AUX}),
    "pos3, allgather, grouped, two chunks": Case(
        scmoe={"scmoe_shortcut_position": "pos3", "scmoe_num_chunks": 2},
        host={**TWO, "moe_token_dispatcher_type": "allgather", "moe_grouped_gemm": True},
    ),
    "pos2, capacity, no overlap": Case(
        scmoe={"scmoe_overlap": False},
        host={
            **TWO,
            "moe_expert_capacity_factor": 0.75,
            "moe_pad_expert_input_to_capacity": True,
            "moe_grouped_gemm": True,
        },
    ),
    "pos1, LongCat-Flash's router, copy experts": Case(
        scmoe={
            "scmoe_shortcut_position": "pos1",
            "scmoe_router": "longcat",
            "scmoe_experts_at_home": {"copy": 4},
        },
        host={**TWO, **AUX},
    ),
    "pos2, DeepEP": Case(
        host={
            **TWO,
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": "deepep",
        }
    ),
    "pos2, sent once to a rank": Case(scmoe={"scmoe_dispatch_copies": "rank"}, host=TWO),
    "two gates": Case(
        scmoe={"scmoe_dual_gating": "separate", "scmoe_combine": "add"},
        host={"num_moe_experts": EXPERTS},
    ),
    "no shortcut": Case(
        scmoe={"scmoe_shortcut_position": "none", "scmoe_combine": "add"},
        host={**TWO, "moe_router_pre_softmax": False},
    ),
}


# Two experts on a rank tell most; with four the first two cases are enough.
TRAINED = [(name, ranks) for ranks in (2, 4) for name in [*CASES][: 2 if ranks == 2 else None]]


def placements(ranks: int, moe_layers: tuple[int, ...] = LAYERS) -> list[Placement]:
    """Two of the model, each with another order in every layer."""
    found = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(10 * ranks + seed)
        layers = {}
        for layer in moe_layers:
            order = torch.randperm(EXPERTS, generator=generator).tolist()
            each = EXPERTS // ranks
            layers[layer] = tuple(tuple(order[i : i + each]) for i in range(0, EXPERTS, each))
        found.append(Placement(EXPERTS, ranks, ranks, layers))
    return found


def build(case: Case, ranks: int, path: Path | None, **host: Any) -> TransformerBlock:
    """The block, from the random numbers of a fresh run of so many expert parallel ranks."""
    if parallel_state.get_expert_model_parallel_world_size() != ranks:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    torch.manual_seed(1234)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    scmoe = {**case.scmoe, "scmoe_expert_placement": None if path is None else str(path)}
    own = {"expert_model_parallel_size": ranks, "use_cpu_initialization": False}
    return build_block(Case(scmoe, {**case.host, **own, **host}, case.moe_frequency))


def named(block: TransformerBlock, path: Path | None) -> dict[str, Tensor]:
    """Parameters of this rank, experts under their own numbers."""
    placed = None if path is None else placement.read(path)

    def own_number(match: re.Match[str]) -> str:
        layer = block.layers[int(match[1])]
        place = layer.mlp.local_expert_indices[int(match[3])]
        number = place if placed is None else placed.order(layer.attention_number)[place]
        return f"layers.{match[1]}.{match[2]}local_experts.{number}."

    pattern = r"layers\.(\d+)\.(.*)local_experts\.(\d+)\."
    return {
        re.sub(pattern, own_number, name): parameter
        for name, parameter in parameters_by_expert(block)
    }


def trained(case: Case, ranks: int, path: Path | None) -> dict[str, Tensor]:
    """What a rank computes: initial weights, output, gradients, by name."""
    block = build(case, ranks, path)
    parameters = named(block, path)
    found = {f"initial {name}": p.detach().clone() for name, p in parameters.items()}
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    shape = (SEQUENCE, BATCH, block.config.hidden_size)
    hidden_states = torch.randn(shape, generator=generator, dtype=torch.float64)
    hidden_states.requires_grad_()
    output = run_block(block, hidden_states)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found |= {f"output {rank}": output.detach(), f"input {rank}": hidden_states.grad}
    for name, parameter in named(block, path).items():
        local = ".local_experts." in name
        found[name if local else f"{name} {rank}"] = parameter.grad
    return found


def all_trained(files: dict[int, list[Path]]) -> dict[tuple[str, int, bool], dict[str, Tensor]]:
    deep_ep.install()
    return {
        (name, ranks, is_placed): trained(
            CASES[name], ranks, files[ranks][0] if is_placed else None
        )
        for name, ranks in TRAINED
        for is_placed in (False, True)
    }


def write_placements(folder: Path, moe_layers: tuple[int, ...] = LAYERS) -> dict[int, list[Path]]:
    """Files by the number of ranks."""
    written: dict[int, list[Path]] = {}
    for ranks in (2, 4):
        for number, placed in enumerate(placements(ranks, moe_layers)):
            path = folder / f"{ranks}-{number}.json"
            placement.write(path, placed)
            written.setdefault(ranks, []).append(path)
    return written


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of every rank."""
    files = write_placements(tmp_path_factory.mktemp("placements"))
    return run_distributed(all_trained, WORLD_SIZE, files, expert_model_parallel_size=2)


@pytest.mark.parametrize(("name", "ranks"), TRAINED)
def test_bits_are_those_without_a_placement(found: list[Any], name: str, ranks: int) -> None:
    def together(is_placed: bool) -> dict[str, list[Tensor]]:
        """By name, of the ranks that have it: one of each expert data parallel group."""
        values: dict[str, list[Tensor]] = {}
        for of_rank in found:
            for key, value in of_rank[name, ranks, is_placed].items():
                values.setdefault(key, []).append(value)
        return values

    in_order, placed = together(False), together(True)
    assert in_order.keys() == placed.keys()
    routed = [key for key in in_order if "local_experts" in key]
    assert len(routed) == 2 * 2 * 2 * EXPERTS  # initial and gradient, layers, linear layers
    for key, values in in_order.items():
        assert len(values) == len(placed[key])
        # Ranks of one expert data parallel group have one order in both.
        for value, other in zip(values, placed[key], strict=True):
            assert torch.equal(value, other), key
    firsts = [in_order[key][0] for key in routed if key.startswith("initial") and "fc1" in key]
    assert len({value.sum().item() for value in firsts}) == len(firsts)  # or none was moved


def saved_and_loaded(case: Case, files: dict[int, list[Path]], folder: Path) -> dict[str, Any]:
    """Own numbers whose weights differ from those that were saved, by where they were loaded."""
    saved_by = files[4][0]
    block = build(case, 4, saved_by)
    for name, parameter in named(block, saved_by).items():
        if ".local_experts." in name:
            parameter.data.copy_(value_of(name, parameter))
    dist_checkpointing.save(block.sharded_state_dict(), str(folder))
    wrong = {}
    loads = {
        "the same": (4, saved_by),
        "another placement": (4, files[4][1]),
        "none": (4, None),
        "half the ranks, none": (2, None),
        "half the ranks, placed": (2, files[2][1]),
        "one rank": (1, None),
    }
    grouped = case.host.get("moe_grouped_gemm", False)
    for where, (ranks, path) in loads.items():
        grouped = not grouped  # by the other class, and by the same
        block = build(case, ranks, path, moe_grouped_gemm=grouped)
        block.load_state_dict(dist_checkpointing.load(block.sharded_state_dict(), str(folder)))
        wrong[where] = [
            name
            for name, parameter in named(block, path).items()
            if ".local_experts." in name
            and not torch.equal(parameter.data, value_of(name, parameter))
        ]
    return wrong


def value_of(name: str, like: Tensor) -> Tensor:
    """Weights that say whose they are."""
    layer, expert = (int(part) for part in re.findall(r"\.(\d+)\.", f".{name}"))
    base = 1000 * layer + 10 * expert + ("fc2" in name)
    return base + torch.linspace(0, 1, like.numel(), dtype=like.dtype).view_as(like)


@pytest.mark.parametrize("saved", ["sequential", "grouped, layers stacked on disk"])
def test_checkpoints_hold_experts_by_their_own_numbers(tmp_path: Path, saved: str) -> None:
    if saved == "sequential":
        case, files = Case(host=TWO), write_placements(tmp_path)
    else:
        host = {**TWO, "moe_grouped_gemm": True}
        case = Case({"scmoe_shortcut_position": "pos1"}, host, moe_frequency=1)
        files = write_placements(tmp_path, (1, 2, 3, 4))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    ranks = run_distributed(
        saved_and_loaded, WORLD_SIZE, case, files, folder, expert_model_parallel_size=4
    )
    wrong = {where: names for of_rank in ranks for where, names in of_rank.items() if names}
    assert not wrong and len(ranks[0]) == 6
