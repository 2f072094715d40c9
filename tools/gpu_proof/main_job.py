"""The main job under torchrun on one rank: trains, resumes bitwise, saves beside training.

bf16, distributed optimizer, overlapped reduction and gather, grouped experts, measured slots; with
Megatron's own layers and with Transformer Engine's. NCCL on the GPU, gloo and fp32 on the CPU.

One rank has nobody to exchange rows with. Some runs send them all the same, to itself: what their
losses must not show, and where their hosts wait, is what an exchange does. So do a run with two
gates and one with experts at home.
"""

import importlib.util
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_scmoe.overlap.collectives import PerTensor
from tools.benchmarks.contenders import LOCAL
from tools.gpu_proof.results import Results
from tools.gpu_proof.runs import MODEL, ProofJob, ProofRun

ITERATIONS = 12
SAVED = 6
STEADY = 9
"""Warmed up, with the slots chosen."""
JOB = shlex.split(
    f"--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --lr 1e-3 "
    f"--train-iters {ITERATIONS} --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2"
)
GPU_MODEL = shlex.split(
    "--bf16 --num-layers 4 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16 "
    "--moe-layer-freq ([0,1]*2) --moe-ffn-hidden-size 1408 --seq-length 1024 "
    "--max-position-embeddings 1024 --micro-batch-size 4 --global-batch-size 8 --vocab-size 8192"
)
# Megatron's output layer would fuse with apex.
ENGINE = ["--transformer-impl", "transformer_engine", "--no-gradient-accumulation-fusion"]
CPU_MODEL = shlex.split(
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--moe-layer-freq ([0,1]*1) --moe-ffn-hidden-size 32 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --vocab-size 64"
)
SYSTEMS = {
    "two gates": shlex.split(
        "--scmoe-dual-gating separate --moe-router-topk 1 --moe-router-pre-softmax"
    ),
    "experts at home": shlex.split(
        "--scmoe-router heterogeneous --scmoe-num-zero-experts 1 --scmoe-num-copy-experts 1 "
        "--scmoe-num-constant-experts 2 --scmoe-gating-residual --moe-router-pre-softmax "
        "--moe-expert-capacity-factor 1.1"
    ),
}
UNITS, MICRO_BATCHES = 2, 2
"""On the GPU."""
IN_A_UNIT = ("megatron_scmoe/model/", "megatron/core/transformer/")
"""Where the host must not wait, beside the one wait for numbers of rows."""
ROW_COUNTS = re.compile(r"megatron_scmoe/overlap/streams\.py:\d+ wait")
WAITS_NOTE = "waits inside NCCL and the driver are not seen"


