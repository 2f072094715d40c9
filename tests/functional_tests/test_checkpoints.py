"""What a run says about the checkpoint it is given, and what a save leaves behind.

The record of the options, another model refused, broken and missing files named, a torn tracker
mended, a full disk, a writer that was killed, a longer run, another number of ranks, the
vocabulary's padding, another position; a start from the baseline, saved by stock Megatron and by
us, every tensor taken bit for bit.
"""

import json
import math
import os
import shlex
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_scmoe.run.checkpoint.transfer import OTHER_STATE

from . import stock_pretrain
from .forked import Hook, launch_forked
from .launch import SCRIPT, TINY_MODEL, TINY_MOE, Run, read_scalars

CURVES = ("lm loss", "grad-norm")
UNTOUCHED = [
    "iter_0000003",
    "iter_0000003.json",
    "iter_0000006",
    "iter_0000006.json",
    "latest_checkpointed_iteration.txt",
]
PAIR = ["--moe-layer-freq", "([0,1]*1)", "--scmoe-shortcut-position", "pos2"]
# Every rank starts processes that import everything anew.
ASYNC_SAVE = pytest.param(("--async-save",), marks=pytest.mark.slow)
NO_DROPOUT = shlex.split("--attention-dropout 0 --hidden-dropout 0 --eval-iters 0")
TWO_RANKS = shlex.split("--expert-model-parallel-size 2 --use-distributed-optimizer")


