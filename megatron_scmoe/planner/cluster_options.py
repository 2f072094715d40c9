"""What the planner is asked beside the options of a run.

Imports no torch, so that what is wrong with it is said at once.
"""

import argparse
from argparse import Namespace, _ArgumentGroup
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_scmoe.checks.before_torch import NO_YAML, typed_options
from megatron_scmoe.checks.ranges import NOT_NEGATIVE, PART, POSITIVE, RANGES, Range, numbers_in
from megatron_scmoe.checks.refusal import Found, Refusal
from megatron_scmoe.planner.cluster import PRESETS, Preset
from megatron_scmoe.words import flag

COMPUTE = ("cluster_tflops", "cluster_flops_efficiency")
NETWORK = ("cluster_intra_node_gbytes", "cluster_bandwidth_efficiency")
# By the end of their names: kind, name of the value, which values there are, what it is.
OPTIONS: dict[str, tuple[type, str, Range, str]] = {
    "nodes": (int, "N", Range(1), "Machines of the job."),
    "gpus_per_node": (int, "N", Range(1), "GPUs of one of them."),
    "tflops": (float, "TFLOPS", POSITIVE, "Peak of one GPU."),
    "intra_node_gbytes": (float, "GB/S", POSITIVE, "NVLink or PCIe."),
    "network_gbytes": (float, "GB/S", POSITIVE, "Between nodes."),
    "memory_gib": (float, "GIB", POSITIVE, "Memory of one GPU."),
    "flops_efficiency": (float, "SHARE", PART, "Share of the peak that operators reach."),
    "bandwidth_efficiency": (
        float,
        "SHARE",
        PART,
        "Share of the bandwidths that an all-to-all reaches.",
    ),
    "message_us": (
        float,
        "US",
        NOT_NEGATIVE,
        "Microseconds that an all-to-all needs for each peer, whatever the size.",
    ),
}
OF_CLUSTER = {
    **RANGES,
    **{f"cluster_{name}": bounds for name, (_, _, bounds, _) in OPTIONS.items()},
}


def add_cluster_args(parser: argparse.ArgumentParser) -> list[_ArgumentGroup]:
    """Add the planner's own options, and return their groups."""
    cluster = parser.add_argument_group("cluster", "Bandwidths: GB/s, one direction, for each GPU.")
    cluster.add_argument("--cluster-preset", choices=sorted(PRESETS), help="Peak numbers of a GPU.")
    for name, (kind, metavar, _, text) in OPTIONS.items():
        cluster.add_argument(flag(f"cluster_{name}"), type=kind, metavar=metavar, help=text)
    parser.set_defaults(cluster_message_us=0.0)
    planner = parser.add_argument_group("planner")
    planner.add_argument("--measured", type=Path, metavar="FILE", help="Measured operator times.")
    planner.add_argument(
        "--collaboration",
        type=Path,
        metavar="FILE",
        help="What a router chose, by tools/c2r.py profile: how often a token is sent.",
    )
    planner.add_argument("--extrapolate", action="store_true", help="Also 64 to 4096 GPUs.")
    planner.add_argument("--json", action="store_true", help="Print JSON in place of tables.")
    return [cluster, planner]


def apply_preset(args: Namespace) -> None:
    """Fill in what the command line leaves open."""
    if args.cluster_preset is None:
        return
    preset: Preset = PRESETS[args.cluster_preset]
    for name in ("gpus_per_node", "tflops", "intra_node_gbytes", "network_gbytes", "memory_gib"):
        if getattr(args, f"cluster_{name}") is None:
            setattr(args, f"cluster_{name}", getattr(preset, name))


def typed(argv: Sequence[str]) -> Namespace:
    """What the words of a command line, files and presets spelled out, ask of the planner.

    Raises:
        ValueError: an option of the planner's that cannot be read.
    """
    args = typed_options(argv, add_cluster_args, _add_megatrons)
    apply_preset(args)
    return args


def _add_megatrons(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yaml-cfg", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--use-checkpoint-args", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(num_experts=None)


def missing(args: Namespace, names: Sequence[str]) -> list[str]:
    """The options of some numbers that nobody gave."""
    return [flag(name) for name in names if getattr(args, name) is None]


def _without(names: Sequence[str]) -> Callable[[Namespace], Found]:
    def when(args: Namespace) -> Found:
        found = missing(args, names)
        return bool(found) and {"missing": ", ".join(found)}

    return when


def _absent(args: Namespace) -> Found:
    files = {dest: getattr(args, dest) for dest in ("measured", "collaboration")}
    found = [f"{flag(dest)} {file}" for dest, file in files.items() if file and not file.exists()]
    return bool(found) and {"files": " and ".join(found)}


# Of what `typed` reads, and of the whole command line; no row relies on another.
ASKED = (
    NO_YAML,
    Refusal(
        lambda args: args.use_checkpoint_args,
        "--use-checkpoint-args: the planner reads no checkpoint",
        "write its options out",
    ),
    Refusal(
        lambda args: args.num_experts is None,
        "A model without --num-experts has no all-to-all to plan for",
        "add it",
    ),
    numbers_in(OF_CLUSTER),
    Refusal(
        _without(("cluster_nodes", "cluster_gpus_per_node")),
        "The layout needs {missing}",
        "add what is missing; a --cluster-preset knows its GPUs",
    ),
    Refusal(
        lambda args: args.measured is None and _without(COMPUTE + NETWORK)(args),
        "Times need {missing}",
        "add what is missing, or give measured times with --measured",
        "no default would be honest",
    ),
    Refusal(_absent, "{files}: no such file", "name one that is there"),
)
