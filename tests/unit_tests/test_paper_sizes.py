"""examples/paper_size.sh: the planner takes every size, and counts the published parameters."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.planner.plan import make_plan
from megatron_scmoe.planner.plan_arguments import parse_command_line, source_from_args
from megatron_scmoe.planner.plan_text import as_json
from megatron_scmoe.presets import PRESETS

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "paper_size.sh"
CLUSTER = (
    "--cluster-preset=h100-infiniband",
    "--cluster-flops-efficiency=0.4",
    "--cluster-bandwidth-efficiency=0.6",
)
# Vocabulary, which the tokenizer of a run says, and billions of parameters as they are published:
# ScMoE's without a shared expert, LongCat-Flash's with the second MLP of a layer.
SIZES = {
    "scmoe small": (50257, 0.323),
    "scmoe medium": (50257, 1.7),
    "scmoe xl": (50257, 4.1),
    "scmoe llama2": (32000, 6.7),
    "scmoe-2 xl": (50257, 4.1),
    "dgmoe small": (50257, 0.323),
    "dgmoe medium": (50257, None),
    "moepp 0.6b": (65536, 0.6),
    "moepp 1b": (65536, 1.0),
    "moepp 2b": (65536, 2.0),
    "moepp 7b": (65536, 7.0),
    "longcat-flash 560b": (131072, 560),
    "nvidia-shortcut llama2": (32000, 6.7),
}


def run(*words: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The script with a torchrun that prints its arguments."""
    launcher = tmp_path / "torchrun"
    launcher.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    launcher.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"DATA": "text_document", "TOKENIZER": "tokenizer"}
    return subprocess.run([SCRIPT, *words], env=environment, capture_output=True, text=True)


def shared_experts(config: TransformerConfig) -> int:
    """Parameters of all shared experts."""
    width = config.moe_shared_expert_intermediate_size or 0
    matrices = 3 if config.gated_linear_unit else 2
    frequency = config.moe_layer_freq
    layers = config.num_layers if frequency == 1 else sum(frequency)
    return layers * matrices * config.hidden_size * width


@pytest.mark.parametrize("size", SIZES)
def test_the_planner_takes_it(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, billions = SIZES[size]
    done = run(*size.split(), "--vocab-size", str(vocabulary), tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    nodes = words[words.index("--nnodes") + 1]
    options = words[words.index("pretrain_gpt_scmoe.py") + 1 :]
    monkeypatch.setattr(sys, "argv", ["plan", *options, *CLUSTER, "--cluster-nodes", nodes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's, about training
        args, config, notes = parse_command_line()
        source = source_from_args(args)
        plan = make_plan(args, config, source)
    found = as_json(args, config.transformer, source, plan, notes)
    assert found["memory"]["total"] < args.cluster_memory_gib * 2**30
    if billions is not None:
        as_it_stands = size.startswith(("longcat", "moepp"))
        shared = 0 if as_it_stands else shared_experts(config.transformer)
        assert (found["parameters"] - shared) / 1e9 == pytest.approx(billions, rel=0.1)


def test_every_preset_has_a_size(tmp_path: Path) -> None:
    assert {size.split()[0] for size in SIZES} == set(PRESETS)
    for preset in PRESETS:
        assert run(preset, tmp_path=tmp_path).returncode == 0  # its first size
    for wrong in ([], ["gpt5"], ["scmoe", "560b"]):
        done = run(*wrong, tmp_path=tmp_path)
        assert done.returncode == 2 and "PRESET [SIZE]" in done.stderr and not done.stdout
