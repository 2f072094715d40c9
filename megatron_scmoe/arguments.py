"""Command line: the host's, plus one group generated from ScMoEConfig."""

import sys
from argparse import SUPPRESS, Action, ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_tokenizer
from megatron.training.argument_utils import (
    ArgumentGroupFactory,
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.config.container import PretrainConfigContainer
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import (
    has_nvrx_checkpointing_async_support as has_nvrx_async_support,
)

from megatron_scmoe import host, presets, recipe, say
from megatron_scmoe.c2r import placement
from megatron_scmoe.checks import command_line, layout, shortcut
from megatron_scmoe.checks.data import DATA, VOCABULARY
from megatron_scmoe.checks.ranges import NUMBERS
from megatron_scmoe.checks.refusal import refuse, refuse_all
from megatron_scmoe.checks.shortcut import check_model, router_has_no_gradient
from megatron_scmoe.config import NO_OPTIONS, ScMoEConfig
from megatron_scmoe.host.cpu import no_cuda_device
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.combine import COMBINES
from megatron_scmoe.model.dispatch import DISPATCHERS
from megatron_scmoe.model.experts.at_home import AT_HOME
from megatron_scmoe.model.experts.grouped import uses_grouped_experts, why_no_grouped_mm
from megatron_scmoe.model.routing import ROUTERS
from megatron_scmoe.model.specs import block_config
from megatron_scmoe.model.variant import values_help
from megatron_scmoe.run.checkpoint.folders import check_folders
from megatron_scmoe.run.checkpoint.model_options import ARCHITECTURE, SCMOE
from megatron_scmoe.run.checkpoint.resume import (
    keep_batch_size,
    keep_lists,
    prepare_load,
    settle_folders,
)
from megatron_scmoe.run.checkpoint.unpickle import trust_as_asked
from megatron_scmoe.words import flag


def parse_and_validate_args() -> Namespace:
    """Parse the command line, adapt it to this machine, and let the host check it.

    Raises:
        ValueError, AssertionError: what the host or we refuse; see say.user_errors.
    """
    return validate(parse(add_scmoe_args), trains=True)


def parse(add_options: Callable[[ArgumentParser], ArgumentParser]) -> Namespace:
    """The host's parser, on a command line in which files and presets are spelled out.

    Args:
        add_options: the program's own, an `extra_args_provider` of the host.

    Raises:
        ValueError: a file or an option that cannot be read.
    """
    # Where the host and `typed_options` look.
    sys.argv[1:] = presets.expand(recipe.expand(sys.argv[1:]))
    return parse_args(add_options)


def validate(args: Namespace, trains: bool = False) -> Namespace:
    """What follows the parsing: BEFORE, the host's own validation, AFTER.

    Args:
        args: parsed; changed in place.
        trains: this is the run that saves to --save, and finishes what others left there.

    Raises:
        ValueError, AssertionError: what the host or we refuse; see say.user_errors.
    """
    notes: list[str] = []
    for step in BEFORE:
        if trains or step is not settle_folders:
            notes += step(args) or []
    validate_args(args)
    for step in AFTER:
        notes += step(args) or []
    if args.rank == 0:
        print(*notes, sep="\n", end="\n" if notes else "")
    return args


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


def set_defaults(args: Namespace) -> list[str]:
    """apply_scmoe_defaults, with what sets them."""
    position = args.scmoe_shortcut_position
    what = "The variant" if position == "none" else f"--scmoe-shortcut-position {position}"
    return [f"{what} sets {note}" for note in apply_scmoe_defaults(args)]


def know_placement(args: Namespace) -> None:
    """Take down what --scmoe-expert-placement says, for checkpoints that hold ranks' buffers.

    Raises:
        ValueError: the file holds no placement.
    """
    if args.scmoe_expert_placement is not None:
        args.scmoe_placement_digest = placement.read(args.scmoe_expert_placement).digest


def choose_router(args: Namespace) -> list[str]:
    """Lists of partners imply the router that reads them."""
    if args.scmoe_c2r_lists is None or args.scmoe_router != ScMoEConfig.scmoe_router:
        return []
    args.scmoe_router = "c2r"
    return ["--scmoe-c2r-lists sets --scmoe-router c2r"]


def explain_hub(args: Namespace) -> list[str]:
    """Say that a tokenizer is asked of a hub, which without a network takes most of a minute."""
    name = args.tokenizer_model
    if args.tokenizer_type != "HuggingFaceTokenizer" or not name or Path(name).exists():
        return []
    return [f"--tokenizer-model {name} is no folder here: the Hugging Face hub is asked for it"]


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
    group = options.build_group(parser, title="scmoe")
    parser.set_defaults(
        scmoe_measured_slots=None,
        scmoe_offload=None,
        scmoe_experts_at_home={},
        scmoe_implied={},
        scmoe_placement_digest=None,
    )
    offer_variants(parser, group)
    recipe.add_config(group)
    # The host's default loads at other data parallel sizes only, and says so when it is too late.
    checkpoints = parser.add_argument_group("scmoe checkpoints")
    checkpoints.add_argument(
        "--trust-checkpoints",
        action="store_true",
        help="Unpickle whatever the files of a checkpoint name, which may run anything. By default "
        "only what torch and Megatron write is loaded.",
    )
    checkpoints.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        action="store_false",
        dest="dist_ckpt_optim_fully_reshardable",
        help="Save the distributed optimizer as it lies in its buffers: less host memory while "
        "saving, but the checkpoint loads at no other layout and no other shortcut position.",
    )
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=True)
    say.printable_help(parser)
    offer_own_help(parser, [group, checkpoints])
    return parser


