"""tools/quality: who is compared, what is kept of a run, the test over seeds, the page."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from examples.quickstart.tokenizer import save_tokenizer, train_tokenizer
from megatron_scmoe.words import write_whole
from tools.benchmarks.provenance import REPOSITORY
from tools.quality import __main__ as program
from tools.quality import claims, report, runs
from tools.quality.contenders import BY_NAME, CONTENDERS
from tools.quality.corpus import SPLITS, Text
from tools.quality.papers import ORDERINGS
from tools.quality.runs import (
    PlannedRun,
    RunQueue,
    RunResult,
    TrainingLog,
    chosen_rate,
    rate_tasks,
    seed_tasks,
)
from tools.quality.scales import SCALES
from tools.quality.sizes import sizes
from tools.quality.statistics import PairedSeeds, student

SCALE = SCALES["smoke"]
LOG = """\
 [2026-11-30 01:21:41] iteration        7/       8 | lm loss: 6.2E+00 | gates agree: 70.0% (1% 2%) |
 [2026-11-30 01:21:41] iteration        8/       8 | consumed samples:           64 | \
lm loss: 6.125821E+00 | expert slots: 1,1 | gates agree: 76.8% (77% 77%) | dropped: 13.8% |
 validation loss at iteration 8 on validation set | lm loss value: 6.087632E+00 |
"""


def result(name: str, seed: int, loss: float, **others: Any) -> RunResult:
    options = BY_NAME[name].command_line(SCALE)
    machine = {"processor": "a processor", "cores": 2}
    known = dict(losses=[(8, loss + 1)], extras={}, seconds=1.0, command="python", commit="abc")
    known |= dict(machine=machine, digest="d", options=options) | others
    return RunResult(name, seed, SCALE.rates[0], loss, **known)


def keep(folder: Path, one: RunResult, name: str) -> Path:
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    path = folder / "runs" / f"{name}.json"
    write_whole(path, json.dumps(vars(one)))
    return path


def runner(folder: Path) -> RunQueue:
    text = Text(folder / "text", "d", {"train": 10**6, "valid": 10**5})
    return RunQueue(folder, SCALE, text, lambda result, seconds: None)


def test_students_distribution() -> None:
    """Values of a printed table, and the two with a closed form."""
    for t, degrees, p in ((12.706, 1, 0.05), (4.303, 2, 0.05), (2.776, 4, 0.05), (3.355, 8, 0.01)):
        assert student(t, degrees) == pytest.approx(p, rel=1e-3)
    assert student(1.7, 1) == pytest.approx(1 - 2 / math.pi * math.atan(1.7))
    assert student(-1.7, 2) == pytest.approx(1 - 1.7 / math.sqrt(2 + 1.7**2))
    assert student(0, 3) == 1


def test_verdicts_weigh_the_scatter_of_three_seeds() -> None:
    """t = mean / (scatter / sqrt(3)), with two degrees of freedom."""
    seeds = PairedSeeds((-1.0, -2.0, -3.0))
    t = 2 * math.sqrt(3)
    assert seeds.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert seeds.verdict == "no difference"
    assert PairedSeeds((-1.8, -2.0, -2.2)).verdict == "better"


def test_verdicts_over_seeds() -> None:
    def verdict(*pairs: tuple[float, float]) -> str:
        one, other = (dict(enumerate(losses)) for losses in zip(*pairs, strict=True))
        return PairedSeeds.of(one, other).verdict

    assert verdict((5.0, 5.1), (5.2, 5.31), (5.1, 5.2)) == "better"
    assert verdict((5.1, 5.0), (5.31, 5.2), (5.2, 5.1)) == "worse"
    assert verdict((5.0, 5.1), (5.2, 5.1), (5.1, 5.2)) == "no difference"
    assert verdict((5.0, 5.0), (5.2, 5.2)) == "no difference"
    assert verdict((5.0, 5.1)) == "one seed"
    # Only seeds that both have count.
    assert PairedSeeds.of({1: 5.0}, {2: 5.1}).verdict == "not run"
    assert PairedSeeds.of({1: 5.0, 2: 4.0}, {2: 4.5}).differences == (-0.5,)


def test_everybody_is_compared_with_somebody() -> None:
    assert len(BY_NAME) == len(CONTENDERS)
    assert {each.against for each in CONTENDERS} <= BY_NAME.keys()
    assert {name for each in ORDERINGS for name in (each.better, each.worse)} <= BY_NAME.keys()
    assert len({(each.better, each.worse, each.source) for each in ORDERINGS}) == len(ORDERINGS)


def test_equal_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the scale that is published; every command line is one that a run takes."""
    monkeypatch.setattr(sys, "argv", ["sizes"])
    found = sizes(SCALES["laptop"])
    assert found.keys() == BY_NAME.keys()

    def same(dest: str, *names: str) -> bool:
        return len({found[name][dest] for name in names}) == 1

    assert same("flops", "top2", "dense", "shared", "pos1", "pos2", "pos3", "dgmoe", "top1-wide")
    assert same("flops", "top3", "scmoe2")
    assert same("flops", "pos2", "pos2-add", "pos2-cg2", "pos2-shared-norm", "pos2-post-norm")
    assert same("parameters", "top1", "top2", "top3", "top2-pre")
    assert found["top1"]["flops"] < found["top2"]["flops"] < found["top3"]["flops"]
    assert found["moepp-0.1"]["flops"] < found["moepp-0.75"]["flops"] < found["moe"]["flops"]


