"""One iteration: its micro-batches, and what data parallelism sends beside them.

A shared expert is dense: every rank has it, and its gradients cross the same links as the
all-to-alls that the shortcut hides. They do so once an iteration, all-to-alls in every micro-batch;
so a shortcut that wins a pair of layers may lose an iteration of few micro-batches.

    gradients     all-reduced once an iteration, with the distributed optimizer reduce-scattered
    parameters    gathered once an iteration, with the distributed optimizer

Without overlap both are awaited. With --overlap-grad-reduce gradients travel beside the backward
pass of the last micro-batch, but for the last bucket, behind which nothing is left; with
--overlap-param-gather parameters beside the forward pass of the first one. All-to-alls have the
link first: what is left is compute beside which nothing travels.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.specs import moe_layer_pattern
from megatron_scmoe.overlap.measure.cost import data_parallel_bytes
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.planner.cluster import Cluster
from megatron_scmoe.planner.memory import Training
from megatron_scmoe.planner.predict import Model, PassTimes, Prediction, stock_seconds
from megatron_scmoe.planner.size import ModelSize, Weights, model_size
from megatron_scmoe.planner.times import changed, exchange_bytes


class GradientTraffic(NamedTuple):
    """What data parallelism sends in an iteration: one rank, mean over pipeline stages."""

    sent: float
    """Bytes."""
    gradients: float
    """Seconds on the link."""
    parameters: float
    """The same."""
    last_bucket: float
    """Share of both that nothing is left to run beside."""


class Work(NamedTuple):
    """A pair of layers and its share of the other layers, in one micro-batch; seconds."""

    seconds: float
    idle_forward: float
    """Of the forward pass, compute beside which no exchange travels."""
    idle_backward: float


class Iteration(NamedTuple):
    """Seconds of a rank."""

    micro_batch: float
    exposed: float
    """Of data parallelism's traffic, what compute waits for."""

    def seconds(self, num_microbatches: int) -> float:
        """Of an iteration."""
        return num_microbatches * self.micro_batch + self.exposed

    def wins_from(self, other: "Iteration") -> int | None:
        """The number of micro-batches from which this one is faster; None where none is enough."""
        gain = other.micro_batch - self.micro_batch
        if gain <= 0:
            return None
        return max(1, math.floor((self.exposed - other.exposed) / gain) + 1)


class Racer(NamedTuple):
    """A model in an iteration."""

    traffic: GradientTraffic
    waiting: Iteration
    """Without overlap of data parallelism's traffic."""
    overlapped: Iteration
    """With --overlap-grad-reduce; parameters as the command line has it."""


@dataclass(frozen=True)
class Race:
    """A shortcut and the stock models that it is compared with, in iterations."""

    num_microbatches: int
    overlaps: bool
    """Whether the command line has --overlap-grad-reduce."""
    shortcut: Racer
    wider: Racer
    """Top-(K+1) without a shared expert."""
    shared: Racer
    """Top-K with a shared expert."""

    def now(self, contender: Racer) -> Iteration:
        return contender.overlapped if self.overlaps else contender.waiting

    def over(self, contender: Racer) -> float:
        """The shortcut's speed-up over another."""
        ours, theirs = (
            self.now(each).seconds(self.num_microbatches) for each in (self.shortcut, contender)
        )
        return theirs / ours


def race(
    args: Namespace,
    config: ScMoEModelConfig,
    model: Model,
    shortcut: Prediction,
    training: Training,
    cluster: Cluster,
) -> Race:
    """Iterations of a shortcut and of the stock models.

    Args:
        args: validated.
        config: the model with its shortcut.
        model: its times.
        shortcut: the position and its slots.

    Raises:
        ValueError: gradients leave the node, and no network is known.
    """
    units = sum(moe_layer_pattern(config.transformer)) / args.pipeline_model_parallel_size

    def contender(built: ScMoEModelConfig, work: Work) -> Racer:
        size = model_size(built, args.seq_length, args.micro_batch_size)
        own = traffic(args, size, training, cluster)
        parameters = args.overlap_param_gather
        return Racer(
            own,
            *(
                Iteration(units * work.seconds, exposed_seconds(own, work, units, *overlap))
                for overlap in ((False, False), (True, parameters))
            ),
        )

    return Race(
        num_microbatches=training.num_microbatches,
        overlaps=args.overlap_grad_reduce,
        shortcut=contender(config, _work_of_shortcut(model, shortcut)),
        wider=contender(stock(config, shared_expert=False), _work_of_stock(model, wider=True)),
        shared=contender(stock(config, shared_expert=True), _work_of_stock(model, wider=False)),
    )


def stock(config: ScMoEModelConfig, shared_expert: bool) -> ScMoEModelConfig:
    """The model without its shortcut, and with or without its shared expert."""
    none = {} if shared_expert else {"moe_shared_expert_intermediate_size": None}
    without = changed(config, moe_shared_expert_gate=False, **none)
    without.scmoe = ScMoEConfig()
    return without