def run(results: Results, device: torch.device, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    on_gpu = device.type == "cuda"
    common = [*MODEL, *JOB, *(GPU_MODEL if on_gpu else CPU_MODEL)]
    common += ["--distributed-backend", "nccl" if on_gpu else "gloo"]
    why_not = _without_transformer_engine(on_gpu)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saves = {what: str(folder / f"saved_{what}") for what in ("local", "async", "engine")}

        def start(name: str, *options: str, observe: Sequence[str] = ()) -> ProofJob:
            return ProofJob(name, folder, [*common, *options], observe)

        def saving(what: str) -> list[str]:
            return ["--save", saves[what], "--save-interval", str(SAVED)]

        def loading(what: str) -> list[str]:
            return ["--load", saves[what], "--ckpt-step", str(SAVED)]

        # They say nothing about time: all that do not depend on each other run together.
        travel = ["--travel"] if hasattr(PerTensor, "moves") else []
        observe = [*travel, "--waits-of", str(STEADY)]
        first = [
            start("local", *LOCAL, *saving("local")),
            start("async", *LOCAL, *saving("async"), "--async-save"),
            start("observed", *LOCAL, observe=observe),
        ]
        systems = [start(name, *LOCAL, *more, observe=observe) for name, more in SYSTEMS.items()]
        if why_not is None:
            first.append(start("engine", *ENGINE, *saving("engine")))
        local, asynchronous, observed, *others = (job.wait(deadline) for job in first)

        second = [start("resumed", *LOCAL, *loading("local"))]
        second.append(start("resumed from async", *LOCAL, *loading("async")))
        if why_not is None:
            second.append(start("engine resumed", *ENGINE, *loading("engine")))

        trained = _check_training(results, local)
        _check_same(results, "async save changes nothing", asynchronous, local.curves, trained)
        if travel:
            name = "exchanges that travel change nothing"
            _check_same(results, name, observed, local.curves, trained)
            _check_slots(results, observed)
        else:
            results.skipped("exchanges that travel", "this engine has no PerTensor.moves")
        _list_waits(results, observed)
        _check_waits(results, observed)
        for system in (job.wait(deadline) for job in systems):
            _check_training(results, system)
            _check_waits(results, system, gates=2 if system.name == "two gates" else 1)
        resumed, resumed_async, *others_resumed = (job.wait(deadline) for job in second)
        rest = _rest(local)
        _check_same(results, "resume is bitwise", resumed, rest, trained)
        _check_same(results, "resume from an async save is bitwise", resumed_async, rest, trained)
        if why_not is not None:
            results.skipped("Transformer Engine's layers", why_not)
            return
        (engine_run,), (engine_resumed,) = others, others_resumed
        trained = _check_training(results, engine_run)
        name = "resume with Transformer Engine is bitwise"
        _check_same(results, name, engine_resumed, _rest(engine_run), trained)


def _check_training(results: Results, run: ProofRun) -> bool:
    """Whether there are losses to compare others with."""
    if not run.ended(results):
        return False
    first, *_, last = run.losses.values()
    results.check(f"{run.name}: losses fall", last < first - 0.1, first=first, last=last)
    return True


def _check_slots(results: Results, run: ProofRun) -> None:
    """That they were measured, which needs exchanges."""
    chosen = [line for line in run.output.splitlines() if line.startswith("expert slot ")]
    results.check("slots are measured", len(chosen) == 2, "; ".join(chosen))


def _check_same(
    results: Results,
    name: str,
    run: ProofRun,
    expected: Mapping[str, Mapping[int, float]],
    comparable: bool,
) -> None:
    """Losses and gradient norms, to the last bit."""
    if not (run.ended(results) and comparable):
        return
    differing = [
        (curve, step)
        for curve, values in expected.items()
        for step, value in values.items()
        if run.curves[curve].get(step) != value
    ]
    same = not differing and run.losses.keys() == expected["lm loss"].keys()
    note = "" if same else f"iterations {list(run.losses)}, first differing {differing[:1]}"
    results.check(name, same, note)


def _rest(run: ProofRun) -> dict[str, dict[int, float]]:
    """Behind the checkpoint."""
    return {
        name: {step: value for step, value in curve.items() if step > SAVED}
        for name, curve in run.curves.items()
    }


def _list_waits(results: Results, run: ProofRun) -> None:
    if run.code != 0:
        return
    number = sum(count for _, _, count in run.waits)
    results.measured(f"host waits in iteration {STEADY}", WAITS_NOTE, waits=number)
    for kind, site, count in run.waits:
        results.measured("host wait", f"{site} ({kind})", count=count)


def _check_waits(results: Results, run: ProofRun, gates: int = 1) -> None:
    """At most one wait a unit, for each gate; on the CPU, where nobody waits, only counted."""
    if run.code != 0:
        return
    most = gates * UNITS * MICRO_BATCHES
    known = sum(count for _, site, count in run.waits if ROW_COUNTS.match(site))
    others = [site for _, site, _ in run.waits if site.startswith(IN_A_UNIT)]
    results.goal(
        f"{run.name}: the host waits once a unit",
        known <= most and not others,
        " ".join(others),
        waits=known,
        most_waits=most,
    )


def _without_transformer_engine(on_gpu: bool) -> str | None:
    """Why its layers cannot run; None where they can."""
    if not on_gpu:
        return "its kernels need CUDA"
    if importlib.util.find_spec("transformer_engine") is None:
        return "it is not installed"
    return None
