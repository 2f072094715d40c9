"""One checkpoint, every split: pipeline stages, virtual stages and experts over ranks.

A cut that would run through a unit is refused.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch import distributed as dist

from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from tests.distributed_utils import run_distributed
from tests.functional_tests.forked import speak_at_once, start_ranks
from tests.functional_tests.launch import SCRIPT, TINY_MODEL, TINY_MOE
from tests.limits import JOB_S
from tests.models import Case

WORLD_SIZE = 4
VOCABULARY, SEQUENCE, BATCH, MICRO_BATCHES = 32, 6, 2, 4
NUM_LAYERS = 8
TOLERANCE = 1e-7  # the host's cross entropy is float32

# Sizes of the process groups, and what else the config needs to know.
Layout = tuple[dict[str, int], dict[str, Any]]
LAYOUTS: dict[str, Layout] = {
    "PP 1": ({}, {}),
    "PP 2": ({"pipeline_model_parallel_size": 2}, {}),
    "PP 2, first stage short": (
        {"pipeline_model_parallel_size": 2},
        {"num_layers_in_first_pipeline_stage": 2},
    ),
    "PP 2, EP 2": ({"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, {}),
    "VPP 2, PP 2, EP 2": (
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
        },
        # As the command line sets them: batched messages need more than two stages.
        {"overlap_p2p_comm": True, "batch_p2p_comm": False},
    ),
    "EP 4": ({"expert_model_parallel_size": 4}, {}),
}
POSITIONS = ("pos1", "pos2", "pos3")
# Every split with one position, and with every position those that say most.
SPLITS = [
    (position, name)
    for position in POSITIONS
    for name in LAYOUTS
    if name in ("PP 2, first stage short", "VPP 2, PP 2, EP 2")
    or (position == "pos2" and name != "PP 1")
]


def build_model(position: str, sizes: dict[str, int], host: dict[str, Any]) -> nn.ModuleList:
    """This rank's model chunks, by the entry script's builder."""
    case = Case(
        scmoe={"scmoe_shortcut_position": position},
        host={"moe_router_topk": 2, **sizes, **host},
        num_layers=NUM_LAYERS,
    )
    model_config = ScMoEModelConfig(
        transformer=case.host_config(),
        scmoe=case.scmoe_config(),
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
    )
    virtual_size = sizes.get("virtual_pipeline_model_parallel_size")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return nn.ModuleList(
        ScMoEModelBuilder(model_config).build_model(groups, vp_stage=stage).double()
        for stage in (range(virtual_size) if virtual_size else [None])
    )


def sharded_state_dict(chunks: nn.ModuleList) -> dict[str, Any]:
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}


def save(chunks: nn.ModuleList, folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(sharded_state_dict(chunks), folder)


def load(chunks: nn.ModuleList, folder: Path) -> None:
    loaded = dist_checkpointing.load(sharded_state_dict(chunks), folder)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"])


def save_weights(position: str, folder: Path) -> None:
    """Random weights of order one, from one stage."""
    chunks = build_model(position, *LAYOUTS["PP 1"])
    for index, parameter in enumerate(chunks.parameters()):
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.3 * noise)
    save(chunks, folder)


def micro_batches() -> Iterator[Tensor]:
    """The same on every rank, so that losses need no reduction; [b, s + 1]."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(MICRO_BATCHES):
        yield torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)


def forward_step(batches: Iterator[Tensor], model: GPTModel) -> tuple[Tensor, partial]:
    batch = next(batches)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    output = model(batch[:, :-1], positions, mask, labels=batch[:, 1:])
    return output, _loss


def _loss(losses: Tensor) -> tuple[Tensor, dict[str, float]]:
    loss = losses.double().mean()
    return loss, {"loss": loss.item()}


def train(chunks: nn.ModuleList) -> list[float]:
    """Losses of the micro-batches, known to the last stage; leaves gradients behind."""
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[micro_batches() for _ in chunks],
        model=list(chunks),
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
    )
    return [report["loss"] for report in reports]


