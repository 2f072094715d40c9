"""What a rank holds, against models, optimizers and pipeline schedules built on gloo ranks.

Parameters, weights, gradients and optimizer state, exact, at EP, TP, expert TP, uneven and
interleaved PP, with and without the distributed optimizer; activations at the peak of the schedule
within 2 %.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.planner.memory import RankMemory, Training, memory_of_ranks
from megatron_scmoe.planner.size import model_size
from tests.distributed_utils import run_distributed
from tests.kept_bytes import KeptBytes
from tests.models import Case

VOCABULARY, SEQUENCE, BATCH, NUM_LAYERS = 32, 16, 2, 8
TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SHORT_FIRST = {"num_layers_in_first_pipeline_stage": 2}
INTERLEAVED = {
    "virtual_pipeline_model_parallel_size": 2,
    "overlap_p2p_comm": True,
    "batch_p2p_comm": False,
}
SP = {"sequence_parallel": True}
BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}


@dataclass
class GroupSizes:
    """Sizes of the process groups, and what else the config and the run need to know."""

    ranks: int
    sizes: dict[str, int]
    host: dict[str, Any] = field(default_factory=dict)
    scmoe: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tied: bool = True


def model_config(layout: GroupSizes, **host: Any) -> ScMoEModelConfig:
    fp32 = {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    case = Case(layout.scmoe, {**fp32, **layout.sizes, **layout.host, **host}, 2, NUM_LAYERS)
    return ScMoEModelConfig(
        transformer=case.host_config(),
        scmoe=case.scmoe_config(),
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        share_embeddings_and_output_weights=layout.tied,
        position_embedding_type="none",
    )


def expected(layout: GroupSizes, model: ScMoEModelConfig) -> list[RankMemory]:
    size = model_size(model, SEQUENCE, BATCH)
    in_fp32 = model.transformer.params_dtype == torch.float32
    training = Training(
        world_size=layout.ranks, num_microbatches=4, optimizer_bytes=8 if in_fp32 else 12
    )
    return memory_of_ranks(model, size, replace(training, **layout.training))


# Weights, gradients, optimizer. -----------------------------------------------------------------

STATES = {
    "EP 2": GroupSizes(2, EP2),
    "EP 2, data parallel 2, distributed optimizer": GroupSizes(
        4, EP2, training={"optimizer_instances": 1}
    ),
    "PP 2, 2 + 6 layers, distributed optimizer, bf16": GroupSizes(
        4, PP2, SHORT_FIRST | BF16, {"scmoe_combine": "cg2"}, {"optimizer_instances": 1}
    ),
    "PP 2, interleaved, untied": GroupSizes(2, PP2, INTERLEAVED, tied=False),
    "TP 2, expert TP 1, EP 2, bf16": GroupSizes(
        2, {**TP2, **EP2, "expert_tensor_parallel_size": 1}, SP | BF16, {"scmoe_post_norm": True}
    ),
    "TP 2, expert TP 2, PP 2": GroupSizes(4, {**TP2, **PP2, "expert_tensor_parallel_size": 2}, SP),
    "EP 2, PP 2, stock": GroupSizes(
        4, {**EP2, **PP2}, SHORT_FIRST, {"scmoe_shortcut_position": "none"}
    ),
}


def held(layout: GroupSizes) -> tuple[int, int, int]:
    """Pipeline rank, parameters, and bytes of weights, gradients and optimizer state, of this rank
    after one step."""
    model = model_config(layout)
    distributed = "optimizer_instances" in layout.training
    chunks = ScMoEModelBuilder(model).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
        ),
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3,
            bf16=model.transformer.bf16,
            params_dtype=model.transformer.params_dtype,
            use_distributed_optimizer=distributed,
        ),
        chunks,
    )
    optimizer.step()
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    gradients = [parameter.main_grad for parameter in weights]
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    states = [
        tensor
        for torch_optimizer in inner
        for state in torch_optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    main = [
        parameter
        for torch_optimizer in inner
        for group in torch_optimizer.param_groups
        for parameter in group["params"]
        if parameter.untyped_storage().data_ptr() not in own
    ]
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        sum(weight.numel() for weight in weights),
        sum(tensor.nbytes for tensor in (*weights, *gradients, *states, *main)),
    )


@pytest.mark.parametrize("name", STATES)
def test_weights_and_optimizer_state(name: str) -> None:
    """Exact, on the average of a stage's ranks: the distributed optimizer cuts its buffers in equal
    parts wherever a parameter ends."""
    layout = STATES[name]
    ranks = run_distributed(held, layout.ranks, layout, **layout.sizes)
    for stage in expected(layout, model_config(layout)):
        bytes_held = []
        for pp_rank, parameters, rank_bytes in ranks:
            if pp_rank == stage.pipeline_rank:
                assert parameters == stage.parameters
                bytes_held.append(rank_bytes)
        mean = sum(bytes_held) / len(bytes_held)
        assert stage.weight_and_optimizer_bytes == pytest.approx(mean, rel=1e-12)


# Activations. -----------------------------------------------------------------------------------

WIDE = {
    "hidden_size": 128,
    "kv_channels": 32,
    "ffn_hidden_size": 192,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 160,
    # Every expert gets every token: routing is balanced.
    "moe_router_topk": 4,
    "normalization": "LayerNorm",
    "bias_activation_fusion": True,
    "attention_softmax_in_fp32": True,
}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
ACTIVATIONS = {
    "PP 2, 2 + 6 layers": GroupSizes(2, PP2, SHORT_FIRST),
    "PP 2, interleaved": GroupSizes(2, PP2, INTERLEAVED),
    "PP 2, three micro-batches for four stages": GroupSizes(
        4, {"pipeline_model_parallel_size": 4}, training={"num_microbatches": 3}
    ),
    "TP 2, EP 2": GroupSizes(2, {**TP2, **EP2, "expert_tensor_parallel_size": 1}, SP),
    "expert TP 2": GroupSizes(2, {"expert_tensor_parallel_size": 2}),
    "PP 2, full recomputation": GroupSizes(2, PP2, FULL | {"recompute_method": "uniform"}),
    "PP 2, block recomputation": GroupSizes(2, PP2, FULL | {"recompute_method": "block"}),
}


def forward_step(batches, model):
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    output = model(tokens, tokens, mask, labels=tokens)
    return output, partial(lambda losses: (losses.mean(), {}))


def peak(layout: GroupSizes) -> tuple[int, int]:
    """Pipeline rank, and most bytes kept at any time of one step."""
    model = model_config(layout, **WIDE)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = [
        ScMoEModelBuilder(model).build_model(groups, vp_stage=stage)
        for stage in range(model.transformer.virtual_pipeline_model_parallel_size or 1)
    ]
    kept = KeptBytes(chunks)
    with kept.measure():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(()) for _ in chunks],
            model=chunks,
            num_microbatches=layout.training.get("num_microbatches", 4),
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )
    dist.barrier()
    return parallel_state.get_pipeline_model_parallel_rank(), kept.peak


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_the_peak_of_the_schedule(name: str) -> None:
    """Within 2 %: indices and masks of the routing are not counted."""
    layout = ACTIVATIONS[name]
    sizes = dict(layout.sizes)
    if "virtual_pipeline_model_parallel_size" in layout.host:
        sizes["virtual_pipeline_model_parallel_size"] = 2
    ranks = run_distributed(peak, layout.ranks, layout, **sizes)
    stages = expected(layout, model_config(layout, **WIDE))
    for pp_rank, measured in ranks:
        assert stages[pp_rank].activation_bytes == pytest.approx(measured, rel=0.02)
