"""Before a run starts: is what --load names there, whole, and this model?

Every refusal is one line and comes before any process group exists. What the host would get wrong
without a word (another vocabulary padding, a longer schedule) is set here, with a note.
"""

import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.run.checkpoint import aside, contents
from megatron_scmoe.run.checkpoint.errors import cause_of
from megatron_scmoe.run.checkpoint.model_options import (
    ARCHITECTURE,
    LAYOUT,
    SCMOE,
    TIMES,
    WORTH_A_NOTE,
    differences,
)
from megatron_scmoe.run.checkpoint.param_schedule import follow_schedule
from megatron_scmoe.run.checkpoint.record import machine_differences, read_record, tokenizer_digest

NEW_TENSORS = SCMOE[2:]
# What a baseline changes when it gains a shortcut: an expert less, a shared one that is new, and
# with a single expert the softmax in front of the choice.
OF_A_SHORTCUT = (
    "--moe-router-topk ",
    "--moe-router-pre-softmax ",
    "--moe-shared-expert-intermediate-size None ",
)
SECONDS_BETWEEN_LOOKS = 0.1
# What is looked up in the options of a checkpoint.
NEEDED = (
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
    "tensor_model_parallel_size",
    "use_distributed_optimizer",
)


def settle_folders(args: Namespace) -> list[str]:
    """Finish what runs before this one have left half done in its folders.

    Before anything is read there. The first rank does it; no process group exists yet, so the
    others look until it is done.

    Returns:
        Notes for the user, a line each, on the first rank.

    Raises:
        ValueError: what is half done is in the way, and may be another run's.
    """
    own = contents.own_folders(args)
    notes = []
    deadline = time.monotonic() + 60 * args.distributed_timeout_minutes
    for folder in own:
        if args.rank == 0:
            notes += aside.settle_all(folder)
        while left := aside.unsettled(folder):
            if time.monotonic() > deadline:
                raise ValueError(f"--save {folder}: the first rank has not settled {left}.")
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if args.load is None or (load := Path(args.load).resolve()) in own:
        return notes
    left = aside.unsettled(load)
    if left and not args.ckpt_step and contents.readable_tracker(load) is None:
        raise ValueError(
            f"--load {load}: iteration {left[-1]} is being saved again, or the run that did so was "
            "killed: wait for it, or start it again with --save there."
        )
    return notes


def prepare_load(args: Namespace) -> list[str]:
    """Check the checkpoint that this run will load and tell the host how.

    Args:
        args: parsed and validated; changed in place.

    Returns:
        Notes for the user, a line each.

    Raises:
        ValueError: the checkpoint is not whole, or not one of this model.
    """
    folder, starts_anew = _folder(args)
    if folder is None:
        return []
    iteration, notes = _iteration(folder, args)
    if not isinstance(iteration, int):
        return notes  # nothing to load, or a release, which the host knows better
    checkpoint = contents.iteration_folder(folder, iteration)
    if not checkpoint.is_dir():
        raise ValueError(f"--load {folder}: no {checkpoint.name}{_newest(folder)}.")
    if not _is_distributed(checkpoint):
        if args.scmoe_expert_placement is not None:
            raise ValueError(
                f"--load {folder}: {checkpoint.name} holds the experts of every rank as they lay "
                "there, in the host's older format: drop --scmoe-expert-placement."
            )
        return notes
    looks = os.environ.get("LOCAL_RANK", "0") == "0"  # at the files, once for each node
    if looks and (defects := contents.defects(checkpoint)):
        raise ValueError(f"--load {folder}: {defects[0]}{_newest(folder)}.")
    saved = _common_state(checkpoint)
    if saved.get("iteration") not in (None, iteration):
        raise ValueError(
            f"--load {folder}: {checkpoint.name} holds iteration {saved['iteration']}: its files "
            f"are another one's{_newest(folder, but=iteration)}."
        )
    saved_args = saved.get("args")
    if saved_args is None:
        return notes
    where = f"--load {folder}, iteration {iteration}"
    _check_model(where, saved_args, args, starts_anew)
    _check_tokenizer(where, folder, iteration, args, starts_anew)
    notes += _keep_vocabulary(where, saved_args, args)
    if not starts_anew:
        if not args.no_load_optim:
            _check_optimizer(where, saved, saved_args, args)
            notes += follow_schedule(where, saved.get("opt_param_scheduler"), saved_args, args)
        notes += _keep_slots(where, read_record(folder, iteration), saved_args, args)
        changed = differences(saved_args, args, (*SCMOE[:1], *WORTH_A_NOTE))
        if changed:
            notes.append(f"{where}, differs: {'; '.join(changed)}")
    return notes


