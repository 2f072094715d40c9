"""What tools/preprocess_data.py writes: the format, its order, and the manifest."""

import hashlib
import json
import os
import pty
import struct
import termios
from itertools import accumulate
from pathlib import Path

import pyarrow
import pytest
from conftest import TOOL, documents, write_lines
from pyarrow import parquet


def bin_bytes(corpus: list[list[list[int]]]) -> bytes:
    """The .bin of documents made of sequences of ids below 65500."""
    return b"".join(struct.pack("<H", i) for doc in corpus for sequence in doc for i in sequence)


def idx_bytes(corpus: list[list[list[int]]]) -> bytes:
    """The .idx: magic, version, code of uint16, counts, lengths, byte offsets, document ends."""
    lengths = [len(sequence) for document in corpus for sequence in document]
    offsets = [2 * start for start in accumulate(lengths, initial=0)][:-1]
    ends = list(accumulate((len(document) for document in corpus), initial=0))
    return b"".join(
        [
            b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 8),
            struct.pack("<QQ", len(lengths), len(ends)),
            struct.pack(f"<{len(lengths)}i", *lengths),
            struct.pack(f"<{len(offsets)}q", *offsets),
            struct.pack(f"<{len(ends)}q", *ends),
        ]
    )


def read(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_every_byte_of_a_small_corpus(tool, tmp_path: Path, null_arguments):
    texts = ["1 2 3", "", "99", "4 5"]
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    assert tool("--input", corpus, "--append-eod", *null_arguments).code == 0
    # The end of a document is id 99 = vocab_size - 1; an empty document has no sequence.
    expected = [[[1, 2, 3, 99]], [], [[99, 99]], [[4, 5, 99]]]
    written = read(tmp_path / "out" / "corpus_text_document")
    assert written == (bin_bytes(expected), idx_bytes(expected))


def test_large_vocabulary_is_four_bytes(tool, tmp_path: Path, null_arguments):
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "70000 1"}])
    assert tool("--input", corpus, *null_arguments, "--vocab-size", 65500).code == 0
    data, index = read(tmp_path / "out" / "corpus_text_document")
    assert data == struct.pack("<ii", 70000, 1)
    assert index[17] == 4  # Megatron's code of int32


@pytest.mark.parametrize("workers", [1, 3])
def test_order_does_not_depend_on_workers(tool, tmp_path: Path, null_arguments, workers):
    """Many batches, the first by far the slowest to encode."""
    rows = [[i % 90, i // 90] for i in range(6000)]
    slow = list(range(90)) * 3000
    corpus = write_lines(
        tmp_path / "c.jsonl", [{"text": " ".join(map(str, row))} for row in [slow, *rows]]
    )
    outcome = tool("--input", corpus, *null_arguments, "--workers", workers)
    assert outcome.code == 0, outcome.stderr
    expected = [[slow], *([row] for row in rows)]
    written = read(tmp_path / "out" / "corpus_text_document")
    assert written == (bin_bytes(expected), idx_bytes(expected))


def test_partitions_round_robin(tool, tmp_path: Path, null_arguments):
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": str(i)} for i in range(7)])
    assert tool("--input", corpus, *null_arguments, "--partitions", 3).code == 0
    expected = [[[i]] for i in (0, 3, 6, 1, 4, 2, 5)]
    written = read(tmp_path / "out" / "corpus_text_document")
    assert written == (bin_bytes(expected), idx_bytes(expected))


def test_more_partitions_than_documents(tool, tmp_path: Path, null_arguments):
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "5"}, {"text": "6"}])
    assert tool("--input", corpus, *null_arguments, "--partitions", 9).code == 0
    expected = [[[5]], [[6]]]
    written = read(tmp_path / "out" / "corpus_text_document")
    assert written == (bin_bytes(expected), idx_bytes(expected))


def test_megatron_reads_it_and_the_manifest_is_true(tool, tmp_path: Path, tokenizers):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    items = documents(50)
    corpus = write_lines(tmp_path / "c.jsonl", items)
    prefix = tmp_path / "out"
    arguments = ["--json-keys", "text", "title", "--output-prefix", prefix, *tokenizers["hf"]]
    assert tool("--input", corpus, *arguments, "--append-eod").code == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == [
        f"out_{key}_document.{suffix}"
        for key in ("text", "title")
        for suffix in ("bin", "idx", "json")
    ]
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["hf"][-1])
    for key in ("text", "title"):
        expected = [[*tokenizer(item[key]).input_ids, 0] for item in items if item[key]]
        dataset = IndexedDataset(f"{prefix}_{key}_document")
        assert [sequence.tolist() for sequence in dataset] == expected
        manifest = json.loads(Path(f"{prefix}_{key}_document.json").read_text())
        data = Path(f"{prefix}_{key}_document.bin").read_bytes()
        assert manifest["documents"] == 50
        assert manifest["empty_documents"] == 50 - len(expected)
        assert manifest["sequences"] == len(expected)
        assert manifest["tokens"] == sum(map(len, expected))
        assert manifest["vocab_size"] == len(tokenizer)
        assert manifest["bin_bytes"] == len(data)
        assert manifest["bin_sha256"] == hashlib.sha256(data).hexdigest()
        assert len(manifest["tokenizer_sha256"]) == 64


