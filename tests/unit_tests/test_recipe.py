"""Options from a file stand in front of those that are typed."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scmoe import recipe
from megatron_scmoe.arguments import add_scmoe_args, parse

FILE = """
ENV_VARS:
  CUDA_DEVICE_MAX_CONNECTIONS: 1
MODEL_ARGS:
  --num-layers: 4
  --swiglu: true
  --lr: 1.0e-3
  --split: 949,50,1          # a comment
  --moe-layer-freq: ([0,1]*2)
  --recompute-modules: [core_attn, mlp]
  --cuda-graph-modules: [attn mlp]
  --save: ${FOLDER}/run
TEST_TYPE: regular
"""
EXPECTED = [
    "--num-layers=4",
    "--swiglu",
    "--lr=1.0e-3",
    "--split=949,50,1",
    "--moe-layer-freq=([0,1]*2)",
    *("--recompute-modules", "core_attn", "mlp"),
    *("--cuda-graph-modules", "attn", "mlp"),
    "--save=/somewhere/run",
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOLDER", "/somewhere")
    path = tmp_path / "model.yaml"
    path.write_text(FILE)
    return path


def test_every_kind_of_value(file: Path) -> None:
    assert recipe.options(file) == EXPECTED


def test_what_is_typed_stands_behind_wherever_the_file_is_named(file: Path) -> None:
    typed = ["--num-layers", "8", "--swiglu", "--seed", "-1"]
    for argv in (["--config", str(file), *typed], [*typed, f"--config={file}"]):
        assert recipe.expand(argv) == [*EXPECTED, *typed]


def test_a_file_names_another_and_wins(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "longer.yaml"
    other.write_text(f"MODEL_ARGS:\n  --num-layers: 6\n  --config: {file.name}\n")
    assert recipe.expand(["--config", str(other)]) == [*EXPECTED, "--num-layers=6"]


def test_programs_parse_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["train.py", "--lr", "2e-3", "--config", str(file)]
    monkeypatch.setattr(sys, "argv", argv)
    args = parse(add_scmoe_args)
    assert (args.num_layers, args.lr, args.moe_layer_freq) == (4, 2e-3, [0, 1, 0, 1])
    assert args.swiglu and args.recompute_modules == ["core_attn", "mlp"]
    assert not hasattr(args, "config")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file or directory"),
        ("MODEL_ARGS: [", "expected the node content"),
        ("--num-layers: 4", "has no MODEL_ARGS"),
        ("MODEL_ARGS:\n  num-layers: 4", "num-layers is no option"),
        ("MODEL_ARGS:\n  --swiglu: false", "leave the line out"),
        ("MODEL_ARGS:\n  --swiglu:", "leave the line out"),
        ("MODEL_ARGS:\n  --lr: {min: 1}", "leave the line out"),
        ("MODEL_ARGS:\n  --save: ${NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE is not set"),
        ("MODEL_ARGS:\n  --save: $", "Invalid placeholder"),
        ("MODEL_ARGS:\n  --config: FILE", "names itself"),
        ("\x00", "special characters are not allowed"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_file(
    content: str | None, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content.replace("FILE", str(path)))
    with pytest.raises(ValueError, match=expected) as error:
        recipe.expand(["--config", str(path)])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_entry_script_reads_the_file_before_torch(tmp_path: Path) -> None:
    """What it misses and what is out of range is looked for there too."""
    path = tmp_path / "model.yaml"
    path.write_text("MODEL_ARGS:\n  --train-iters: 5\n  --lr: 1e-3\n  --eval-interval: 5\n")
    script = Path(__file__).resolve().parents[2] / "pretrain_gpt_scmoe.py"
    command = [sys.executable, script, "--config", path, "--seq-length", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert "--seq-length 0" in line and "missing" not in line


def test_no_file_is_one_line() -> None:
    with pytest.raises(ValueError, match="names no file"):
        recipe.expand(["--config"])
