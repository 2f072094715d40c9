"""The plan of one command line: every position and slot, every EP degree, more GPUs, memory."""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from megatron_scmoe.arguments import model_config_from_args
from megatron_scmoe.checks.shortcut import check_model
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.specs import unit_class
from megatron_scmoe.overlap.schedule import POSITIONS, Slots, window
from megatron_scmoe.planner.cluster import Cluster
from megatron_scmoe.planner.iteration import Race, race
from megatron_scmoe.planner.measured import CheckedPrediction, Measurement, compare
from megatron_scmoe.planner.memory import RankMemory, Training, memory_of_ranks, training_from_args
from megatron_scmoe.planner.predict import (
    Model,
    PassTimes,
    Prediction,
    predict,
    predict_best,
    stock_seconds,
)
from megatron_scmoe.planner.size import ModelSize, model_size
from megatron_scmoe.planner.times import (
    all_passes,
    changed,
    computed_model,
    is_paired,
    with_exchanges,
)
from megatron_scmoe.planner.twin import without_shortcut

LARGEST_EP = 4096
EXTRAPOLATED_GPUS = tuple(64 * 2**power for power in range(7))
"""64, 128, ... 4096."""


@dataclass(frozen=True)
class TimesFrom:
    """What times are made of.

    Attributes:
        cluster: None where only measured times are known.
        flops_per_second: that a GPU reaches; None where compute is measured.
        measurement: of compute, and maybe of exchanges at the EP degree of the command line.
    """

    cluster: Cluster | None
    flops_per_second: float | None
    measurement: Measurement | None

    def model(
        self, args: Namespace, config: ScMoEModelConfig, measured_exchanges: bool = True
    ) -> Model:
        """The times of a model; `measured_exchanges` prefers measured ones to the cluster's."""
        if self.measurement is None:
            assert self.cluster is not None and self.flops_per_second is not None
            return computed_model(args, config, self.cluster, self.flops_per_second)
        passes = [self.measurement.forward, self.measurement.backward]
        if not (measured_exchanges and self.measurement.has_exchanges):
            assert self.cluster is not None
            passes = [
                with_exchanges(times, args, config.transformer, self.cluster) for times in passes
            ]
        return Model(
            all_passes(config.transformer, *passes),
            is_paired(config.transformer),
            self.measurement.rest,
            unit_class(config.scmoe).further_routes,
        )


class Degree(NamedTuple):
    """One EP degree."""

    ranks: int
    leaving_node: float
    times: PassTimes
    """Of the forward pass."""
    best: dict[str, Prediction]
    """By position."""


class Larger(NamedTuple):
    """The model with as many experts as more GPUs can hold."""

    gpus: int
    experts: int
    parameters: int
    degree: Degree
    memory: RankMemory


@dataclass(frozen=True)
class Plan:
    """Everything that is predicted for one command line."""

    model: Model
    predictions: dict[str, list[Prediction]]
    """By position: every slot in both directions, then the best slots if they differ."""
    refused: dict[str, str]
    """Positions that the model cannot have, and why."""
    degrees: list[Degree]
    """EP 1, 2, 4, ...; empty without a cluster."""
    comparisons: list[CheckedPrediction]
    counted: ScMoEModelConfig
    """What parameters and memory are of."""
    parameters: int
    memory: RankMemory
    """Of the pipeline stage that needs most."""
    larger: list[Larger]
    typed: float
    """Seconds of a pair of the command line as it stands, without a shortcut: top-K, and a shared
    expert only if it names one."""
    race: Race | None = None
    """Iterations of the fastest position, with data parallelism's traffic; None without data
    parallelism, a network or a position."""

    def over_typed(self, prediction: Prediction) -> float:
        """Speed-up of the pair over the command line as it stands."""
        return self.typed / prediction.seconds

    @property
    def fastest(self) -> Prediction | None:
        """The position that takes the least time at its best slots; None if none can be had."""
        return min(map(self.best, self.predictions), key=lambda best: best.seconds, default=None)

    def best(self, position: str) -> Prediction:
        """The slots that take the least time, of each direction on its own."""
        return predict_best(self.model, position)

    def first_misfit(self, position: str) -> int | None:
        """The EP degree from which communication no longer fits at any slot."""
        return next(
            (degree.ranks for degree in self.degrees if not degree.best[position].fits), None
        )


