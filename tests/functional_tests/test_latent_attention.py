"""Multi-latent attention, for which the host drops derived config classes, in shortcut units.

Its options and ours are restored from a checkpoint.
"""

import shlex
from pathlib import Path

import pytest

from .forked import launch_forked
from .launch import TINY_MODEL, TINY_MOE, Run, read_scalars

LATENT = shlex.split(
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 12 --rope-type rope --qk-layernorm"
)
SCMOE = shlex.split(
    "--moe-layer-freq ([0,1]*1) --scmoe-shortcut-position pos2 --scmoe-shortcut-norm shared "
    # With these a unit is a layer of LongCat-Flash.
    "--scmoe-mla-scale --scmoe-router longcat --scmoe-num-copy-experts 2 --scmoe-combine add"
)
CURVES = ("lm loss", "load_balancing_loss", "grad-norm")


def train(data: Path, folder: Path, *options: str) -> Run:
    """A run on two expert parallel ranks whose curves are in `folder`."""
    arguments = [*TINY_MODEL, *TINY_MOE, "--data-path", str(data), "--split", "80,10,10"]
    arguments += ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
    arguments += ["--data-cache-path", str(data.parent / "cache")]
    run = launch_forked([*arguments, "--expert-model-parallel-size", "2", *options], 2, folder)
    assert run.returncode == 0, run.stdout[-3000:]
    return run


def curves(folder: Path) -> dict[str, dict[int, float]]:
    return {tag: read_scalars(folder, tag) for tag in CURVES}


@pytest.fixture(scope="module")
def overlapped(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations, saved after three."""
    folder = tmp_path_factory.mktemp("latent")
    save = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
    run = train(data_prefix, folder, *LATENT, *SCMOE, *save)
    # Only units report their exchanges: the options were not dropped.
    assert "a2a (ms)" in run.stdout
    return folder


def test_units_train_and_overlap_changes_no_bit(
    overlapped: Path, data_prefix: Path, tmp_path: Path
) -> None:
    train(data_prefix, tmp_path, *LATENT, *SCMOE, "--no-scmoe-overlap")
    assert curves(tmp_path) == curves(overlapped)
    losses = curves(tmp_path)["lm loss"]
    assert losses[6] < losses[1] - 0.5


def test_checkpoint_restores_its_options_and_ours(
    overlapped: Path, data_prefix: Path, tmp_path: Path
) -> None:
    """None of them on the command line, and bit for bit the run that never stopped."""
    load = ["--load", str(overlapped / "checkpoints"), "--ckpt-step", "3", "--use-checkpoint-args"]
    run = train(data_prefix, tmp_path, *load)
    for name in ("q_lora_rank", "qk_head_dim", "v_head_dim", "rope_type", "scmoe_shortcut_norm"):
        assert run.stdout.count(f"Setting {name} to") == 1
    whole = curves(overlapped)
    assert curves(tmp_path) == {
        tag: {i: v for i, v in whole[tag].items() if i > 3} for tag in CURVES
    }
