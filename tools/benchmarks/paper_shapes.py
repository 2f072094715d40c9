"""The paper's shapes, a pair of layers at a time, against the stock layers in the same run.

    torchrun --nproc-per-node 2 -m tools.benchmarks.paper_shapes --shape gpt2-moe-medium

Builds a dense layer and a MoE layer with the dimensions of a model of arXiv:2404.05019, table 8,
once for each contender, and measures in turns forward + backward, the forward-only pass, and the
operators of a unit without overlap, forward and backward. Every rank holds its share of the
experts. Weights, inputs and routing are random, dropout is 0, precision is fp32; sequence and batch
are options, because 2K tokens in several attention matrices do not fit every machine.

Writes to --output: SHAPE.md, SHAPE.json, and SHAPE.measured.json for `plan_overlap --measured`.
"""

from megatron_scmoe import start

start.replace_host_symbols()

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.checks.shortcut import check_model
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.specs import block_config, scmoe_block_spec, with_local_replacements
from megatron_scmoe.model.unit import ShortcutLayer
from megatron_scmoe.overlap.measure.adaptive import DIRECTIONS, unit_times
from megatron_scmoe.overlap.recorder import Direction, UnitRecord
from megatron_scmoe.overlap.schedule import window
from megatron_scmoe.words import markdown_table
from tools.benchmarks.cluster_report import write_pair
from tools.benchmarks.contenders import Contender, contenders
from tools.benchmarks.process_groups import launched_ranks
from tools.benchmarks.provenance import add_output, as_markdown, describe

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Shape:
    """One model of table 8."""

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    num_experts: int
    moe_every_layer: bool
    llama: bool
    """SwiGLU and RMSNorm, otherwise GELU and LayerNorm."""


SHAPES = {
    "gpt2-moe-small": Shape(768, 3072, 12, 12, 8, False, False),
    "gpt2-moe-medium": Shape(1024, 4096, 16, 16, 16, False, False),
    "gpt3-moe-xl": Shape(2048, 8192, 32, 32, 8, False, False),
    # The paper does not give the FFN size: with this one the model has its 6.7 B parameters.
    "llama2-moe": Shape(2048, 5376, 16, 4, 8, True, True),
    # Not the paper's: the default sizes of overlap_cluster.
    "overlap-cluster": Shape(256, 1024, 4, 4, 8, False, False),
}


def host_config(
    shape: Shape, contender: Contender, num_layers: int, **options: Any
) -> TransformerConfig:
    """Megatron's config of these layers.

    Args:
        options: fields of the config, in place of what stands here.
    """
    is_moe = [1] * num_layers if num_layers == 1 else [0, 1]
    fields: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": (
            shape.ffn_hidden_size if contender.shared_expert else None
        ),
        "moe_shared_expert_gate": contender.shared_expert,
        "moe_router_topk": contender.topk,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        # An untrained router is not balanced, and each block would have its own.
        "moe_router_force_load_balancing": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_layer_freq": is_moe,
        "expert_model_parallel_size": torch.distributed.get_world_size(),
        "normalization": "RMSNorm" if shape.llama else "LayerNorm",
        "gated_linear_unit": shape.llama,
        "activation_func": torch.nn.functional.silu if shape.llama else torch.nn.functional.gelu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "transformer_impl": "local",
    }
    return TransformerConfig(**{**fields, **options})


def configs(
    shape: Shape,
    contender: Contender,
    num_layers: int,
    scmoe_options: Mapping[str, Any] = NO_OPTIONS,
    **host_options: Any,
) -> tuple[TransformerConfig, ScMoEConfig]:
    """Megatron's config of these layers and ours; `num_layers` counts attention layers."""
    config = host_config(shape, contender, num_layers, **host_options)
    options: dict[str, Any] = {"scmoe_shortcut_position": contender.position}
    if contender.position == "none" and not contender.shared_expert:
        options["scmoe_combine"] = "add"
    scmoe = ScMoEConfig(**{**options, **scmoe_options})
    check_model(config, scmoe)
    return config, scmoe


