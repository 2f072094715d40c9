"""The writer of .bin and .idx: the bytes of Megatron's own, and from where it was."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scmoe.commands.preprocess import dataset_writer
from megatron_scmoe.commands.preprocess.dataset_writer import DatasetWriter, optimal_dtype

# Documents of sequences of ids; empty documents and empty sequences too.
DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 65000), max_size=4), max_size=3), max_size=12)


def add(writer: DatasetWriter, documents: list[list[list[int]]]) -> None:
    sequences = [sequence for document in documents for sequence in document]
    writer.add(
        np.array([i for sequence in sequences for i in sequence], writer.dtype),
        np.array(list(map(len, sequences)), np.int32),
        np.array(list(map(len, documents)), np.int64),
    )


def files(folder: Path, name: str) -> tuple[bytes, bytes]:
    return (folder / f"{name}.bin").read_bytes(), (folder / f"{name}.idx").read_bytes()


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 3), st.integers(0, 12), st.sampled_from([np.uint16, np.int32]))
def test_the_bytes_of_megatrons_writer(tmp_path_factory, documents, partitions, cut, dtype) -> None:
    """In one go, and resumed from somewhere, with more on disk than was known then."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("w")
    builder = IndexedDatasetBuilder(str(folder / "host.bin"), dtype)
    for number in range(partitions):
        for document in documents[number::partitions]:
            ids = [i for sequence in document for i in sequence]
            builder.add_document(np.array(ids, dtype), list(map(len, document)))
    builder.finalize(str(folder / "host.idx"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_writer, "_ENTRIES", 3)
        whole = DatasetWriter(folder, "whole", dtype, partitions)
        add(whole, documents)
        whole.finish({})
        stopped = DatasetWriter(folder, "resumed", dtype, partitions)
        add(stopped, documents[:cut])
        state = stopped.state()
        add(stopped, documents[cut:][:2])
        stopped.finish({})
        resumed = DatasetWriter(folder, "resumed", dtype, partitions, state)
        add(resumed, documents[cut:])
        resumed.finish({})
    assert files(folder, "whole") == files(folder, "resumed") == files(folder, "host")


def test_a_file_that_lost_its_end_is_no_place_to_go_on(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, "w", np.uint16, 1)
    add(writer, [[[1, 2, 3]]])
    state = writer.state()
    writer.close()
    (tmp_path / "w.bin").write_bytes(b"\1\0")
    with pytest.raises(OSError, match="is shorter than it was"):
        DatasetWriter(tmp_path, "w", np.uint16, 1, state)


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 200_000])
def test_the_type_that_megatron_chooses(vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert optimal_dtype(vocab_size) is DType.optimal_dtype(vocab_size)
