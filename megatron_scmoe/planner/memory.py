"""What the ranks of a run hold: weights, gradients, optimizer state, kept activations.

Numbers come from size.py and the pipeline split; tests/distributed_tests/test_memory.py holds
them against models and optimizers built on gloo ranks.

Covered: parameters, gradient buffers, main parameters and optimizer state; and what autograd keeps
of the micro-batches in flight, with balanced routing. Not covered: temporaries, communication
buffers, the padding of the distributed optimizer's buffers, the allocator's fragmentation, CUDA's
context.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.arguments import model_config_from_args
from megatron_scmoe.host.replace import Replacement
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.specs import block_layers, pipeline_stages
from megatron_scmoe.planner.size import ModelSize, Weights, model_size

MEBIBYTE = 1024 * 1024

# Selective recomputation that size.py takes into account.
COUNTED_RECOMPUTATION = {"core_attn", "mlp", "moe", "shared_experts", "layernorm"}


@dataclass(frozen=True)
class Training:
    """What decides the memory of a rank, beside the model."""

    world_size: int
    num_microbatches: int
    """Of one step on one data parallel rank."""
    gradient_bytes: int = 4
    """Per parameter, in the gradient buffers."""
    optimizer_bytes: int = 12
    """Per parameter: main parameter (0 where the model's own is fp32) and optimizer state."""
    optimizer_instances: int | None = None
    """Over which the distributed optimizer repeats its shards; None without one."""

    def optimizer_shards(self, data_parallel_size: int) -> int:
        """Ranks that share the optimizer state of one parameter.

        Raises:
            ValueError: they cannot be split into the instances; one line.
        """
        if self.optimizer_instances is None:
            return 1
        if data_parallel_size % self.optimizer_instances:
            raise ValueError(
                f"--num-distributed-optimizer-instances {self.optimizer_instances} does not divide "
                f"{data_parallel_size}, the ranks that hold the same parameters."
            )
        return data_parallel_size // self.optimizer_instances


@dataclass(frozen=True)
class RankMemory:
    """One rank of a pipeline stage; all of its ranks hold as much."""

    pipeline_rank: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: float
    """Main parameters and optimizer state."""
    activation_bytes: float
    """Kept for the backward pass at the peak of the pipeline schedule."""

    @property
    def weight_and_optimizer_bytes(self) -> float:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> float:
        return self.weight_and_optimizer_bytes + self.activation_bytes


def training_from_args(args: Namespace, num_microbatches: int) -> Training:
    """The run of a validated command line.

    Raises:
        ValueError: the run stores its parameters or its state in a way that is not counted; one
            line that names it.
    """
    for option, present in {
        f"--optimizer {args.optimizer}": args.optimizer not in ("adam", "sgd"),
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer,
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
        "--fp8-param-gather": args.fp8_param_gather,
        "--tensor-parallel-num-weight-shards": args.gtp_weight_remat_size > 1,
    }.items():
        if present:
            raise ValueError(f"{option} is not counted")
    in_fp32 = args.params_dtype == torch.float32
    states = 2 if args.optimizer == "adam" else int(args.sgd_momentum != 0)
    return Training(
        world_size=args.world_size,
        num_microbatches=num_microbatches,
        gradient_bytes=4 if in_fp32 or args.accumulate_allreduce_grads_in_fp32 else 2,
        optimizer_bytes=4 * states + (0 if in_fp32 else 4),
        optimizer_instances=(
            args.num_distributed_optimizer_instances if args.use_distributed_optimizer else None
        ),
    )


def memory_of_ranks(
    model: ScMoEModelConfig, size: ModelSize, training: Training
) -> list[RankMemory]:
    """Memory by pipeline rank.

    Args:
        model: the model.
        size: its count, at the sequence length and micro-batch size of the run.
        training: the run.

    Raises:
        ValueError: the optimizer state cannot be split as the run asks; one line.
    """
    config = model.transformer
    stages = pipeline_stages(config)
    last = (len(stages) - 1, config.pipeline_model_parallel_size - 1)
    ranks = []
    for pp_rank in range(config.pipeline_model_parallel_size):
        weights = Weights()
        kept = []
        # Backward of one micro-batch: the loss first, then what it computes again.
        transient = size.output.kept_bytes if pp_rank == last[1] else 0.0
        for vp_stage, chunks in enumerate(stages):
            kept_bytes, recomputed = _kept_in_layers(model, size, chunks[pp_rank])
            kept.append(kept_bytes)
            transient = max(transient, recomputed)
            weights = sum((size.layers[number].weights for number in chunks[pp_rank]), weights)
            if (vp_stage, pp_rank) == (0, 0):
                weights += size.embedding.weights
                kept[-1] += size.embedding.kept_bytes
            if (vp_stage, pp_rank) == last:
                weights += size.output.weights
                if last != (0, 0) and size.tied:
                    # A copy of the word embedding, kept equal by an all-reduce.
                    weights += Weights(tensor=size.embedding.weights.tensor)
        activations = sum(kept[chunk] for chunk in _chunks_in_flight(config, training, pp_rank))
        parameters = weights.dense_on_rank(config) + weights.expert_on_rank(config)
        ranks.append(
            RankMemory(
                pipeline_rank=pp_rank,
                parameters=parameters,
                weight_bytes=parameters * config.params_dtype.itemsize,
                gradient_bytes=parameters * training.gradient_bytes,
                optimizer_bytes=_optimizer_bytes(config, training, weights),
                activation_bytes=activations + transient,
            )
        )
    return ranks


def _optimizer_bytes(config: TransformerConfig, training: Training, weights: Weights) -> float:
    """Dense parameters are shared by all data (and context) parallel ranks, experts by those that
    hold the same experts."""
    ranks = training.world_size // config.pipeline_model_parallel_size
    expert_ranks = config.expert_model_parallel_size * (config.expert_tensor_parallel_size or 1)
    total = 0.0
    for parameters, model_ranks in (
        (weights.dense_on_rank(config), config.tensor_model_parallel_size),
        (weights.expert_on_rank(config), expert_ranks),
    ):
        shards = training.optimizer_shards(ranks // model_ranks)
        total += parameters * training.optimizer_bytes / shards
    return total


def _chunks_in_flight(config: TransformerConfig, training: Training, pp_rank: int) -> list[int]:
    """Model chunk of every forward pass before the first backward pass, the peak of 1F1B
    (core/pipeline_parallel/schedules.py:897)."""
    pp_size = config.pipeline_model_parallel_size
    chunks = config.virtual_pipeline_model_parallel_size or 1
    if chunks == 1:
        return [0] * min(training.num_microbatches, pp_size - pp_rank)
    group = config.microbatch_group_size_per_vp_stage or pp_size
    order = [
        chunk
        for start in range(0, training.num_microbatches, group)
        for chunk in range(chunks)
        for _ in range(min(group, training.num_microbatches - start))
    ]
    return order[: (pp_size - pp_rank - 1) * 2 + (chunks - 1) * group + 1]


def _kept_in_layers(
    model: ScMoEModelConfig, size: ModelSize, numbers: range
) -> tuple[float, float]:
    """Bytes of one micro-batch in the attention layers of one model chunk: kept from forward to
    backward, and added for a moment where they are computed again."""
    config, scmoe = model.transformer, model.scmoe
    if config.recompute_granularity != "full":
        return sum(size.layers[number].kept_bytes for number in numbers), 0.0
    blocks = (
        block_layers(config, scmoe)
        if scmoe.enabled
        else [(number,) for number in range(config.num_layers)]
    )
    inside = [
        sum(size.layers[number].kept_bytes for number in block)
        for block in blocks
        if block[0] in numbers
    ]
    count = config.recompute_num_layers or 1
    if config.recompute_method == "block":
        groups, rest = [[block] for block in inside[:count]], sum(inside[count:])
    else:
        groups, rest = [inside[i : i + count] for i in range(0, len(inside), count)], 0.0
    # The input of every group is kept. When one is computed again, the layers behind it, which
    # were not recomputed, have had their backward pass.
    again = max((sum(group) for group in groups), default=0.0) - size.hidden_bytes - rest
    return len(groups) * size.hidden_bytes + rest, max(again, 0.0)


# The report. ----------------------------------------------------------------------------------


def reporting(host_report: Callable[..., Any]) -> Callable[..., Any]:
    """`report_theoretical_memory` that prints these numbers.

    The host's divide the layers evenly over stages, leave out the shortcut's norms and gates,
    position embeddings and biases, know bf16 only, and take every layer's activations for those of
    a dense layer without SwiGLU. What is not counted here is left to it, and said so.
    """

    def replacement(
        args: Namespace, num_microbatches: int | None = None, verbose: bool = False
    ) -> Any:
        if not hasattr(args, "scmoe_shortcut_position"):  # a script of stock Megatron
            return host_report(args, num_microbatches, verbose)
        try:
            model = model_config_from_args(args)
            size = model_size(model, args.seq_length, args.micro_batch_size)
            training = training_from_args(args, num_microbatches or 1)
        except ValueError as error:
            print(f"Theoretical memory as Megatron estimates it, unverified: {error}.")
            return host_report(args, num_microbatches, verbose)
        ranks = memory_of_ranks(model, size, training)
        print(*report_lines(size, ranks), sep="\n", flush=True)
        fullest = max(ranks, key=lambda rank: rank.total_bytes)
        return (
            fullest.weight_and_optimizer_bytes / MEBIBYTE,
            fullest.activation_bytes / MEBIBYTE,
            fullest.total_bytes / MEBIBYTE,
        )

    return replacement


def report_lines(size: ModelSize, ranks: list[RankMemory]) -> list[str]:
    """Size of the model, then what a rank of every pipeline stage holds, in the host's words."""
    lines = [
        f"Theoretical model size: {size.parameters:,} parameters, "
        f"{size.activated_parameters:,} activated per token"
    ]
    for rank in ranks:
        where = f"pipeline rank {rank.pipeline_rank}, " if len(ranks) > 1 else ""
        state = rank.weight_and_optimizer_bytes / MEBIBYTE
        activation = rank.activation_bytes / MEBIBYTE
        lines.append(
            f"Theoretical memory footprints: weight and optimizer={state:.2f} MB, "
            f"activation={activation:.2f} MB, total={state + activation:.2f} MB "
            f"({where}{rank.parameters:,} parameters)"
        )
    lines.append(f"  activation: {activation_remarks(size.config)}")
    return lines


def activation_remarks(config: TransformerConfig) -> str:
    """What the number covers, and where it is a bound or could not be measured."""
    remarks = [
        "what is kept for backward, with balanced routing",
        "no temporaries, no communication buffers",
    ]
    recomputed = set(config.recompute_modules or []) - COUNTED_RECOMPUTATION
    if config.recompute_granularity == "selective" and recomputed:
        names = ", ".join(sorted(recomputed))
        remarks.append(f"an upper bound, because recomputing {names} is not counted")
    if config.fp8 or config.fp4:
        remarks.append("an upper bound, because everything counts in the model's precision")
    if config.transformer_impl == "transformer_engine":
        remarks.append("not yet measured with Transformer Engine")
    return "; ".join(remarks)


REPLACEMENTS = (
    Replacement(
        "megatron.training.training.report_theoretical_memory",
        "always",
        "training/theoretical_memory_usage.py:456",
        "even stages only, bf16 only, no shortcut, activations of a dense layer without SwiGLU",
        reporting,
    ),
)