def arguments_of(data: Path, folder: Path) -> list[str]:
    """The tiny pair with its curves in `folder`."""
    arguments = [*TINY_MODEL, *TINY_MOE, *PAIR, *NO_DROPOUT, *TWO_RANKS]
    arguments += ["--data-path", str(data), "--split", "100,0,0"]
    arguments += ["--data-cache-path", str(data.parent / "cache")]
    return [*arguments, "--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]


def train(
    data: Path,
    folder: Path,
    *options: str,
    ranks: int = 2,
    batch: int | None = 8,
    largest: int | None = None,
    hook: Hook | None = None,
) -> Run:
    """A run of the tiny pair with its curves in `folder`; options given last win."""
    arguments = arguments_of(data, folder)
    at = arguments.index("--global-batch-size")
    arguments[at : at + 2] = [] if batch is None else ["--global-batch-size", str(batch)]
    return launch_forked([*arguments, *options], ranks, folder, largest, hook)


def error_line(run: Run) -> str:
    """The only error of a run, which ended with exit code 2 and no traceback of ours."""
    assert run.returncode != 0, run.stdout[-3000:]
    prefix = f"{SCRIPT}: error: "
    (line,) = [line for line in run.stdout.splitlines() if line.startswith(prefix)]
    return line.removeprefix(prefix)


def succeeded(run: Run) -> Run:
    assert run.returncode == 0, run.stdout[-3000:]
    return run


@pytest.fixture(scope="module")
def saved(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations on two ranks, saved after three and six."""
    folder = tmp_path_factory.mktemp("saved")
    save = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
    succeeded(train(data_prefix, folder, *save))
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints"))


def test_record_says_what_the_checkpoint_is(saved: Path) -> None:
    record = json.loads((saved / "checkpoints" / "iter_0000003.json").read_text())
    assert record["iteration"] == 3
    assert record["padded_vocab_size"] == 64
    assert record["model"]["scmoe_shortcut_position"] == "pos2"
    assert record["model"]["moe_layer_freq"] == [0, 1]
    assert record["options"]["expert_model_parallel_size"] == 2
    assert len(record["tokenizer"]["sha256"]) == 64
    assert record["versions"]["megatron-core"].startswith("0.19.")


def test_longer_run_goes_on(saved: Path, data_prefix: Path, tmp_path: Path) -> None:
    load = ["--load", str(saved / "checkpoints"), "--train-iters", "8"]
    run = succeeded(train(data_prefix, tmp_path, *load))
    assert run.stdout.count("the schedule follows the new length") == 1
    assert sorted(read_scalars(tmp_path, "lm loss")) == [7, 8]


def test_longer_run_keeps_the_old_schedule_if_asked(
    saved: Path, data_prefix: Path, tmp_path: Path
) -> None:
    load = ["--load", str(saved / "checkpoints"), "--train-iters", "8"]
    succeeded(train(data_prefix, tmp_path, *load, "--use-checkpoint-opt-param-scheduler"))
    assert read_scalars(tmp_path, "learning-rate")[8] == 0  # decayed over six iterations


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--hidden-size 64", "is another model: --hidden-size 32 there, 64 here"),
        ("--moe-router-topk 1", "--moe-router-topk 2 there, 1 here"),
        ("--lr 1e-3", "another schedule: max_lr 0.01 there, 0.001 here"),
        ("--scmoe-shortcut-norm shared", "other units: --scmoe-shortcut-norm own there"),
        ("--scmoe-combine add", "other units: --scmoe-combine cg1 there, add here"),
        ("--vocab-size 60", "another tokenizer: vocab_size 64 there, 60 here"),
        ("--padded-vocab-size 128", "has 64 rows in its vocabulary"),
        ("--ckpt-step 5", "no iter_0000005; the newest complete checkpoint there is iteration 6"),
    ],
)
def test_checkpoint_of_another_model(
    saved: Path, data_prefix: Path, tmp_path: Path, options: str, expected: str
) -> None:
    load = ["--load", str(saved / "checkpoints"), *shlex.split(options)]
    assert expected in error_line(train(data_prefix, tmp_path, *load))


def break_file(checkpoints: Path, how: str) -> None:
    """Damage iteration 6, the newest one."""
    shard = checkpoints / "iter_0000006" / "__1_0.distcp"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "missing":
        shard.unlink()
    elif how == "metadata":
        (checkpoints / "iter_0000006" / ".metadata").write_bytes(b"nothing")
    elif how == "record":
        (checkpoints / "iter_0000006.json").write_text("{")
    else:
        content = bytearray(shard.read_bytes())
        content[1000:1020] = b"x" * 20
        shard.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated", "bytes; the newest complete checkpoint there is iteration 3: add --ckpt-st"),
        ("missing", "__1_0.distcp is missing; the newest complete checkpoint there is iteration 3"),
        ("metadata", ".metadata is corrupt"),
        ("record", "iter_0000006.json is no record"),
        ("overwritten", "__1_0.distcp is corrupt"),
    ],
)
def test_broken_checkpoint(
    checkpoints: Path, data_prefix: Path, tmp_path: Path, how: str, expected: str
) -> None:
    break_file(checkpoints, how)
    load = ["--load", str(checkpoints), "--train-iters", "8"]
    assert expected in error_line(train(data_prefix, tmp_path, *load))


def test_missing_tracker_costs_nothing(
    checkpoints: Path, data_prefix: Path, tmp_path: Path
) -> None:
    """The host would begin at iteration 1 and save over what is there."""
    (checkpoints / "latest_checkpointed_iteration.txt").unlink()
    there = sorted(checkpoints.rglob("*"))
    load = ["--load", str(checkpoints), "--save", str(checkpoints), "--save-interval", "8"]
    load += ["--train-iters", "8"]
    line = error_line(train(data_prefix, tmp_path / "refused", *load))
    assert "say which with --ckpt-step 6" in line
    assert sorted(checkpoints.rglob("*")) == there
    succeeded(train(data_prefix, tmp_path, *load, "--ckpt-step", "6"))
    assert sorted(read_scalars(tmp_path, "lm loss")) == [7, 8]


def test_files_of_another_iteration(checkpoints: Path, data_prefix: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkpoints / "iter_0000006")
    shutil.copytree(checkpoints / "iter_0000003", checkpoints / "iter_0000006")
    line = error_line(train(data_prefix, tmp_path, "--load", str(checkpoints)))
    assert "iter_0000006 holds iteration 3: its files are another one's; the newest" in line


def test_torn_tracker_is_mended(checkpoints: Path, data_prefix: Path, tmp_path: Path) -> None:
    """A kill between opening and writing the tracker leaves it empty; the host would exit."""
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    tracker.write_text("")
    run = succeeded(train(data_prefix, tmp_path, "--load", str(checkpoints), "--train-iters", "8"))
    assert "going on from iteration 6" in run.stdout
    assert sorted(read_scalars(tmp_path, "lm loss")) == [7, 8]
    assert tracker.read_text() == "6"


@pytest.mark.parametrize("how", [(), ASYNC_SAVE], ids=["sync", "async"])
def test_full_disk(
    checkpoints: Path, data_prefix: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    """The kernel refuses to let a file grow, as on a full disk; the earlier checkpoint stays."""
    save = ["--load", str(checkpoints), "--save", str(checkpoints), "--save-interval", "1"]
    run = train(data_prefix, tmp_path, *save, "--train-iters", "8", *how, largest=100_000)
    line = error_line(run)
    assert f"cannot save to {checkpoints}" in line
    assert line.endswith("iteration 6 there is intact.")
    assert sorted(path.name for path in checkpoints.iterdir()) == UNTOUCHED
    load = ["--load", str(checkpoints), "--train-iters", "8"]
    succeeded(train(data_prefix, tmp_path / "again", *load))


def kill_before_it_is_whole() -> None:
    """A hook: rank 0 dies when all of iteration 6 is written but the file that says so."""
    from megatron.core.dist_checkpointing import serialization

    save_config = serialization.save_config

    def kill_then_save(config: object, checkpoint_dir: str) -> None:
        if checkpoint_dir.endswith("iter_0000006"):
            os.kill(os.getpid(), signal.SIGKILL)
        save_config(config, checkpoint_dir)

    serialization.save_config = kill_then_save


@pytest.mark.parametrize("how", [(), ASYNC_SAVE], ids=["sync", "async"])
def test_killed_while_saving_an_iteration_that_is_there(
    saved: Path, checkpoints: Path, data_prefix: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    """A run that went back to iteration 3; the next one goes on from the old iteration 6."""
    save = ["--load", str(checkpoints), "--save", str(checkpoints), "--save-interval", "3", *how]
    back = [*save, "--ckpt-step", "3"]
    run = train(data_prefix, tmp_path / "killed", *back, hook=kill_before_it_is_whole)
    assert run.returncode == -signal.SIGKILL, run.stdout[-3000:]
    assert (checkpoints / "iter_0000006" / ".metadata").exists()
    assert not (checkpoints / "latest_checkpointed_iteration.txt").exists()
    longer = ["--train-iters", "8"]
    run = succeeded(train(data_prefix, tmp_path / "again", *save, *longer))
    assert run.stdout.count("iteration 6 again did not end; the old one is back") == 1
    whole = ["--load", str(saved / "checkpoints"), *longer]
    succeeded(train(data_prefix, tmp_path / "whole", *whole))
    for tag in CURVES:
        curve = read_scalars(tmp_path / "again", tag)
        assert sorted(curve) == [7, 8]
        assert curve == read_scalars(tmp_path / "whole", tag)


def test_full_disk_while_saving_an_iteration_that_is_there(
    checkpoints: Path, data_prefix: Path, tmp_path: Path
) -> None:
    save = ["--load", str(checkpoints), "--save", str(checkpoints), "--save-interval", "3"]
    back = [*save, "--ckpt-step", "3"]
    line = error_line(train(data_prefix, tmp_path, *back, largest=100_000))
    assert line.endswith("iteration 6, which was being saved again, comes back with the next run.")
    assert not (checkpoints / "iter_0000006").exists()
    run = succeeded(train(data_prefix, tmp_path / "again", *save, "--train-iters", "8"))
    assert "the old one is back" in run.stdout
    assert sorted(read_scalars(tmp_path / "again", "lm loss")) == [7, 8]


def test_saving_again_lets_the_host_remove_nothing(
    checkpoints: Path, data_prefix: Path, tmp_path: Path
) -> None:
    """--save-retain-interval removes what the tracker named before."""
    save = ["--load", str(checkpoints), "--save", str(checkpoints), "--save-interval", "3"]
    back = [*save, "--ckpt-step", "3", "--save-retain-interval", "6"]
    succeeded(train(data_prefix, tmp_path, *back))
    assert sorted(path.name for path in checkpoints.iterdir()) == UNTOUCHED


def test_run_that_has_ended_is_not_saved_again(
    checkpoints: Path, data_prefix: Path, tmp_path: Path
) -> None:
    """The host saves at the end whatever --save-interval has not."""
    record = checkpoints / "iter_0000006.json"
    before = record.stat().st_mtime_ns
    save = ["--load", str(checkpoints), "--save", str(checkpoints), "--save-interval", "4"]
    run = succeeded(train(data_prefix, tmp_path, *save))
    assert run.stdout.count(f"iteration 6 is in {checkpoints} already: not saved") == 1
    assert record.stat().st_mtime_ns == before


def test_vocabulary_padding_follows_the_checkpoint(data_prefix: Path, tmp_path: Path) -> None:
    """TP 2 would pad 64 tokens to 128 rows, and 64 untrained rows would move the loss."""
    sizes = ["--make-vocab-size-divisible-by", "64", "--num-query-groups", "4"]
    folder = str(tmp_path / "checkpoints")
    save = ["--save", folder, "--save-interval", "3"]
    succeeded(train(data_prefix, tmp_path / "one", *sizes, *save))
    tp2 = shlex.split("--tensor-model-parallel-size 2 --sequence-parallel")
    tp2 += ["--expert-tensor-parallel-size", "1", "--moe-aux-loss-coeff", "0", "--ckpt-step", "3"]
    run = succeeded(train(data_prefix, tmp_path / "two", *sizes, *tp2, "--load", folder))
    assert "sets --padded-vocab-size 64" in run.stdout
    one, two = (read_scalars(tmp_path / name, "lm loss")[4] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_goes_on_at_another_position(saved: Path, data_prefix: Path, tmp_path: Path) -> None:
    load = ["--load", str(saved / "checkpoints"), "--ckpt-step", "3"]
    run = succeeded(train(data_prefix, tmp_path, *load, "--scmoe-shortcut-position", "pos3"))
    assert "--scmoe-shortcut-position pos2 there, pos3 here" in run.stdout
    before, after = (read_scalars(path, "lm loss")[4] for path in (saved, tmp_path))
    assert before != after
    assert after == pytest.approx(before, abs=0.5)


BASELINE = shlex.split("--moe-shared-expert-intermediate-size 64 --moe-router-pre-softmax")
NEW = [
    "decoder.layers.1.mlp.shared_experts.gate_weight",
    "decoder.layers.1.shortcut_layernorm.weight",
]


def save_baseline(by: str, data: Path, folder: Path) -> Path:
    """Top-2 with a shared expert, by stock Megatron or by our script, saved after six steps."""
    checkpoints = folder / "checkpoints"
    options = [*BASELINE, "--save", str(checkpoints), "--save-interval", "6"]
    if by == "ours":
        succeeded(train(data, folder, *options, "--scmoe-shortcut-position", "none"))
        return checkpoints
    arguments = [*arguments_of(data, folder), *options]
    at = arguments.index("--scmoe-shortcut-position")
    del arguments[at : at + 2]  # stock Megatron does not know it
    succeeded(launch_forked(arguments, 2, folder, main=stock_pretrain.main))
    (checkpoints / "iter_0000006.json").unlink()  # nor does it write this
    return checkpoints


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights of the model by name, with the names of our specs."""
    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(OTHER_STATE)
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    stock = ".mlp.linear_fc1.layer_norm_"
    moe = {name.split(".mlp.")[0] for name in wanted if ".mlp.router." in name}
    return {
        name.replace(stock, ".pre_mlp_layernorm.") if name.split(".mlp.")[0] in moe else name: value
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("by", ["stock", "ours"])
def test_starts_from_the_baseline(data_prefix: Path, tmp_path: Path, by: str) -> None:
    """Every weight is taken as it is, and what is new is what only our model has."""
    folder = save_baseline(by, data_prefix, tmp_path / "baseline")
    load = ["--load", str(folder), "--moe-router-pre-softmax"]
    assert "start from its weights with --finetune" in error_line(
        train(data_prefix, tmp_path / "refused", *load)
    )
    save = ["--save", str(tmp_path / "scmoe"), "--save-interval", "1", "--train-iters", "1"]
    still = ["--lr", "0", "--min-lr", "0"]
    run = succeeded(train(data_prefix, tmp_path / "run", *load, "--finetune", *save, *still))
    (new,) = [line for line in run.stdout.splitlines() if "new, as initialised" in line]
    assert new.split("initialised: ")[1].split(", ") == NEW
    assert "--finetune: 0 left in the checkpoint" in run.stdout
    before = tensors(folder / "iter_0000006")
    after = tensors(tmp_path / "scmoe" / "iter_0000001")
    assert sorted(after.keys() - before.keys()) == NEW
    assert len(before) > 15
    assert all(torch.equal(after[name], value) for name, value in before.items())
    untrained = math.log(64)
    assert read_scalars(tmp_path / "run", "lm loss")[1] < untrained - 0.5


def kill_the_writer(seconds: float | None = None) -> None:
    """A hook: the kernel ends the process that writes rank 0's checkpoints, short of memory.

    Args:
        seconds: from when the host begins to wait for it to take the tensors; None before.
    """
    from megatron.training import training

    save = training.save_checkpoint_and_time

    def kill_then_save(iteration: int, *args: object, **kwargs: object) -> None:
        training.maybe_finalize_async_save(blocking=True)
        if iteration == 6 and torch.distributed.get_rank() == 0:
            writer = PersistentAsyncCaller._persistent_process
            if seconds is None:
                writer.kill()
                writer.join()
            else:
                os.kill(writer.pid, signal.SIGSTOP)
                threading.Timer(seconds, writer.kill).start()
        save(iteration, *args, **kwargs)

    training.save_checkpoint_and_time = kill_then_save


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(None, marks=pytest.mark.slow), 1.0],
    ids=["before a save", "in a save"],
)
def test_writer_of_async_saves_is_gone(
    data_prefix: Path, tmp_path: Path, seconds: float | None
) -> None:
    """The host would wait for it forever; the earlier checkpoint stays."""
    folder = tmp_path / "checkpoints"
    save = ["--save", str(folder), "--save-interval", "3", "--async-save"]
    run = train(data_prefix, tmp_path, *save, hook=partial(kill_the_writer, seconds))
    assert "the process that writes checkpoints has ended (exit code -9" in error_line(run)
    assert sorted(path.name for path in folder.iterdir()) == [
        "iter_0000003",
        "iter_0000003.json",
        "latest_checkpointed_iteration.txt",
    ]


def test_other_number_of_ranks_keeps_the_global_batch(data_prefix: Path, tmp_path: Path) -> None:
    """Without --global-batch-size, which the host would take from the number of ranks."""
    folder = str(tmp_path / "checkpoints")
    save = ["--save", folder, "--save-interval", "3", "--moe-aux-loss-coeff", "0"]
    succeeded(train(data_prefix, tmp_path / "four", *save, ranks=4, batch=None))
    load = ["--load", folder, "--ckpt-step", "3", "--moe-aux-loss-coeff", "0"]
    run = succeeded(train(data_prefix, tmp_path / "two", *load, batch=None))
    assert run.stdout.count("iteration 3 sets --global-batch-size 8") == 1
    four, two = (read_scalars(tmp_path / name, "lm loss") for name in ("four", "two"))
    assert two == pytest.approx({i: four[i] for i in (4, 5, 6)}, rel=1e-5)
