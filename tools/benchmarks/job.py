"""One training run: `torchrun --nnodes 2`, a node on each host, and what it says while it runs."""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.benchmarks.network import ADDRESSES, INTERFACE, TwoHosts
from tools.benchmarks.step_log import Step, StepReader
from tools.benchmarks.text import REPOSITORY

MASTER_PORT = "29500"
KEPT_LINES = 40
STOP_S = 60


class JobError(Exception):
    """A run ended with an error; the message holds its last lines."""


@contextmanager
def two_node_job(
    hosts: TwoHosts, script: list[str], options: list[str], log: Path
) -> Iterator[Iterator[Step]]:
    """Start a run and yield its steps, as they end.

    Leaving the block ends the run: it waits for it if all steps were taken, and kills it otherwise.

    Args:
        script: what torchrun starts, a file or `-m module`.
        options: Megatron's.
        log: receives the output of both nodes, as log.0 and log.1; the last rank is the one that
            Megatron lets speak.

    Raises:
        JobError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    nodes: list[subprocess.Popen] = []
    with open(f"{log}.0", "w") as silent:
        try:
            for host, output in ((0, silent), (1, subprocess.PIPE)):
                nodes.append(start_node(hosts, host, [*script, *options], output))
            steps = _follow(nodes, log)
            yield steps
            steps.close()
        finally:
            hosts.kill_processes()
            for node in nodes:
                node.wait()


def start_node(hosts: TwoHosts, host: int, script: list[str], output: Any) -> subprocess.Popen:
    """torchrun on one host, one rank on one core; `output` as Popen's `stdout`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launcher += ["--nproc-per-node", "1", "--node-rank", str(host)]
    launcher += ["--master-addr", ADDRESSES[0], "--master-port", MASTER_PORT]
    return subprocess.Popen(
        hosts.command(host, host, [*launcher, *script]),
        cwd=REPOSITORY,
        env=os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _follow(nodes: list[subprocess.Popen], log: Path) -> Generator[Step, None, None]:
    reader = StepReader()
    last_lines: deque[str] = deque(maxlen=KEPT_LINES)
    assert nodes[1].stdout is not None
    with open(f"{log}.1", "w") as file:
        for line in nodes[1].stdout:
            file.write(line)
            last_lines.append(line)
            step = reader.feed(line)
            if step is not None:
                yield step
    codes = [node.wait(STOP_S) for node in nodes]
    if any(codes):
        raise JobError(
            f"a run ended with exit codes {codes}; its output is in {log}.0 and {log}.1, the last "
            f"lines are:\n{''.join(last_lines)}"
        )
