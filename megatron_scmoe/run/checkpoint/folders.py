"""Before anything is read: are --load and --save the folders that the user means?

The host begins at iteration 1, without a word, where --load has no tracker file, and then saves
over what is there. Nothing whole is replaced here unless the run goes on from its folder.
"""

from argparse import Namespace
from pathlib import Path

from megatron_scmoe.run.checkpoint import aside, contents


def check_folders(args: Namespace) -> None:
    """Refuse folders that would be misread or overwritten.

    Args:
        args: parsed; what earlier runs left half done in --save is settled.

    Raises:
        ValueError: one line that says which folder or option is meant.
    """
    for option in ("load", "pretrained_checkpoint", "save"):
        if getattr(args, option):
            _check_place("--" + option.replace("_", "-"), Path(getattr(args, option)))
    _check_cleaned(args)
    start = _first_iteration(args)
    if args.save and not args.skip_train:
        _check_replaced(args, Path(args.save), start)


def _check_place(option: str, path: Path) -> None:
    """Take the folder of all iterations, and nothing in it.

    Raises:
        ValueError: it is a file, or one of the iterations.
    """
    if path.is_file():
        raise ValueError(f"{option} {path} is a file: give the folder that it lies in.")
    whole = (path / contents.DISTRIBUTED).exists() or any(path.glob("mp_rank_0*"))
    number = path.name.removeprefix("iter_")
    if whole and number.isdigit():
        step = f" --ckpt-step {int(number)}" if option == "--load" else ""
        raise ValueError(
            f"{option} {path} is one iteration of a checkpoint: use {option} {path.parent}{step}."
        )


def _check_cleaned(args: Namespace) -> None:
    """Nothing may lie below --non-persistent-global-ckpt-dir, where the host keeps one.

    Raises:
        ValueError: something does.
    """
    cleaned = args.non_persistent_global_ckpt_dir
    if cleaned is None:
        return
    for option in ("save", "load"):
        folder = getattr(args, option)
        if folder and Path(folder).resolve().is_relative_to(Path(cleaned).resolve()):
            raise ValueError(
                f"--non-persistent-global-ckpt-dir {cleaned} holds --{option} {folder}, and "
                "Megatron keeps only the newest checkpoint in it: give it a folder of its own."
            )


def _first_iteration(args: Namespace) -> int:
    """The iteration that the run goes on from, 0 if it begins anew.

    Raises:
        ValueError: there are checkpoints in --load, and nothing says which one is meant, or there
            has to be one and is none.
    """
    if args.load is None:
        return 0
    folder = Path(args.load)
    tracked = contents.tracked_iteration(folder) if contents.readable_tracker(folder) else None
    if args.ckpt_step or tracked is not None or aside.unsettled(folder):
        return 0 if args.finetune or tracked == "release" else int(args.ckpt_step or tracked or 0)
    newest = contents.newest_complete(folder)
    torn = (folder / contents.TRACKER).exists()  # resume.py mends it
    if newest is not None and not torn:
        found = ", ".join(map(str, contents.saved_iterations(folder)))
        raise ValueError(
            f"--load {folder} has checkpoints (iteration {found}) and no {contents.TRACKER}, and "
            f"Megatron would begin at iteration 1: say which with --ckpt-step {newest}, or use "
            "another folder."
        )
    if newest is None and args.exit_on_missing_checkpoint and not args.pretrained_checkpoint:
        raise ValueError(
            f"--load {folder} has no checkpoint: drop --exit-on-missing-checkpoint to begin at "
            "iteration 1."
        )
    return 0 if args.finetune else newest or 0


def _check_replaced(args: Namespace, save: Path, start: int) -> None:
    """Refuse whole iterations that the run would come to, and that are not its own past.

    Raises:
        ValueError: there are some.
    """
    goes_on = args.load is not None and Path(args.load).resolve() == save.resolve()
    if goes_on and not args.finetune:
        return  # after --ckpt-step, or where the run before was killed: its own
    newest = max((i for i in contents.saved_iterations(save) if _is_kept(save, i)), default=0)
    if newest <= start:
        return
    remedy = (
        "--finetune begins at iteration 1 again: save to another folder"
        if goes_on
        else f"go on from there with --load {save}, or save to another folder"
    )
    raise ValueError(
        f"--save {save} has a whole iteration {newest}, which this run has not made and would "
        f"replace: {remedy}."
    )


def _is_kept(save: Path, iteration: int) -> bool:
    """Whether a folder is worth keeping. Of the host's other formats nobody knows what is whole."""
    checkpoint = contents.iteration_folder(save, iteration)
    return any(checkpoint.glob("mp_rank_0*")) or not contents.defects(checkpoint)
