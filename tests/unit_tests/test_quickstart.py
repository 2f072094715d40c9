"""The scripts around the quick start's training: corpus, tokenizer and report.

Known documents and event files with known numbers go in; what comes out is compared with values
worked out by hand, never with a second copy of the same code.
"""

import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def load(name: str) -> ModuleType:
    """Import one of the scripts; they are run by path and belong to no package."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


corpus, tokenizer, report = load("corpus"), load("tokenizer"), load("loss_report")
progress = load("progress")


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- corpus -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("corpus")
    argv = ["--output-dir", str(output_dir), "--max-megabytes", "1.5", "--valid-fraction", "0.1"]
    assert corpus.main(argv) == 0
    return output_dir


def test_corpus_is_python_text_of_the_size_asked_for(small_corpus: Path) -> None:
    splits = {name: read_jsonl(small_corpus / f"{name}.jsonl") for name in ("train", "valid")}
    documents = splits["train"] + splits["valid"]
    size = sum(len(document["text"].encode()) for document in documents)
    assert 0.5e6 < size <= 1.5e6
    kinds = {document["source"].split("/")[0] for document in documents}
    assert kinds == {"library", "manual", "topics"}
    counts = json.loads((small_corpus / "corpus.json").read_text())
    assert counts["train_documents"] == len(splits["train"])
    assert counts["valid_documents"] == len(splits["valid"])
    assert counts["train_bytes"] + counts["valid_bytes"] == size


def test_held_out_text_is_not_in_train(small_corpus: Path) -> None:
    """Checked with Python's own `in`, at random places, not with the tool's hashes."""
    train = read_jsonl(small_corpus / "train.jsonl")
    valid = read_jsonl(small_corpus / "valid.jsonl")
    assert not {d["source"] for d in train} & {d["source"] for d in valid}
    everything = "\0".join(corpus.normalise(document["text"]) for document in train)
    rng = random.Random(0)
    shared = total = 0
    for document in valid:
        text = corpus.normalise(document["text"])
        for _ in range(5):
            start = rng.randrange(len(text) - corpus.WINDOW_CHARS + 1)
            shared += text[start : start + corpus.WINDOW_CHARS] in everything
            total += 1
    assert total >= 20
    assert shared <= 0.02 * total


def test_same_files_in_another_process(small_corpus: Path, tmp_path: Path) -> None:
    """Neither the hash seed nor what the process imported before changes a byte."""
    script = [sys.executable, str(QUICKSTART / "corpus.py"), "--output-dir", str(tmp_path)]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    argv = [*script, "--max-megabytes", "1.5", "--valid-fraction", "0.1"]
    subprocess.run(argv, env=environment, check=True)
    for name in ("train.jsonl", "valid.jsonl", "corpus.json"):
        assert (tmp_path / name).read_bytes() == (small_corpus / name).read_bytes()


def words(seed: int, count: int) -> str:
    """Lines of eight pseudo-random words; different seeds share no line."""
    rng = random.Random(seed)
    pick = [f"w{rng.randrange(10**6)}" for _ in range(count)]
    return "\n".join(" ".join(pick[i : i + 8]) for i in range(0, count, 8))


def test_shared_windows_counts_exactly_the_copied_passage() -> None:
    own, copied = words(1, 400), words(2, 160)
    width, stride = corpus.WINDOW_CHARS, corpus.WINDOW_STRIDE
    held_out = corpus.normalise(own + "\n" + copied)
    # The copy sits in other surroundings and is indented differently.
    train = words(3, 200) + "\n" + copied.replace("\n", "\n        ") + "\n" + words(4, 200)
    flat = corpus.normalise(train)
    expected = [
        held_out[start : start + width] in flat
        for start in range(0, len(held_out) - width + 1, stride)
    ]
    assert 10 < sum(expected) < len(expected)
    pairs = corpus.shared_windows(
        [corpus.Document("t", train)],
        [corpus.Document("v", held_out), corpus.Document("clean", words(5, 300))],
    )
    assert pairs[0] == (sum(expected), len(expected))
    assert pairs[1][0] == 0 and pairs[1][1] > 50


def test_leaky_and_giant_documents_are_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [corpus.Document(f"plain{i}", words(i, 400)) for i in range(40)]
    quoted = plain[0].text.split("\n")[:20]
    leaky = corpus.Document("leaky", words(90, 400) + "\n" + "\n".join(quoted))
    giant = corpus.Document("giant", words(91, 20_000))
    assert len(giant.text) > corpus.MAX_HELD_OUT_CHARS
    monkeypatch.setattr(corpus, "candidates", lambda seed: iter([*plain, leaky, giant]))
    held_out = {"leaky", "giant", "plain7", "plain8"}
    monkeypatch.setattr(corpus, "unit_hash", lambda *parts: 0.0 if parts[-1] in held_out else 0.9)
    splits, counts = corpus.build_corpus(10**9, 0.5, 0)
    assert [document.source for document in splits["valid"]] == ["plain7", "plain8"]
    assert counts["valid_documents_dropped_for_overlap"] == 1
    assert "giant" in {document.source for document in splits["train"]}
    assert "leaky" not in {document.source for document in splits["train"]}


def test_the_split_depends_on_name_and_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [corpus.Document(f"plain{i}", words(i, 400)) for i in range(40)]

    def held_out(seed: int, order: list) -> set[str]:
        monkeypatch.setattr(corpus, "candidates", lambda seed: iter(order))
        splits, _ = corpus.build_corpus(10**9, 0.5, seed)
        return {document.source for document in splits["valid"]}

    assert 10 < len(held_out(0, documents)) < 30
    assert held_out(0, documents) == held_out(0, documents[::-1])
    assert held_out(0, documents) != held_out(1, documents)


def test_near_duplicates_are_dropped() -> None:
    text = words(1, 800)
    lines = text.split("\n")
    edited = "\n".join("changed" if i % 25 == 0 else "  " + line for i, line in enumerate(lines))
    half_new = words(2, 800) + "\n" + "\n".join(lines[:40])
    documents = {"a": text, "copy": text, "edited": edited, "other": half_new, "short": "x = 1"}
    kept = corpus.without_duplicates(corpus.Document(*item) for item in documents.items())
    assert [document.source for document in kept] == ["a", "other"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decoding_table = (\n" + "    '\\x41'     #  0x41 -> LATIN CAPITAL LETTER A\n" * 50, True),
        ("entities = {\n" + "    'Aacute': '\\xc1',\n    (0x8a, 'x'),\n" * 50 + "}\n", True),
        ("def add(a, b):\n    '''Add.'''\n    return a + b  # sum\n" * 50, False),
        ("parser.add_argument('--x', type=int,\n                    help='y')\n" * 50, False),
    ],
)
def test_tables_are_told_from_code(text: str, expected: bool) -> None:
    assert corpus.is_table(text) is expected


def test_stdlib_paths_leave_out_what_is_not_python_itself(tmp_path: Path) -> None:
    wanted = ["json/decoder.py", "test/test_json.py"]
    unwanted = [
        "site-packages/torch/a.py",
        "dist-packages/b.py",
        "pydoc_data/topics.py",
        "_sysconfigdata__linux.py",
        "config-3.12/python-config.py",
        "test/tokenizedata/bad.py",
    ]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.as_posix() for path in corpus.stdlib_paths(tmp_path)] == wanted


@pytest.mark.parametrize(
    "options", [["--max-megabytes", "0.0001"], ["--valid-fraction", "1.5"]], ids=["tiny", "share"]
)
def test_corpus_errors_are_one_line(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert corpus.main(["--output-dir", str(tmp_path), *options]) == 2
    assert_error_line(capsys)
    assert not list(tmp_path.iterdir())


def assert_error_line(capsys: pytest.CaptureFixture[str], mentioning: str = "") -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.match(r"[\w.-]+: error: ", captured.err)
    assert mentioning in captured.err


# ---- tokenizer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_dir(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("tokenizer")
    argv = ["--input", str(small_corpus / "train.jsonl"), "--output-dir", str(output_dir)]
    assert tokenizer.main([*argv, "--vocab-size", "600"]) == 0
    return output_dir


def test_megatron_loads_the_tokenizer_offline(
    tokenizer_dir: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the host's own builder, with the host's own default arguments."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import parse_args

    options = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_dir)]
    monkeypatch.setattr(sys, "argv", ["pretrain", *options])
    args = parse_args()
    loaded = build_tokenizer(args)
    assert loaded.vocab_size == 600
    assert args.padded_vocab_size == math.ceil(600 / 128) * 128
    assert loaded.eod == 0
    assert loaded.tokenize("<|endoftext|>") == [loaded.eod]
    # GPTDataset masks padding: it must not be None and must not be the end of a document.
    assert loaded.pad == 1

    rng = random.Random(0)
    every_plane = [*range(0xD800), *range(0xE000, 0x110000)]  # all but the surrogates
    texts = [
        " leading, 'quoted' and . spaced , punctuation don 't \r\n\ttabs  \n\n",
        "\u00e9 e\u0301 \u00a0 \u4e16\u754c \U0001f642 \x00\x7f",
        "".join(chr(rng.choice(every_plane)) for _ in range(3000)),
        read_jsonl(small_corpus / "valid.jsonl")[0]["text"],
    ]
    for text in texts:
        ids = loaded.tokenize(text)
        assert loaded.detokenize(ids) == text
        assert min(ids) >= 0 and max(ids) < 600
        assert loaded.eod not in ids  # the end of a document is preprocess_data's to append
    assert len(loaded.tokenize(texts[-1])) < 0.6 * len(texts[-1].encode())


def test_tokenizer_training_is_reproducible(
    tokenizer_dir: Path, small_corpus: Path, tmp_path: Path
) -> None:
    argv = ["--input", str(small_corpus / "train.jsonl"), "--output-dir", str(tmp_path)]
    assert tokenizer.main([*argv, "--vocab-size", "600"]) == 0
    first, second = (folder / "tokenizer.json" for folder in (tokenizer_dir, tmp_path))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("line", "vocab_size", "mentioning"),
    [
        ('{"text": "a"}', 257, "--vocab-size 257"),
        ('{"source": "a"}', 300, ":2: not a JSON object"),
        ("[1]", 300, ":2: not a JSON object"),
        ('{"text": "a', 300, ":2: not a JSON object"),
        (None, 300, "No such file"),
    ],
)
def test_tokenizer_errors_are_one_line(
    line: str | None,
    vocab_size: int,
    mentioning: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "texts.jsonl"
    if line is not None:
        path.write_text('{"text": "fine"}\n' + line + "\n")
    argv = ["--input", str(path), "--output-dir", str(tmp_path / "out")]
    assert tokenizer.main([*argv, "--vocab-size", str(vocab_size)]) == 2
    assert_error_line(capsys, mentioning)
    assert not (tmp_path / "out").exists()


# ---- report -------------------------------------------------------------------------------------


def write_launch(
    folder: Path, name: str, steps: range, skip: tuple[str, ...] = (), offset: float = 0.0
) -> None:
    """One launch's event file: losses on the line 9 - 0.02 step, other tags constant.

    The first two iterations are slow, as compilation and caches make them; the others take 0.5 s.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(folder), filename_suffix=name) as writer:
        for step in steps:
            scalars = {
                "lm loss": 9 - 0.02 * step + offset,
                "a2a-seconds": 0.2,
                "a2a-exposed-seconds": 0.05,
                "learning-rate": 1e-3,
            }
            if step > steps[0]:
                scalars["iteration-time"] = 30.0 if step < steps[0] + 2 else 0.5
            if step % 20 == 0:
                scalars["lm loss validation"] = 9.5 - 0.02 * step
            for tag, value in scalars.items():
                if tag not in skip:
                    writer.add_scalar(tag, value, step)
        # The loss on a test set, which Megatron logs under this name too, after the last step.
        if "lm loss validation" not in skip:
            writer.add_scalar("lm loss validation", 99.0, steps[-1] // 20 * 20)


def write_dataset(prefix: Path) -> None:
    """Two documents in which four tokens occur with shares 1/2, 1/4, 1/8, 1/8."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in ([7, 7, 9, 11], [7, 9, 7, 0]):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


ENTROPY = 1.75 * math.log(2)  # of shares 1/2, 1/4, 1/8, 1/8, in nats


@pytest.fixture
def run_dir(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """Launch 1 logs up to 65 but its last checkpoint is 60; launch 2 resumes there, to 100."""
    write_dataset(tmp_path / "data" / "valid_text_document")
    (tmp_path / "tokenizer").symlink_to(tokenizer_dir)
    write_launch(tmp_path / "tensorboard", ".first", range(1, 66))
    (first,) = (tmp_path / "tensorboard").iterdir()
    # Two launches within one second would otherwise sort by process id.
    first.rename(first.with_name("events.out.tfevents.1000000000.host.1.0"))
    write_launch(tmp_path / "tensorboard", ".second", range(61, 101))
    return tmp_path


def run_report(run_dir: Path, *options: str) -> int:
    argv = ["--run-dir", str(run_dir), "--tokens-per-iteration", "1000"]
    return report.main([*argv, "--resumed-from-iteration", "60", *options])


def test_summary_numbers(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MIN_GAIN", -10.0)  # this toy entropy cannot be beaten
    assert run_report(run_dir) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["iterations"] == 100
    assert summary["initial_loss"] == pytest.approx(8.98, abs=1e-6)
    assert summary["final_loss"] == pytest.approx(9 - 0.02 * 95.5, abs=1e-6)  # mean of 91..100
    assert summary["validation_loss"] == pytest.approx(7.5, abs=1e-6)
    assert summary["unigram_entropy"] == pytest.approx(ENTROPY, abs=1e-12)
    assert summary["tokens_per_second"] == pytest.approx(2000)  # without the slow beginning
    assert summary["tokens_trained"] == 100_000
    assert summary["a2a_seconds"] == pytest.approx(100 * 0.2, rel=1e-6)  # 61..65 count once
    assert summary["a2a_hidden_share"] == pytest.approx(0.75, rel=1e-6)
    assert summary["resumed_from_iteration"] == 60
    assert summary["resume_loss"] == pytest.approx(9 - 0.02 * 61, abs=1e-6)
    assert summary["resume_expected_loss"] == pytest.approx(9 - 0.02 * 61, abs=1e-5)
    assert summary["megatron_core_version"] and summary["torch_version"]
    assert summary["warnings"] == []
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")

    lines = capsys.readouterr().out.splitlines()
    assert "validation loss  7.500 nats/token" in lines
    assert "  hidden share   75.0%" in lines
    # Aligned: every row's value starts in one column.
    assert len({len(line) - len(line[17:].lstrip()) for line in lines[:-1]}) == 1


def test_a_resumed_launch_replaces_what_it_repeats() -> None:
    merged = report.merge([{1: 5.0, 2: 6.0, 3: 7.0}, {3: 8.0, 4: 9.0}])
    assert list(merged.items()) == [(1, 5.0), (2, 6.0), (3, 8.0), (4, 9.0)]


def test_validation_above_the_unigram_entropy_is_a_warning(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """7.5 against 1.21: the table says so, the status is 1, the outputs are there."""
    assert run_report(run_dir) == 1
    out = capsys.readouterr().out
    (warning,) = [line for line in out.splitlines() if line.startswith("WARNING")]
    assert "validation loss 7.500" in warning and "unigram entropy 1.213" in warning
    assert json.loads((run_dir / "summary.json").read_text())["warnings"] == [
        warning.removeprefix("WARNING").strip()
    ]
    assert (run_dir / "loss.png").is_file()


def found(loss: float, resume: float = 4.0, train: float = 4.0) -> list[str]:
    summary = {"validation_loss": loss, "unigram_entropy": 5.0, "resume_loss": resume}
    summary |= {"resume_expected_loss": 4.0, "resume_tolerance": 0.25}
    return report.find_warnings(summary, {1: train})


@pytest.mark.parametrize(("gain", "warned"), [(0.49, True), (0.51, False)])
def test_the_margin_over_unigram_entropy(gain: float, warned: bool) -> None:
    assert bool(found(5.0 - gain)) is warned


def test_a_loss_that_is_not_finite_is_a_warning() -> None:
    assert found(math.inf) == found(1.0, train=math.nan) == ["a loss is not finite"]


@pytest.mark.parametrize(("resume", "warned"), [(4.24, False), (4.26, True), (3.74, True)])
def test_a_jump_after_the_resume_is_a_warning(resume: float, warned: bool) -> None:
    assert bool(found(1.0, resume)) is warned


def test_the_loss_to_continue_lies_on_the_line_before_the_resume() -> None:
    before = {step: 9 - 0.02 * step + 0.1 * (-1) ** step for step in range(1, 66)}
    before |= dict.fromkeys(range(61, 66), 20.0)  # repeated by the resumed launch: no matter
    expected, tolerance = report.expected_loss(before, 61, 60)
    assert expected == pytest.approx(9 - 0.02 * 61, abs=0.05)
    assert tolerance == pytest.approx(4 * 0.1, rel=0.1)


def test_a_run_that_diverged_is_still_reported(run_dir: Path) -> None:
    """Losses that are not numbers: valid JSON, a figure, a warning, no exception."""
    write_launch(run_dir / "tensorboard", ".third", range(101, 121), offset=math.nan)
    assert run_report(run_dir, "--resumed-from-iteration", "100") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "summary.json").read_text()
    summary = json.loads(text, parse_constant=refuse)
    assert summary["final_loss"] is None
    assert "a loss is not finite" in summary["warnings"]
    assert (run_dir / "loss.png").is_file()


def break_tags(run_dir: Path) -> None:
    for path in (run_dir / "tensorboard").iterdir():
        path.unlink()
    skip = ("a2a-seconds", "lm loss validation")
    write_launch(run_dir / "tensorboard", "", range(1, 30), skip=skip)


def drop_tokens(run_dir: Path) -> None:
    (run_dir / "data" / "valid_text_document.bin").unlink()


@pytest.mark.parametrize(
    ("break_run", "options", "mentioning"),
    [
        (break_tags, [], "lacks the tags: lm loss validation, a2a-seconds"),
        (drop_tokens, [], "no such file: "),
        (lambda run_dir: None, ["--resumed-from-iteration", "200"], "no loss after iteration 200"),
        (lambda run_dir: None, ["--resumed-from-iteration", "2"], "only 2 losses were logged"),
    ],
)
def test_report_errors_are_one_line_and_leave_nothing(
    run_dir: Path,
    break_run,
    options: list[str],
    mentioning: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_run(run_dir)
    assert run_report(run_dir, *options) == 2
    assert_error_line(capsys, mentioning)
    assert sorted(path.name for path in run_dir.iterdir()) == ["data", "tensorboard", "tokenizer"]


def test_without_matplotlib_the_error_says_what_to_install(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_report(run_dir) == 2
    assert_error_line(capsys, "megatron-scmoe[plot]")
    assert not (run_dir / "summary.json").exists()


# ---- progress -----------------------------------------------------------------------------------

LINES = [
    "  hidden_size ..................................... 128\n",
    " [2026-11-27] iteration       20/     620 | consumed samples:          320 | elapsed time per "
    "iteration (ms): 250.0 | learning rate: 2.0E-03 | global batch size:    16 | lm loss: "
    "8.357000E+00 | a2a hidden: 75.9% | number of nan iterations:   0 |\n",
    " validation loss at iteration 20 on validation set | lm loss value: 8.1E+00 | PPL: 1\n",
    "pretrain_gpt_scmoe.py: error: the disk is full.\n",
    " iteration       40/     620 | global batch size:    16 | lm loss: 7.0E+00 |\n",
]


def test_progress_shows_what_the_log_says_and_keeps_it_all() -> None:
    log, screen = io.StringIO(), io.StringIO()
    progress.follow(LINES, log, 128, screen)
    assert log.getvalue() == "".join(LINES)
    shown = screen.getvalue()
    first, last = progress.read_line(LINES[1], 128), shown.split("\r")[-1]
    assert first == (20, 620, {"loss": "8.357", "tokens/s": "8,192", "hidden": "76%"})
    assert "40/620" in last and "loss=7.000" in last and "validation=8.100" in last
    assert "error: the disk is full." in shown and "hidden_size" not in shown


def test_training_ends_with_the_script(tmp_path: Path) -> None:
    """Every program is a stub; torchrun's stays until somebody ends it."""
    stubs = {
        "python": "cat > /dev/null",
        "torchrun": f"trap 'touch {tmp_path}/ended; exit' TERM; echo $$ > {tmp_path}/new; "
        f"mv {tmp_path}/new {tmp_path}/started; while :; do sleep 0.1; done",
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN_DIR": str(tmp_path / "run")}
    script = subprocess.Popen(
        [QUICKSTART / "run.sh"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    started, ended = tmp_path / "started", tmp_path / "ended"
    wait_for(started)
    script.terminate()
    script.wait()
    try:
        wait_for(ended)
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(started.read_text()), signal.SIGKILL)


def wait_for(file: Path, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.05)