class _OwnHelp(Action):
    """Print some groups of options and stop."""

    def __init__(self, *args: Any, groups: list[_ArgumentGroup], **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "nargs": 0, "default": SUPPRESS})
        self.groups = groups

    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        formatter = parser._get_formatter()
        for group in self.groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        print(formatter.format_help(), end="")
        parser.exit()


def offer_own_help(parser: ArgumentParser, groups: list[_ArgumentGroup]) -> None:
    """Add --help-scmoe, to which the host's four thousand lines of --help point at their top; where
    it is there, add to it.

    Args:
        groups: our options, which get their defaults into their texts.
    """
    for action in (action for group in groups for action in group._group_actions):
        if action.nargs != 0 and action.default is not None and action.default != SUPPRESS:
            action.help = f"{action.help} Default: {action.default}."
    if (own := parser._option_string_actions.get("--help-scmoe")) is not None:
        assert isinstance(own, _OwnHelp)
        own.groups += groups
        return
    parser.add_argument(
        "--help-scmoe", action=_OwnHelp, groups=groups, help="Print the options of ScMoE alone."
    )
    parser.usage = "%(prog)s [--help-scmoe] [--help] <options>\n\n--help-scmoe prints ours alone."


class _NumberOfKind(Action):
    """N experts of one kind; all kinds are one dictionary, as in ScMoEConfig."""

    def __init__(self, *args: Any, kind: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser: Any, args: Namespace, values: Any, _: str | None = None) -> None:
        setattr(args, self.dest, {**getattr(args, self.dest), self.kind: values})


def offer_variants(parser: ArgumentParser, group: _ArgumentGroup) -> None:
    """Describe the values of options that come from a table, and let the host's take them too.

    Args:
        group: our options.
    """
    for action in group._group_actions:
        if isinstance(table := action.choices, dict):
            action.help = f"{(action.help or '').rstrip('.')}: {values_help(table)}."
    if (dispatcher := parser._option_string_actions.get("--moe-token-dispatcher-type")) is not None:
        dispatcher.choices = DISPATCHERS
    for kind, experts in AT_HOME.items():
        group.add_argument(
            f"--scmoe-num-{kind}-experts",
            dest="scmoe_experts_at_home",
            type=int,
            action=_NumberOfKind,
            kind=kind,
            metavar="N",
            default=SUPPRESS,
            help=f"Experts at home of the kind {values_help({kind: experts})}.",
        )


def restore_options(args: Namespace) -> list[str]:
    """--use-checkpoint-args: the options that the host restores, and ours, which it does not know.

    Returns:
        One line for each of ours that changes.

    Raises:
        ValueError: there is no checkpoint to take options from.
    """
    if not args.use_checkpoint_args:
        return []
    typed = {dest: getattr(args, dest, None) for dest in typed_options(sys.argv[1:])}
    restored = load_args_from_checkpoint(args) if args.load is not None else None
    if not isinstance(restored, tuple):  # what the host returns when it has read a checkpoint
        raise ValueError(
            f"--use-checkpoint-args: no options of a checkpoint in --load {args.load}."
        )
    _, saved = restored
    notes = []
    for name in (*ARCHITECTURE, *SCMOE):
        if hasattr(saved, name) and getattr(saved, name) != getattr(args, name):
            setattr(args, name, getattr(saved, name))
            notes.append(f"Setting {name} to {getattr(args, name)} from checkpoint")
    overruled = [
        f"{flag(dest)} {value} by {getattr(args, dest)}"
        for dest, value in typed.items()
        if getattr(args, dest, None) != value
    ]
    if overruled:
        notes.append(f"--use-checkpoint-args overrules {', '.join(overruled)}.")
    return notes


