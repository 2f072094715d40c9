"""Times of a pair's parts from FLOPs and bytes on a cluster."""

import copy
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.specs import moe_layer_pattern, unit_class
from megatron_scmoe.overlap.measure.cost import RoutedTimes
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.planner.cluster import Cluster
from megatron_scmoe.planner.copies import copies_of
from megatron_scmoe.planner.predict import DENSE_LAYER, MOE_LAYER, Model, PassTimes
from megatron_scmoe.planner.size import ModelSize, model_size

_ROUTER_WEIGHT_BYTES = 4
# Gradients of the input and of the weights, a multiplication of the same size for each.
_BACKWARD_FACTOR = 2


def changed(config: ScMoEModelConfig, **options: Any) -> ScMoEModelConfig:
    """The same model with other options of its TransformerConfig; the host's checks are not
    repeated."""
    other = copy.copy(config)
    other.transformer = copy.copy(config.transformer)
    for name, value in options.items():
        setattr(other.transformer, name, value)
    return other


def tokens_per_rank(args: Namespace, config: TransformerConfig) -> int:
    """Tokens of one micro-batch that a rank routes."""
    ranks = config.context_parallel_size * config.tensor_model_parallel_size
    return args.seq_length * args.micro_batch_size // ranks


def is_paired(config: TransformerConfig) -> bool:
    """Whether a dense layer stands in front of every MoE layer."""
    pattern = moe_layer_pattern(config)
    before = [1, *pattern[:-1]]
    return all(not (here and there) for there, here in zip(before, pattern, strict=True))


def step_flops(size: ModelSize) -> dict[Step, int]:
    """FLOPs of the experts and of every dense operator of the model, forward, one token."""
    layers = {"experts" in layer.operators: layer for layer in size.layers}
    steps = {True: (*MOE_LAYER, Step.EXPERTS), False: DENSE_LAYER}
    return {
        step: layer.operators[step.value.removeprefix("dense_")].flops
        for is_moe, layer in layers.items()
        for step in steps[is_moe]
    }


def padding_factor(config: TransformerConfig) -> float:
    """Rows that travel and are computed, for each one that was routed."""
    if config.moe_pad_expert_input_to_capacity:
        return config.moe_expert_capacity_factor
    return 1.0


def exchange_bytes(
    args: Namespace, config: TransformerConfig, topk: int, copies: str | None = None
) -> tuple[float, float]:
    """Bytes that a rank sends in dispatch and in combine, to itself included; with a row for every
    node those that cross.

    Rows of hidden states in the parameters' precision, in dispatch each with the router weights of
    the experts that it may be for; none for experts at home.

    Args:
        copies: what there is a row for; None for --scmoe-dispatch-copies.
    """
    own = copies_of(args, config, topk)
    experts = (config.num_moe_experts or 1) // config.expert_model_parallel_size
    per_token, weights = {
        "expert": (own.experts * padding_factor(config), 1),
        "rank": (own.ranks, experts),
        "node": (own.nodes, experts * own.ranks_per_node),
    }[copies or args.scmoe_dispatch_copies]
    rows = tokens_per_rank(args, config) * per_token
    row = config.hidden_size * config.params_dtype.itemsize
    return rows * (row + weights * _ROUTER_WEIGHT_BYTES), rows * row


def with_exchanges(
    times: PassTimes, args: Namespace, config: TransformerConfig, cluster: Cluster
) -> PassTimes:
    """The same compute with the cluster's all-to-alls; gradients travel as activations do.

    Raises:
        ValueError: the expert parallel group leaves the node and no network is known.
    """

    def exchanged(routed: RoutedTimes, topk: int) -> RoutedTimes:
        ranks, stride = config.expert_model_parallel_size, config.expert_tensor_parallel_size
        dispatch, combine = (
            cluster.all_to_all_seconds(sent, ranks, stride)
            for sent in exchange_bytes(args, config, topk)
        )
        if args.scmoe_dispatch_copies == "node":
            across = exchange_bytes(args, config, topk, "node")
            dispatch, combine = (
                cluster.two_hops_seconds(*sent, ranks, stride)
                for sent in zip(across, exchange_bytes(args, config, topk, "rank"), strict=True)
            )
        return routed._replace(dispatch=dispatch, combine=combine)

    topk = config.moe_router_topk
    return replace(
        times,
        routed=exchanged(times.routed, topk),
        wider=exchanged(times.wider, topk + 1),
    )


def computed_model(
    args: Namespace, config: ScMoEModelConfig, cluster: Cluster, flops_per_second: float
) -> Model:
    """A model's times on a cluster whose GPUs reach `flops_per_second`.

    Raises:
        ValueError: the expert parallel group leaves the node and no network is known, or the model
            has a part that is not counted.
    """
    size = model_size(config, args.seq_length, args.micro_batch_size)
    transformer = config.transformer
    topk = transformer.moe_router_topk
    further = unit_class(config.scmoe).further_routes
    seconds_per_flop = tokens_per_rank(args, transformer) / flops_per_second

    def one_pass(factor: int) -> PassTimes:
        dense = {
            step: factor * flops * seconds_per_flop for step, flops in step_flops(size).items()
        }
        experts = dense.pop(Step.EXPERTS) * padding_factor(transformer) / (1 + len(further))
        compute = PassTimes(
            dense=dense,
            routed=RoutedTimes(experts, 0.0, 0.0),
            wider=RoutedTimes(experts * (topk + 1) / topk, 0.0, 0.0),
        )
        return with_exchanges(compute, args, transformer, cluster)

    passes = all_passes(transformer, one_pass(1), one_pass(_BACKWARD_FACTOR))
    pattern, paired = moe_layer_pattern(transformer), is_paired(transformer)
    dense_layers = len(pattern) - sum(pattern) - (sum(pattern) if paired else 0)
    # Full recomputation repeats layers, not the output layer.
    rest = (
        dense_layers * sum(times.dense.get(step, 0) for times in passes for step in DENSE_LAYER)
        + (1 + _BACKWARD_FACTOR) * size.output.flops * seconds_per_flop
    )
    return Model(passes, paired, rest / sum(pattern), further)


def all_passes(
    config: TransformerConfig, forward: PassTimes, backward: PassTimes
) -> Sequence[PassTimes]:
    """What one micro-batch runs: forward again before backward with full recomputation."""
    again = [forward] if config.recompute_granularity == "full" else []
    return [forward, *again, backward]
