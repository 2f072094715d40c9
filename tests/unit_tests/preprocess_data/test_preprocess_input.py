"""Which files and lines megatron_scmoe.commands.preprocess.corpus finds."""

import gzip
import json
import lzma
import random
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_scmoe.commands.preprocess import DataError, corpus

LINES = [b'{"text": "%d"}\n' % number for number in range(5000)]


def pack(path: Path, data: bytes) -> Path:
    """Writes data as the suffix says; packed files in two members, as `cat a.gz b.gz` makes."""
    half = len(data) // 2
    halves = (data[:half], data[half:])
    if path.suffix == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, halves)))
    elif path.suffix == ".zst":
        path.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, halves)))
    elif path.suffix == ".xz":
        path.write_bytes(b"".join(map(lzma.compress, halves)))
    else:
        path.write_bytes(data)
    return path


def read(*files: Path) -> list[tuple[str, int, bytes]]:
    return [
        (Path(batch.path).name, number, line)
        for batch in corpus.read_batches(files)
        for number, line in enumerate(batch.lines, batch.first_line)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".gz", ".zst", ".xz"])
def test_lines_and_numbers(tmp_path: Path, suffix):
    path = pack(tmp_path / f"c{suffix}", b"".join(LINES))
    assert read(path) == [(path.name, number, line) for number, line in enumerate(LINES, 1)]
    assert sum(batch.disk_bytes for batch in corpus.read_batches([path])) == path.stat().st_size


@pytest.mark.parametrize("suffix", [".jsonl", ".gz", ".zst", ".xz"])
def test_from_the_end_of_any_batch(tmp_path: Path, suffix, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_LINES", 900)
    files = [pack(tmp_path / f"{name}{suffix}", b"".join(LINES[:2000])) for name in "ab"]
    batches = list(corpus.read_batches(files))
    assert len(batches) == 6
    for number, batch in enumerate(batches, 1):
        assert list(corpus.read_batches(files, start=batch.end)) == batches[number:]


def test_rows_of_parquet(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_LINES", 30)
    texts = [f"text {number} \u4f60" for number in range(100)]
    table = pyarrow.table({"id": range(100), "text": texts, "title": [None, *texts[1:]]})
    path = tmp_path / "c.parquet"
    parquet.write_table(table, path, row_group_size=25)
    batches = list(corpus.read_batches([path], ["text"]))
    lines = [json.loads(line) for batch in batches for line in batch.lines]
    assert lines == [{"text": text} for text in texts]
    assert [batch.first_line for batch in batches] == [1, 31, 61, 91]
    assert sum(batch.disk_bytes for batch in batches) == pytest.approx(path.stat().st_size, abs=4)
    for number, batch in enumerate(batches, 1):
        assert [b.lines for b in corpus.read_batches([path], ["text"], batch.end)] == [
            b.lines for b in batches[number:]
        ]
    first = next(corpus.read_batches([path], ["title", "text"])).lines[0]
    assert json.loads(first) == {"title": None, "text": texts[0]}


@pytest.mark.parametrize(
    ("keys", "said"),
    [(["title"], "no column 'title' .* the file has: 'text', 'id'"), (["id"], "no text but int64")],
)
def test_columns_that_are_not_texts(tmp_path: Path, keys, said):
    path = tmp_path / "c.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "id": [1]}), path)
    with pytest.raises(DataError, match=said):
        list(corpus.read_batches([path], keys))


def test_damaged_parquet(tmp_path: Path):
    path = tmp_path / "c.parquet"
    parquet.write_table(pyarrow.table({"text": ["a" * 1000 + str(i) for i in range(99)]}), path)
    for content in (b"", b"PAR1", path.read_bytes()[:-9], path.read_bytes()[30:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="Parquet file cannot be read"):
            list(corpus.read_batches([path]))


def test_a_text_file_is_a_document(tmp_path: Path):
    text = 'two\r\nlines, "quoted"\\ \u4f60\n'
    files = [pack(tmp_path / f"a.txt{end}", text.encode()) for end in ("", ".gz", ".zst", ".xz")]
    files += [pack(tmp_path / "b.txt.jsonl", LINES[0])]
    lines = [
        json.loads(line) for batch in corpus.read_batches(files, ["t"]) for line in batch.lines
    ]
    assert lines == [{"t": text}] * 4 + [{"text": "0"}]
    with pytest.raises(DataError, match="has one text, --json-keys names 2"):
        list(corpus.read_batches(files, ["a", "b"]))
    files[0].write_bytes(b"ab\xff")
    assert next(corpus.read_batches(files)).lines == [b"ab\xff"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_cut_short(tmp_path: Path, suffix):
    noise = random.Random(0)
    data = b"".join(b'{"text": "%d"}\n' % noise.getrandbits(500) for _ in range(5000))
    path = pack(tmp_path / f"c{suffix}", data)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"c\{suffix}:\d+: the file cannot be read on from here"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_not_packed_at_all(tmp_path: Path, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(LINES[0])
    with pytest.raises(DataError, match=rf"c\{suffix}:1: the file cannot be read"):
        read(path)


def test_empty_packed_files(tmp_path: Path):
    for suffix in (".jsonl", ".gz", ".zst", ".xz"):
        path = tmp_path / f"c{suffix}"
        path.write_bytes(b"")
        assert read(path) == []


def test_directory_and_glob_by_name(tmp_path: Path):
    for name in ("b.jsonl.gz", "a.jsonl", "c.json.zst", "notes.txt", "d.jsonl.xz", "f.parquet"):
        pack(tmp_path / name, LINES[0])
    (tmp_path / "e.jsonl").mkdir()
    wanted = ["a.jsonl", "b.jsonl.gz", "c.json.zst", "d.jsonl.xz"]
    assert [path.name for path in corpus.find_files([str(tmp_path)])] == [*wanted, "f.parquet"]
    assert [path.name for path in corpus.find_files([str(tmp_path / "?.json*")])] == wanted
    given_order = [str(tmp_path / "d.jsonl.xz"), str(tmp_path / "a.jsonl")]
    assert list(map(str, corpus.find_files(given_order))) == given_order


def test_file_whose_name_is_a_glob(tmp_path: Path):
    path = pack(tmp_path / "a[1].jsonl", LINES[0])
    assert corpus.find_files([str(path)]) == [path]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=60), st.integers(1, 100), st.integers(1, 7))
def test_batches_lose_nothing(tmp_path_factory, parts, batch_bytes, batch_lines):
    """Any bytes, cut at any size: the lines joined are the file, numbered one after another."""
    data = b"\n".join(parts)
    path = tmp_path_factory.mktemp("h") / "c.jsonl"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BATCH_BYTES", batch_bytes)
        patch.setattr(corpus, "BATCH_LINES", batch_lines)
        lines = read(path)
    assert b"".join(line for _, _, line in lines) == data.removeprefix(b"\xef\xbb\xbf")
    assert [number for _, number, _ in lines] == list(range(1, len(lines) + 1))
