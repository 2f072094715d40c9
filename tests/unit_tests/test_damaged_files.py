"""Files that somebody has damaged: one line that names the file, whatever is in it.

Seeded: a value that fails names its seed. The programs and readers run in this process.
"""

import copy
import json
import math
import os
import random
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_scmoe.checks.command_line import _trace_of_nothing
from megatron_scmoe.commands import overlap_report
from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.commands.preprocess.corpus import find_files
from megatron_scmoe.commands.preprocess_data import check_output
from megatron_scmoe.overlap.measure.each_iteration import UnitTracker
from megatron_scmoe.planner.measured import Measurement
from megatron_scmoe.run.checkpoint.record import (
    READ,
    SCHEMA,
    machine_differences,
    read_record,
    record_path,
)
from megatron_scmoe.words import write_whole
from tests.unit_tests.test_overlap_report import write_run
from tests.unit_tests.test_plan_overlap import measured_file

VALUES = [None, True, 0, -1, 3, 2**70, 1.5, 1e300, math.nan, math.inf, "", "x", [], [[]], {}]
TEXTS = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1e999"]
MACHINE = Namespace(expert_model_parallel_size=1, expert_tensor_parallel_size=1, world_size=1)
FUZZED = 500  # of each kind; ten seconds in all


def places(content: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value but the value itself, the shallow ones first."""
    if isinstance(content, dict | list):
        keys = list(content) if isinstance(content, dict) else range(len(content))
        for key in keys:
            yield (*here, key)
        for key in keys:
            yield from places(content[key], (*here, key))


def damaged(content: Any, seed: int) -> bytes:
    """JSON with a value replaced or left out, or cut off, or with other bytes of its length."""
    choose = random.Random(seed)
    text = bytearray(json.dumps(content).encode())
    match choose.randrange(10):
        case 0:
            return choose.choice(TEXTS)
        case 1:
            return bytes(text[: choose.randrange(len(text))])
        case 2:
            text[choose.randrange(len(text))] = choose.randrange(256)
            return bytes(text)
    changed = copy.deepcopy(content)
    # Half of the time one of a few, or events would be all that is ever damaged.
    among = list(places(changed))
    *path, last = choose.choice(among[: 30 if choose.random() < 0.5 else None])
    inner = changed
    for key in path:
        inner = inner[key]
    if choose.random() < 0.2:
        del inner[last]
    else:
        inner[last] = choose.choice(VALUES)
    return json.dumps(changed).encode()


def test_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path, *_) = sorted(write_run(tmp_path, layers=(2,)).glob("rank-*.json"))
    whole = json.loads(path.read_text())
    whole = {"otherData": whole["otherData"], **whole}  # the facts are what comes first
    refused = 0
    for seed in range(FUZZED):
        path.write_bytes(damaged(whole, seed))
        code = overlap_report.main([str(tmp_path)])
        lines = capsys.readouterr().err.splitlines()
        assert (code, len(lines)) in {(0, 0), (2, 1)}, seed
        refused += code == 2
    assert FUZZED / 2 < refused < FUZZED


def test_measured_files(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    refused = 0
    for seed in range(FUZZED):
        path.write_bytes(damaged(measured_file(), seed))
        try:
            Measurement.read(path)
        except ValueError as error:
            assert str(error).startswith(f"--measured {path}: ") and "\n" not in str(error), seed
            refused += 1
    assert FUZZED / 2 < refused < FUZZED


def test_records(tmp_path: Path) -> None:
    whole = {
        "schema": SCHEMA,
        "options": {},
        "machine": {"ranks": 2},
        **{part: dict.fromkeys(names, "1") for part, names in READ.items() if names},
    }
    path = record_path(tmp_path, 3)
    refused = 0
    for seed in range(FUZZED):
        path.write_bytes(damaged(whole, seed))
        try:
            record = read_record(tmp_path, 3)
        except ValueError as error:
            assert str(error).startswith(f"{path} is no record of") and "\n" not in str(error), seed
            refused += 1
        else:
            assert record is not None and READ["tokenizer"] <= record["tokenizer"].keys()
            machine_differences(record, MACHINE)
    assert FUZZED / 4 < refused < FUZZED


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(record_path(tmp_path, 3))
    with pytest.raises(ValueError, match="it is no file"):
        read_record(tmp_path, 3)


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while a file is written: the old one, and nothing beside it."""

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:3])
        raise OSError(28, "No space left on device")

    path = tmp_path / "page"
    write_whole(path, "the old one")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "a new one")
    assert [file.name for file in tmp_path.iterdir()] == ["page"]
    assert path.read_text() == "the old one"


def test_links_to_nothing_are_no_documents_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    for given in (tmp_path, tmp_path / "*.jsonl", tmp_path / "b.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl is a link to nothing"):
            find_files([str(given)])
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is a link to nothing"):
        find_files([str(tmp_path)])
    with pytest.raises(DataError, match="--input '' is empty"):
        find_files([""])


def test_an_empty_prefix() -> None:
    with pytest.raises(DataError, match="--output-prefix '' is empty"):
        check_output(Namespace(output_prefix=""))


def test_a_folder_of_traces_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    options = {"profile_step_start": 1, "profile_step_end": 2, "train_iters": 3}
    for name, why in (("file/traces", "file is no folder"), ("loop", "loop is no folder")):
        found = _trace_of_nothing(
            Namespace(
                scmoe_trace_dir=str(tmp_path / name), scmoe_shortcut_position="pos2", **options
            )
        )
        assert isinstance(found, dict) and found["why"] == f"{tmp_path / why}"
    (tmp_path / "traces").mkdir()
    assert not _trace_of_nothing(
        Namespace(
            scmoe_trace_dir=str(tmp_path / "traces"), scmoe_shortcut_position="pos2", **options
        )
    )


def test_a_full_disk_ends_the_traces_and_not_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    tracker = UnitTracker("pos2", overlap=True, measures_slots=False, trace_dir="traces")
    monkeypatch.setattr(tracker, "_write_trace", full)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    for iteration in (8, 9):
        tracker._trace_if_possible(iteration, [], {})
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "WARNING: no more traces of rank 1: [Errno 28] No space left on device"
