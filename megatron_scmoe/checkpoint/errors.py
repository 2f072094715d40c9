"""While a checkpoint is written or read: what went wrong with the files, as one line.

`saving` and `loading` wrap the host's save_checkpoint and load_checkpoint (host/table.py).
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.checkpoint import contents
from megatron_scmoe.checkpoint.record import write_record


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message is for the user."""


def saving(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
    """`save_checkpoint` that writes the record first, and leaves nothing half-written."""

    def replacement(iteration: int, *args: Any, **kwargs: Any) -> None:
        options = get_args()
        folder = Path(options.save)
        with _one_line(f"cannot save iteration {iteration} to {folder}", folder, iteration):
            if torch.distributed.get_rank() == 0:
                write_record(folder, iteration, options)
            save_checkpoint(iteration, *args, **kwargs)

    return replacement


def finalizing(maybe_finalize_async_save: Callable[..., None]) -> Callable[..., None]:
    """The end of an asynchronous save, which is where its errors arrive."""

    def replacement(*args: Any, **kwargs: Any) -> None:
        folder = get_args().save
        with _one_line(f"cannot save to {folder}", None, None):
            maybe_finalize_async_save(*args, **kwargs)

    return replacement


def loading(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`load_checkpoint` that names the file that is wrong."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        options = get_args()
        with _one_line(f"cannot load from {options.load or options.pretrained_checkpoint}"):
            return load_checkpoint(*args, **kwargs)

    return replacement


@contextmanager
def _one_line(
    what: str, folder: Path | None = None, iteration: int | None = None
) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
        left = ""
        if folder is not None and iteration is not None:
            left = _remove_partial(folder, iteration)
        raise CheckpointError(f"{what}: {_cause(error)}{left}.") from error


def _remove_partial(folder: Path, iteration: int) -> str:
    """Remove what a failed save left, and say what there is to go on from."""
    tracked = contents.tracked_iteration(folder)
    if tracked == iteration:
        return ""
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(contents.iteration_folder(folder, iteration), ignore_errors=True)
    return f"; {folder} still holds iteration {tracked}" if tracked is not None else ""


def _cause(error: BaseException) -> str:
    """The innermost cause's text on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
