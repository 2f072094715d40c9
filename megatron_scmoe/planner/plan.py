"""The plan of one command line: every position and slot, every EP degree, more GPUs, memory."""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.overlap.schedule import POSITIONS, window
from megatron_scmoe.planner.cluster import Cluster
from megatron_scmoe.planner.measured import Comparison, Measurement, compare
from megatron_scmoe.planner.memory import Memory, fullest_gpu, model_parameters
from megatron_scmoe.planner.predict import Model, PassTimes, Prediction, predict, predict_best
from megatron_scmoe.planner.times import (
    all_passes,
    changed,
    computed_model,
    is_paired,
    with_exchanges,
)

LARGEST_EP = 4096
EXTRAPOLATED_GPUS = tuple(64 * 2**power for power in range(7))
"""64, 128, ... 4096."""


@dataclass(frozen=True)
class Source:
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
        self, args: Namespace, config: TransformerConfig, measured_exchanges: bool = True
    ) -> Model:
        """The times of a model; `measured_exchanges` prefers measured ones to the cluster's."""
        if self.measurement is None:
            assert self.cluster is not None and self.flops_per_second is not None
            return computed_model(args, config, self.cluster, self.flops_per_second)
        passes = [self.measurement.forward, self.measurement.backward]
        if not (measured_exchanges and self.measurement.has_exchanges):
            assert self.cluster is not None
            passes = [with_exchanges(times, args, config, self.cluster) for times in passes]
        forward, backward = passes
        return Model(
            all_passes(config, forward, backward), is_paired(config), self.measurement.rest
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
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """Everything that is predicted for one command line."""

    model: Model
    predictions: dict[str, list[Prediction]]
    """By position, then slot."""
    refused: dict[str, str]
    """Positions that the model cannot have, and why."""
    degrees: list[Degree]
    """EP 1, 2, 4, ...; empty without a cluster."""
    comparisons: list[Comparison]
    parameters: int
    memory: Memory
    larger: list[Larger]

    def best(self, position: str) -> Prediction:
        """The slot that takes the least time."""
        return predict_best(self.model, position)

    def first_misfit(self, position: str) -> int | None:
        """The EP degree from which communication no longer fits at any slot."""
        return next(
            (degree.ranks for degree in self.degrees if not degree.best[position].fits), None
        )


def make_plan(
    args: Namespace,
    config: TransformerConfig,
    scmoe: ScMoEConfig,
    source: Source,
    extrapolate: bool = False,
) -> Plan:
    """Predict.

    Args:
        args: the host's validated options, of a hypothetical world.
        config: the model's config; `num_layers` counts attention layers.

    Raises:
        ValueError: a measurement of another top-k, or a network that would be needed, in one line.
    """
    measurement = source.measurement
    if measurement is not None and measurement.topk != config.moe_router_topk:
        raise ValueError(
            f"--measured has times of top-{measurement.topk} and --moe-router-topk is "
            f"{config.moe_router_topk}: make them equal."
        )
    refused = _refused_positions(config, scmoe)
    positions = [position for position in POSITIONS if position not in refused]
    model = source.model(args, config)
    return Plan(
        model=model,
        predictions={
            position: [predict(model, position, slot) for slot in range(len(window(position)) + 1)]
            for position in positions
        },
        refused=refused,
        degrees=list(_degrees(args, config, source, positions)),
        comparisons=compare(model, measurement.topk, measurement.runs) if measurement else [],
        parameters=model_parameters(args, config, scmoe).total,
        memory=fullest_gpu(args, config, scmoe, args.world_size),
        larger=list(_larger(args, config, scmoe, source, positions)) if extrapolate else [],
    )


def _refused_positions(config: TransformerConfig, scmoe: ScMoEConfig) -> dict[str, str]:
    refused = {}
    for position in POSITIONS:
        moved = ScMoEConfig(
            **{
                **asdict(scmoe),
                "scmoe_shortcut_position": position,
                "scmoe_expert_slot": "auto",
            }
        )
        try:
            moved.check(config)
        except ValueError as error:
            refused[position] = str(error)
    return refused


def _degree(
    args: Namespace, config: TransformerConfig, source: Source, positions: list[str], ranks: int
) -> Degree:
    assert source.cluster is not None
    wider = changed(config, expert_model_parallel_size=ranks)
    model = source.model(args, wider, measured_exchanges=False)
    return Degree(
        ranks=ranks,
        leaving_node=source.cluster.share_leaving_node(ranks, config.expert_tensor_parallel_size),
        times=model.passes[0],
        best={position: predict_best(model, position) for position in positions},
    )


def _degrees(
    args: Namespace, config: TransformerConfig, source: Source, positions: list[str]
) -> Iterator[Degree]:
    if source.cluster is None:
        return
    largest = LARGEST_EP
    if source.cluster.network_bandwidth is None:
        stride = config.expert_tensor_parallel_size
        largest = source.cluster.ranks_in_node(LARGEST_EP, stride)
    for power in range(int(math.log2(largest)) + 1):
        yield _degree(args, config, source, positions, 2**power)


def _larger(
    args: Namespace,
    config: TransformerConfig,
    scmoe: ScMoEConfig,
    source: Source,
    positions: list[str],
) -> Iterator[Larger]:
    """One expert parallel group over all GPUs of a pipeline stage, experts of a rank kept."""
    if source.cluster is None:
        raise ValueError("--extrapolate needs a network: add the --cluster options.")
    pp, dense_ranks = (
        config.pipeline_model_parallel_size,
        config.tensor_model_parallel_size * config.context_parallel_size,
    )
    experts_per_rank = config.num_moe_experts // config.expert_model_parallel_size
    for gpus in EXTRAPOLATED_GPUS:
        if gpus % (pp * math.lcm(dense_ranks, config.expert_tensor_parallel_size)):
            continue
        ranks = gpus // (pp * config.expert_tensor_parallel_size)
        grown = changed(
            config,
            expert_model_parallel_size=ranks,
            num_moe_experts=ranks * experts_per_rank,
        )
        yield Larger(
            gpus=gpus,
            experts=ranks * experts_per_rank,
            parameters=model_parameters(args, grown, scmoe).total,
            degree=_degree(args, grown, source, positions, ranks),
            memory=fullest_gpu(args, grown, scmoe, gpus),
        )