def test_what_a_run_has_printed(tmp_path: Path) -> None:
    write_whole(tmp_path / "log.txt", LOG)
    log = TrainingLog.read(tmp_path / "log.txt")
    assert log.losses == [(7, 6.2), (8, 6.125821)]
    assert log.validation == 6.087632
    assert log.extras == {"gates agree": [0.7, 0.768], "dropped": [0.138]}


def test_the_rate_of_the_least_loss_is_taken() -> None:
    scale = replace(SCALE, rates=(1e-3, 2e-3))
    tasks = rate_tasks(BY_NAME["top3"], scale)
    assert [(task.rate, task.seed) for task in tasks] == [(1e-3, 100), (2e-3, 100)]
    found = [
        replace(result("top3", 100, loss), rate=task.rate)
        for loss, task in zip((5, 4), tasks, strict=True)
    ]
    assert chosen_rate(BY_NAME["top3"], scale, found) == 2e-3
    assert [task.seed for task in seed_tasks(BY_NAME["top3"], scale, 2e-3)] == [1]
    assert [task.seed for task in seed_tasks(BY_NAME["top2"], scale, 2e-3)] == [1, 2]
    assert rate_tasks(BY_NAME["top3"], SCALE) == []


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = PlannedRun(BY_NAME["top2"], 1, SCALE.rates[0], SCALE.iterations)
    stored = keep(tmp_path, result("top2", 1, 5.0), task.name)
    one = runner(tmp_path)
    monkeypatch.setattr(runs.subprocess, "Popen", None)
    (found,) = one.all([task], jobs=1)
    assert found == result("top2", 1, 5.0)
    for damaged, said in (
        ('{"contender": "top2"', "is no result of this program .*: remove it to repeat it"),
        ("{}", "is no result of this program"),
        (json.dumps(vars(result("top2", 1, 5.0, digest="e"))), "other text .* another --output"),
        (
            json.dumps(vars(result("dense", 1, 5.0))),
            "of other options than top2 has now: remove it",
        ),
    ):
        write_whole(stored, damaged)
        with pytest.raises(ValueError, match=said):
            one.all([task], jobs=1)


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What the program says of a mistake: one line, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["quality", "--scale", "smoke", *words])
    assert program.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    line = said(capsys, monkeypatch, "--output", str(tmp_path / "file" / "folder"))
    assert "Not a directory" in line
    line = said(capsys, monkeypatch, "--output", str(tmp_path / "new"), "--table")
    assert line.endswith("has no results: run it without --table first.")
    assert not (tmp_path / "new").exists()
    program.claim(tmp_path, "laptop", SCALES["laptop"])
    line = said(capsys, monkeypatch, "--output", str(tmp_path))
    assert "has results of another scale" in line and "choose another --output" in line
    write_whole(tmp_path / "scale.json", "{")
    assert "scale.json: it is no JSON" in said(capsys, monkeypatch, "--output", str(tmp_path))


