"""Command line: the host's, plus one group generated from ScMoEConfig."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields

import torch
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

from megatron_scmoe import host, say
from megatron_scmoe.checks.layout import check_ranks, check_shares
from megatron_scmoe.config import (
    NO_OPTIONS,
    ScMoEConfig,
    check_transformer_impl,
    router_has_no_gradient,
    uses_grouped_experts,
)
from megatron_scmoe.host.cpu import no_cuda_device
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.experts.grouped import why_no_grouped_mm
from megatron_scmoe.model.specs import block_config
from megatron_scmoe.run.checkpoint.folders import check_folders
from megatron_scmoe.run.checkpoint.options import ARCHITECTURE, SCMOE
from megatron_scmoe.run.checkpoint.resume import keep_batch_size, prepare_load, settle_folders


def parse_and_validate_args() -> Namespace:
    """Parse the command line, adapt it to this machine, and let the host check it.

    Raises:
        ValueError, AssertionError: what the host or we refuse; see say.user_errors.
    """
    return validate(parse_args(add_scmoe_args), trains=True)


def validate(args: Namespace, trains: bool = False) -> Namespace:
    """What follows the parsing; options are changed in place.

    Args:
        trains: this is the run that saves to --save, and finishes what others left there.

    Raises:
        ValueError, AssertionError: what the host or we refuse; see say.user_errors.
    """
    if args.yaml_cfg is not None:
        raise ValueError("--yaml-cfg has no place for the --scmoe options: use the command line.")
    notes = settle_folders(args) if trains else []
    check_folders(args)
    if args.use_checkpoint_args:
        restore_args(args)
    host.apply_cpu_defaults(args)
    check_transformer_impl(args.transformer_impl)
    check_complete(args)
    notes += complete_async_save(args) + keep_batch_size(args)
    check_ranks(args)
    validate_args(args)
    check_shares(args)
    position = args.scmoe_shortcut_position
    notes += [
        f"--scmoe-shortcut-position {position} sets {note}" for note in apply_scmoe_defaults(args)
    ]
    notes += explain_grouped_gemm(args)
    notes += prepare_load(args)
    if args.rank == 0:
        print(*notes, sep="\n", end="\n" if notes else "")
    return args


def check_complete(args: Namespace) -> None:
    """Refuse a command line without what the host misses too late to say so in one line.

    Raises:
        ValueError: the option that is missing.
    """
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise ValueError("--tokenizer-type NullTokenizer needs --vocab-size.")
    if args.skip_train:
        return
    if args.train_iters is None and args.train_samples is None:
        raise ValueError("How long to train is missing: add --train-iters or --train-samples.")
    if args.lr is None:
        raise ValueError("The learning rate is missing: add --lr.")
    if args.eval_interval is None and not args.full_validation:
        raise ValueError("When to evaluate is missing: add --eval-interval.")


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


def explain_grouped_gemm(args: Namespace) -> list[str]:
    """Say where `--moe-grouped-gemm` without Transformer Engine does not mean grouped_mm.

    Returns:
        One line, or none.
    """
    if not args.moe_grouped_gemm or args.num_experts is None or args.transformer_impl != "local":
        return []
    if not uses_grouped_experts(args):
        return ["--moe-grouped-gemm: experts with biases run one by one; add --disable-bias-linear"]
    ffn = (args.moe_ffn_hidden_size or args.ffn_hidden_size) // args.expert_tensor_parallel_size
    device = torch.device("cpu" if no_cuda_device() else "cuda")
    reason = why_no_grouped_mm(args.params_dtype, (args.hidden_size, ffn), device)
    return [f"--moe-grouped-gemm: a loop of matmuls: {reason}"] if reason else []


def add_scmoe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the options of ScMoEConfig; an `extra_args_provider` of the host."""
    say.one_line_usage_errors(parser)
    options = ArgumentGroupFactory(ScMoEConfig, exclude=list(NO_OPTIONS))
    options.build_group(parser, title="scmoe")
    parser.set_defaults(**dict.fromkeys(NO_OPTIONS))
    # The host's default loads at other data parallel sizes only, and says so when it is too late.
    parser.add_argument_group("scmoe checkpoints").add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        action="store_false",
        dest="dist_ckpt_optim_fully_reshardable",
        help="Save the distributed optimizer as it lies in its buffers: less host memory while "
        "saving, but the checkpoint loads at no other layout and no other shortcut position.",
    )
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=True)
    say.printable_help(parser)
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
