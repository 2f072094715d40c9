"""--scmoe-preset: each makes a model, what is typed wins, and the page lists them."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import validate_args

from megatron_scmoe import arguments, presets
from megatron_scmoe.presets import PRESETS
from tests.unit_tests.test_arguments import MODEL
from tests.unit_tests.test_variants import cells

SIZES = (
    f"{MODEL} --num-experts 8 --moe-ffn-hidden-size 16 --moe-token-dispatcher-type alltoall "
    "--moe-layer-freq ([0,1]*2)"
)
# What a preset's model has, by dest.
EXPECTED: dict[str, dict[str, Any]] = {
    "scmoe": {"scmoe_shortcut_position": "pos2", "moe_router_topk": 1},
    "scmoe-2": {"scmoe_combine": "cg1", "moe_router_topk": 2},
    "dgmoe": {"scmoe_dual_gating": "shared", "scmoe_combine": "add"},
    "moepp": {
        "scmoe_shortcut_position": "none",
        "scmoe_experts_at_home": {"zero": 1, "copy": 1, "constant": 2},
        "moe_expert_capacity_factor": 1.1,
    },
    "longcat-flash": {
        "scmoe_experts_at_home": {"copy": 4},
        "multi_latent_attention": True,
        "scmoe_mla_scale": True,
        "moe_router_pre_softmax": True,
    },
    "nvidia-shortcut": {"scmoe_shortcut_position": "pos1", "moe_layer_freq": [0, 1, 0, 1]},
}


def parsed(monkeypatch: pytest.MonkeyPatch, options: str) -> Any:
    """The way of the entry script, up to the model's config."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *options.split()])
    args = arguments.parse(arguments.add_scmoe_args)
    validate_args(args)
    arguments.apply_scmoe_defaults(args)
    args.padded_vocab_size = 128
    arguments.model_config_from_args(args)
    return args


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_makes_a_model(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    args = parsed(monkeypatch, f"{SIZES} --scmoe-preset {preset}")
    assert args.scmoe_preset == preset  # for the record
    assert {dest: getattr(args, dest) for dest in EXPECTED[preset]} == EXPECTED[preset]


def test_what_is_typed_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stands; also what a preset switches on."""
    typed = "--no-scmoe-gating-residual --scmoe-num-zero-experts 0 --scmoe-tau 0.5"
    args = parsed(monkeypatch, f"{typed} {SIZES} --scmoe-preset moepp")
    assert not args.scmoe_gating_residual and args.scmoe_tau == 0.5
    assert args.scmoe_experts_at_home == {"zero": 0, "copy": 1, "constant": 2}
    args = parsed(monkeypatch, f"--scmoe-preset=scmoe {SIZES} --moe-router-topk 4")
    assert args.moe_router_topk == 4


def test_a_preset_that_needs_a_size_says_so() -> None:
    with pytest.raises(ValueError, match=r"--scmoe-preset longcat-flash needs .* --num-experts\.$"):
        presets.expand(["--scmoe-preset", "longcat-flash"])
    assert presets.expand(["--scmoe-preset"]) == ["--scmoe-preset"]


def test_the_page_lists_them() -> None:
    rows = {row[0].strip("`"): row[1].strip("`") for row in cells("docs/options.md", "preset")}
    assert rows == PRESETS


def test_every_program_spells_presets_and_files_out() -> None:
    """Only `arguments.parse` calls the host's parser, which would ignore both without a word."""
    files = Path(arguments.__file__).parent.rglob("*.py")
    callers = [
        path.name for path in files if re.search(r"import .*\bparse_args\b", path.read_text())
    ]
    assert callers == ["arguments.py"]
