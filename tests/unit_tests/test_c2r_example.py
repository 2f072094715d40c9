"""What examples/c2r/compare.py makes of runs whose counts are known."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_scmoe.c2r import collaboration
from megatron_scmoe.c2r.collaboration import Collaboration, LayerCounts

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "c2r" / "compare.py"
EXPERTS, TOKENS = 8, 80
LOSSES = {"base": (4.9, 5.1), "t1": (4.5, 4.8), "t7": (4.4, 4.6)}


def counts(distance: int) -> Collaboration:
    """Every token has an expert and the one so many numbers further."""
    together = np.zeros((EXPERTS, EXPERTS), int)
    for expert in range(EXPERTS):
        other = (expert + distance) % EXPERTS
        together[[expert, other], [other, expert]] += TOKENS // EXPERTS
    layer = LayerCounts(TOKENS, together.sum(axis=1), together)
    return Collaboration(EXPERTS, 2, {2: layer})


def write_seed(folder: Path, seed: int) -> Path:
    for name, losses in LOSSES.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "log.txt").write_text(
            "validation loss at iteration 10 | lm loss value: 9.0E+00 |\n"
            f"validation loss at iteration 20 | lm loss value: {losses[seed]:.6E} |\n"
        )
        collaboration.write(folder / name / "counts.json", counts(4 if name == "t1" else 1))
    collaboration.write(folder / "matrix.json", counts(4))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    spec = importlib.util.spec_from_file_location("c2r_compare", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    return module.main()


def test_seeds_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Partners that lie four apart are two on a rank after the placement of the counts before."""
    folders = [str(write_seed(tmp_path / str(seed), seed)) for seed in range(2)]
    output = tmp_path / "found.json"
    words = [*folders, "--ranks", "4", "--json", str(output)]
    assert run(monkeypatch, *words) == 0
    content = json.loads(output.read_text())
    assert content["seeds"] == ["0", "1"]
    runs = content["runs"]
    assert list(runs) == ["base", "t1", "t7"]
    for name, losses in LOSSES.items():
        assert runs[name]["validation loss"] == pytest.approx(losses)
    assert runs["t1"]["- free"] == pytest.approx([0.1, 0.2]) and "- free" not in runs["base"]
    columns = [f"EP 4, {where}" for where in ("in order", "placed", "placed anew")]
    assert [runs["t1"][column] for column in columns] == [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]]
    # A ring: half of its neighbours are on one rank in order, none where four apart are.
    assert [runs["t7"][column] for column in columns] == [[1.5, 1.5], [2.0, 2.0], [1.5, 1.5]]
    assert runs["t1"]["busiest expert / mean"] == [1.0, 1.0]
    line = next(line for line in capsys.readouterr().out.splitlines() if "| t1 |" in line)
    assert "4.650 +- 0.212 | 0.150 +- 0.071" in line


def test_what_cannot_be_compared_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write_seed(tmp_path / str(seed), seed) for seed in range(2)]
    (folders[1] / "t7" / "counts.json").unlink()
    (folders[0] / "t7" / "log.txt").write_text("killed\n")
    for words, line in (
        ([*map(str, folders)], "has other runs than"),
        ([str(folders[0])], "log.txt has no validation loss"),
        ([str(folders[1]), "--ranks", "3"], "--ranks 3 does not divide 8 experts"),
        ([str(tmp_path / "2")], "matrix.json"),
    ):
        assert run(monkeypatch, *words) == 2
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1
