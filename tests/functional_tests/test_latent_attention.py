"""Multi-latent attention, for which the host drops derived config classes, in shortcut units."""

import shlex
from pathlib import Path

from .launch import TINY_MODEL, TINY_MOE, launch, read_scalars

LATENT = shlex.split(
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 12 --rope-type rope --qk-layernorm"
)
SCMOE = shlex.split(
    "--moe-layer-freq ([0,1]*1) --scmoe-shortcut-position pos2 --scmoe-shortcut-norm shared "
    "--expert-model-parallel-size 2"
)


def test_units_train_and_overlap_changes_no_bit(data_prefix: Path, tmp_path: Path) -> None:
    data = ["--data-path", str(data_prefix), "--split", "80,10,10"]
    curves = {}
    for name, more in {"on": [], "off": ["--no-scmoe-overlap"]}.items():
        writer = ["--tensorboard-dir", str(tmp_path / name), "--tensorboard-log-interval", "1"]
        cache = ["--data-cache-path", str(tmp_path / "cache")]
        options = [*TINY_MODEL, *TINY_MOE, *LATENT, *SCMOE, *data, *cache, *writer, *more]
        run = launch(options, nproc=2)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        # Only units report their exchanges: the options were not dropped.
        assert "a2a (ms)" in run.stdout
        curves[name] = {
            tag: read_scalars(tmp_path / name, tag)
            for tag in ("lm loss", "load_balancing_loss", "grad-norm")
        }
    assert curves["on"] == curves["off"]
    assert curves["on"]["lm loss"][6] < curves["on"]["lm loss"][1] - 0.5
