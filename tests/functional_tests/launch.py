"""Run the entry script in processes of its own and read what it reports."""

import logging
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.limits import JOB_S

REPOSITORY = Path(__file__).parents[2]
SCRIPT = "pretrain_gpt_scmoe.py"

LOSS_LINE = re.compile(r"iteration +(\d+)/ +\d+ \|(.*)")
FIELD = re.compile(r" ([a-z ]+): +([-+0-9.E]+) \|")

# A model that trains in milliseconds; every test adds what it is about.
TINY_MODEL = shlex.split(
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 "
    "--lr 1e-2 --train-iters 6 --log-interval 1 --eval-interval 3 --eval-iters 1 --num-workers 0 "
    "--tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 64"
)
TINY_MOE = shlex.split(
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-grouped-gemm "
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2"
)


@dataclass(frozen=True)
class Run:
    """What a finished run left behind."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def log(self) -> dict[int, dict[str, float]]:
        """The loss lines: {iteration: {"lm loss": ..., "grad norm": ...}}."""
        return {
            int(iteration): {name: float(value) for name, value in FIELD.findall(rest)}
            for iteration, rest in LOSS_LINE.findall(self.stdout)
        }


def launch(options: list[str], nproc: int = 1, script: str = SCRIPT) -> Run:
    """Run a script under torchrun on `nproc` ranks, without any help from the environment."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return _run([*launcher, f"--nproc-per-node={nproc}", script, *options])


def launch_rank(
    options: list[str], rank: int = 0, world_size: int = 1, script: str = SCRIPT
) -> Run:
    """Run one rank without a launcher, for runs that end before ranks meet."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    return _run([sys.executable, script, *options], {k: str(v) for k, v in ranks.items()})


def _run(command: list[str], extra_env: dict[str, str] | None = None) -> Run:
    """A time limit ends the launcher, which ends its ranks, so that nothing of a hung run stays."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | (extra_env or {})
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        stdout, stderr = process.communicate(timeout=JOB_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        raise
    return Run(process.returncode, stdout, stderr)


class Launcher:
    """torchrun while it runs; leaving the block ends it and its ranks.

    Args:
        options: torchrun's own.
        log: file for the output of all ranks.
        deaf: let it ignore SIGTERM; its ranks do until they set a handler.
    """

    def __init__(
        self,
        launcher: list[str],
        options: list[str],
        log: Path,
        deaf: bool = False,
        script: str = SCRIPT,
    ):
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, script, *options]
        if deaf:
            command = ["sh", "-c", 'trap "" TERM; exec "$@"', "sh", *command]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env=env, stdout=file, stderr=subprocess.STDOUT
            )
        self.pid = self._process.pid
        self.poll = self._process.poll

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.kill()

    def wait(self) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it hangs.
        """
        return self._process.wait(JOB_S)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Process ids of its ranks, in order."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        found = {}
        for child in children:
            variables = Path(f"/proc/{child}/environ").read_text().split("\0")
            rank = [text for text in variables if text.startswith("RANK=")]
            if rank:
                found[int(rank[0].removeprefix("RANK="))] = int(child)
        return [found[rank] for rank in sorted(found)]

    def kill(self) -> None:
        """Kill it and its ranks, as when a node is lost."""
        ranks = self.ranks()
        self._process.kill()
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        self._process.wait()


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to connections: one of
    these could be taken before the caller listens."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as free:
            try:
                free.bind(("localhost", port))
            except OSError:
                continue
            return port


logging.getLogger("tensorboard").setLevel(logging.WARNING)


def read_events(folder: Path, tag: str) -> list[tuple[int, float]]:
    """A TensorBoard curve in full float32: (iteration, value), as often as it was logged."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def read_scalars(folder: Path, tag: str) -> dict[int, float]:
    """The same as {iteration: value}, the last of those that were logged twice."""
    return dict(read_events(folder, tag))
