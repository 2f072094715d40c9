"""Command line: the host's, plus one group generated from ScMoEConfig."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields

from megatron.training.argument_utils import (
    ArgumentGroupFactory,
    core_transformer_config_from_args,
    gpt_config_from_args,
)
from megatron.training.arguments import parse_args, validate_args

from megatron_scmoe import host
from megatron_scmoe.config import ScMoEConfig, check_transformer_impl
from megatron_scmoe.layer_specs import block_config
from megatron_scmoe.model import ScMoEModelConfig


def parse_and_validate_args() -> Namespace:
    """Parse the command line, adapt it to this machine, and let the host check it.

    Raises:
        ValueError, AssertionError: what the host or we refuse; see host.user_errors.
    """
    args = parse_args(add_scmoe_args)
    host.apply_cpu_defaults(args)
    check_transformer_impl(args.transformer_impl)
    validate_args(args)
    notes = apply_scmoe_defaults(args)
    if args.rank == 0:
        for note in notes:
            print(f"--scmoe-shortcut-position {args.scmoe_shortcut_position} sets {note}")
    return args


def add_scmoe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the options of ScMoEConfig; an `extra_args_provider` of the host."""
    host.one_line_usage_errors(parser)
    ArgumentGroupFactory(ScMoEConfig).build_group(parser, title="scmoe")
    return parser


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
    if (
        args.moe_router_topk == 1
        and args.moe_router_score_function == "softmax"
        and not args.moe_router_pre_softmax
    ):
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
    if scmoe.enabled:
        if args.spec is not None:
            raise ValueError(
                "--spec does not work with a shortcut: the units are the layers; drop it."
            )
        block_config(config, scmoe)
    model_config = gpt_config_from_args(args, config=config, model_config_cls=ScMoEModelConfig)
    model_config.scmoe = scmoe
    return model_config
