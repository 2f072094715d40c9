"""What a command line lacks or cannot mix, whatever the model: the host says it late, or never."""

import os
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from megatron_scmoe.checks.before_torch import LENGTH, NO_YAML
from megatron_scmoe.checks.refusal import Found, Refusal
from megatron_scmoe.checks.shortcut import TRANSFORMER_ENGINE
from megatron_scmoe.config import has_units
from megatron_scmoe.host.cpu import no_cuda_device
from megatron_scmoe.model.experts.grouped import uses_grouped_experts
from megatron_scmoe.words import flag

EMERGING = "emerging_optimizers"

FOLDERS = (
    "save",
    "load",
    "pretrained_checkpoint",
    "tensorboard_dir",
    "scmoe_trace_dir",
    "scmoe_collaboration_dir",
)


def _link_to_itself(args: Namespace) -> Found:
    for dest in FOLDERS:
        try:
            Path(getattr(args, dest) or ".").resolve()
        except (OSError, RuntimeError):
            return {"option": f"{flag(dest)} {getattr(args, dest)}"}
    return False


def _nameless(args: Namespace) -> Found:
    found = [flag(dest) for dest in FOLDERS if getattr(args, dest) == ""]
    return bool(found) and {"options": " and ".join(found)}


def _address(args: Namespace) -> Found:
    # TensorBoard's writer knows addresses.
    found = [
        f"{flag(dest)} {name}"
        for dest in FOLDERS
        if dest != "tensorboard_dir" and "://" in (name := getattr(args, dest) or "")
    ]
    return bool(found) and {"options": " and ".join(found)}


PARSED = (
    Refusal(
        _address,
        "{options} is an address and no folder",
        "mount what it names, and give the folder",
        "a folder of that name would be made here",
    ),
    Refusal(
        _nameless,
        "{options} is empty",
        "name a folder, or leave it out",
        "a variable of the shell may have no value",
    ),
    NO_YAML,
    Refusal(_link_to_itself, "{option} is a link to itself", "mend it, or name another folder"),
)

ROTATES = ("rope", "yarn", "none")
"""Position embeddings that take positions as they are, without asking for position ids."""


def _late_warm_up(unit: str) -> Refusal:
    """The host asserts it when it builds the schedule (core/optimizer_param_scheduler.py)."""

    def when(args: Namespace) -> Found:
        decay, whole = f"lr_decay_{unit}", f"train_{unit}"
        end = getattr(args, decay) or getattr(args, whole)
        warm_up = getattr(args, f"lr_warmup_{unit}")
        option = flag(decay if getattr(args, decay) else whole)
        return end is not None and warm_up >= end and {"end": f"{option} {end}"}

    return Refusal(
        when,
        f"--lr-warmup-{unit} {{lr_warmup_{unit}}} does not end before {{end}}",
        "make it shorter",
    )


def _no_key_for_wandb(args: Namespace) -> bool:
    """As wandb looks for one: its variable, then the file where `wandb login` puts it."""
    if not args.wandb_project or os.environ.get("WANDB_API_KEY"):
        return False
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc().authenticators(host or "") is None
    except (OSError, NetrcParseError):
        return True


WANDB = (
    Refusal(
        lambda args: bool(args.wandb_project) and find_spec("wandb") is None,
        "--wandb-project needs the package wandb",
        "install it, or drop --wandb-project",
    ),
    Refusal(
        lambda args: bool(args.wandb_project) and not args.wandb_exp_name,
        "--wandb-project needs a name for this run",
        "add --wandb-exp-name",
    ),
    Refusal(
        lambda args: bool(args.wandb_project) and not (args.wandb_save_dir or args.save),
        "--wandb-project has no folder to write to",
        "add --wandb-save-dir, or --save",
    ),
    Refusal(
        _no_key_for_wandb,
        "--wandb-project finds no key of Weights & Biases",
        "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline",
    ),
)


def _trace_of_nothing(args: Namespace) -> Found:
    start, end = args.profile_step_start, args.profile_step_end
    if args.scmoe_trace_dir is None:
        return False
    if not has_units(args):
        return {"why": "only shortcut units are traced, and --scmoe-shortcut-position is none"}
    if start >= end:
        return {"why": f"--profile-step-start {start} is not before --profile-step-end {end}"}
    if args.train_iters is not None and start >= args.train_iters:
        ends = f"the run ends at --train-iters {args.train_iters}"
        return {"why": f"it begins at --profile-step-start {start}, and {ends}"}
    return _no_place(args.scmoe_trace_dir)


