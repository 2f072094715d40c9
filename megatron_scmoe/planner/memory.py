"""Bytes on the fullest GPU: weights, gradients and optimizer exactly, activations estimated."""

from argparse import Namespace
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.layer_specs import moe_layer_pattern, pipeline_stages
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.planner.counts import (
    Parameters,
    layer_parameters,
    norm_parameters,
    saved_activations,
)
from megatron_scmoe.planner.predict import DENSE_LAYER, MOE_LAYER


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline stage."""

    stage: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """An estimate."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def model_parameters(args: Namespace, config: TransformerConfig, scmoe: ScMoEConfig) -> Parameters:
    """Parameters of the whole model."""
    stages = [
        _stage_parameters(args, config, scmoe, stage)
        for stage in range(config.pipeline_model_parallel_size)
    ]
    total = sum(stages, Parameters(0, 0, 0))
    if config.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights:
        # The last stage holds a copy of the first one's.
        total += Parameters(-config.hidden_size * args.padded_vocab_size, 0, 0)
    return total


def fullest_gpu(
    args: Namespace, config: TransformerConfig, scmoe: ScMoEConfig, world_size: int
) -> Memory:
    """Memory of the pipeline stage that needs most."""
    stages = range(config.pipeline_model_parallel_size)
    return max(
        (_stage_memory(args, config, scmoe, world_size, stage) for stage in stages),
        key=lambda memory: memory.total,
    )


def micro_batches(args: Namespace) -> int:
    """Micro-batches of one data parallel rank in one iteration."""
    return args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)


def _stage_memory(
    args: Namespace, config: TransformerConfig, scmoe: ScMoEConfig, world_size: int, stage: int
) -> Memory:
    whole = _stage_parameters(args, config, scmoe, stage)
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    expert_ranks = config.expert_tensor_parallel_size * config.expert_model_parallel_size
    dense = whole.dense // tp + whole.replicated
    experts = whole.experts // expert_ranks
    if args.use_distributed_optimizer:
        shards = (world_size // (tp * pp), world_size // (expert_ranks * pp))
    else:
        shards = (1, 1)
    weight_bytes = config.params_dtype.itemsize
    gradient_bytes = 4 if args.accumulate_allreduce_grads_in_fp32 else weight_bytes
    return Memory(
        stage=stage,
        parameters=dense + experts,
        weights=weight_bytes * (dense + experts),
        gradients=gradient_bytes * (dense + experts),
        optimizer=_optimizer_bytes(args, config) * (dense / shards[0] + experts / shards[1]),
        activations=_activation_bytes(args, config, stage),
    )


def _optimizer_bytes(args: Namespace, config: TransformerConfig) -> int:
    """Adam's two moments, and a copy of the weights in higher precision if they have a lower."""
    moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    copy = args.main_params_dtype.itemsize if config.params_dtype != torch.float32 else 0
    return moments + copy


def _layers(config: TransformerConfig, stage: int) -> list[int]:
    """Attention layers of a pipeline rank, all its virtual stages."""
    return [layer for virtual in pipeline_stages(config) for layer in virtual[stage]]


def _stage_parameters(
    args: Namespace, config: TransformerConfig, scmoe: ScMoEConfig, stage: int
) -> Parameters:
    total = Parameters(0, 0, 0)
    for layer in _layers(config, stage):
        total += layer_parameters(config, scmoe, layer)
    embedding = config.hidden_size * args.padded_vocab_size
    first, last = stage == 0, stage == config.pipeline_model_parallel_size - 1
    if first:
        total += Parameters(embedding, 0, 0)
        if args.add_position_embedding and args.position_embedding_type == "learned_absolute":
            total += Parameters(0, config.hidden_size * args.max_position_embeddings, 0)
    if last:
        total += Parameters(0, norm_parameters(config, config.hidden_size), 0)
        if args.untie_embeddings_and_output_weights or not first:
            total += Parameters(embedding, 0, 0)
    return total


def _activation_bytes(args: Namespace, config: TransformerConfig, stage: int) -> float:
    """Saved tensors of all micro-batches in flight, and the last stage's logits once, in float32.

    Flash attention, sequence parallelism, routed rows spread evenly; no allocator overhead, no
    communication buffers. Of recomputation only --recompute-granularity full is modelled, as if
    every layer kept its input alone.
    """
    pp = config.pipeline_model_parallel_size
    tp = config.tensor_model_parallel_size
    tokens = args.seq_length * args.micro_batch_size // (config.context_parallel_size * tp)
    pattern = moe_layer_pattern(config)
    kept = 0
    for layer in _layers(config, stage):
        if config.recompute_granularity == "full":
            kept += config.hidden_size
        else:
            steps = (*MOE_LAYER, Step.EXPERTS) if pattern[layer] else DENSE_LAYER
            kept += sum(saved_activations(config, step) for step in steps)
    in_flight: float = min(pp - stage, micro_batches(args))
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual is not None and pp > 1:
        # arXiv:2205.05198, section 4.2.3
        in_flight = pp * (1 + (pp - 1) / (pp * virtual))
    logits = tokens * args.padded_vocab_size * 4 if stage == pp - 1 else 0
    return tokens * kept * in_flight * config.params_dtype.itemsize + logits
