"""While a checkpoint is written or read: what went wrong with the files, as one line.

`saving`, `finalizing`, `cleaning` and `loading` wrap the host's functions (replacements.py).
"""

import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import get_args, print_rank_0
from megatron.training.async_utils import is_empty_async_queue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.run.checkpoint import aside, contents
from megatron_scmoe.run.checkpoint.record import drop_records_without_checkpoint, write_record
from megatron_scmoe.run.checkpoint.writer import check_writer, not_waiting_for_a_dead_writer
from megatron_scmoe.run.collaboration_dir import write_counts
from megatron_scmoe.run.watch import lost_peer

SECONDS_BETWEEN_LOOKS = 0.1
FULL = 2**20  # free bytes, of a disk that a save has failed on
FAILURES = (CheckpointException, CheckpointingException, OSError, RuntimeError)

Saved = tuple[Path, int]  # folder, iteration

_begun: list[Saved] = []
"""On the first rank: what the host has been told to write and has not finished."""
_current: Saved | None = None
"""Where the run's present state lies, if it has made no step since it loaded or saved it."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message is for the user."""


def saving(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
    """`save_checkpoint` that writes the record first, and never into an earlier checkpoint."""

    def replacement(iteration: int, *args: Any, **kwargs: Any) -> None:
        global _current
        options = get_args()
        persistent = not kwargs.get("non_persistent_ckpt")
        if options.save is None:
            # The host saves before it ends a run whose results are wrong, with nowhere to save to.
            return print_rank_0("nothing is saved: there is no --save")
        folder = Path(options.save) if persistent else contents.non_persistent_folder(options)
        if folder is None:
            with _leaves_nothing_half_written(Path(options.save)):
                check_writer()
                with not_waiting_for_a_dead_writer():
                    return save_checkpoint(iteration, *args, **kwargs)
        folder = folder.resolve()
        with _leaves_nothing_half_written(folder):
            check_writer()
            if _is_there(folder, iteration):
                return print_rank_0(f"iteration {iteration} is in {folder} already: not saved")
            if torch.distributed.get_rank() == 0:
                aside.put_aside(folder, iteration)
                _begun.append((folder, iteration))
                if persistent:
                    write_record(folder, iteration, options)
            torch.distributed.barrier()  # nobody writes into what the first rank puts aside
            with not_waiting_for_a_dead_writer():
                save_checkpoint(iteration, *args, **kwargs)
            if not options.async_save:
                _settle_begun()
        write_counts(options, iteration)
        _current = (folder, iteration)

    return replacement


def _is_there(folder: Path, iteration: int) -> bool:
    """Whether the run's present state is saved already, or about to be; the same on every rank."""
    if _current != (folder, iteration):
        return False
    saved = (folder, iteration) in _begun or contents.whole(folder, iteration)
    answer = [saved]
    torch.distributed.broadcast_object_list(answer)
    return answer[0]


def _settle_begun() -> None:
    """The host has finished all saves: what was put aside for them is not needed any more."""
    for folder, iteration in _begun:
        aside.settle(folder, iteration)
    _begun.clear()


def finalizing(maybe_finalize_async_save: Callable[..., None]) -> Callable[..., None]:
    """The end of an asynchronous save, which is where its errors arrive."""

    def replacement(blocking: bool = False, terminate: bool = False) -> None:
        options = get_args()
        if not (options.async_save and options.save):
            return maybe_finalize_async_save(blocking, terminate)
        with _leaves_nothing_half_written(Path(options.save)):
            check_writer()
            while blocking and not is_empty_async_queue():
                maybe_finalize_async_save()
                check_writer()
                time.sleep(SECONDS_BETWEEN_LOOKS)
            maybe_finalize_async_save(blocking, terminate)
            if is_empty_async_queue():
                _settle_begun()

    return replacement


def cleaning(cleanup_old_checkpoints: Callable[..., None]) -> Callable[..., None]:
    """`cleanup_old_non_persistent_checkpoint` that does nothing unless the newest folder, which it
    keeps, is whole: it may be half written, by a run that was killed or with --async-save."""

    def replacement(save_dir: str, *args: Any, **kwargs: Any) -> None:
        folder = Path(save_dir)
        newest = max(contents.saved_iterations(folder), default=None)
        if newest is None or newest != contents.readable_tracker(folder):
            return
        if contents.whole(folder, newest):
            cleanup_old_checkpoints(save_dir, *args, **kwargs)

    return replacement


def loading(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`load_checkpoint` that says what is wrong with the files."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        global _current
        options = get_args()
        _settle_earlier_attempt(options)
        try:
            result = load_checkpoint(*args, **kwargs)
            known = options.load is not None and options.non_persistent_ckpt_type is None
            _current = (Path(options.load).resolve(), result[0]) if known else None
            return result
        except CheckpointError:
            raise
        except SystemExit as error:
            # What the host cannot read it prints, and ends the run as if all were well.
            where = options.load or options.pretrained_checkpoint
            raise CheckpointError(
                f"cannot load from {where}: the lines above say what is wrong."
            ) from error
        except (CheckpointException, Exception) as error:  # torch's is no Exception
            if lost_peer(error):
                raise  # a rank that knows more has spoken or will
            where = options.load or options.pretrained_checkpoint
            broken = _corrupt_files(Path(where), options.ckpt_step) if where else []
            if not (broken or isinstance(error, FAILURES)):
                raise
            what = f"{broken[0]} is corrupt" if broken else cause_of(error)
            raise CheckpointError(f"cannot load from {where}: {what}.") from error

    return replacement


def _settle_earlier_attempt(options: Namespace) -> None:
    """With --inprocess-restart a run loads again after a save that has failed."""
    _begun.clear()
    if torch.distributed.get_rank() == 0:
        for folder in contents.own_folders(options):
            for line in aside.settle_all(folder):
                print(line, flush=True)
    torch.distributed.barrier()


@contextmanager
def _leaves_nothing_half_written(folder: Path) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if torch.distributed.get_rank() == 0:
            _remove_unfinished(folder)
        if lost_peer(error):
            raise
        cause = cause_of(error) if free > FULL else "the disk is full, make room there"
        raise CheckpointError(
            f"cannot save to {folder} ({free / 2**20:.1f} MiB free): "
            f"{'; '.join([cause, *_intact(folder)])}."
        ) from error


def _remove_unfinished(folder: Path) -> None:
    """Remove what a failed save has written, and no more.

    What was put aside comes back with the next run: other ranks may still write, by name.
    """
    for place, iteration in _begun:
        if not contents.whole(place, iteration):
            shutil.rmtree(contents.iteration_folder(place, iteration), ignore_errors=True)
    _begun.clear()
    drop_records_without_checkpoint(folder)


def _intact(folder: Path) -> list[str]:
    """What can be gone on from."""
    tracked = contents.readable_tracker(folder)
    intact = [] if tracked is None else [f"iteration {tracked} there is intact"]
    return intact + [
        f"iteration {iteration}, which was being saved again, comes back with the next run"
        for iteration in aside.unsettled(folder)
    ]


def _corrupt_files(folder: Path, iteration: int | str | None) -> list[Path]:
    """Those of the checkpoint that was asked for."""
    iteration = iteration or contents.readable_tracker(folder)
    if not isinstance(iteration, int):
        return []
    checkpoint = contents.iteration_folder(folder, iteration)
    if not (checkpoint / contents.DISTRIBUTED).exists() or contents.defects(checkpoint):
        return []  # not ours to read, or seen before anything was loaded
    return contents.corrupt_files(checkpoint)


def cause_of(error: BaseException) -> str:
    """The innermost cause's text on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300].rstrip('.')}" if text else type(error).__name__