def test_unicode_survives(tool, tmp_path: Path, tokenizers):
    """A byte-level tokenizer gives the text back: emoji, NUL, escapes; a lone surrogate is
    U+FFFD."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(
        b'\xef\xbb\xbf{"text": "raw \xf0\x9f\x98\x80"}\r\n'
        rb'{"text": "pair \ud83d\ude00 nul \u0000 lone \ud800 and \udc00x"}'
    )
    prefix = tmp_path / "out"
    outcome = tool("--input", corpus, "--output-prefix", prefix, *tokenizers["hf"])
    assert outcome.code == 0, outcome.stderr
    assert "replaced 2 unpaired surrogates" in outcome.stderr
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["hf"][-1])
    texts = [tokenizer.decode(ids) for ids in IndexedDataset(f"{prefix}_text_document")]
    assert texts == ["raw \U0001f600", "pair \U0001f600 nul \x00 lone \ufffd and \ufffdx"]


def test_huge_line(tool, tmp_path: Path, null_arguments):
    numbers = [i % 100 for i in range(2_000_000)]
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": " ".join(map(str, numbers))}])
    assert corpus.stat().st_size > 5_000_000
    assert tool("--input", corpus, *null_arguments).code == 0
    data, _ = read(tmp_path / "out" / "corpus_text_document")
    assert data == struct.pack(f"<{len(numbers)}H", *numbers)


def test_inputs_with_weights_are_a_blend(tool, tmp_path: Path, null_arguments):
    """Each input is what it is alone, and Megatron reads weights and names from the blend file."""
    from megatron.core.datasets.utils import get_blend_from_list

    write_lines(tmp_path / "web.jsonl", [{"text": "1 2", "t": "5"}, {"text": "3", "t": "6"}])
    (tmp_path / "code").mkdir()
    write_lines(tmp_path / "code" / "a.jsonl", [{"text": "4", "t": "7"}])
    write_lines(tmp_path / "code" / "b.jsonl", [{"text": "5", "t": "8"}])
    inputs = [tmp_path / "web.jsonl", tmp_path / "code"]
    run = ["--json-keys", "text", "t", *null_arguments]
    outcome = tool("--input", *inputs, "--input-weights", "0.3", "2", *run)
    assert outcome.code == 0 and "5 tokens of text, 4 tokens of t" in outcome.stderr
    out = tmp_path / "out"
    for key in ("text", "t"):
        words = (out / f"corpus_{key}_document.blend").read_text().split()
        prefixes, weights = get_blend_from_list(words)
        assert weights == [0.3, 2.0]
        assert prefixes == [f"{out}/corpus_{name}_{key}_document" for name in ("web", "code")]
        assert [read(Path(prefix))[0] for prefix in prefixes] == {
            "text": [struct.pack("<3H", 1, 2, 3), struct.pack("<2H", 4, 5)],
            "t": [struct.pack("<2H", 5, 6), struct.pack("<2H", 7, 8)],
        }[key]
    again = tool("--input", *inputs, "--input-weights", "1", "1", *run)
    assert "exists; use --overwrite" in again.error


def test_parquet_and_text_files(tool, tmp_path: Path, null_arguments):
    table = pyarrow.table({"text": [f"{i % 90} 1" for i in range(3000)]})
    parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("7 8 9")
    run = ["--input", tmp_path / "c.parquet", tmp_path / "d.txt", *null_arguments]
    assert tool(*run, "--workers", 2).code == 0
    expected = [[[i % 90, 1]] for i in range(3000)] + [[[7, 8, 9]]]
    written = read(tmp_path / "out" / "corpus_text_document")
    assert written == (bin_bytes(expected), idx_bytes(expected))


def test_existing_output(tool, tmp_path: Path, null_arguments):
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "1"}])
    assert tool("--input", corpus, *null_arguments).code == 0
    before = read(tmp_path / "out" / "corpus_text_document")
    write_lines(corpus, [{"text": "2 3"}])
    outcome = tool("--input", corpus, *null_arguments)
    assert outcome.code == 2
    assert "exists; use --overwrite" in outcome.error
    assert read(tmp_path / "out" / "corpus_text_document") == before
    assert tool("--input", corpus, *null_arguments, "--overwrite").code == 0
    expected = [[[2, 3]]]
    written = read(tmp_path / "out" / "corpus_text_document")
    assert written == (bin_bytes(expected), idx_bytes(expected))
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_progress_lines_and_bar(start, tmp_path: Path, null_arguments):
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "1"}] * 2500)
    outcome = start("--input", corpus, *null_arguments, "--log-interval", 1000).wait()
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("Processed ")]
    assert len(lines) == 2
    assert all("docs/s" in line and "MB/s" in line for line in lines)

    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 120))
    run = start(
        "--input", corpus, *null_arguments, "--overwrite", prepare=lambda: os.dup2(stderr, 2)
    )
    assert run.wait().code == 0
    shown = os.read(terminal, 1 << 16).decode()
    assert "docs/s" in shown and "MB/s" in shown and "100%" in shown


def test_options_are_megatrons(preloaded, monkeypatch):
    """Each tokenizer option has the name, destination and default of Megatron's training."""
    import argparse

    from megatron.training.arguments import _add_tokenizer_args

    from megatron_scmoe.commands.preprocess.host_tokenizer import add_tokenizer_arguments

    ours, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_tokenizer_arguments(ours)
    _add_tokenizer_args(theirs)
    known = {action.dest: action for action in theirs._actions}
    assert len(ours._actions) > 10
    for action in ours._actions:
        other = known[action.dest]
        assert (action.option_strings, action.default, action.nargs) == (
            other.option_strings,
            other.default,
            other.nargs,
        )


def test_help_imports_nothing_large(tmp_path: Path):
    """--help, like every error found before work starts, must not wait for PyTorch."""
    import subprocess
    import sys

    code = (
        "import runpy, sys; sys.argv = ['preprocess_data.py', '--help']\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit: print('LOADED', sorted({'torch', 'megatron', 'nltk', 'transformers'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "LOADED []" in done.stdout, done.stderr
    assert "--overwrite" in done.stdout and "--partitions" in done.stdout
