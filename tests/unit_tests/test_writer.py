"""A writer of checkpoints ends when its rank ends it or is gone, and for no other SIGTERM."""

import multiprocessing
import os
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_scmoe.run.checkpoint.writer import SECONDS_TO_NOTICE, obey_the_rank_alone
from tests import distributed_utils  # the server's preloaded modules
from tests.limits import PROCESS_S

assert distributed_utils  # imported for its effect


def write(ready: Connection) -> None:
    obey_the_rank_alone()
    ready.send(os.getpid())
    time.sleep(PROCESS_S)


def start_writer(start_method: str) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context(start_method)
    ready, says = context.Pipe(duplex=False)
    writer = context.Process(target=write, args=(says,))  # type: ignore[attr-defined]
    writer.start()
    assert ready.poll(PROCESS_S)
    return writer


def be_a_rank(says: Connection) -> None:
    writer = start_writer("fork")  # its own server would import everything again
    says.send(writer.pid)
    os._exit(0)  # as if killed: nobody is told


def test_it_obeys_its_rank_alone() -> None:
    writer = start_writer("forkserver")
    subprocess.run(["kill", "-TERM", str(writer.pid)], check=True)  # as a launcher or Slurm
    writer.join(2 * SECONDS_TO_NOTICE)
    assert writer.exitcode is None
    os.kill(writer.pid, signal.SIGTERM)
    writer.join(PROCESS_S)
    assert writer.exitcode == 1


def test_it_leaves_with_its_rank() -> None:
    context = multiprocessing.get_context("forkserver")
    hears, says = context.Pipe(duplex=False)
    rank = context.Process(target=be_a_rank, args=(says,))
    rank.start()
    writer = Path("/proc", str(hears.recv()))
    deadline = time.monotonic() + PROCESS_S / 2
    while writer.exists():
        assert time.monotonic() < deadline, "the writer outlives its rank"
        time.sleep(0.1)
