"""--resume: a run that was stopped goes on, and writes what it would have written."""

import fcntl
import gzip
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import documents, write_lines

from megatron_scmoe.commands.preprocess.work_folder import work_folder

OPTIONS = ["--append-eod", "--workers", 2, "--log-interval", 10**9]


def stop_after(batches: int, signum: int) -> Callable[[], None]:
    """Records behind every batch, and stops the run in the middle of a later one."""

    def prepare() -> None:
        from megatron_scmoe.commands import preprocess_data
        from megatron_scmoe.commands.preprocess import corpus, job

        corpus.BATCH_LINES = 20
        preprocess_data.SECONDS_BETWEEN_RECORDS = 0
        add, done = job.PreprocessJob.add, 0

        def add_and_stop(self, batch) -> None:
            nonlocal done
            done += 1
            if done > batches:
                writer = next(iter(self._writers.values()))
                writer.add(batch.tokens["text"], batch.lengths["text"], batch.sequences["text"])
                os.kill(os.getpid(), signum)
            add(self, batch)

        job.PreprocessJob.add = add_and_stop

    return prepare


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """150 documents in a plain and a packed file."""
    items = documents(150)
    plain = write_lines(tmp_path / "a.jsonl", items[:80])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(write_lines(tmp_path / "b", items[80:]).read_bytes()))
    return [plain, packed]


def data(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}_text_document.{end}").read_bytes() for end in ("bin", "idx", "json")]


@pytest.mark.parametrize(
    ("stops", "more"),
    [
        ([(2, signal.SIGKILL), (3, signal.SIGINT)], []),  # in the plain file, then in the packed
        ([(5, signal.SIGTERM)], ["--partitions", "3"]),
    ],
)
def test_the_bytes_of_a_run_without_interruption(tool, tmp_path, tokenizers, corpus, stops, more):
    run = ["--input", *corpus, *tokenizers["hf"], *OPTIONS, *more]
    assert tool(*run, "--output-prefix", tmp_path / "whole").code == 0
    run += ["--output-prefix", tmp_path / "o", "--resume"]
    behind = 0
    for batches, signum in stops:
        outcome = tool(*run, prepare=stop_after(batches, signum))
        assert outcome.code == (-signum if signum == signal.SIGKILL else 128 + signum)
        if signum != signal.SIGKILL:
            assert outcome.stderr.endswith("the same line goes on from what was kept\n")
        behind += 20 * batches
    outcome = tool(*run)
    assert outcome.code == 0
    assert f"goes on behind document {behind}\n" in outcome.stderr
    assert data(tmp_path / "o") == data(tmp_path / "whole")
    assert not (tmp_path / ".o.resume").exists()


def test_a_line_that_stopped_a_run_can_be_skipped(tool, tmp_path, null_arguments):
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(b'{"text": "1 2"}\n' * 50 + b"bad\n" + b'{"text": "3"}\n' * 50)
    run = ["--input", corpus, *null_arguments, "--resume"]
    outcome = tool(*run, prepare=stop_after(9, signal.SIGINT))
    assert outcome.code == 2 and "c.jsonl:51: not valid JSON" in outcome.stderr
    outcome = tool(*run, "--on-error", "skip")
    assert outcome.code == 0 and "goes on behind document 40\n" in outcome.stderr
    assert (tmp_path / "out" / "corpus_text_document.bin").stat().st_size == 2 * 150


def test_what_cannot_go_on(tool, tmp_path, null_arguments):
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "1 2"}] * 100)
    run = ["--input", corpus, *null_arguments, "--resume"]
    assert tool(*run, prepare=stop_after(0, signal.SIGINT)).code == 130
    folder = tmp_path / "out" / ".corpus.resume"
    assert not folder.exists()  # nothing was done yet
    assert tool(*run, prepare=stop_after(2, signal.SIGINT)).code == 130
    assert "with another --append-eod; begin it again" in tool(*run, "--append-eod").error
    with (folder / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert "another run is writing" in tool(*run).error
    corpus.write_bytes(corpus.read_bytes() + b'{"text": "3"}\n')
    assert "with another --input; begin it again" in tool(*run).error
    (folder / "progress.json").write_text("{")
    assert "progress.json is damaged; delete" in tool(*run).error


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path):
    run = os.fork()
    if run == 0:
        with work_folder(tmp_path / "o", True, {}) as folder:
            folder.record({"place": 1})
            if os.fork() == 0:
                time.sleep(5)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(run, 0)
    with work_folder(tmp_path / "o", True, {}) as folder:
        assert folder.progress == {"place": 1}
