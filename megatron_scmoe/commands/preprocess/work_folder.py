"""The hidden folder beside the output in which the files of a run are made."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.words import read_json

_PROGRESS = "progress.json"


class WorkFolder:
    """Where files are made, and how far they are.

    progress: what `record` was last given, by this run or by the one that it goes on from.
    """

    def __init__(self, path: Path, run: dict[str, Any], progress: dict[str, Any] | None) -> None:
        self.path = path
        self.progress = progress
        self._run = run

    def record(self, progress: dict[str, Any]) -> None:
        """Keep `progress` for a later run; on disk when this returns, whole or not at all."""
        partial = self.path / f"{_PROGRESS}.partial"
        with partial.open("w") as stream:
            json.dump({"run": self._run, "progress": progress}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self.path / _PROGRESS)
        self.progress = progress


@contextlib.contextmanager
def work_folder(prefix: Path, resume: bool, run: dict[str, Any]) -> Iterator[WorkFolder]:
    """A folder `.<prefix>.<random>.tmp`, removed on any end but a kill of the process itself
    (SIGKILL); it can then be deleted by hand. With `resume` one named `.<prefix>.resume`, which
    stays when the run does not reach its end and something is recorded.

    Args:
        prefix: of the output, as in --output-prefix; its folder is created if missing.
        run: what must be the same in the run that goes on; of JSON's types.

    Raises:
        DataError: what is there is another run's, or in use.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        with tempfile.TemporaryDirectory(
            prefix=f".{prefix.name}.", suffix=".tmp", dir=prefix.parent
        ) as name:
            yield WorkFolder(Path(name), run, None)
        return
    path = prefix.parent / f".{prefix.name}.resume"
    path.mkdir(exist_ok=True)
    with (path / "lock").open("w") as lock:
        try:  # not flock, which the workers of a killed run would hold a moment longer
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"--resume: another run is writing in {path}; wait for it") from error
        folder = WorkFolder(path, run, _progress(path, run))
        try:
            yield folder
        except BaseException:
            if folder.progress is None:
                shutil.rmtree(path)
            raise
        shutil.rmtree(path)


def _progress(path: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """What the run before has recorded; None if nothing.

    Raises:
        DataError: the record is damaged, or of a run with other options.
    """
    try:
        recorded = read_json(path / _PROGRESS)
        before, progress = recorded["run"], recorded["progress"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise DataError(f"--resume: {path / _PROGRESS} is damaged; delete {path}") from error
    for name in {**run, **before}:
        if before.get(name) != run.get(name):
            raise DataError(
                f"--resume: the run in {path} was begun with another {name}; begin it again "
                "with the same, or delete that folder"
            )
    return progress
