"""Predict what a shortcut is worth on a cluster, without one.

    python tools/plan_overlap.py <Megatron options> --cluster-preset h100-infiniband \\
        --cluster-nodes 8 --cluster-flops-efficiency 0.4 --cluster-bandwidth-efficiency 0.6

Takes the options of pretrain_gpt_scmoe.py; layout and batch are those of the cluster, and no rank
is started. Prints, for every position and slot, how much of the all-to-all is hidden and the
speed-up over stock Megatron; the EP degree from which communication no longer fits; memory of a
GPU; and everything that was assumed. docs/planner.md explains the numbers.

--measured FILE takes measured operator times (megatron_scmoe/planner/measured.py) in place of
FLOPs, and compares predictions with measured runs. Exit codes: 0 printed; 2 options are wrong.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from argparse import Namespace
from pathlib import Path

from megatron_scmoe import host, say, start

say.one_line_interrupts()
start.replace_host_symbols()

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import validate_args
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_scmoe.arguments import (
    add_scmoe_args,
    apply_scmoe_defaults,
    model_config_from_args,
    offer_own_help,
    parse,
    scmoe_config_from_args,
)
from megatron_scmoe.checks import layout
from megatron_scmoe.checks.ranges import NUMBERS
from megatron_scmoe.checks.refusal import refuse
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.planner.cluster import PRESETS, Cluster, Preset
from megatron_scmoe.planner.measured import Measurement
from megatron_scmoe.planner.plan import TimesFrom, make_plan
from megatron_scmoe.planner.plan_text import as_json, as_text
from megatron_scmoe.planner.times import is_paired
from megatron_scmoe.words import flag

GIGA, TERA = 1e9, 1e12


def add_planner_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The package's options and the planner's; an `extra_args_provider` of the host."""
    add_scmoe_args(parser)
    group = cluster = parser.add_argument_group(
        "cluster", "Bandwidths: GB/s, one direction, for each GPU."
    )
    group.add_argument("--cluster-preset", choices=sorted(PRESETS), help="Peak numbers of a GPU.")
    group.add_argument("--cluster-nodes", type=int, metavar="N", help="Machines of the job.")
    group.add_argument(
        "--cluster-gpus-per-node", type=int, metavar="N", help="GPUs of one of them."
    )
    group.add_argument("--cluster-tflops", type=float, metavar="TFLOPS", help="Peak of one GPU.")
    group.add_argument(
        "--cluster-intra-node-gbytes", type=float, metavar="GB/S", help="NVLink or PCIe."
    )
    group.add_argument(
        "--cluster-network-gbytes", type=float, metavar="GB/S", help="Between nodes."
    )
    group.add_argument("--cluster-memory-gib", type=float, metavar="GIB", help="Memory of one GPU.")
    group.add_argument(
        "--cluster-flops-efficiency",
        type=float,
        metavar="SHARE",
        help="Share of the peak that operators reach.",
    )
    group.add_argument(
        "--cluster-bandwidth-efficiency",
        type=float,
        metavar="SHARE",
        help="Share of the bandwidths that an all-to-all reaches.",
    )
    group.add_argument(
        "--cluster-message-us",
        type=float,
        metavar="US",
        default=0.0,
        help="Microseconds that an all-to-all needs for each peer, whatever the size.",
    )
    group = parser.add_argument_group("planner")
    group.add_argument("--measured", type=Path, metavar="FILE", help="Measured operator times.")
    group.add_argument(
        "--collaboration",
        type=Path,
        metavar="FILE",
        help="What a router chose, by tools/c2r.py profile: how often a token is sent.",
    )
    group.add_argument("--extrapolate", action="store_true", help="Also 64 to 4096 GPUs.")
    group.add_argument("--json", action="store_true", help="Print JSON in place of tables.")
    offer_own_help(parser, [cluster, group])
    return parser