def typed_options(argv: list[str]) -> list[str]:
    """The dests of the options on a command line, in its order."""
    known = add_scmoe_args(add_megatron_arguments(ArgumentParser()))._option_string_actions
    names = (word.split("=")[0] for word in argv if word.startswith("--"))
    return list(dict.fromkeys(known[name].dest for name in names if name in known))


def scmoe_config_from_args(args: Namespace) -> ScMoEConfig:
    """Our options from the parsed command line."""
    return ScMoEConfig(**{field.name: getattr(args, field.name) for field in fields(ScMoEConfig)})


def apply_scmoe_defaults(args: Namespace) -> list[str]:
    """Set what a shortcut implies and the baseline's command line leaves open.

    Args:
        args: parsed and validated; changed in place, so that FLOPs, checkpoints and logs see it;
            `scmoe_implied` is what stood there before, by dest.

    Returns:
        One line for each option that was set, with the reason.
    """
    scmoe = scmoe_config_from_args(args)
    if not scmoe.enabled or args.num_experts is None:
        return []
    notes = []

    def imply(dest: str, value: Any) -> None:
        args.scmoe_implied = {**args.scmoe_implied, dest: getattr(args, dest)}
        setattr(args, dest, value)

    if scmoe.dual_gating or not (scmoe.has_shortcut or args.moe_shared_expert_gate):
        if scmoe.scmoe_combine == ScMoEConfig.scmoe_combine:
            imply("scmoe_combine", "add")
            scmoe = scmoe_config_from_args(args)
            notes.append("--scmoe-combine add: there is no gated shared expert")
    elif scmoe.has_shortcut and args.moe_shared_expert_intermediate_size is None:
        imply("moe_shared_expert_intermediate_size", args.ffn_hidden_size)
        notes.append(
            f"--moe-shared-expert-intermediate-size {args.ffn_hidden_size} (--ffn-hidden-size): "
            "the shared expert on the current representation"
        )
    for dest, (value, reason) in ROUTERS[scmoe.scmoe_router].implied.items():
        if getattr(args, dest) != value:
            imply(dest, value)
            notes.append(f"{flag(dest)}: with --scmoe-router {scmoe.scmoe_router} {reason}")
    if router_has_no_gradient(args):
        imply("moe_router_pre_softmax", True)
        notes.append(
            "--moe-router-pre-softmax: with top-1 a softmax over the selected expert is always 1 "
            "and would leave the router no gradient"
        )
    if COMBINES[scmoe.scmoe_combine].host_gate and not args.moe_shared_expert_gate:
        imply("moe_shared_expert_gate", True)
        notes.append(f"--moe-shared-expert-gate: this is --scmoe-combine {scmoe.scmoe_combine}")
    return notes


# The way of the parsed command line, top to bottom: each may change it and returns notes for the
# user, a line each. The host validates between the two.
Step = Callable[[Namespace], list[str] | None]
BEFORE: tuple[Step, ...] = (
    partial(refuse, command_line.PARSED),
    trust_as_asked,
    settle_folders,
    check_folders,
    restore_options,
    choose_router,
    host.apply_cpu_defaults,
    complete_async_save,
    keep_batch_size,
    partial(refuse_all, NUMBERS + command_line.COMPLETE),
    partial(refuse, layout.TYPED),
)
AFTER: tuple[Step, ...] = (
    partial(refuse, layout.RESOLVED),
    set_defaults,
    explain_grouped_gemm,
    explain_hub,
    know_placement,
    prepare_load,
    keep_lists,
)


def model_config_from_args(args: Namespace) -> ScMoEModelConfig:
    """The model of a validated command line.

    Raises:
        ValueError: a combination that cannot work, in one line.
    """
    scmoe = scmoe_config_from_args(args)
    if args.multi_latent_attention:
        # The host reads them for other attention only (argument_utils.py:388).
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            if (value := getattr(args, f"yarn_{name}")) is not None:
                setattr(args, name, value)
    config = core_transformer_config_from_args(args)
    check_model(config, scmoe)
    refuse(shortcut.OPTIONS + command_line.STACKED_EXPERTS, args)
    if scmoe.enabled:
        block_config(config, scmoe)
    model_config = gpt_config_from_args(args, config=config, model_config_cls=ScMoEModelConfig)
    model_config.scmoe = scmoe
    return model_config


def prepare(args: Namespace) -> PretrainConfigContainer:
    """Everything that needs no process group, so that what is wrong ends the run here.

    Args:
        args: validated; becomes the host's global options.

    Raises:
        ValueError and other say.USER_ERRORS: what the host or we refuse.
    """
    refuse(DATA, args)
    set_global_variables(args)
    refuse(VOCABULARY, args, get_tokenizer().vocab_size)
    return pretrain_cfg_container_from_args(args, model_config_from_args(args))
