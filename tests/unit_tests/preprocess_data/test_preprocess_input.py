"""Which files and lines megatron_scmoe.commands.preprocess.json_lines finds."""

import gzip
import lzma
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scmoe.commands.preprocess import DataError, json_lines

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
        for batch in json_lines.read_batches(files)
        for number, line in enumerate(batch.lines, batch.first_line)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".gz", ".zst", ".xz"])
def test_lines_and_numbers(tmp_path: Path, suffix):
    path = pack(tmp_path / f"c{suffix}", b"".join(LINES))
    assert read(path) == [(path.name, number, line) for number, line in enumerate(LINES, 1)]
    assert sum(batch.disk_bytes for batch in json_lines.read_batches([path])) == path.stat().st_size


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
    for name in ("b.jsonl.gz", "a.jsonl", "c.json.zst", "notes.txt", "d.jsonl.xz"):
        pack(tmp_path / name, LINES[0])
    (tmp_path / "e.jsonl").mkdir()
    wanted = ["a.jsonl", "b.jsonl.gz", "c.json.zst", "d.jsonl.xz"]
    assert [path.name for path in json_lines.find_files([str(tmp_path)])] == wanted
    assert [path.name for path in json_lines.find_files([str(tmp_path / "?.json*")])] == wanted
    given_order = [str(tmp_path / "d.jsonl.xz"), str(tmp_path / "a.jsonl")]
    assert list(map(str, json_lines.find_files(given_order))) == given_order


def test_file_whose_name_is_a_glob(tmp_path: Path):
    path = pack(tmp_path / "a[1].jsonl", LINES[0])
    assert json_lines.find_files([str(path)]) == [path]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=60), st.integers(1, 100), st.integers(1, 7))
def test_batches_lose_nothing(tmp_path_factory, parts, batch_bytes, batch_lines):
    """Any bytes, cut at any size: the lines joined are the file, numbered one after another."""
    data = b"\n".join(parts)
    path = tmp_path_factory.mktemp("h") / "c.jsonl"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "BATCH_BYTES", batch_bytes)
        patch.setattr(json_lines, "BATCH_LINES", batch_lines)
        lines = read(path)
    assert b"".join(line for _, _, line in lines) == data.removeprefix(b"\xef\xbb\xbf")
    assert [number for _, number, _ in lines] == list(range(1, len(lines) + 1))