def traffic(
    args: Namespace, size: ModelSize, training: Training, cluster: Cluster
) -> GradientTraffic:
    """What data parallelism sends.

    Raises:
        ValueError: it leaves the node, and no network is known.
    """
    config = size.config
    shards = training.optimizer_instances is not None
    bucket = _bucket_parameters(args, size.parameters)
    sent = gradients = parameters = last = 0.0
    for held, ranks, stride in rings(args, size):
        of_gradients = cluster.ring_seconds(held * training.gradient_bytes, ranks, stride)
        of_parameters = cluster.ring_seconds(held * config.params_dtype.itemsize, ranks, stride)
        # An all-reduce is a reduce-scatter and an all-gather.
        own = (of_gradients, of_parameters) if shards else (2 * of_gradients, 0.0)
        sent += _sent(config, training, held, ranks)
        gradients, parameters = gradients + own[0], parameters + own[1]
        last += sum(own) * min(1.0, bucket / held if held else 1.0)
    total = gradients + parameters
    return GradientTraffic(sent, gradients, parameters, last / total if total else 0.0)


def rings(args: Namespace, size: ModelSize) -> list[tuple[float, int, int]]:
    """Of dense parameters and of experts: parameters of a rank, mean over pipeline stages, ranks
    that hold the same, and their distance."""
    config, stages = size.config, args.pipeline_model_parallel_size
    weights = sum((operator.weights for _, operator in size.operators), Weights())
    expert_ranks = args.expert_model_parallel_size * args.expert_tensor_parallel_size
    return [
        (
            weights.dense_on_rank(config) / stages,
            args.data_parallel_size * args.context_parallel_size,
            args.tensor_model_parallel_size,
        ),
        (
            weights.expert_on_rank(config) / stages,
            args.world_size // (stages * expert_ranks),
            expert_ranks,
        ),
    ]


def _bucket_parameters(args: Namespace, parameters: int) -> float:
    """The host's (training/training.py::resolve_ddp_bucket_size)."""
    if args.ddp_num_buckets is not None:
        return parameters / args.ddp_num_buckets
    ranks = args.data_parallel_size * args.context_parallel_size
    return args.ddp_bucket_size or max(40_000_000, 1_000_000 * ranks)


def exposed_seconds(
    traffic: GradientTraffic, work: Work, units: float, gradients: bool, parameters: bool
) -> float:
    """What compute waits for.

    Args:
        units: MoE layers of a rank.
        gradients, parameters: whether they travel beside compute.
    """
    return sum(
        max(seconds - units * idle, traffic.last_bucket * seconds) if beside else seconds
        for seconds, idle, beside in (
            (traffic.gradients, work.idle_backward, gradients),
            (traffic.parameters, work.idle_forward, parameters),
        )
    )


def micro_batches_to_win(args: Namespace, config: ScMoEModelConfig, training: Training) -> float:
    """On a link so slow that bytes alone count: the micro-batches of an iteration beyond which the
    rows that top-(K+1) sends more outweigh the gradients of the shared experts."""
    transformer = config.transformer
    topk, expert_ranks = transformer.moe_router_topk, transformer.expert_model_parallel_size
    more, fewer = (sum(exchange_bytes(args, transformer, k)) for k in (topk + 1, topk))
    layers = sum(moe_layer_pattern(transformer)) / args.pipeline_model_parallel_size
    rows = 2 * layers * (more - fewer) * (expert_ranks - 1) / expert_ranks  # backward as forward
    with_shared, without = (
        rings(args, model_size(stock(config, shared), args.seq_length, args.micro_batch_size))[0]
        for shared in (True, False)
    )
    held, ranks = with_shared[0] - without[0], with_shared[1]
    gradients = _sent(transformer, training, held, ranks)
    return gradients / rows if rows else 0.0


def _sent(config: TransformerConfig, training: Training, held: float, ranks: int) -> float:
    gathered = None if training.optimizer_instances is None else config.params_dtype.itemsize
    return data_parallel_bytes(held, ranks, training.gradient_bytes, gathered)


# Compute beside which no exchange travels. ----------------------------------------------------


def _compute(model: Model, times: PassTimes, experts: float, shared_expert: bool = True) -> float:
    """Of a pair and its share of the other layers, in one pass."""
    dense = math.fsum(
        times.dense[step]
        for step in model.operators
        if shared_expert or step is not Step.SHARED_EXPERT
    )
    everything = math.fsum(math.fsum(each.dense.values()) for each in model.passes)
    return dense + experts + model.rest * math.fsum(times.dense.values()) / everything


def _work_of_shortcut(model: Model, prediction: Prediction) -> Work:
    routes = 1 + len(model.further)
    forward, backward = (
        _compute(model, model.passes[at], routes * model.passes[at].routed.experts)
        - prediction.passes[at].hidden
        for at in (0, -1)
    )
    return Work(prediction.seconds + model.rest, forward, backward)


def _work_of_stock(model: Model, wider: bool) -> Work:
    shared = not wider
    forward, backward = (
        _compute(model, times, (times.wider if wider else times.routed).experts, shared)
        for times in (model.passes[0], model.passes[-1])
    )
    return Work(stock_seconds(model, wider, shared) + model.rest, forward, backward)
