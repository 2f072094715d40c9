"""While a checkpoint is written or read: what went wrong with the files, as one line.

`saving` and `loading` wrap the host's save_checkpoint and load_checkpoint (host/table.py).
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import get_args
from megatron.training.async_utils import is_empty_async_queue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.checkpoint import contents
from megatron_scmoe.checkpoint.record import drop_records_without_checkpoint, write_record
from megatron_scmoe.checkpoint.writer import check_writer
from megatron_scmoe.watch import lost_peer

SECONDS_BETWEEN_LOOKS = 0.1
FAILURES = (CheckpointException, CheckpointingException, OSError, RuntimeError)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message is for the user."""


def saving(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
    """`save_checkpoint` that writes the record first, and never into an earlier checkpoint."""

    def replacement(iteration: int, *args: Any, **kwargs: Any) -> None:
        options = get_args()
        folder = Path(options.save)
        with _leaves_nothing_half_written(folder):
            check_writer()
            persistent = not kwargs.get("non_persistent_ckpt")  # the others lie elsewhere
            if persistent and torch.distributed.get_rank() == 0:
                contents.retract(folder, iteration)
                write_record(folder, iteration, options)
            torch.distributed.barrier()  # nobody writes into what the first rank removes
            save_checkpoint(iteration, *args, **kwargs)

    return replacement


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

    return replacement


def loading(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`load_checkpoint` that says what is wrong with the files."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        options = get_args()
        try:
            return load_checkpoint(*args, **kwargs)
        except CheckpointError:
            raise
        except FAILURES as error:
            if lost_peer(error):
                raise  # a rank that knows more has spoken or will
            where = options.load or options.pretrained_checkpoint
            broken = _corrupt_files(Path(where), options.ckpt_step)
            what = f"{broken[0]} is corrupt" if broken else _cause(error)
            raise CheckpointError(f"cannot load from {where}: {what}.") from error

    return replacement


@contextmanager
def _leaves_nothing_half_written(folder: Path) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if torch.distributed.get_rank() == 0:
            _remove_incomplete(folder)
        if lost_peer(error):
            raise
        tracked = contents.tracked_iteration(folder)
        intact = "" if tracked is None else f"; iteration {tracked} there is intact"
        raise CheckpointError(
            f"cannot save to {folder} ({free / 2**20:.1f} MiB free): {_cause(error)}{intact}."
        ) from error


def _remove_incomplete(folder: Path) -> None:
    """Remove what a failed save has written: folders that no tracker ever named, and records."""
    tracked = contents.tracked_iteration(folder)
    for iteration in contents.saved_iterations(folder):
        checkpoint = contents.iteration_folder(folder, iteration)
        if iteration != tracked and not (checkpoint / contents.DISTRIBUTED).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)
    drop_records_without_checkpoint(folder)


def _corrupt_files(folder: Path, iteration: int | str | None) -> list[Path]:
    """Those of the checkpoint that was asked for."""
    iteration = iteration or contents.tracked_iteration(folder)
    if not isinstance(iteration, int):
        return []
    return contents.corrupt_files(contents.iteration_folder(folder, iteration))


def _cause(error: BaseException) -> str:
    """The innermost cause's text on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300].rstrip('.')}" if text else type(error).__name__
