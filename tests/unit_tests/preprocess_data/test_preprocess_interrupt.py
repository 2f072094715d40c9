"""Runs of tools/preprocess_data.py that do not reach their end leave nothing behind."""

import contextlib
import os
import resource
import signal
import time
from pathlib import Path

import pytest
from conftest import ForkedTool


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A corpus whose end does not come: a named pipe that the test holds open."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    os.write(descriptor, b'{"text": "1 2 3"}\n' * 3000)
    yield pipe
    os.close(descriptor)


def wait_for_workers(run: ForkedTool, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while len(run.children()) < count:
        assert time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.05)
    return run.children()


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process has ended, waiting some time for it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [True, False])
def test_stopped_by_a_signal(start, tmp_path: Path, null_arguments, endless, stop, to_group):
    """Ctrl-C reaches the whole group, kill only the parent; twice, as impatient users do."""
    run = start("--input", endless, *null_arguments, "--workers", 2)
    workers = wait_for_workers(run, 2)
    time.sleep(0.2)
    for _ in range(2):
        (os.killpg if to_group and stop == signal.SIGINT else os.kill)(run.pid, stop)
    outcome = run.wait()
    assert outcome.code == 128 + stop
    assert outcome.stderr.splitlines()[-1] == (
        f"preprocess_data.py: stopped by {stop.name}; nothing was written"
    )
    assert "Traceback" not in outcome.stderr
    assert list((tmp_path / "out").iterdir()) == []
    assert all(gone(pid) for pid in workers)


def test_killed_worker(start, tmp_path: Path, null_arguments, endless):
    run = start("--input", endless, *null_arguments, "--workers", 2)
    victim = wait_for_workers(run, 2)[0]
    os.kill(victim, signal.SIGKILL)
    assert gone(victim)
    # Input keeps coming: on a pipe the loss is noticed at the next batch of lines.
    descriptor = os.open(endless, os.O_WRONLY | os.O_NONBLOCK)
    deadline = time.monotonic() + 60
    while not gone(run.pid, seconds=0.05) and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            os.write(descriptor, b'{"text": "1 2 3"}\n' * 200)
    os.close(descriptor)
    outcome = run.wait()
    assert outcome.code == 1
    assert "a worker process was killed" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_killed_parent(start, tmp_path: Path, null_arguments, endless):
    """Nothing can be cleaned up, but nothing looks finished and no worker lives on."""
    run = start("--input", endless, *null_arguments, "--workers", 2)
    workers = wait_for_workers(run, 2)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait().code == -signal.SIGKILL
    assert all(gone(pid) for pid in workers)
    left = list((tmp_path / "out").iterdir())
    assert all(path.name.startswith(".corpus.") and path.name.endswith(".tmp") for path in left)


def test_disk_full(tool, tmp_path: Path, null_arguments):
    """A limit on file size fails a write like a full disk does, only with another number."""
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "1 2 3 4 5 6 7 8"}\n' * 20000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    outcome = tool("--input", corpus, *null_arguments, "--log-interval", 10**9, prepare=limit)
    assert outcome.code == 1
    assert "File too large; nothing was written" in outcome.error
    assert list((tmp_path / "out").iterdir()) == []