def test_the_page_says_what_came_out(tmp_path: Path) -> None:
    for seed in (1, 2):
        for name, loss in (("top2", 5.0 + seed), ("pos2", 4.9 + seed), ("shared", 5.0 - seed)):
            keep(tmp_path, result(name, seed, loss), f"{name}.seed-{seed}")
    keep(tmp_path, result("dgmoe-any", 1, 6.0, extras={"gates agree": 0.75}), "dgmoe-any.seed-1")
    keep(tmp_path, result("top2", 100, 6.0), "top2.rate-0.003")
    (tmp_path / "claims").mkdir()
    claim = {"tokens": 4, "cosines": [0.5, 0.75], "experts": {"word": [4, 1.25]}}
    write_whole(tmp_path / "claims" / "moepp-0.75.json", json.dumps(claim))
    corpus = {"python_version": "3.12.1", "train_bytes": 10**6, "valid_bytes": 10**5}
    page = report.page(report.read(tmp_path), SCALE, "smoke", corpus)
    assert f"7 of {runs.number_of_runs(SCALE)} runs" in page
    row = next(line for line in page.splitlines() if line.startswith("| ScMoE Pos-2, CG-1 | 6.4"))
    assert "| 6.4000 ± 0.7071 | 2 |" in row and "| -0.1000 | 0.000 | better |" in row
    assert "| ScMoE Pos-2, CG-1 | top-2 | ScMoE table 4" in page and "| reproduced |" in page
    assert "| DGMoE without the rule | 75.0% |" in page
    assert "| MoE++, tau 0.75 | 0.500 | 0.750 |" in page and "| word | 4 | 1.250 |" in page
    assert "| top-2 | **6.0000** |" in page


def test_kinds_of_tokens() -> None:
    entries = ["def", "Ġf", "oo", "(", "x", "):", "Ċ", "ĠĠ", "Ġ12", "Ġreturn", "<|endoftext|>"]
    assert claims.kinds_of(entries) == [
        "keyword",
        "part of a word",
        "part of a word",
        "mark",
        "word",
        "mark",
        "blank",
        "blank",
        "number",
        "keyword",
        "end of document",
    ]


def write_text(folder: Path) -> None:
    """What corpus.write leaves: the license, in both splits."""
    license = (REPOSITORY / "LICENSE").read_text()
    tokenizer = train_tokenizer(iter([license]), SCALE.vocabulary)
    save_tokenizer(tokenizer, folder / "tokenizer")
    for split in SPLITS:
        prefix = folder / f"{split}_text_document"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for paragraph in license.split("\n\n"):
            if ids := tokenizer.encode(paragraph).ids:
                builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(f"{prefix}.idx")
    counts = {"python_version": "3.12.1", "train_bytes": 10**4, "valid_bytes": 10**4}
    write_whole(folder / "corpus.json", json.dumps(counts))
    write_whole(folder / "complete", "")


@pytest.mark.slow
def test_a_contender_is_trained_and_studied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole program with one row, from its run to the pictures; again, nothing runs."""
    only = replace(BY_NAME["moepp-0.75"], main=False)
    programs = program._program

    def without_sizes(*words: str) -> str:
        return "{}" if words[0] == "tools.quality.sizes" else programs(*words)

    monkeypatch.setattr(program, "_program", without_sizes)
    monkeypatch.setattr(program, "CONTENDERS", (only,))
    monkeypatch.setattr(runs, "CONTENDERS", (only,))
    monkeypatch.setattr(sys, "argv", ["quality", "--scale", "smoke", "--output", str(tmp_path)])
    write_text(tmp_path / "text")
    assert program.main() == 0
    printed = capsys.readouterr().out
    assert "[1/1] moepp-0.75 seed 1" in printed and "FFN experts of a token" in printed
    assert (tmp_path / "held_out.png").stat().st_size > 1000
    assert program.main() == 0
    assert "[1/1]" not in capsys.readouterr().out