def parse_command_line() -> tuple[Namespace, ScMoEModelConfig, list[str]]:
    """The host's options, validated for a world of the cluster's size.

    Returns:
        options, their model, and what was set beside them.

    Raises:
        ValueError, AssertionError: what the host or we refuse; see say.user_errors.
    """
    # Asked by the host before Blackwell; no communication happens here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = parse(add_planner_args)
    if args.yaml_cfg is not None:
        raise ValueError("--yaml-cfg has no place for the --scmoe options: use the command line.")
    if args.use_checkpoint_args:
        raise ValueError("--use-checkpoint-args: the planner reads no checkpoint, write them out.")
    if args.num_experts is None:
        raise ValueError("a model without --num-experts has no all-to-all to plan for.")
    _apply_preset(args)
    for name in ("cluster_nodes", "cluster_gpus_per_node"):
        if getattr(args, name) is None or getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} is missing or not positive: it makes the layout.")
    args.rank, args.world_size = 0, args.cluster_nodes * args.cluster_gpus_per_node
    args.scmoe_ranks_per_node = args.scmoe_ranks_per_node or args.cluster_gpus_per_node
    # Validated for this machine; the memory is that of the cluster's kernels.
    transformer_impl = args.transformer_impl
    host.switch_kernels(args)
    notes = []
    if args.scmoe_shortcut_position == "none":
        is_variant = scmoe_config_from_args(args).enabled
        # Of published models, which have a MoE in every layer, the only one.
        args.scmoe_shortcut_position = "pos2" if is_paired(args) else "pos1"
        if is_variant:
            args.scmoe_implied = {"scmoe_shortcut_position": "none"}
        what = "times, not for parameters and" if is_variant else "the"
        notes.append(
            f"--scmoe-shortcut-position {args.scmoe_shortcut_position} for {what} memory: the "
            "command line has none"
        )
    refuse(NUMBERS + layout.TYPED, args)
    with contextlib.redirect_stdout(io.StringIO()):
        validate_args(args)
    if args.padded_vocab_size is None:
        if args.vocab_size is None:
            args.vocab_size = _tokens(args)
        args.padded_vocab_size = calculate_padded_vocab_size(
            args.vocab_size,
            args.make_vocab_size_divisible_by,
            args.tensor_model_parallel_size,
            logging_enabled=False,
        )
    notes += apply_scmoe_defaults(args)
    config = model_config_from_args(args)
    config.transformer.transformer_impl = transformer_impl
    return args, config, notes


def _tokens(args: Namespace) -> int:
    """Of the tokenizer, which lies on this machine.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    local = args.tokenizer_model or args.vocab_file
    if local is None or not Path(local).exists():
        raise ValueError(
            "--vocab-size is missing, and --tokenizer-model names nothing here: add it."
        )
    return build_tokenizer(args).vocab_size


def _apply_preset(args: Namespace) -> None:
    """Fill in what the command line leaves open."""
    if args.cluster_preset is None:
        return
    preset: Preset = PRESETS[args.cluster_preset]
    for name in ("gpus_per_node", "tflops", "intra_node_gbytes", "network_gbytes", "memory_gib"):
        if getattr(args, f"cluster_{name}") is None:
            setattr(args, f"cluster_{name}", getattr(preset, name))


def source_from_args(args: Namespace) -> TimesFrom:
    """Where times come from.

    Raises:
        ValueError: a number is missing, in one line that names its option.
    """
    measurement = Measurement.read(args.measured) if args.measured is not None else None
    network = ["cluster_intra_node_gbytes", "cluster_bandwidth_efficiency"]
    compute = ["cluster_tflops", "cluster_flops_efficiency"]
    needed = [] if measurement else compute
    if measurement is None or not measurement.has_exchanges or args.extrapolate:
        needed += network
    missing = [flag(name) for name in needed if getattr(args, name) is None]
    if missing:
        advice = "" if args.measured else ", or give measured times with --measured"
        raise ValueError(f"missing: {', '.join(missing)}{advice} (no default would be honest).")
    cluster = None
    if all(getattr(args, name) is not None for name in network):
        between = args.cluster_network_gbytes
        cluster = Cluster(
            gpus_per_node=args.cluster_gpus_per_node,
            intra_node_bandwidth=args.cluster_intra_node_gbytes * GIGA,
            network_bandwidth=None if between is None else between * GIGA,
            efficiency=args.cluster_bandwidth_efficiency,
            message_latency=args.cluster_message_us * 1e-6,
        )
    flops = None
    if measurement is None:
        if not 0 < args.cluster_flops_efficiency <= 1 or args.cluster_tflops <= 0:
            raise ValueError(
                f"--cluster-tflops {args.cluster_tflops} with --cluster-flops-efficiency "
                f"{args.cluster_flops_efficiency}: positive, and the second at most 1."
            )
        flops = args.cluster_tflops * TERA * args.cluster_flops_efficiency
    return TimesFrom(cluster, flops, measurement)


def main() -> int:
    """Print the plan and return the exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's, about training
        with say.user_errors():
            args, config, notes = parse_command_line()
            source = source_from_args(args)
            plan = make_plan(args, config, source, args.extrapolate)
        if args.json:
            print(json.dumps(as_json(args, config.transformer, source, plan, notes), indent=2))
        else:
            print(as_text(args, config.transformer, source, plan, notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
