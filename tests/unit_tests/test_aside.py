"""An iteration that is saved again, stopped at every operation on the file system.

By a kill or an error, and once more at every operation of the next start: a whole checkpoint is
left with its record and is gone on from, and nothing else is removed.
"""

import itertools
import json
import os
import shutil
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.training import checkpointing
from torch.distributed import checkpoint as dcp

from megatron_scmoe.run.checkpoint import aside, contents, errors
from megatron_scmoe.run.checkpoint.record import read_record, write_record
from megatron_scmoe.run.checkpoint.resume import settle_folders

OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir")
OLD, NEW = 1.0, 2.0


class Interruption:
    """Counts operations on files; the one with the number `at` does not happen."""

    def __init__(self, at: int | None, error: BaseException | None = None) -> None:
        self.at = at
        self.error = error
        self.count = 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.at and self.error is not None:
            raise self.error

    @property
    def happened(self) -> bool:
        return self.at is not None and self.count >= self.at


@contextmanager
def interrupted(interruption: Interruption) -> Iterator[None]:
    """Everything that pathlib and shutil do ends in these functions of `os`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            original = getattr(os, name)

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                interruption.step()
                return original(*args, **kwargs)

            patch.setattr(os, name, counted)
        with suppress(SystemExit, errors.CheckpointError, OSError):
            yield


def host_save(folder: Path, iteration: int, value: float, interruption: Interruption) -> None:
    """In the host's order: tensors, their metadata, what says that it is whole, the tracker, which
    is not replaced but opened and written."""
    checkpoint = contents.iteration_folder(folder, iteration)
    checkpoint.mkdir(exist_ok=True)
    dcp.save({"weight": torch.full((100,), value)}, checkpoint_id=checkpoint, no_dist=True)
    interruption.step()
    (checkpoint / contents.DISTRIBUTED).write_text("{}")
    interruption.step()
    with (folder / contents.TRACKER).open("w") as file:
        interruption.step()
        file.write(str(iteration))


def options(folder: Path, value: float = NEW, **more: Any) -> Namespace:
    tokenizer = dict.fromkeys(
        ("tokenizer_model", "vocab_file", "merge_file", "tokenizer_type", "vocab_size")
    )
    defaults: dict[str, Any] = {
        "save": str(folder),
        "load": str(folder),
        "rank": 0,
        "value": value,
        "world_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "async_save": False,
        "ckpt_step": None,
        "distributed_timeout_minutes": 1e-3,
        "non_persistent_ckpt_type": None,
        "non_persistent_global_ckpt_dir": None,
    }
    return Namespace(**tokenizer | defaults | more)


def old_run(folder: Path, iterations: tuple[int, ...], tracked: int) -> None:
    folder.mkdir()
    for iteration in iterations:
        host_save(folder, iteration, OLD, Interruption(None))
        write_record(folder, iteration, options(folder, OLD))
    contents.write_tracker(folder, tracked)


def load(folder: Path, iteration: int) -> float:
    """What is in a checkpoint, in its tensors and in its record."""
    weight = torch.zeros(100)
    dcp.load({"weight": weight}, checkpoint_id=contents.iteration_folder(folder, iteration))
    record = read_record(folder, iteration)
    assert record is not None and record["options"]["value"] == weight[0]
    assert torch.equal(weight, weight[:1].expand(100))
    return float(weight[0])


def check_now(folder: Path, iteration: int) -> None:
    """At any moment: a whole copy, and a tracker that does not lie."""
    copies = (contents.iteration_folder(folder, iteration), aside.aside_folder(folder, iteration))
    assert any(not contents.defects(copy) for copy in copies)
    tracked = contents.readable_tracker(folder)
    assert tracked is None or contents.whole(folder, tracked)


@pytest.fixture
def run(single_rank: None, monkeypatch: pytest.MonkeyPatch):
    """Start a run that saves to a folder; saving(iteration) is what the host calls."""

    def start(folder: Path, interruption: Interruption | None = None, **more: Any):
        args = options(folder, **more)
        monkeypatch.setattr(errors, "get_args", lambda: args)
        monkeypatch.setattr(errors, "_begun", [])
        monkeypatch.setattr(errors, "_current", None)
        interruption = interruption or Interruption(None)

        def save(iteration: int, **kwargs: Any) -> None:
            host_save(folder, iteration, NEW, interruption)

        return errors.saving(save)

    return start


LAYOUTS = {
    "the only one": ((6,), 6),
    "behind another": ((3, 6), 6),
    "of a run that went back": ((3, 6), 3),
}


@pytest.mark.parametrize("kind", [SystemExit, OSError])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_checkpoint_at_every_moment(run, tmp_path: Path, layout: str, kind: type) -> None:
    """Killed, or refused by the file system, at every operation of the save, and killed again at
    every operation of the next run's start, which then goes on from a whole checkpoint."""
    iterations, tracked = LAYOUTS[layout]
    template = tmp_path / "template"
    old_run(template, iterations, tracked)
    ends = set()
    for at in itertools.count(1):
        folder = tmp_path / f"{at}"
        shutil.copytree(template, folder)
        first = Interruption(at, kind())
        with interrupted(first):
            run(folder, first)(6)
        check_now(folder, 6)
        again = 0 if kind is SystemExit else None
        while again is not None:
            again += 1
            copy = tmp_path / f"{at}-{again}"
            shutil.copytree(folder, copy)
            second = Interruption(again, SystemExit())
            with interrupted(second):
                aside.settle_all(copy)
            check_now(copy, 6)
            ends.add(settled(copy, iterations, tracked))
            if not second.happened:
                break
        ends.add(settled(folder, iterations, tracked))
        if not first.happened:
            break
    assert at > 8
    assert {value for _, value in ends} == {OLD, NEW}
    assert {iteration for iteration, _ in ends} == {tracked, 6}


