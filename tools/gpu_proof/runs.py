"""Runs of the entry script for the parts: how they start, and what they leave."""

import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.benchmarks.real_text import REPOSITORY
from tools.gpu_proof.results import Results

Curves = Mapping[str, Mapping[int, float]]

OBSERVED = str(Path(__file__).with_name("observed_run.py"))
# No machine but this one, whose name may not resolve; the same kernels and sums every time.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
STOP_S = 5.0
"""From the first failure of a rank until the others are killed."""
ERROR = re.compile(r"(\[rank\d+\]: *)?[\w.]+(: error: |(Error|Exception): )")
ERROR_CHARACTERS = 300
TAIL_CHARACTERS = 6000

# What the models of all parts have in common.
MODEL = shlex.split(
    "--group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 "
    "--mock-data --split 100,0,0 --tokenizer-type NullTokenizer --num-workers 0 --log-interval 1 "
    "--eval-iters 0 --eval-interval 1000 --lr-decay-style constant --seed 1 --num-experts 8 "
    "--moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-grouped-gemm "
    "--scmoe-shortcut-position pos2"
)


@dataclass(frozen=True)
class ProofRun:
    """What a run left behind."""

    name: str
    code: int | None
    """Of the first rank that failed, 0 if none did; None if it was killed."""
    output: str
    """Of all ranks."""
    seconds: float
    curves: Curves = field(default_factory=dict)
    """"lm loss" and "grad norm" by iteration, to the last bit."""
    waits: Sequence[tuple[str, str, int]] = ()

    @property
    def losses(self) -> Mapping[int, float]:
        return self.curves.get("lm loss", {})

    def error(self) -> str:
        """The line that says what was wrong."""
        if self.code is None:
            return "killed: its time was over"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        said = [line for line in lines if ERROR.match(line)] or lines[-1:]
        return f"exit code {self.code}: {''.join(said[:1])[:ERROR_CHARACTERS]}"

    def ended(self, results: Results) -> bool:
        """Check that it came to its end with finite losses; the log gets the last of its output."""
        good = self.code == 0 and bool(self.losses)
        good &= all(math.isfinite(loss) for loss in self.losses.values())
        if not good:
            print(f"-- {self.name}\n{self.output[-TAIL_CHARACTERS:]}", flush=True)
        note = "" if good else f"losses {list(self.losses.values())}, {self.error()}"
        return results.check(f"{self.name}: ends", good, note, seconds=self.seconds)


class ProofJob:
    """A run on this machine's only device.

    Args:
        folder: for its output and its record.
        options: of the entry script.
        observe: options of observed_run.py.
        ranks: started without a launcher, all on the first device; 0 for one rank by torchrun.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        options: Sequence[str],
        observe: Sequence[str] = (),
        ranks: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = name
        self._began = time.perf_counter()
        files = folder / name.replace(" ", "_")
        files.mkdir(parents=True)
        self._record = files / "record.json"
        what = [OBSERVED, "--record", str(self._record), *observe, "--", *options]
        common = os.environ | ENVIRONMENT | dict(environment or {})
        if ranks == 0:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
            starts = [([*launcher, "--local-addr=127.0.0.1", *what], common)]
        else:
            starts = [(what, common | variables) for variables in rank_variables(ranks)]
        self._outputs = [files / f"{number}.txt" for number in range(len(starts))]
        self._processes = []
        for (arguments, variables), path in zip(starts, self._outputs, strict=True):
            with path.open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=REPOSITORY,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self._processes.append(process)

    def wait(self, deadline: float) -> ProofRun:
        """Until it ends, or until then, in seconds of `time.monotonic`."""
        while True:
            codes = [process.poll() for process in self._processes]
            if any(codes):
                deadline = min(deadline, time.monotonic() + STOP_S)
            if None not in codes or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for process in self._processes:
            process.kill()
            process.wait()
        failed = [code for code in codes if code]
        code = failed[0] if failed else (None if None in codes else 0)
        output = "".join(path.read_text(errors="replace") for path in self._outputs)
        seconds = round(time.perf_counter() - self._began, 1)
        if not self._record.exists():
            return ProofRun(self._name, code, output, seconds)
        record = json.loads(self._record.read_text())
        curves = {
            name: {int(iteration): value for iteration, value in curve.items()}
            for name, curve in record["curves"].items()
        }
        return ProofRun(self._name, code, output, seconds, curves, record["waits"])


def difference(curve: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """The largest relative one; infinite where the iterations are not the same."""
    if not curve or curve.keys() != reference.keys():
        return math.inf
    return max(abs(curve[step] / value - 1) for step, value in reference.items())


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each rank; local rank 0 is the one device, for everybody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return [
        {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank)}
        | {name: str(value) for name, value in common.items()}
        for rank in range(ranks)
    ]