def make_plan(
    args: Namespace,
    config: ScMoEModelConfig,
    source: TimesFrom,
    extrapolate: bool = False,
) -> Plan:
    """Predict.

    Args:
        args: the host's validated options, of a hypothetical world.
        config: the model.

    Raises:
        ValueError: a measurement of another top-k, a network that would be needed, or a model or
            an optimizer that is not counted; one line.
    """
    transformer = config.transformer
    measurement = source.measurement
    if measurement is not None and measurement.topk != transformer.moe_router_topk:
        raise ValueError(
            f"--measured has times of top-{measurement.topk} and --moe-router-topk is "
            f"{transformer.moe_router_topk}: make them equal."
        )
    refused = _refused_positions(config)
    positions = [position for position in POSITIONS if position not in refused]
    model = source.model(args, config)
    counted = _counted(args, config)
    size = model_size(counted, args.seq_length, args.micro_batch_size)
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    training = training_from_args(args, num_microbatches)
    plan = Plan(
        model=model,
        predictions={position: _predictions(model, position) for position in positions},
        refused=refused,
        degrees=list(_degrees(args, config, source, positions)),
        comparisons=compare(model, measurement.topk, measurement.runs) if measurement else [],
        counted=counted,
        parameters=size.parameters,
        memory=_fullest_rank(counted, size, training),
        larger=list(_larger(args, config, counted, training, source, positions))
        if extrapolate
        else [],
        typed=stock_seconds(
            model,
            wider=False,
            shared_expert="moe_shared_expert_intermediate_size" not in args.scmoe_implied,
        ),
    )
    if (cluster := source.cluster) is None or plan.fastest is None:
        return plan
    leaves_node = args.world_size > cluster.gpus_per_node
    alone = args.data_parallel_size * args.context_parallel_size == 1
    if alone or (leaves_node and cluster.network_bandwidth is None):
        return plan
    return replace(plan, race=race(args, config, model, plan.fastest, training, cluster))


def _counted(args: Namespace, config: ScMoEModelConfig) -> ScMoEModelConfig:
    """The model; a variant without a shortcut without what the one that is predicted implies."""
    if "scmoe_shortcut_position" not in args.scmoe_implied:
        return config
    own = model_config_from_args(without_shortcut(args))
    return changed(own, transformer_impl=config.transformer.transformer_impl)


def _predictions(model: Model, position: str) -> list[Prediction]:
    best = predict_best(model, position)
    equal = [
        predict(model, position, Slots(slot, slot)) for slot in range(len(window(position)) + 1)
    ]
    return equal if best in equal else [*equal, best]


def _fullest_rank(config: ScMoEModelConfig, size: ModelSize, training: Training) -> RankMemory:
    return max(memory_of_ranks(config, size, training), key=lambda rank: rank.total_bytes)


def _refused_positions(config: ScMoEModelConfig) -> dict[str, str]:
    # It is the layout that is asked: what is installed on this machine does not matter.
    transformer = changed(config, transformer_impl="local").transformer
    refused = {}
    for position in POSITIONS:
        moved = ScMoEConfig(
            **{
                **asdict(config.scmoe),
                "scmoe_shortcut_position": position,
                "scmoe_expert_slot": "auto",
            }
        )
        try:
            check_model(transformer, moved)
        except ValueError as error:
            refused[position] = str(error)
    return refused


def _degree(
    args: Namespace, config: ScMoEModelConfig, source: TimesFrom, positions: list[str], ranks: int
) -> Degree:
    assert source.cluster is not None
    wider = changed(config, expert_model_parallel_size=ranks)
    model = source.model(args, wider, measured_exchanges=False)
    return Degree(
        ranks=ranks,
        leaving_node=source.cluster.share_leaving_node(
            ranks, config.transformer.expert_tensor_parallel_size
        ),
        times=model.passes[0],
        best={position: predict_best(model, position) for position in positions},
    )


def _degrees(
    args: Namespace, config: ScMoEModelConfig, source: TimesFrom, positions: list[str]
) -> Iterator[Degree]:
    if source.cluster is None:
        return
    largest = LARGEST_EP
    if source.cluster.network_bandwidth is None:
        stride = config.transformer.expert_tensor_parallel_size
        largest = source.cluster.ranks_in_node(LARGEST_EP, stride)
    for power in range(int(math.log2(largest)) + 1):
        yield _degree(args, config, source, positions, 2**power)


def _larger(
    args: Namespace,
    config: ScMoEModelConfig,
    counted: ScMoEModelConfig,
    training: Training,
    source: TimesFrom,
    positions: list[str],
) -> Iterator[Larger]:
    """One expert parallel group over all GPUs of a pipeline stage, experts of a rank kept.

    Raises:
        ValueError: there are no options of a cluster.
    """
    if source.cluster is None:
        raise ValueError("--extrapolate needs a network: add the --cluster options.")
    layout = config.transformer
    pp, expert_tp = layout.pipeline_model_parallel_size, layout.expert_tensor_parallel_size
    dense_ranks = layout.tensor_model_parallel_size * layout.context_parallel_size
    experts_per_rank = layout.num_moe_experts // layout.expert_model_parallel_size
    for gpus in EXTRAPOLATED_GPUS:
        if gpus % (pp * math.lcm(dense_ranks, expert_tp)):
            continue
        ranks = gpus // (pp * expert_tp)
        grown, told = (
            changed(
                each, expert_model_parallel_size=ranks, num_moe_experts=ranks * experts_per_rank
            )
            for each in (config, counted)
        )
        size = model_size(told, args.seq_length, args.micro_batch_size)
        yield Larger(
            gpus=gpus,
            experts=ranks * experts_per_rank,
            parameters=size.parameters,
            degree=_degree(args, grown, source, positions, ranks),
            memory=_fullest_rank(told, size, replace(training, world_size=gpus)),
        )