def settled(folder: Path, iterations: tuple[int, ...], tracked: int) -> tuple[int, float]:
    """What the tracker names after the next run has started, and what iteration 6 is."""
    settle_folders(options(folder))
    assert contents.saved_iterations(folder) == list(iterations)
    assert aside.unsettled(folder) == [] and not list(folder.glob("aside_*"))
    now = contents.tracked_iteration(folder)
    value = load(folder, 6)
    assert now in (tracked, 6) and isinstance(now, int)
    assert value == NEW or now == tracked
    if 3 in iterations:
        assert load(folder, 3) == OLD
    return now, value


@pytest.mark.parametrize("at", range(1, 12))
def test_next_save_finds_what_a_killed_one_has_left(run, tmp_path: Path, at: int) -> None:
    folder = tmp_path / "checkpoints"
    old_run(folder, (6,), 6)
    interruption = Interruption(at, SystemExit())
    with interrupted(interruption):
        run(folder, interruption)(6)
    assert interruption.happened
    run(folder)(6)
    assert settled(folder, (6,), 6) == (6, NEW)


def test_state_that_is_saved_already_is_not_saved_again(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After loading it, and after saving it; a step makes the difference."""
    folder = tmp_path / "checkpoints"
    old_run(folder, (6,), 6)
    save = run(folder)
    errors.loading(lambda: (6, 0))()
    save(6)
    assert load(folder, 6) == OLD
    assert f"iteration 6 is in {folder} already: not saved" in capsys.readouterr().out
    save(7)
    save(7)
    assert capsys.readouterr().out.count("already") == 1
    assert load(folder, 7) == NEW
    save(6)  # a run that has gone back
    assert load(folder, 6) == NEW


def test_broken_checkpoint_and_other_folder_are_saved(run, tmp_path: Path) -> None:
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    old_run(folder, (6,), 6)
    old_run(other, (6,), 6)
    save = run(folder, load=str(other))
    errors.loading(lambda: (6, 0))()
    save(6)
    assert (load(folder, 6), load(other, 6)) == (NEW, OLD)
    (shard,) = (folder / "iter_0000006").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-100])
    save(6)
    assert load(folder, 6) == NEW


def test_asynchronous_save_of_an_iteration_that_is_there(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole only when it is finalised; until then a kill leaves the old one."""
    folder = tmp_path / "checkpoints"
    old_run(folder, (6,), 6)
    run(folder, async_save=True)
    busy = True
    monkeypatch.setattr(errors, "is_empty_async_queue", lambda: not busy)
    written = contents.iteration_folder(folder, 6)
    save = errors.saving(lambda iteration, **_: written.mkdir())
    poll = errors.finalizing(lambda *_: None)
    save(6)
    save(6)  # the same state, while it is being written
    poll()
    check_now(folder, 6)
    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    assert settled(killed, (6,), 6) == (6, OLD)

    host_save(folder, 6, NEW, Interruption(None))
    busy = False
    poll()
    assert not aside.aside_folder(folder, 6).exists()
    assert settled(folder, (6,), 6) == (6, NEW)


def test_failed_save_removes_no_other_checkpoint(run, tmp_path: Path) -> None:
    """The host's other formats have no metadata.json, and only one of them is tracked."""
    for iteration in (2, 4, 8):
        (tmp_path / f"iter_{iteration:07d}" / "mp_rank_00").mkdir(parents=True)
    contents.write_tracker(tmp_path, 4)
    run(tmp_path)

    def fill(iteration: int) -> None:
        contents.iteration_folder(tmp_path, iteration).mkdir()
        raise OSError("No space left on device")

    with pytest.raises(errors.CheckpointError, match="iteration 4 there is intact"):
        errors.saving(fill)(6)
    assert contents.saved_iterations(tmp_path) == [2, 4, 8]
    with pytest.raises(errors.CheckpointError, match="iteration 4, which was being saved again"):
        errors.saving(fill)(4)
    settle_folders(options(tmp_path))
    assert contents.saved_iterations(tmp_path) == [2, 4, 8]
    assert contents.tracked_iteration(tmp_path) == 4


def test_older_non_persistent_checkpoint_stays_until_the_next_is_whole(
    single_rank: None, tmp_path: Path
) -> None:
    """The host keeps the newest folder, whether a run was killed while it wrote it or not."""
    old_run(tmp_path / "saved", (2, 4), 4)
    folder = tmp_path / "saved"
    for record in folder.glob("*.json"):
        record.unlink()  # they have none
    contents.iteration_folder(folder, 6).mkdir()
    checkpointing.cleanup_old_non_persistent_checkpoint(str(folder), leave_ckpt_num=1)
    assert contents.saved_iterations(folder) == [2, 4, 6]
    host_save(folder, 6, NEW, Interruption(None))
    checkpointing.cleanup_old_non_persistent_checkpoint(str(folder), leave_ckpt_num=1)
    assert contents.saved_iterations(folder) == [6]


@pytest.mark.parametrize("kind", ["global", "local"])
def test_non_persistent_saves_leave_the_others_alone(run, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    old_run(folder, (6,), 6)
    run(folder, non_persistent_ckpt_type=kind)
    own = folder / "non_persistent"

    def host(iteration: int, non_persistent_ckpt: bool) -> None:
        if kind == "global":
            own.mkdir(exist_ok=True)
            host_save(own, iteration, NEW, Interruption(None))

    save = errors.saving(host)
    save(6, non_persistent_ckpt=True)
    assert load(folder, 6) == OLD
    assert contents.saved_iterations(own) == ([6] if kind == "global" else [])
    save(7, non_persistent_ckpt=True)
    save(6, non_persistent_ckpt=True)
    assert contents.saved_iterations(folder) == [6] and aside.unsettled(folder) == []


def killed_while_saving_again(folder: Path) -> None:
    old_run(folder, (6,), 6)
    aside.put_aside(folder, 6)
    contents.iteration_folder(folder, 6).mkdir()


def test_other_ranks_wait_until_the_first_has_settled(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    killed_while_saving_again(folder)
    with pytest.raises(ValueError, match=r"the first rank has not settled \[6\]"):
        settle_folders(options(folder, rank=1))
    first = threading.Timer(0.3, settle_folders, [options(folder)])
    first.start()
    assert settle_folders(options(folder, rank=1, distributed_timeout_minutes=1)) == []
    assert contents.tracked_iteration(folder) == 6
    first.join()


def test_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    """That run may be alive, and writing."""
    folder = tmp_path / "checkpoints"
    killed_while_saving_again(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="iteration 6 is being saved again, or the run that did"):
        settle_folders(options(folder, save=str(tmp_path / "other")))
    assert sorted(folder.rglob("*")) == before
    contents.write_tracker(folder, 3)  # there is something to load
    assert settle_folders(options(folder, save=None)) == []


def test_run_says_what_it_has_settled(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    killed_while_saving_again(folder)
    (line,) = settle_folders(options(folder))
    assert line == f"{folder}: saving iteration 6 again did not end; the old one is back"
    assert json.loads((folder / "iter_0000006.json").read_text())["options"]["value"] == OLD
