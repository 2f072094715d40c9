"""An iteration that is saved again: the old one stays until the new one is whole.

    iter_0000006/     the host writes it; the tracker names it as soon as it is whole
    aside_0000006/    the one before, until then

What belongs to an iteration, its record and the tracker if it names it, lies inside the old one
while that is aside: a single rename puts all of it aside or back, and the tracker never names what
is not there. A run that is killed in between leaves the folder to the next one, which settles it.
"""

import os
import shutil
from pathlib import Path

from megatron_scmoe.run.checkpoint.contents import (
    TRACKER,
    iteration_folder,
    readable_tracker,
    whole,
    write_tracker,
)
from megatron_scmoe.run.checkpoint.record import record_path

RECORD = "record.json"


def aside_folder(folder: Path, iteration: int) -> Path:
    """Where an iteration waits while it is saved again."""
    return folder / f"aside_{iteration:07d}"


def put_aside(folder: Path, iteration: int) -> None:
    """Make room for an iteration that is about to be saved, whatever is there, whole or not.

    The host would write into its files, with the tracker or `metadata.json` calling it whole
    meanwhile (training/checkpointing.py:767, "TODO").
    """
    settle(folder, iteration)
    checkpoint = iteration_folder(folder, iteration)
    if not checkpoint.is_dir():
        return
    if readable_tracker(folder) == iteration:
        os.rename(folder / TRACKER, checkpoint / TRACKER)
    if record_path(folder, iteration).exists():
        os.rename(record_path(folder, iteration), checkpoint / RECORD)
    os.rename(checkpoint, aside_folder(folder, iteration))


def settle(folder: Path, iteration: int) -> str | None:
    """Keep one of the two: the new one if it is whole, else the one that was put aside.

    Not while the host still writes. May be killed at any moment and called again.

    Returns:
        What was done, for the user; None if there was nothing to do.
    """
    checkpoint, aside = iteration_folder(folder, iteration), aside_folder(folder, iteration)
    done = None
    if aside.is_dir() and whole(folder, iteration):
        if readable_tracker(folder) is None:
            write_tracker(folder, iteration)  # killed between the last byte and the tracker
        shutil.rmtree(aside)
        done = f"iteration {iteration} was saved again; the old one is removed"
    elif aside.is_dir():
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        record_path(folder, iteration).unlink(missing_ok=True)
        os.rename(aside, checkpoint)
        done = f"saving iteration {iteration} again did not end; the old one is back"
    if (checkpoint / RECORD).exists():
        os.rename(checkpoint / RECORD, record_path(folder, iteration))
    if (checkpoint / TRACKER).exists():
        if readable_tracker(folder) is None:
            os.rename(checkpoint / TRACKER, folder / TRACKER)
        else:
            (checkpoint / TRACKER).unlink()  # another save has ended since
    return done


def unsettled(folder: Path) -> list[int]:
    """Iterations that `settle` has something to do for."""
    found = {path.name.removeprefix("aside_") for path in folder.glob("aside_*")}
    for name in (RECORD, TRACKER):
        found |= {path.parent.name.removeprefix("iter_") for path in folder.glob(f"iter_*/{name}")}
    return sorted(int(name) for name in found if name.isdecimal())


def settle_all(folder: Path) -> list[str]:
    """Settle what earlier runs have left in a folder that only this run writes to.

    Returns:
        A line for the user for each iteration.
    """
    done = [settle(folder, iteration) for iteration in unsettled(folder)]
    return [f"{folder}: {what}" for what in done if what]
