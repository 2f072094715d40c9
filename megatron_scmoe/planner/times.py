"""Times of a pair's parts from FLOPs and bytes on a cluster."""

import copy
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.layer_specs import moe_layer_pattern
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.planner.cluster import Cluster
from megatron_scmoe.planner.counts import (
    BACKWARD_FACTOR,
    forward_flops,
    logits_flops,
    rows_per_token,
)
from megatron_scmoe.planner.predict import DENSE_LAYER, PAIR, Model, PassTimes, Routed

_ROUTER_WEIGHT_BYTES = 4


def changed(config: TransformerConfig, **options: Any) -> TransformerConfig:
    """The same model with some options changed; the host's checks are not repeated."""
    other = copy.copy(config)
    for name, value in options.items():
        setattr(other, name, value)
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


def exchange_bytes(args: Namespace, config: TransformerConfig) -> tuple[float, float]:
    """Bytes that a rank sends in dispatch and in combine, to itself included.

    Rows of hidden states in the parameters' precision, in dispatch each with its router weight.
    """
    rows = tokens_per_rank(args, config) * rows_per_token(config)
    row = config.hidden_size * config.params_dtype.itemsize
    return rows * (row + _ROUTER_WEIGHT_BYTES), rows * row


def with_exchanges(
    times: PassTimes, args: Namespace, config: TransformerConfig, cluster: Cluster
) -> PassTimes:
    """The same compute with the cluster's all-to-alls; gradients travel as activations do.

    Raises:
        ValueError: the expert parallel group leaves the node and no network is known.
    """

    def exchanged(routed: Routed, topk: int) -> Routed:
        dispatch, combine = (
            cluster.all_to_all_seconds(
                sent, config.expert_model_parallel_size, config.expert_tensor_parallel_size
            )
            for sent in exchange_bytes(args, changed(config, moe_router_topk=topk))
        )
        return replace(routed, dispatch=dispatch, combine=combine)

    topk = config.moe_router_topk
    return replace(
        times,
        routed=exchanged(times.routed, topk),
        wider=exchanged(times.wider, topk + 1),
    )


def computed_model(
    args: Namespace, config: TransformerConfig, cluster: Cluster, flops_per_second: float
) -> Model:
    """A model's times on a cluster whose GPUs reach `flops_per_second`.

    Raises:
        ValueError: the expert parallel group leaves the node and no network is known.
    """
    tokens = tokens_per_rank(args, config)

    def seconds(step: Step, factor: float) -> float:
        flops = tokens * forward_flops(config, step, args.seq_length)
        return factor * flops / flops_per_second

    def one_pass(factor: float) -> PassTimes:
        experts = seconds(Step.EXPERTS, factor)
        compute = PassTimes(
            dense={step: seconds(step, factor) for step in PAIR},
            routed=Routed(experts, 0.0, 0.0),
            wider=Routed(experts * (config.moe_router_topk + 1) / config.moe_router_topk, 0.0, 0.0),
        )
        return with_exchanges(compute, args, config, cluster)

    passes = all_passes(config, one_pass(1.0), one_pass(BACKWARD_FACTOR))
    pattern = moe_layer_pattern(config)
    dense_layers = len(pattern) - sum(pattern) - (sum(pattern) if is_paired(config) else 0)
    logits = tokens * logits_flops(config, args.padded_vocab_size)
    # Full recomputation repeats layers, not the output layer.
    rest = (
        dense_layers * sum(times.dense[step] for times in passes for step in DENSE_LAYER)
        + (1 + BACKWARD_FACTOR) * logits / flops_per_second
    )
    return Model(passes, is_paired(config), rest / sum(pattern))


def all_passes(
    config: TransformerConfig, forward: PassTimes, backward: PassTimes
) -> Sequence[PassTimes]:
    """What one micro-batch runs: forward again before backward with full recomputation."""
    again = [forward] if config.recompute_granularity == "full" else []
    return [forward, *again, backward]
