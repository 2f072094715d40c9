"""Whose learning rate, weight decay and optimizer constants a run follows that goes on.

    neither option                        a schedule that differs is refused, unless it is only
                                          longer; constants of the optimizer are this run's, with
                                          a note (options.WORTH_A_NOTE)
    --use-checkpoint-opt_param-scheduler  all as in the checkpoint
    --override-opt_param-scheduler        all as on the command line

The host compares what its scheduler saves (core/optimizer_param_scheduler.py:318), which is not
all of it, and takes the bounds of every parameter group from the optimizer that it has built. So
the checkpoint's values are put on the command line, before anything is built from it.
"""

from argparse import Namespace
from typing import Any

from megatron_scmoe.run.checkpoint.model_options import differences, flag

# The scheduler's state and the option that a value of it comes from.
_SAVED = {
    "max_lr": "lr",
    "min_lr": "min_lr",
    "lr_decay_style": "lr_decay_style",
    "start_wd": "start_weight_decay",
    "end_wd": "end_weight_decay",
    "wd_incr_style": "weight_decay_incr_style",
}
# What decides the schedule too, and is known from the saved command line alone.
_NOT_SAVED = ("lr_warmup_init", "decoupled_lr", "decoupled_min_lr", "lr_wsd_decay_style")
_CONSTANTS = ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")


def follow_schedule(
    where: str, saved: dict[str, Any] | None, saved_args: Namespace, args: Namespace
) -> list[str]:
    """Decide which schedule this run follows, and tell the host.

    Args:
        where: the checkpoint, for messages.
        saved: the state of its scheduler.
        saved_args: its command line.
        args: parsed and validated; changed in place.

    Returns:
        Notes for the user, a line each.

    Raises:
        ValueError: the schedule changes, and the run does not say which one it wants.
    """
    if saved is None or args.override_opt_param_scheduler:
        return []
    if args.use_checkpoint_opt_param_scheduler:
        return _take(where, saved, saved_args, args)
    here, there = _lengths(args), _lengths(saved_args) | saved
    here |= {name: getattr(args, dest) for name, dest in _SAVED.items()}
    changed = [name for name, value in here.items() if there.get(name) != value]
    texts = [f"{name} {there.get(name)} there, {here[name]} here" for name in changed]
    others = differences(saved_args, args, _NOT_SAVED)
    if not changed and not others:
        return []
    by_length = {"lr_decay_steps", "wd_incr_steps"}
    if args.lr_warmup_fraction is not None:
        by_length.add("lr_warmup_steps")
    text = "; ".join(texts)
    if others or not set(changed) <= by_length:
        in_samples = f"{text} (in samples)" if texts else ""
        raise ValueError(
            f"{where} has another schedule: {'; '.join(filter(None, [in_samples, *others]))}. Add "
            "--override-opt-param-scheduler for the new one or "
            "--use-checkpoint-opt-param-scheduler for the old one."
        )
    args.override_opt_param_scheduler = True
    return [
        f"{where}: the schedule follows the new length ({text}, in samples); to keep the old one "
        "add --use-checkpoint-opt-param-scheduler"
    ]


def _take(where: str, saved: dict[str, Any], saved_args: Namespace, args: Namespace) -> list[str]:
    """The checkpoint's values, on the command line."""
    there = {dest: saved[name] for name, dest in _SAVED.items() if name in saved}
    others = (*_NOT_SAVED, *_CONSTANTS)
    there |= {dest: getattr(saved_args, dest) for dest in others if hasattr(saved_args, dest)}
    last_part = _lengths(saved_args)["wsd_decay_steps"]
    if last_part is not None:
        unit = "lr_wsd_decay_iters" if args.train_iters else "lr_wsd_decay_samples"
        there[unit] = last_part / args.global_batch_size if args.train_iters else last_part
    changed = {dest: value for dest, value in there.items() if getattr(args, dest) != value}
    for dest, value in changed.items():
        setattr(args, dest, value)
    text = ", ".join(f"{flag(dest)} {value}" for dest, value in changed.items())
    return [f"{where} sets {text}"] if changed else []


def _lengths(args: Namespace) -> dict[str, Any]:
    """What the host will compute (training/training.py:1906), in samples."""
    if args.train_iters:
        unit = args.global_batch_size
        length = args.train_iters * unit
        decay = length if args.lr_decay_iters is None else args.lr_decay_iters * unit
        warmup = args.lr_warmup_iters * unit
        last_part = args.lr_wsd_decay_iters and args.lr_wsd_decay_iters * unit
    else:
        length = args.train_samples
        decay = length if args.lr_decay_samples is None else args.lr_decay_samples
        warmup = args.lr_warmup_samples
        last_part = args.lr_wsd_decay_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return {
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "wd_incr_steps": length,
        "wsd_decay_steps": last_part,
    }
