"""Command line: the host's, plus one group generated from ScMoEConfig."""

import math
from argparse import ArgumentParser, Namespace
from dataclasses import fields

from megatron.training.argument_utils import (
    ArgumentGroupFactory,
    core_transformer_config_from_args,
    gpt_config_from_args,
)
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.utils import (
    has_nvrx_checkpointing_async_support as has_nvrx_async_support,
)

from megatron_scmoe import host
from megatron_scmoe.checkpoint.options import ARCHITECTURE, SCMOE
from megatron_scmoe.checkpoint.resume import keep_batch_size, prepare_load
from megatron_scmoe.config import ScMoEConfig, check_transformer_impl, router_has_no_gradient
from megatron_scmoe.layer_specs import block_config
from megatron_scmoe.model import ScMoEModelConfig


def parse_and_validate_args() -> Namespace:
    """Parse the command line, adapt it to this machine, and let the host check it.

    Raises:
        ValueError, AssertionError: what the host or we refuse; see host.user_errors.
    """
    args = parse_args(add_scmoe_args)
    if args.yaml_cfg is not None:
        raise ValueError("--yaml-cfg has no place for the --scmoe options: use the command line.")
    if args.use_checkpoint_args:
        restore_args(args)
    host.apply_cpu_defaults(args)
    check_transformer_impl(args.transformer_impl)
    notes = complete_async_save(args) + keep_batch_size(args)
    validate_args(args)
    check_world_size(args)
    position = args.scmoe_shortcut_position
    notes += [
        f"--scmoe-shortcut-position {position} sets {note}" for note in apply_scmoe_defaults(args)
    ]
    notes += prepare_load(args)
    if args.rank == 0:
        print(*notes, sep="\n", end="\n" if notes else "")
    return args


def check_world_size(args: Namespace) -> None:
    """Refuse a number of ranks that the experts' layout does not divide.

    The host finds out while it builds process groups (core/parallel_state.py).
    """
    layout = {
        "--expert-tensor-parallel-size": args.expert_tensor_parallel_size,
        "--expert-model-parallel-size": args.expert_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
    }
    ranks = math.prod(layout.values())
    if args.num_experts is not None and args.world_size % ranks:
        product = " x ".join(f"{option} {size}" for option, size in layout.items())
        raise ValueError(
            f"{args.world_size} ranks are no multiple of {ranks} = {product} (the first is "
            "--tensor-model-parallel-size unless it is given)."
        )


def complete_async_save(args: Namespace) -> list[str]:
    """Set what --async-save needs: the host would switch it off, or fail at the first save.

    Returns:
        One line for each option that was set, with the reason.
    """
    notes = []
    if args.async_save and not args.use_persistent_ckpt_worker:
        args.use_persistent_ckpt_worker = True
        notes.append("--async-save sets --use-persistent-ckpt-worker: Megatron's only way to do it")
    if args.async_save and args.async_strategy == "nvrx" and not has_nvrx_async_support():
        args.async_strategy = "mcore"
        notes.append("--async-save sets --async-strategy mcore: no nvidia-resiliency-ext here")
    return notes


def add_scmoe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the options of ScMoEConfig; an `extra_args_provider` of the host."""
    host.one_line_usage_errors(parser)
    ArgumentGroupFactory(ScMoEConfig).build_group(parser, title="scmoe")
    # The host's default loads at other data parallel sizes only, and says so when it is too late.
    parser.add_argument_group("scmoe checkpoints").add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        action="store_false",
        dest="dist_ckpt_optim_fully_reshardable",
        help="Save the distributed optimizer as it lies in its buffers: less host memory while "
        "saving, but the checkpoint loads at no other layout and no other shortcut position.",
    )
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=True)
    return parser


def restore_args(args: Namespace) -> None:
    """--use-checkpoint-args: the options that the host restores, and ours, which it does not know.

    Raises:
        ValueError: there is no checkpoint to take options from.
    """
    restored = load_args_from_checkpoint(args) if args.load is not None else None
    if not isinstance(restored, tuple):  # what the host returns when it has read a checkpoint
        raise ValueError(
            f"--use-checkpoint-args: no options of a checkpoint in --load {args.load}."
        )
    _, saved = restored
    for name in (*ARCHITECTURE, *SCMOE):
        if hasattr(saved, name) and getattr(saved, name) != getattr(args, name):
            setattr(args, name, getattr(saved, name))
            if args.rank == 0:
                print(f"Setting {name} to {getattr(args, name)} from checkpoint")


def scmoe_config_from_args(args: Namespace) -> ScMoEConfig:
    """Our options from the parsed command line."""
    return ScMoEConfig(**{field.name: getattr(args, field.name) for field in fields(ScMoEConfig)})


def apply_scmoe_defaults(args: Namespace) -> list[str]:
    """Set what a shortcut implies and the baseline's command line leaves open.

    Args:
        args: parsed and validated; changed in place, so that FLOPs, checkpoints and logs see it.

    Returns:
        One line for each option that was set, with the reason.
    """
    scmoe = scmoe_config_from_args(args)
    if not scmoe.enabled or args.num_experts is None:
        return []
    notes = []
    if args.moe_shared_expert_intermediate_size is None:
        args.moe_shared_expert_intermediate_size = args.ffn_hidden_size
        notes.append(
            f"--moe-shared-expert-intermediate-size {args.ffn_hidden_size} (--ffn-hidden-size): "
            "the shared expert on the current representation"
        )
    if router_has_no_gradient(args):
        args.moe_router_pre_softmax = True
        notes.append(
            "--moe-router-pre-softmax: with top-1 a softmax over the selected expert is always 1 "
            "and would leave the router no gradient"
        )
    if scmoe.scmoe_combine == "cg1" and not args.moe_shared_expert_gate:
        args.moe_shared_expert_gate = True
        notes.append("--moe-shared-expert-gate: this is --scmoe-combine cg1")
    return notes


def model_config_from_args(args: Namespace) -> ScMoEModelConfig:
    """The model of a validated command line.

    Raises:
        ValueError: a combination that cannot work, in one line.
    """
    scmoe = scmoe_config_from_args(args)
    config = core_transformer_config_from_args(args)
    scmoe.check(config)
    scmoe.check_options(args)
    if scmoe.enabled:
        block_config(config, scmoe)
    model_config = gpt_config_from_args(args, config=config, model_config_cls=ScMoEModelConfig)
    model_config.scmoe = scmoe
    return model_config