def run_layout(
    position: str, layout: Layout, weights: Path, folder: Path
) -> tuple[list[float], dict[str, Tensor]]:
    """Load the weights, train one step: losses, and gradients by their names on disk.

    Gradients are written as if they were the weights: the checkpoint puts the parts of all ranks
    together. All ranks see the same data, so experts get their gradient once from each EP rank.
    """
    sizes, host = layout
    chunks = build_model(position, sizes, host)
    load(chunks, weights)
    losses = train(chunks)
    with torch.no_grad():
        for name, parameter in chunks.named_parameters():
            repeats = sizes.get("expert_model_parallel_size", 1) if ".experts." in name else 1
            parameter.copy_(parameter.grad / repeats)
    save(chunks, folder)
    dist.barrier()
    gradients = dist_checkpointing.load_plain_tensors(str(folder)) if dist.get_rank() == 0 else {}
    return losses, gradients


def run_all(folder: Path) -> dict[tuple[str, str], tuple[list[float], dict[str, Tensor]]]:
    weights = {position: folder / f"weights {position}" for position in POSITIONS}
    results = {}
    for name, layout in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**layout[0])
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        for position in POSITIONS:
            if name == "PP 1":
                save_weights(position, weights[position])
            elif (position, name) not in SPLITS:
                continue
            gradients = folder / f"{position} {name}"
            results[position, name] = run_layout(position, layout, weights[position], gradients)
    return results


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[tuple[str, str], tuple[list[float], dict[str, Tensor]]]]:
    """What every rank has got."""
    return run_distributed(run_all, WORLD_SIZE, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(("position", "split"), SPLITS)
def test_split_equals_one_stage(results: list, position: str, split: str) -> None:
    expected_losses, expected = results[0][position, "PP 1"]
    # Gradients come together on rank 0, the losses at the last stage.
    assert len(expected_losses) == MICRO_BATCHES
    reports = [losses for losses, _ in (rank[position, split] for rank in results) if losses]
    pipeline_size = LAYOUTS[split][0].get("pipeline_model_parallel_size", 1)
    assert len(reports) == WORLD_SIZE // pipeline_size
    for losses in reports:
        assert losses == pytest.approx(expected_losses, abs=TOLERANCE)

    found = results[0][position, split][1]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(found[name], gradient, rtol=0, atol=TOLERANCE), name


def test_names_on_disk_are_numbers_of_attention_layers(results: list) -> None:
    """Wherever the shortcut begins; its own norm is the only addition to the stock names."""
    names = [set(results[0][position, "PP 1"][1]) for position in POSITIONS]
    assert names[0] == names[1] == names[2]
    for layer in range(NUM_LAYERS):
        assert f"decoder.layers.{layer}.self_attention.linear_qkv.weight" in names[0]
        for norm in ("shortcut_layernorm", "pre_mlp_layernorm"):
            is_moe = layer % 2 == 1
            assert (f"decoder.layers.{layer}.{norm}.weight" in names[0]) == is_moe


def test_stage_that_cuts_a_unit_is_refused(tmp_path: Path) -> None:
    """By every rank, before they meet; a rank that nobody stops says why itself."""
    units = ["--num-layers", "6", "--moe-layer-freq", "([0,1]*3)"]
    shortcut = ["--scmoe-shortcut-position", "pos2", "--pipeline-model-parallel-size", "2"]
    outputs = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
    options = [*TINY_MODEL, *TINY_MOE, *units, *shortcut, "--mock-data"]
    ranks = start_ranks(options, outputs, hook=speak_at_once)
    for rank in ranks:
        rank.join(JOB_S)
        rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        text = output.read_text()
        assert rank.exitcode == 2, text
        assert "Traceback" not in text
        (error,) = [line for line in text.splitlines() if line.startswith(f"{SCRIPT}: error: ")]
        assert "inside the unit of layers 3 and 4" in error
        assert "--pipeline-model-parallel-layout 'Etttt|ttL'" in error