def _no_place(name: str) -> dict[str, str]:
    """Why files cannot be put into a folder, which need not be there yet."""
    folder = Path(name).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return {"why": f"{there} is no folder"}
    try:
        with TemporaryDirectory(dir=there):  # the permissions alone say nothing to root
            return {}
    except OSError as error:
        return {"why": f"{there} takes no file: {error.strerror}"}


def _no_curves(args: Namespace) -> Found:
    name = args.tensorboard_dir
    # The writer knows addresses.
    return bool(name) and "://" not in name and _no_place(name)


def _counts_of_nothing(args: Namespace) -> Found:
    if args.scmoe_collaboration_dir is None:
        return False
    if args.num_experts is None:
        return {"why": "a model without --num-experts has no experts to count"}
    if args.scmoe_dual_gating != "none":
        return {"why": "two gates choose a token's experts apart"}
    return _no_place(args.scmoe_collaboration_dir)


# Once options of a checkpoint and of this machine are in their places.
COMPLETE = (
    TRANSFORMER_ENGINE,
    Refusal(
        _no_curves,
        "--tensorboard-dir {tensorboard_dir} cannot be written: {why}",
        "name another folder",
    ),
    Refusal(
        lambda args: args.tokenizer_type == "NullTokenizer" and args.vocab_size is None,
        "--tokenizer-type NullTokenizer needs --vocab-size",
    ),
    *LENGTH,
    Refusal(
        # The host takes iterations x the first batch size for the number of samples
        # (training/training.py), and the learning rate ends there.
        lambda args: (
            (args.step_batch_size_schedule or args.rampup_batch_size) and not args.train_samples
        ),
        "A batch size that grows needs the run's length in samples, or its schedule ends early",
        "use --train-samples in place of --train-iters, --lr-decay-samples and "
        "--lr-warmup-samples with it",
    ),
    *map(_late_warm_up, ("iters", "samples")),
    Refusal(
        lambda args: (
            args.seq_length is not None
            and args.max_position_embeddings is not None
            and args.seq_length > args.max_position_embeddings
            and {
                "of": "the checkpoint's" if args.use_checkpoint_args else "the model's",
                "remedy": "leave out --use-checkpoint-args"
                if args.use_checkpoint_args
                else "raise --max-position-embeddings",
            }
        ),
        "--seq-length {seq_length} is longer than {of} {max_position_embeddings} positions",
        "use a shorter sequence, or {remedy}",
    ),
    Refusal(
        lambda args: args.reset_position_ids and args.position_embedding_type in ROTATES,
        "--reset-position-ids changes nothing with --position-embedding-type "
        "{position_embedding_type}",
        "drop it",
        "only learned position embeddings read position ids",
    ),
    Refusal(
        lambda args: args.reset_attention_mask and not args.create_attention_mask_in_dataloader,
        "--reset-attention-mask changes nothing with --no-create-attention-mask-in-dataloader",
        "drop one of them",
    ),
    Refusal(
        lambda args: (
            args.reset_attention_mask
            and (args.transformer_impl == "transformer_engine" or args.masked_softmax_fusion)
        ),
        "--reset-attention-mask changes nothing with --transformer-impl {transformer_impl}",
        "add --transformer-impl local --no-masked-softmax-fusion",
        "fused causal attention takes no mask",
    ),
    Refusal(
        lambda args: args.optimizer not in ("adam", "sgd") and find_spec(EMERGING) is None,
        "--optimizer {optimizer} needs the package emerging_optimizers, which is not installed",
        "install it, or use adam or sgd",
    ),
    Refusal(
        lambda args: args.optimizer_cpu_offload and no_cuda_device(),
        "--optimizer-cpu-offload has nothing to offload from",
        "drop it",
        "there is no CUDA device",
    ),
    Refusal(_trace_of_nothing, "--scmoe-trace-dir would stay empty", "{why}"),
    Refusal(_counts_of_nothing, "--scmoe-collaboration-dir would stay empty", "{why}"),
    *WANDB,
)


def _wants_matrices(option: str, is_set: Callable[[Namespace], bool]) -> Refusal:
    return Refusal(
        lambda args: uses_grouped_experts(args) and is_set(args),
        f"{option} wants every expert's weights as matrices of their own, and --moe-grouped-gemm "
        "with --transformer-impl local stacks them",
        "drop --moe-grouped-gemm",
    )


# What looks for every expert's own matrix, where their weights are stacked.
STACKED_EXPERTS = (
    _wants_matrices("--optimizer {optimizer}", lambda args: args.optimizer not in ("adam", "sgd")),
    _wants_matrices("--moe-use-upcycling", lambda args: args.moe_use_upcycling),
    _wants_matrices(
        "--ckpt-format {ckpt_format}",
        lambda args: args.ckpt_format != "torch_dist" and bool(args.save or args.load),
    ),
)