def build(
    shape: Shape,
    contender: Contender,
    num_layers: int,
    scmoe_options: Mapping[str, Any] = NO_OPTIONS,
    **host_options: Any,
) -> Any:
    """The host's block with these layers, on this rank's device.

    Args:
        scmoe_options: fields of ScMoEConfig.
        host_options: fields of the host's config.
    """
    config, scmoe = configs(shape, contender, num_layers, scmoe_options, **host_options)
    spec: Any
    if scmoe.enabled:
        spec = scmoe_block_spec(config, scmoe)
        config = block_config(config, scmoe)
    else:
        stock = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=config.transformer_impl == "transformer_engine",
            normalization=config.normalization,
        )
        spec = with_local_replacements(stock, config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    block = TransformerBlock(config=config, spec=spec, pg_collection=groups).cuda()
    # Norms are built in fp32; a run converts them too.
    return block.to(config.params_dtype)


@dataclass
class Inputs:
    """What a block reads, forward and backward."""

    hidden_states: Tensor
    """Random, [s, b, h]."""
    grad: Tensor
    """Of the block's output, random, [s, b, h]."""
    attention: dict[str, Tensor]
    """What attention needs."""

    @classmethod
    def draw(
        cls,
        shape: Shape,
        seq_length: int,
        micro_batch_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> "Inputs":
        size = (seq_length, micro_batch_size, shape.hidden_size)
        device = torch.cuda.current_device()
        hidden_states = torch.randn(size, dtype=dtype, device=device, requires_grad=True)
        rotary = RotaryEmbedding(
            kv_channels=shape.hidden_size // shape.num_attention_heads,
            rotary_percent=1.0,
            use_cpu_initialization=True,
        )
        mask = torch.ones(seq_length, seq_length, dtype=torch.bool).triu(1)[None, None].cuda()
        attention = {"attention_mask": mask, "rotary_pos_emb": rotary(seq_length).cuda()}
        return cls(hidden_states, torch.randn_like(hidden_states), attention)

    def forward(self, block: Any) -> Tensor:
        """The block's output, [s, b, h]."""
        return block(hidden_states=self.hidden_states, **self.attention)

    def train(self, block: Any) -> Tensor:
        """The same, after forward and backward once; no gradient of a parameter stays."""
        output = self.forward(block)
        output.backward(self.grad)
        block.zero_grad(set_to_none=True)
        return output.detach()


def unit_of(block: Any) -> Any:
    """The shortcut unit of a block; None in stock layers."""
    return next((layer for layer in block.layers if isinstance(layer, ShortcutLayer)), None)


# Measuring. ---------------------------------------------------------------------------------------


def seconds(function: Callable[[], Any]) -> float:
    """Time of the slowest rank, all starting together."""
    torch.cuda.synchronize()
    torch.distributed.barrier()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    slowest = torch.tensor(time.perf_counter() - started, device=torch.cuda.current_device())
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    return slowest.item()


def measure_block(block: Any, inputs: Inputs, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of forward + backward, and of the forward-only pass; the first step is dropped."""
    training = [seconds(partial(inputs.train, block)) for _ in range(1 + steps)][1:]
    block.eval()
    with torch.no_grad():
        inference = [seconds(partial(inputs.forward, block)) for _ in range(1 + steps)][1:]
    block.train()
    return training, inference


def operator_times(record: UnitRecord, direction: Direction) -> dict[str, float]:
    """Seconds by name of one pass of a Pos-3 unit without overlap."""
    times = unit_times(record, direction, "pos3")
    named = dict(zip((step.value for step in window("pos3")), times.dense, strict=True))
    named["experts"] = times.experts
    others = sum(
        span.end - span.begin
        for span in record.steps
        if span.activity.direction == direction and span.activity.name not in named
    )
    # What compute stands still for is the exchange's time, whichever step contains the wait.
    others -= sum(x.blocked for x in record.exchanges if x.activity.direction == direction)
    return named | {"dispatch": times.dispatch, "combine": times.combine, "others": others}


class Operators:
    """The operators of a pair with top-1; without overlap nothing runs beside an exchange."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        # The widest window holds all dense operators.
        everything = Contender("operators", "pos3", 1, True)
        self._block = build(shape, everything, num_layers=2, scmoe_options={"scmoe_overlap": False})
        self._inputs = inputs
        self._samples: dict[Direction, list[dict[str, float]]] = {
            direction: [] for direction in DIRECTIONS
        }

    def measure(self, steps: int) -> None:
        """Add samples; the first step is dropped."""
        unit = unit_of(self._block)
        unit.recorder.records_steps = True
        for step in range(1 + steps):
            seconds(partial(self._inputs.train, self._block))
            record = unit.recorder.take()
            if step > 0:
                for direction in DIRECTIONS:
                    self._samples[direction].append(operator_times(record, direction))
        unit.recorder.records_steps = False

    def seconds(self) -> dict[str, dict[str, float]]:
        """By direction and name: median of the samples, mean over ranks."""
        result: dict[str, dict[str, float]] = {}
        for direction, samples in self._samples.items():
            names = list(samples[0])
            device = torch.cuda.current_device()
            rows = [list(sample.values()) for sample in samples]
            medians = torch.tensor(rows, dtype=torch.float64, device=device).median(0).values
            torch.distributed.all_reduce(medians)
            values = (medians / torch.distributed.get_world_size()).tolist()
            result[direction] = dict(zip(names, values, strict=True))
        return result


def communication_share(operators: dict[str, dict[str, float]]) -> float:
    """Of the exchanges in a top-2 MoE layer's forward + backward: twice those of top-1.

    What is neither exchange nor expert is counted once, as a router is; permutations are twice.
    """
    totals = {
        name: sum(times[name] for times in operators.values())
        for name in ("dispatch", "combine", "experts", "others")
    }
    exchange = 2 * (totals["dispatch"] + totals["combine"])
    return exchange / (exchange + 2 * totals["experts"] + totals["others"])


# Reporting. ---------------------------------------------------------------------------------------


def measured_file(
    source: str, operators: dict[str, dict[str, float]], runs: dict[Contender, list[float]]
) -> dict[str, Any]:
    """What `plan_overlap --measured` reads (megatron_scmoe/planner/measured.py)."""
    planned = {
        direction: {name: value for name, value in times.items() if name != "others"}
        for direction, times in operators.items()
    }
    return {
        "source": source,
        "topk": 1,
        **planned,
        "rest": sum(times["others"] for times in operators.values()),
        "runs": [contender.as_run(statistics.median(times)) for contender, times in runs.items()],
    }


def as_tables(
    environment: dict[str, Any],
    settings: dict[str, Any],
    runs: dict[Contender, tuple[list[float], list[float]]],
    operators: dict[str, dict[str, float]],
) -> str:
    """The report of one shape."""
    medians = {
        contender: [statistics.median(times) for times in both] for contender, both in runs.items()
    }
    baseline = next(iter(medians.values()))
    contender_rows = [
        (
            contender.name,
            f"{training * 1e3:.0f}",
            f"{baseline[0] / training:.2f}x",
            f"{inference * 1e3:.0f}",
            f"{baseline[1] / inference:.2f}x",
        )
        for contender, (training, inference) in medians.items()
    ]
    operator_rows = [
        (name, *(f"{operators[direction][name] * 1e3:.1f}" for direction in DIRECTIONS))
        for name in operators["forward"]
    ]
    return "\n".join(
        (
            f"# {settings['shape']}",
            "",
            as_markdown(environment),
            "",
            ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
            "",
            *markdown_table(
                ("contender", "forward + backward ms", "speed", "inference ms", "speed"),
                contender_rows,
            ),
            "",
            *markdown_table(("operator", "forward ms", "backward ms"), operator_rows),
            "",
            "All-to-alls in a top-2 MoE layer, forward + backward, by these times: "
            f"{communication_share(operators):.0%}.",
            "",
        )
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="paper_shapes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--shape", choices=SHAPES, required=True, help="which of the paper's models"
    )
    add_sizes(parser)
    return parser.parse_args(argv)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options of all programs that measure a pair of layers."""
    for name, default, text in (
        ("--seq-length", 512, "tokens of a sample"),
        ("--micro-batch-size", 1, "samples of a micro-batch"),
        ("--repetitions", 3, "how often the contenders take turns"),
        ("--steps", 3, "counted steps of each turn"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    shape = SHAPES[args.shape]
    environment = describe()
    ranks = torch.distributed.get_world_size()
    settings = {
        "shape": args.shape,
        **asdict(shape),
        "seq_length": args.seq_length,
        "micro_batch_size": args.micro_batch_size,
        "ranks": ranks,
        "precision": "fp32",
    }
    inputs = Inputs.draw(shape, args.seq_length, args.micro_batch_size)
    runs: dict[Contender, tuple[list[float], list[float]]] = {
        contender: ([], []) for contender in contenders(shape)
    }
    operators = Operators(shape, inputs)
    for _ in range(args.repetitions):
        operators.measure(args.steps)
        for contender, (training, inference) in runs.items():
            block = build(shape, contender, num_layers=1 if shape.moe_every_layer else 2)
            more_training, more_inference = measure_block(block, inputs, args.steps)
            training += more_training
            inference += more_inference
    times = operators.seconds()
    if torch.distributed.get_rank() != 0:
        return
    source = f"{environment['command']}, commit {environment['commit']}, {environment['date']}"
    measured = measured_file(source, times, {one: both[0] for one, both in runs.items()})
    content = {
        "environment": environment,
        "settings": settings,
        "contenders": {
            one.name: {"forward_backward": training, "inference": inference}
            for one, (training, inference) in runs.items()
        },
        "operators": times,
    }
    markdown = as_tables(environment, settings, runs, times)
    write_pair(
        args.output, args.shape, markdown, content, {f"{args.shape}.measured.json": measured}
    )
    print(markdown, "written to ", args.output, sep="")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with launched_ranks(SHAPES[args.shape].num_experts):
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
