"""Folders that would be misread, or overwritten by a run that has not made what is in them."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_scmoe.run.checkpoint import aside, contents
from megatron_scmoe.run.checkpoint.folders import check_folders
from tests.unit_tests.test_aside import Interruption, host_save


def options(**given: Any) -> Namespace:
    defaults = {
        "load": None,
        "save": None,
        "pretrained_checkpoint": None,
        "finetune": False,
        "ckpt_step": None,
        "skip_train": False,
        "exit_on_missing_checkpoint": False,
        "non_persistent_global_ckpt_dir": None,
    }
    return Namespace(
        **defaults | {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Iterations 3 and 6, whole; the tracker names 6."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for iteration in (3, 6):
        host_save(folder, iteration, 1.0, Interruption(None))
    return folder


def test_no_tracker_and_nobody_says_which(saved: Path) -> None:
    (saved / contents.TRACKER).unlink()
    line = r"has checkpoints \(iteration 3, 6\) and no latest_.*: say which with --ckpt-step 6"
    for save in (None, saved):
        with pytest.raises(ValueError, match=line):
            check_folders(options(load=saved, save=save))
        check_folders(options(load=saved, save=save, ckpt_step=3))


def test_no_tracker_because_an_iteration_is_saved_again(saved: Path) -> None:
    """It waits in the folder that was put aside."""
    aside.put_aside(saved, 6)
    assert not (saved / contents.TRACKER).exists()
    check_folders(options(load=saved, save=saved))


@pytest.mark.parametrize("option", ["load", "save", "pretrained_checkpoint"])
def test_place_inside_a_checkpoint(saved: Path, option: str) -> None:
    flag = "--" + option.replace("_", "-")
    inside = saved / "iter_0000003"
    with pytest.raises(ValueError, match=f"is one iteration of a checkpoint: use {flag} {saved}"):
        check_folders(options(**{option: inside}))
    with pytest.raises(ValueError, match="is a file: give the folder that it lies in"):
        check_folders(options(**{option: saved / contents.TRACKER}))


def test_one_iteration_says_its_number(saved: Path) -> None:
    with pytest.raises(ValueError, match=rf"use --load {saved} --ckpt-step 3\.$"):
        check_folders(options(load=saved / "iter_0000003"))


def test_nothing_is_replaced_by_a_run_that_has_not_made_it(saved: Path, tmp_path: Path) -> None:
    line = "has a whole iteration 6, which this run has not made and would replace: "
    with pytest.raises(ValueError, match=f"{line}go on from there with --load {saved}, or save"):
        check_folders(options(save=saved))
    with pytest.raises(ValueError, match=f"{line}--finetune begins at iteration 1 again"):
        check_folders(options(load=saved, save=saved, finetune=True))
    other = tmp_path / "other"
    other.mkdir()
    host_save(other, 4, 1.0, Interruption(None))
    with pytest.raises(ValueError, match=f"{line}go on from there with --load {saved}"):
        check_folders(options(load=other, save=saved))
    check_folders(options(load=saved, save=other))  # 4 lies behind 6
    check_folders(options(load=saved, save=saved))
    check_folders(options(load=saved, save=saved, ckpt_step=3))
    check_folders(options(save=saved, skip_train=True))
    (saved / "iter_0000006" / contents.DISTRIBUTED).unlink()
    with pytest.raises(ValueError, match="has a whole iteration 3"):
        check_folders(options(save=saved))


def test_other_formats_are_kept_too(tmp_path: Path) -> None:
    (tmp_path / "iter_0000002" / "mp_rank_00_000").mkdir(parents=True)
    with pytest.raises(ValueError, match="has a whole iteration 2"):
        check_folders(options(save=tmp_path))


def test_checkpoint_that_has_to_be_there(tmp_path: Path) -> None:
    check_folders(options(load=tmp_path))
    with pytest.raises(ValueError, match="has no checkpoint: drop --exit-on-missing-checkpoint"):
        check_folders(options(load=tmp_path, exit_on_missing_checkpoint=True))


@pytest.mark.parametrize("option", ["save", "load"])
def test_folder_that_the_host_cleans_holds_nothing_else(tmp_path: Path, option: str) -> None:
    cleaned = tmp_path / "np"
    check_folders(options(**{option: tmp_path}, non_persistent_global_ckpt_dir=cleaned))
    with pytest.raises(ValueError, match=f"holds --{option} .*: give it a folder of its own"):
        check_folders(options(**{option: cleaned / "run"}, non_persistent_global_ckpt_dir=cleaned))
