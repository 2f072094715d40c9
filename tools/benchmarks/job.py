"""A training run: `torchrun --nnodes 2`, a node on each host, that can stand still meanwhile."""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tools.benchmarks.network import (
    ADDRESSES,
    INTERFACE,
    JOB_VARIABLE,
    BenchmarkError,
    TwoHosts,
)
from tools.benchmarks.real_text import REPOSITORY
from tools.benchmarks.step_log import StepReader, TrainingStep

MASTER_PORT = 29500
KEPT_LINES = 40
STOP_S = 60


class Job:
    """A run on both hosts; its steps as they end. Leaving the block ends it.

    Args:
        number: of the job among those that are alive.
        script: what torchrun starts, a file or `-m module`.
        options: Megatron's.
        log: receives the output of both nodes, as log.0 and log.1; the last rank is the one that
            Megatron lets speak.
        ranks: of each host, which share its core.
    """

    def __init__(
        self,
        hosts: TwoHosts,
        number: int,
        script: list[str],
        options: list[str],
        log: Path,
        ranks: int = 1,
    ) -> None:
        self._hosts = hosts
        self._number = number
        self._command = [*script, *options]
        self._log = log
        self._ranks = ranks
        self._nodes: list[subprocess.Popen] = []

    def __enter__(self) -> "Job":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self._log}.0", "w") as silent:
            for host, output in ((0, silent), (1, subprocess.PIPE)):
                node = start_node(
                    self._hosts, host, self._command, output, self._number, self._ranks
                )
                self._nodes.append(node)
        assert self._nodes[1].stdout is not None
        self._steps = self._follow(self._nodes[1].stdout)
        return self

    def __exit__(self, *_: object) -> None:
        self._hosts.signal_job(self._number, signal.SIGKILL)
        for node in self._nodes:
            node.wait()

    def take(self, count: int) -> list[TrainingStep]:
        """The next steps.

        Raises:
            BenchmarkError: the run ended before they did; with its last lines.
        """
        steps = list(islice(self._steps, count))
        if len(steps) < count:
            codes = [self._exit_code(node) for node in self._nodes]
            raise BenchmarkError(
                f"a run ended too early, with exit codes {codes}; its output is in {self._log}.0 "
                f"and {self._log}.1, the last lines are:\n{''.join(self._last_lines)}"
            )
        return steps

    def pause(self) -> None:
        """Stand still, so that others have the machine; the step that is interrupted is no result.

        What waits for the other rank meanwhile waits in the kernel: nothing is lost.
        """
        self._hosts.signal_job(self._number, signal.SIGSTOP)

    def resume(self) -> None:
        self._hosts.signal_job(self._number, signal.SIGCONT)

    def _follow(self, output: IO[str]) -> Iterator[TrainingStep]:
        reader = StepReader()
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        with open(f"{self._log}.1", "w") as file:
            for line in output:
                file.write(line)
                self._last_lines.append(line)
                step = reader.feed(line)
                if step is not None:
                    yield step

    @staticmethod
    def _exit_code(node: subprocess.Popen) -> int | None:
        try:
            return node.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return None


def start_node(
    hosts: TwoHosts, host: int, script: list[str], output: Any, job: int = 0, ranks: int = 1
) -> subprocess.Popen:
    """torchrun on one host, its ranks on one core; `output` as Popen's `stdout`."""
    # Seldom looked at: the launchers of all jobs live beside the ranks that are measured.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "1"]
    launcher += ["--nnodes", "2", "--nproc-per-node", str(ranks), "--node-rank", str(host)]
    launcher += ["--master-addr", ADDRESSES[0], "--master-port", str(MASTER_PORT + job)]
    settings = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", JOB_VARIABLE: str(job)}
    return subprocess.Popen(
        hosts.command(host, host, [*launcher, *script]),
        cwd=REPOSITORY,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )
