"""Defects of the host that training meets, through the entry script."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.limits import JOB_S

from .forked import launch_forked
from .launch import REPOSITORY, SCRIPT, TINY_MODEL, TINY_MOE, Run
from .test_doctor import doctor
from .text import write_text

POS1 = [*TINY_MODEL, *TINY_MOE, "--scmoe-shortcut-position", "pos1"]
MOCK = [*POS1, "--mock-data"]


@pytest.mark.parametrize("kind", ["seq_aux_loss", "global_aux_loss"])
def test_a_balancing_loss_that_there_is_not_is_not_logged(kind: str, tmp_path: Path) -> None:
    options = ["--moe-router-load-balancing-type", kind, "--train-iters", "2"]
    run = launch_forked([*MOCK, *options], 1, tmp_path)
    assert run.returncode == 0, run.stdout[-3000:]
    own = kind.removesuffix("aux_loss")
    values = re.findall(rf" {own}load_balancing_loss: ([0-9.E+-]+)", run.stdout)
    assert len(values) == 2 and all(float(value) > 0 for value in values)
    assert " load_balancing_loss:" not in run.stdout


def second_rank_sees_the_cache_of_the_first() -> None:
    """The second rank looks at the folder of data when the first has made it."""
    if os.environ["RANK"] == "0":
        return
    import pretrain_gpt_scmoe

    check_shared = pretrain_gpt_scmoe.check_shared

    def check_late(folder: Path, option: str) -> None:
        deadline = time.monotonic() + 20
        while not folder.is_dir():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        check_shared(folder, option)

    pretrain_gpt_scmoe.check_shared = check_late


def test_full_validation_of_one_data_set(tmp_path: Path) -> None:
    data = ["--data-path", str(write_text(tmp_path)), "--data-cache-path", str(tmp_path / "cache")]
    options = ["--full-validation", "--split", "900,100,0", "--train-iters", "4"]
    options += ["--vocab-size", "256"]
    options += ["--eval-interval", "2"]
    late = second_rank_sees_the_cache_of_the_first
    run = launch_forked([*POS1, *data, *options], 2, tmp_path, hook=late)
    assert run.returncode == 0, run.stdout[-3000:]
    assert run.stdout.count("validation loss at iteration 2 ") == 1
    assert run.stdout.count("validation loss at iteration 4 ") >= 1


def be_on_another_node() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    if os.environ["RANK"] == "1":
        sys.argv = [word.replace("cache of node 0", "cache of node 1") for word in sys.argv]


def test_nodes_without_a_common_cache_are_told_so(tmp_path: Path) -> None:
    """In place of a FileNotFoundError of document_index.npy; with a common one it trains."""
    data = ["--data-path", str(write_text(tmp_path)), "--vocab-size", "256", "--train-iters", "2"]
    data += ["--split", "900,100,0"]
    cache = ["--data-cache-path", str(tmp_path / "cache of node 0")]
    (tmp_path / "file").touch()
    nowhere = ["--data-cache-path", str(tmp_path / "file" / "cache")]
    common = ["--data-cache-path", str(tmp_path / "common")]

    def look(options: list[str], main: Callable[[], int] | None = None) -> Run:
        return launch_forked(
            [*POS1, *data, *options], 2, tmp_path / "job", hook=be_on_another_node, main=main
        )

    for options, remedy in ((cache, "all nodes share"), (nowhere, "cannot be written: Not a dir")):
        run = look(options)
        assert run.returncode == 2, run.stdout[-3000:]
        (line,) = (line for line in run.stdout.splitlines() if f"{SCRIPT}: error: " in line)
        assert "--data-cache-path" in line and remedy in line
        assert "Traceback" not in run.stdout
        doctors = look(options, doctor)
        assert doctors.returncode == 1
        assert f"error    {line.partition('error: ')[2]}" in doctors.stdout
    assert f"ok       {' '.join(common)} is one folder on all nodes" in look(common, doctor).stdout
    assert not list(tmp_path.glob("c*"))
    run = look(common)
    assert run.returncode == 0, run.stdout[-3000:]
    assert not list((tmp_path / "common").glob(".shared-*"))
    alone = launch_forked([*POS1, *data, *nowhere], 1, tmp_path / "alone")
    assert alone.returncode == 2 and "Traceback" not in alone.stdout
    assert "cannot be written: Not a dir" in alone.stdout


def make_losses_nan() -> None:
    import torch

    from megatron_scmoe.model import unit

    unit.ShortcutLayer.forward = lambda self, hidden_states, *_, **__: (  # type: ignore[method-assign]
        hidden_states * torch.tensor(float("nan")),
        None,
    )


def test_nan_without_save_is_the_hosts_report(tmp_path: Path) -> None:
    run = launch_forked(MOCK, 1, tmp_path, hook=make_losses_nan)
    assert run.returncode != 0
    assert "found NaN in local forward loss calculation" in run.stdout
    assert "TypeError" not in run.stdout


def test_an_unreadable_checkpoint_of_the_hosts_other_format_is_an_error(tmp_path: Path) -> None:
    checkpoint = tmp_path / "ck" / "iter_0000002" / "mp_rank_00"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model_optim_rng.pt").write_bytes(b"no checkpoint")
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("2")
    options = ["--load", str(tmp_path / "ck"), "--ckpt-format", "torch"]
    model = [option for option in MOCK if option != "--moe-grouped-gemm"]
    run = launch_forked([*model, *options, "--no-load-rng", "--no-load-optim"], 1, tmp_path)
    assert run.returncode == 2, run.stdout[-3000:]
    lines = [line for line in run.stdout.splitlines() if f"{SCRIPT}: error: " in line]
    assert len(lines) == 1 and str(tmp_path / "ck") in lines[0]


def test_without_a_launcher_it_is_one_rank_that_an_interrupt_ends_in_one_line() -> None:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    run = subprocess.Popen(
        [sys.executable, SCRIPT, *MOCK, "--train-iters", "100000", "--eval-interval", "100000"],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name not in launcher},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control has what runs in the background ignore it, and so all below.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert run.stdout is not None
    for line in run.stdout:
        if "iteration        3/  100000" in line:
            run.send_signal(signal.SIGINT)
            break
    _, errors = run.communicate(timeout=JOB_S)
    assert run.returncode == -signal.SIGINT, errors[-3000:]
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].endswith(f"{SCRIPT}: error: stopped by an interrupt.")
