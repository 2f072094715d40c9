"""What tools/inspect_data.py says of data sets, sound and damaged."""

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import documents, write_lines

from megatron_scmoe.commands import inspect_data
from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.commands.preprocess.dataset_reader import Dataset, digests
from megatron_scmoe.commands.preprocess.dataset_writer import DatasetWriter

# Documents of sequences; the second repeats nothing, the fifth the first.
CORPUS = [[[1, 2, 3], [4]], [[5, 6]], [], [[7] * 9], [[1, 2, 3], [4]], [[8]]]


def write(folder: Path, name: str, corpus, dtype=np.uint16, **manifest: object) -> str:
    writer = DatasetWriter(folder, name, dtype, 1)
    sequences = [sequence for document in corpus for sequence in document]
    writer.add(
        np.array([i for sequence in sequences for i in sequence], dtype),
        np.array(list(map(len, sequences)), np.int32),
        np.array(list(map(len, corpus)), np.int64),
    )
    writer.finish({"vocab_size": 10, **manifest})
    return str(folder / name)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = inspect_data.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_counts_and_lengths(capsys, tmp_path: Path) -> None:
    prefix = write(tmp_path, "d", CORPUS)
    code, out, _ = run(capsys, prefix, "--checksum")
    assert code == 0
    assert "6 documents (1 empty), 7 sequences, 20 tokens, uint16, 40 B" in out
    assert "tokens a sequence: 1 to 9, median 2, mean 2.9" in out
    rows = [line.split() for line in out.splitlines() if " - " in line]
    assert rows == [
        ["1", "-", "1", "3", "#" * 40],
        ["2", "-", "3", "3", "#" * 40],
        ["8", "-", "15", "1", "#" * 13],
    ]
    assert out.endswith("index, data and manifest fit together, every id and sha256\n")


def test_what_megatrons_builder_has_written_is_sound(capsys, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for multimodal in (False, True):
        builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), np.int32, multimodal)
        for document in CORPUS:
            ids = np.array([i for sequence in document for i in sequence], np.int32)
            builder.add_document(ids, list(map(len, document)), [1] * len(document))
        builder.finalize(str(tmp_path / "d.idx"))
        code, out, _ = run(capsys, tmp_path / "d")
        assert code == 0 and "no manifest fit together" in out, out
        dataset = Dataset(str(tmp_path / "d"))
        flat = [[i for sequence in document for i in sequence] for document in CORPUS]
        assert [dataset.document(number).tolist() for number in range(6)] == flat


def test_duplicates(capsys, tmp_path: Path) -> None:
    """Equal ids in another type and cut into other sequences are the same document."""
    prefix = write(tmp_path, "d", CORPUS)
    other = write(tmp_path, "other", [[[1, 2], [3, 4]], [[9]], [], [[8]]], np.int32)
    code, out, _ = run(capsys, prefix, "--duplicates-of", other)
    assert code == 0
    assert f"3 documents (50.0%), 9 tokens, are in {other} too" in out
    assert "1 documents (16.7%) repeat an earlier one" in out
    assert len(np.unique(digests(Dataset(prefix)))) == 5


@pytest.mark.parametrize("name", ["hf", "sp", "null"])
def test_samples_are_decoded(capsys, tool, tmp_path: Path, tokenizers, name) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", documents(30) if name != "null" else [{"text": "5"}])
    run_it = ["--input", corpus, "--output-prefix", tmp_path / "o", *tokenizers[name]]
    assert tool(*run_it).code == 0
    code, out, err = run(capsys, tmp_path / "o_text_document", "--samples", 3)
    assert code == 0, err
    text = {"hf": repr(documents(30)[10]["text"])[:20], "sp": "the", "null": "1 tokens: '5'"}[name]
    assert text in out
    (tmp_path / "o_text_document.json").unlink()
    code, _, err = run(capsys, tmp_path / "o_text_document", "--samples", 1)
    assert code == 2 and "names no tokenizer; give --tokenizer-type" in err
    given = [*tokenizers[name], "--samples", 1]
    assert run(capsys, tmp_path / "o_text_document", *given)[0] == 0


HEADER = 34  # bytes before the lengths of the 7 sequences
STARTS, ENDS = HEADER + 4 * 7, HEADER + 12 * 7


@pytest.mark.parametrize(
    ("suffix", "at", "value", "said"),
    [
        ("idx", HEADER, struct.pack("<i", 4), "sequence 1 at another place than the lengths"),
        ("idx", HEADER, struct.pack("<i", -3), "negative lengths"),
        ("idx", STARTS + 8, struct.pack("<q", 8), "sequence 1 at another place"),
        ("idx", ENDS, struct.pack("<q", 1), "do not begin at sequence 0"),
        ("idx", ENDS + 8, struct.pack("<q", 9), "are not the sequences one after the other"),
        ("idx", ENDS + 48, struct.pack("<q", 6), "are not the sequences one after the other"),
        ("idx", HEADER, struct.pack("<i", 4), "d.bin is 40 bytes, the index says 42"),
        ("bin", 2, b"\3", "the manifest says bin_sha256"),
        ("bin", 2, b"\12", "the largest id is 10, the manifest's vocabulary has 10"),
    ],
)
def test_what_does_not_fit_together(capsys, tmp_path: Path, suffix, at, value, said) -> None:
    prefix = write(tmp_path, "d", CORPUS)
    path = Path(f"{prefix}.{suffix}")
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
    code, out, _ = run(capsys, prefix, "--checksum", "--samples", 2)
    assert code == 1
    assert any(line.startswith("  UNSOUND: ") and said in line for line in out.splitlines()), out


def test_a_manifest_of_something_else(capsys, tmp_path: Path) -> None:
    prefix = write(tmp_path, "d", CORPUS)
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps(manifest | {"tokens": 21}))
    code, out, _ = run(capsys, prefix)
    assert code == 1 and "UNSOUND: the manifest says tokens 21, here it is 20" in out
    Path(f"{prefix}.json").write_text("{")
    code, _, err = run(capsys, prefix)
    assert code == 2 and "d.json: it is no JSON" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; give the path without .bin and .idx"),
        (b"", "is no index of Megatron's"),
        (b"MMIDIDX\0\0" + bytes(25), "version 0, type 0: not known to Megatron"),
        (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 5, 1), "is cut short or damaged"),
    ],
)
def test_no_index(capsys, tmp_path: Path, content, said) -> None:
    prefix = write(tmp_path, "d", CORPUS)
    path = Path(f"{prefix}.idx")
    path.unlink() if content is None else path.write_bytes(content)
    code, _, err = run(capsys, prefix)
    assert code == 2 and said in err and err.count("\n") == 1
    code, _, err = run(capsys, write(tmp_path, "e", CORPUS), "--duplicates-of", prefix)
    assert code == 2 and said in err


def test_damage_anywhere_is_said_in_lines(tmp_path: Path) -> None:
    prefix = write(tmp_path, "d", CORPUS)
    path, seed = Path(f"{prefix}.idx"), random.Random(0)
    whole = path.read_bytes()
    for _ in range(200):
        content = bytearray(
            whole[: seed.randrange(len(whole) + 1)] if seed.random() < 0.2 else whole
        )
        for _ in range(seed.randrange(1, 4)):
            if content:
                content[seed.randrange(len(content))] = seed.randrange(256)
        path.write_bytes(content)
        try:
            faults = list(Dataset(prefix).faults(True))
        except DataError:
            continue
        assert faults or bytes(content) == whole