def keep_batch_size(args: Namespace) -> list[str]:
    """Go on with the checkpoint's global batch where the command line gives none.

    The host would take --micro-batch-size x data parallel ranks: a job that comes back with fewer
    ranks would train with a smaller batch.

    Args:
        args: parsed, not yet validated; changed in place.

    Returns:
        Notes for the user, a line each.
    """
    _, starts_anew = _folder(args)
    if starts_anew or args.global_batch_size is not None:
        return []
    if args.step_batch_size_schedule is not None:
        return []
    where, saved, notes = _saved_options(args)
    size = getattr(saved, "global_batch_size", None)
    if size is None:
        return notes
    args.global_batch_size = size
    return [*notes, f"{where} sets --global-batch-size {size}"]


def keep_lists(args: Namespace) -> list[str]:
    """Go on with the checkpoint's lists of partners where the command line names none.

    Args:
        args: parsed and validated; changed in place.

    Returns:
        Notes for the user, a line each.

    Raises:
        ValueError: there are no lists.
    """
    if args.scmoe_router != "c2r":
        return []
    where, saved, _ = _saved_options(args)
    if saved is None or getattr(saved, "scmoe_router", None) != "c2r":
        if args.scmoe_c2r_lists is None:
            raise ValueError(
                "--scmoe-router c2r has no lists of partners: add --scmoe-c2r-lists, or --load a "
                "checkpoint that was trained with them."
            )
        return [f"{where}: experts are chosen by --scmoe-router c2r from now on"] if saved else []
    there = saved.scmoe_c2r_top_t
    if args.scmoe_c2r_top_t is None:
        args.scmoe_c2r_top_t = there
    top_t = f"--scmoe-c2r-top-t {there} there, {args.scmoe_c2r_top_t} here"
    if args.scmoe_c2r_lists is None:
        return [f"{where} sets the lists of partners; {top_t}"]
    return [
        f"{where}: the lists of --scmoe-c2r-lists {args.scmoe_c2r_lists} take the place of the "
        f"checkpoint's; {top_t}"
    ]


def _saved_options(args: Namespace) -> tuple[str, Namespace | None, list[str]]:
    """Of the checkpoint that will be loaded: its name, its options, notes for the user."""
    folder, _ = _folder(args)
    if folder is None:
        return "", None, []
    iteration, notes = _iteration(folder, args)
    if not isinstance(iteration, int):
        return "", None, notes
    checkpoint = contents.iteration_folder(folder, iteration)
    if not checkpoint.is_dir() or not _is_distributed(checkpoint):
        return "", None, notes
    saved = _common_state(checkpoint).get("args")
    return f"--load {folder}, iteration {iteration}", saved, notes


def _folder(args: Namespace) -> tuple[Path | None, bool]:
    """The folder that the host will load from, and whether only the weights are taken."""
    if args.load is not None and (Path(args.load) / contents.TRACKER).exists():
        return Path(args.load), args.finetune
    if args.pretrained_checkpoint is not None:
        return Path(args.pretrained_checkpoint), True
    return (None if args.load is None else Path(args.load)), args.finetune


def _iteration(folder: Path, args: Namespace) -> tuple[int | str | None, list[str]]:
    try:
        tracked = contents.tracked_iteration(folder)
    except ValueError as error:
        newest = contents.newest_complete(folder)
        if newest is None:
            raise ValueError(f"--load {folder}: {error}, and no complete checkpoint.") from error
        if args.rank == 0:
            contents.write_tracker(folder, newest)  # the host would leave without a word
        return newest, [f"--load {folder}: {error}; going on from iteration {newest}"]
    return (args.ckpt_step or tracked), []


def _is_distributed(checkpoint: Path) -> bool:
    old = any(path.name.startswith("mp_rank_0") for path in checkpoint.iterdir())
    return not old


def _newest(folder: Path, but: int | None = None) -> str:
    newest = contents.newest_complete(folder, but)
    if newest is None:
        return "; no other checkpoint there is complete"
    return f"; the newest complete checkpoint there is iteration {newest}: add --ckpt-step {newest}"


def _common_state(checkpoint: Path) -> dict[str, Any]:
    try:
        saved = load_common_state_dict(str(checkpoint))
        if not isinstance(saved, dict):
            raise ValueError(f"its options are a {type(saved).__name__}")
        options = saved.get("args")
        lacking = [name for name in NEEDED if options is not None and not hasattr(options, name)]
        if lacking:
            raise ValueError(f"its options lack {', '.join(lacking)}")
    except (CheckpointException, Exception) as error:  # damage is stumbled over in any way there is
        raise ValueError(f"--load {checkpoint} cannot be read: {cause_of(error)}.") from error
    return saved


