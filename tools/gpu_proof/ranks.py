"""Several ranks on one GPU: expert parallel training over gloo has the losses of the CPU.

NCCL takes one rank a GPU, gloo copies CUDA tensors through the host. So exchanges block, but who
sends which row to whom, the numbers of rows on their way to the host, the side stream and autograd
on the device are those of a real job. The router is free: ranks send uneven numbers of rows.

Reference: one process without a GPU, from the same initial weights, on the same samples, in fp32.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tools.benchmarks.contenders import LOCAL
from tools.benchmarks.real_text import REPOSITORY
from tools.gpu_proof.results import Results
from tools.gpu_proof.runs import (
    ENVIRONMENT,
    MODEL,
    ProofJob,
    ProofRun,
    difference,
    rank_variables,
)

TOLERANCE = 1e-4
"""Relative, of a loss. Sums of another order differ by 1e-7 on the CPU, and Adam lets it grow."""
PROBE_SHARE = 0.6
"""Of the part's time, in which gloo's collectives must be done."""
UNEVEN = 1.01
"""Rows of the busiest expert over the mean of all."""
IMBALANCE = re.compile(r"expert load imbalance: ([0-9.]+)")

# Adam's default epsilon would make a full step of a gradient that is rounding noise.
TRAIN = shlex.split(
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 "
    "--moe-layer-freq ([0,1]*2) --moe-ffn-hidden-size 48 --seq-length 32 "
    "--max-position-embeddings 32 --global-batch-size 16 --vocab-size 256 --lr 2e-3 "
    "--adam-eps 1e-5 --moe-router-load-balancing-type none --distributed-backend gloo"
)
STEPS = ["--train-iters", "8"]
LAYOUTS = {
    "EP 2": (2, "--expert-model-parallel-size 2"),
    "EP 4": (4, "--expert-model-parallel-size 4"),
    "EP 2, all-gather": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
}
NEEDED = ("uneven_all_to_all", "all_gather_into_tensor", "all_reduce", "broadcast")
"""By every run here; of gloo's other collectives it is enough to know."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}


def run(results: Results, device: torch.device, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        initial = str(folder / "checkpoint")
        save = ["--train-iters", "1", "--save", initial, "--save-interval", "1", "--no-save-optim"]
        options = [*MODEL, *TRAIN, *LOCAL, "--micro-batch-size", "4"]
        job = ProofJob("initial weights", folder, [*options, *save], ranks=1, environment=NO_GPU)
        with results.guarded("gloo's collectives"):
            _try_collectives(results, device, PROBE_SHARE * seconds)
        if not job.wait(deadline).ended(results):
            return

        options += ["--load", initial, "--finetune", *STEPS]
        first = ProofJob("one process, CPU", folder, options, ranks=1, environment=NO_GPU)
        # DDP reduces buckets by one coalesced call, which gloo has for the CPU only.
        jobs = [
            ProofJob(
                layout,
                folder,
                [*options, *shlex.split(more)],
                observe=["--one-by-one"],
                ranks=ranks,
                environment=NO_TF32,
            )
            for layout, (ranks, more) in LAYOUTS.items()
        ]
        reference = first.wait(deadline)
        comparable = reference.ended(results)
        for job in jobs:
            _compare(results, job.wait(deadline), reference, comparable)


def _compare(results: Results, run: ProofRun, reference: ProofRun, comparable: bool) -> None:
    if not (run.ended(results) and comparable):
        return
    found = difference(run.losses, reference.losses)
    results.check(
        f"{run.name}: losses of the CPU",
        found <= TOLERANCE,
        losses=len(run.losses),
        relative_difference=found,
        norm_relative_difference=difference(run.curves["grad norm"], reference.curves["grad norm"]),
    )
    busiest = [float(value) for value in IMBALANCE.findall(run.output)]
    uneven = bool(busiest) and min(busiest) > UNEVEN
    results.check(f"{run.name}: uneven splits", uneven, "", least_imbalance=min(busiest, default=1))


def _try_collectives(results: Results, device: torch.device, seconds: float) -> None:
    """Which of gloo's collectives take this device's tensors."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.gpu_proof.gloo_collectives", device.type],
            cwd=REPOSITORY,
            env=os.environ | ENVIRONMENT | variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        for variables in rank_variables(2)
    ]
    outputs = []
    for rank in ranks:
        try:
            outputs.append(rank.communicate(timeout=seconds)[0])
        finally:
            rank.kill()
    for name, error in json.loads(outputs[0].splitlines()[-1]).items():
        if name in NEEDED:
            results.check(f"gloo: {name}", error is None, error or "")
        else:
            results.measured(f"gloo: {name}", error or "there")
