"""What tools/preprocess_data.py says when the user is wrong: one line, exit code 2, no output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOOL, write_lines

GOOD = b'{"text": "1 2"}\n'
WRONG_MODEL = ["--tokenizer-model", "c.jsonl"]
MISSING_MODEL = ["--tokenizer-model", "./none"]


def left_over(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "1"\n', "not valid JSON"),
        (b"nonsense\n", "not valid JSON"),
        (b'{"other": "1", "id": 3}\n', "no key 'text' (--json-keys); the line has: 'other', 'id'"),
        (b"{}\n", "the line has: none"),
        (b'{"text": 5}\n', "not a string but a number"),
        (b'{"text": null}\n', "not a string but null"),
        (b'{"text": ["1"]}\n', "not a string but an array"),
        (b'["text"]\n', "not a JSON object but an array"),
        (b'{"text": "\xff"}\n', "not UTF-8 (byte 11 of the line)"),
        (b'{"text": "one"}\n', "the tokenizer refuses the value of 'text': ValueError"),
        (b'{"text": "70000"}\n', "token id 70000, which uint16"),
        (b"[" * 100_000 + b"\n", "not usable JSON"),
        (b'{"text": "1", "n": ' + b"9" * 5000 + b"}\n", "not usable JSON"),
    ],
)
def test_malformed_line(tool, tmp_path: Path, null_arguments, line, said):
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(GOOD + b"\n" + GOOD * 2000 + line + GOOD)
    outcome = tool("--input", corpus, *null_arguments, "--log-interval", 10**9)
    assert outcome.code == 2
    assert outcome.error.startswith(f"{corpus}:2003: ")
    assert said in outcome.error
    assert left_over(tmp_path) == []


def test_first_malformed_line_is_named(tool, tmp_path: Path, null_arguments):
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes((GOOD * 900 + b"bad\n") * 9)
    outcome = tool("--input", corpus, *null_arguments, "--workers", 4, "--log-interval", 10**9)
    assert outcome.error.startswith(f"{corpus}:901: ")


def test_skip_counts_and_names(tool, tmp_path: Path, null_arguments):
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(GOOD + b"bad\n" * 12 + b'{"text": "3"}\n')
    outcome = tool("--input", corpus, *null_arguments, "--on-error", "skip")
    assert outcome.code == 0
    lines = [line for line in outcome.stderr.splitlines() if "skipped" in line]
    assert len(lines) == 11  # the first ten, and the count
    assert f"{corpus}:2: not valid JSON" in lines[0]
    assert f"{corpus}:11: " in lines[9]
    assert lines[10].endswith("skipped 12 lines in all")
    manifest = json.loads((tmp_path / "out" / "corpus_text_document.json").read_text())
    assert (manifest["documents"], manifest["skipped_lines"]) == (2, 12)


def test_skip_keeps_keys_aligned(tool, tmp_path: Path, null_arguments):
    corpus = write_lines(
        tmp_path / "c.jsonl", [{"a": "1", "b": "2"}, {"a": "3"}, {"a": "5", "b": "6"}]
    )
    outcome = tool(
        "--input", corpus, *null_arguments, "--on-error", "skip", "--json-keys", "a", "b"
    )
    assert outcome.code == 0
    assert (tmp_path / "out" / "corpus_a_document.bin").read_bytes() == b"\1\0\5\0"
    assert (tmp_path / "out" / "corpus_b_document.bin").read_bytes() == b"\2\0\6\0"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "nothing to write"),
        (b"\n  \n", "nothing to write"),
        (b'{"text": ""}\n', "every 'text' is empty: nothing to write"),
        (b"bad\n", "nothing to write"),
    ],
)
def test_nothing_to_write(tool, tmp_path: Path, null_arguments, content, said):
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(content)
    outcome = tool("--input", corpus, *null_arguments, "--on-error", "skip")
    assert outcome.code == 2
    assert said in outcome.stderr.splitlines()[-1]
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --input"),
        (["--input", "missing.jsonl"], "--input missing.jsonl: does not exist"),
        (["--input", "*.none"], "--input *.none: matches no file"),
        (["--input", "empty_folder"], "has no *.jsonl or *.json file"),
        (["--input", "c.jsonl", "c.jsonl"], "c.jsonl twice"),
        (["--input", "c.jsonl", "--workers", "0"], "must be at least 1, not 0"),
        (["--input", "c.jsonl", "--workers", "two"], "--workers: must be at least 1, not two"),
        (["--input", "c.jsonl", "--partitions", "-1"], "must be at least 1, not -1"),
        (["--input", "c.jsonl", "--json-keys", "a/b"], "cannot be part of a file name"),
        (["--input", "c.jsonl", "--json-keys", "a", "a"], "names 'a' twice"),
        (["--input", "c.jsonl", "--input-weights", "1", "2"], "2 numbers for 1 inputs"),
        (["--input", "c.jsonl", "--input-weights", "0"], "must be above 0, not 0"),
        (["--input", "c.jsonl", "--input-weights", "x"], "argument --input-weights: invalid"),
        (
            ["--input", "c.jsonl", "a/c.jsonl", "--input-weights", "1", "1"],
            "the inputs' names c, c are those of their datasets and must differ",
        ),
        (
            ["--input", "c.jsonl", "--input-weights", "1", "--output-prefix", "a b/x"],
            "no white space",
        ),
        (["--input", "c.jsonl", "--keep-newlines"], "--keep-newlines needs --split-sentences"),
        (["--input", "c.jsonl", "--output-prefix", "empty_folder/"], "is a folder"),
        (["--input", "c.jsonl", "--output-prefix", "c.jsonl/x"], "c.jsonl is not a folder"),
        (["--input", "c.jsonl", "--tokenizer-type", "Nonsense"], "invalid choice: 'Nonsense'"),
        (["--input", "c.jsonl", "--tokenizer-type", "HuggingFaceTokenizer"], "needs --tokenizer-m"),
        (["--input", "c.jsonl", "--vocab-size", "0"], "needs --vocab-size, at least 1"),
        (["--input", "c.jsonl", "--merge-file", "none"], "--merge-file none: no such file"),
        (["--input", "c.jsonl", "--lang", "klingon", "--split-sentences"], "--lang klingon; run"),
        (
            ["--input", "c.jsonl", "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "x"],
            "--tokenizer-model x: no such file",
        ),
        (
            ["--input", "c.jsonl", "--tokenizer-type", "Llama2Tokenizer", *WRONG_MODEL],
            "cannot load --tokenizer-type Llama2Tokenizer",
        ),
        (
            ["--input", "c.jsonl", "--tokenizer-type", "HuggingFaceTokenizer", *MISSING_MODEL],
            "--tokenizer-model ./none: no such folder",
        ),
    ],
)
def test_wrong_option(tool, tmp_path: Path, null_arguments, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    outcome = tool(*null_arguments, *arguments)
    assert outcome.code == 2
    assert said in outcome.error
    assert left_over(tmp_path) == []


def test_tokenizer_without_end(tool, tmp_path: Path, tokenizers):
    folder = Path(tokenizers["hf"][-1])
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(GOOD)
    outcome = tool(
        "--input", corpus, "--append-eod", "--output-prefix", tmp_path / "out",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", other,
    )  # fmt: skip
    assert outcome.code == 2
    assert "no end-of-document token" in outcome.error


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("nltk", ["--split-sentences"]),
        ("zstandard", ["--input", "c.jsonl.zst"]),
        ("pyarrow", ["--input", "c.parquet"]),
    ],
)
def test_missing_extra(tmp_path: Path, module, arguments):
    """As a user starts it, on a machine without the module."""
    for name in ("c.jsonl.zst", "c.parquet"):
        (tmp_path / name).write_bytes(b"")
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name: None if name == {module!r} else find(name)\n"
        f"sys.argv = {['x', '--input', 'c.jsonl.zst', *arguments]!r} + ['--output-prefix', 'out',"
        " '--tokenizer-type', 'NullTokenizer', '--vocab-size', '9']\n"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("preprocess_data.py: error: ")
    assert done.stderr.endswith(f"needs {module}: pip install 'megatron-scmoe[data]'\n")
    assert done.stderr.count("\n") == 1


def test_as_a_user_starts_it(tmp_path: Path):
    """A malformed line costs one line of stderr also where the large imports happen."""
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(GOOD + b"bad\n")
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]
    done = subprocess.run(
        [sys.executable, TOOL, "--input", corpus, "--output-prefix", tmp_path / "out" / "x", *null],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"preprocess_data.py: error: {corpus}:2: not valid JSON")
    assert done.stderr.count("\n") == 1
    assert left_over(tmp_path) == []