def _check_model(where: str, saved: Namespace, args: Namespace, starts_anew: bool) -> None:
    changed = differences(saved, args, ARCHITECTURE)
    position = getattr(saved, "scmoe_shortcut_position", "none")
    if position == "none" or differences(saved, args, ("scmoe_combine",)):
        # The gate is then a matter of --scmoe-combine.
        changed = [line for line in changed if not line.startswith("--moe-shared-expert-gate")]
    gains_shortcut = position == "none" and args.scmoe_shortcut_position != "none"
    if gains_shortcut and starts_anew:
        changed = [line for line in changed if not line.startswith(OF_A_SHORTCUT)]
    if gains_shortcut and not changed and not starts_anew:
        advice = "drop --scmoe-shortcut-position"
        if not args.skip_train:
            advice = "start from its weights with --finetune"
        raise ValueError(f"{where} is a model without a shortcut: {advice}.")
    if changed:
        raise ValueError(
            f"{where} is another model: {'; '.join(changed)}. Use the checkpoint's values "
            "(--use-checkpoint-args takes them)."
        )
    changed = differences(saved, args, NEW_TENSORS)
    if changed and position != "none" and not starts_anew:
        raise ValueError(
            f"{where} has other units: {'; '.join(changed)}. Use the checkpoint's values"
            f"{_or_finetune(args)}."
        )


def _check_tokenizer(
    where: str, folder: Path, iteration: int, args: Namespace, starts_anew: bool
) -> None:
    record = read_record(folder, iteration)
    if record is None or starts_anew:
        return
    there, here = record["tokenizer"], tokenizer_digest(args)
    # A program that is given numbers in place of words has none that could be others.
    if args.skip_train and here["type"] == "NullTokenizer" != there["type"]:
        return
    changed = [
        f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]
    ]
    if changed:
        raise ValueError(
            f"{where} was trained with another tokenizer: {'; '.join(changed)}. Use that one"
            f"{_or_finetune(args)}."
        )


def _or_finetune(args: Namespace) -> str:
    """The other way out, where something is trained."""
    return "" if args.skip_train else ", or start from its weights with --finetune"


def _keep_vocabulary(where: str, saved: Namespace, args: Namespace) -> list[str]:
    """The checkpoint's padded vocabulary. The host pads to a multiple of the tensor parallel size,
    loads what fits, and rows that were never trained move the loss.

    Raises:
        ValueError: other options do not allow it.
    """
    size = saved.padded_vocab_size
    if size is None or args.padded_vocab_size == size:
        return []
    if args.padded_vocab_size is not None:
        raise ValueError(
            f"{where} has {size} rows in its vocabulary, --padded-vocab-size is "
            f"{args.padded_vocab_size}: drop it."
        )
    if size % args.tensor_model_parallel_size:
        raise ValueError(
            f"{where} has {size} rows in its vocabulary, which --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} does not divide: use a size that does."
        )
    args.padded_vocab_size = size
    padding = saved.make_vocab_size_divisible_by * saved.tensor_model_parallel_size
    if padding == args.make_vocab_size_divisible_by * args.tensor_model_parallel_size:
        return []
    return [f"{where} sets --padded-vocab-size {size}"]


def _keep_slots(
    where: str, record: dict[str, Any] | None, saved: Namespace, args: Namespace
) -> list[str]:
    """The expert slots that the saved run measured, unless this one takes other times."""
    slots = getattr(saved, "scmoe_measured_slots", None)
    if slots is None or args.scmoe_expert_slot != "auto" or args.scmoe_remeasure_slot:
        return []
    changed = differences(saved, args, (*LAYOUT, *TIMES)) + machine_differences(record, args)
    if changed:
        return [f"{where}: expert slots are measured again, it differs: {'; '.join(changed)}"]
    args.scmoe_measured_slots = slots
    return [
        f"{where} sets the expert slots it has measured, {slots[0]} forward and {slots[1]} "
        "backward; --scmoe-remeasure-slot measures again"
    ]


def _check_optimizer(
    where: str, saved: dict[str, Any], saved_args: Namespace, args: Namespace
) -> None:
    advice = "or load the weights alone with --no-load-optim"
    if saved_args.use_distributed_optimizer != args.use_distributed_optimizer:
        verb = "drop" if args.use_distributed_optimizer else "add"
        raise ValueError(
            f"{where} was saved {'with' if verb == 'add' else 'without'} "
            f"--use-distributed-optimizer: {verb} it, {advice}."
        )
    kind = (saved.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    if args.use_distributed_optimizer and kind == "dp_reshardable":
        # Grouped experts are other parameters, in other buffers.
        changed = differences(saved_args, args, (*LAYOUT, *SCMOE[:1], "moe_grouped_gemm"))
        # Of runs before there were placements, nothing is said of one.
        if args.scmoe_placement_digest != getattr(saved_args, "scmoe_placement_digest", None):
            changed.append("--scmoe-expert-placement")
        if changed:
            raise ValueError(
                f"{where} holds its optimizer as it lay in the buffers of its layout, and this run "
                f"differs: {'; '.join(changed)}. Save it with "
                f"--dist-ckpt-optim-fully-reshardable, {advice}."
            )
