"""From the planner's command line to what it plans: options, model, where times come from."""

import argparse
import contextlib
import io
import os
from argparse import Namespace
from pathlib import Path

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import validate_args
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_scmoe import host
from megatron_scmoe.arguments import (
    add_scmoe_args,
    apply_scmoe_defaults,
    model_config_from_args,
    offer_own_help,
    parse,
    scmoe_config_from_args,
)
from megatron_scmoe.checks import layout
from megatron_scmoe.checks.refusal import refuse, refuse_all
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.planner.cluster import Cluster
from megatron_scmoe.planner.cluster_options import (
    ASKED,
    NETWORK,
    add_cluster_args,
    apply_preset,
    missing,
)
from megatron_scmoe.planner.measured import Measurement
from megatron_scmoe.planner.plan import TimesFrom
from megatron_scmoe.planner.times import is_paired

GIGA, TERA = 1e9, 1e12


def add_planner_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The package's options and the planner's; an `extra_args_provider` of the host."""
    add_scmoe_args(parser)
    offer_own_help(parser, add_cluster_args(parser))
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
    apply_preset(args)
    refuse_all(ASKED, args)
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
    refuse(layout.TYPED, args)
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


def source_from_args(args: Namespace) -> TimesFrom:
    """Where times come from.

    Raises:
        ValueError: a number is missing, in one line that names its option.
    """
    measurement = Measurement.read(args.measured) if args.measured is not None else None
    reaches = measurement is not None and measurement.has_exchanges and not args.extrapolate
    if not reaches and (names := missing(args, NETWORK)):
        raise ValueError(f"missing: {', '.join(names)} (no default would be honest).")
    cluster = None
    if all(getattr(args, name) is not None for name in NETWORK):
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
        flops = args.cluster_tflops * TERA * args.cluster_flops_efficiency
    return TimesFrom(cluster, flops, measurement)
