"""The proof's parts on right results, Transformer Engine, hidden communication and speed, rehearsed
on the CPU.

Sizes are tiny, goals of speed say nothing here, and what needs CUDA is skipped. Everything that a
part promises is there.
"""

import importlib
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from tests import distributed_utils  # what the server of the forks has imported
from tests.limits import PROOF_S
from tools.gpu_proof import generation, right
from tools.gpu_proof.parts import PARTS
from tools.gpu_proof.results import ProofFinding, Results, read_findings

assert distributed_utils  # imported for its effect

POSITIONS = ("pos1", "pos2", "pos3")
NEEDS_CUDA = "needs CUDA"


def _run(part: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= PARTS[part].environment
    module = importlib.import_module(f"tools.gpu_proof.{PARTS[part].module or part}")
    module.run(Results(part, folder, rehearsal=True), torch.device("cpu"), PROOF_S)


def rehearse(part: str, folder: Path) -> dict[str, ProofFinding]:
    """Run a part in a process of its own, as the proof does."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(part, folder))
    process.start()
    try:
        process.join(PROOF_S)
    finally:
        process.kill()
    assert process.exitcode == 0
    findings = read_findings(folder)
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names)), "two findings have one name"
    assert {finding.part for finding in findings} == {part}
    return {finding.name: finding for finding in findings}


def check_outcomes(
    findings: dict[str, ProofFinding], promised: dict[str, str], skipped: dict[str, str]
) -> None:
    """All promised outcomes and no others; what was skipped says why."""
    assert {name: finding.outcome for name, finding in findings.items()} == {
        **promised,
        **dict.fromkeys(skipped, "skipped"),
    }
    assert {name: findings[name].note for name in skipped} == skipped


# What it and test_fast find is judged in unit_tests/test_gpu_proof_figures.py.
@pytest.mark.slow
def test_right(tmp_path: Path) -> None:
    findings = rehearse("right", tmp_path)
    units = [variant for variant in right.UNITS if variant.any_precision]
    passed = ["backward through a branch", "3 steps under memory pressure"]
    passed += ["the gradients that depart are awaited behind the dense backward"]
    passed += [f"float32: {variant.name}" for variant in right.UNITS]
    passed += [f"bfloat16: {variant.name}" for variant in units]
    for when in ("late exchanges", "late compute"):
        passed += [
            f"{when}, {variant.name}: overlap off" for variant in (right.CHUNKS, *right.NEW_SYSTEMS)
        ]
        passed += [
            f"{when}, {position}: {what}"
            for position in POSITIONS
            for what in (
                "every slot",
                "operators ahead",
                "overlap off",
                "two micro-batches in flight",
                "evaluation",
                "full recomputation",
                "selective recomputation",
            )
        ]
    check_outcomes(
        findings,
        {**dict.fromkeys(passed, "passed"), "what an exchange costs the host": "measured"},
        {
            "receive buffers": "needs CUDA's streams",
            "an exchange beside compute": "needs CUDA's streams",
            "memory reserved beyond what is allocated": "needs CUDA's allocator",
            "sanitizer": NEEDS_CUDA,
        },
    )
    assert 0 < findings["float32: pos2 cg1 own"].values["relative_error"] < 1e-5


def test_transformer_engine(tmp_path: Path) -> None:
    findings = rehearse("transformer_engine", tmp_path)
    promised = dict.fromkeys(
        (
            "grouped_mm has a kernel here",
            "grouped_mm and the loop",
            "grouped experts of the local spec",
        ),
        "passed",
    )
    names = (
        "a linear layer of Transformer Engine",
        *(f"local and Transformer Engine, {position}" for position in POSITIONS),
        *(f"shared norm, not fused, {position}" for position in POSITIONS),
        "grouped GEMM of Transformer Engine",
        "fused permutation",
        "FP8",
        "FP8, delayed scaling",
        "experts without tokens",
    )
    check_outcomes(findings, promised, dict.fromkeys(names, NEEDS_CUDA))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "at", "positions"),
    [("hidden", "32 connections", POSITIONS), ("hidden_1", "1 connections", ("pos2",))],
)
def test_hidden(tmp_path: Path, part: str, at: str, positions: tuple[str, ...]) -> None:
    findings = rehearse(part, tmp_path)
    measured = [
        f"{position}, {share}%, {at}: {what}"
        for position in positions
        for share in (15, 30, 60)
        for what in ("training", "prefill")
    ]
    measured += [
        f"slow-down of dense operators, {kind}, {at}" for kind in ("emulated", "to itself")
    ]
    measured += [f"hole behind the route, {position}, {at}" for position in POSITIONS]
    promised = dict.fromkeys(measured, "measured") | {f"experts inside attention, {at}": "passed"}
    check_outcomes(findings, promised, {f"trace, {at}": NEEDS_CUDA})
    training = findings[f"pos2, 60%, {at}: training"].values
    assert 0 <= training["exposed_share"] < 1 and training["in_flight_s"] > 0
    assert findings[f"pos2, 60%, {at}: prefill"].values["in_flight_s"] > 0


@pytest.mark.slow
def test_fast(tmp_path: Path) -> None:
    findings = rehearse("fast", tmp_path)
    measured = ["rates of the chip"]
    skipped = {}
    for shape in ("gpt2-moe-medium", "gpt3-moe-xl", "llama2-moe"):
        positions = ("pos1",) if shape == "llama2-moe" else POSITIONS
        for contender in ("top2", "shared", *positions):
            measured += [
                f"{shape}: {contender}, {what}"
                for what in ("without communication", "on a link with 30%", "MFU")
            ]
        for load in ("even", "one busy expert"):
            name = f"{shape}: experts, {load}"
            measured += [f"{name}, {kind}" for kind in ("SequentialMLP", "grouped_mm")]
            measured.append(f"{name}: grouped_mm over SequentialMLP")
            skipped[f"{name}: grouped_mm over Transformer Engine"] = NEEDS_CUDA
        skipped[f"{shape}: memory, local"] = "the step ran; a CPU's allocator is not measured"
        skipped[f"{shape}: memory, transformer_engine"] = NEEDS_CUDA
    check_outcomes(findings, dict.fromkeys(measured, "measured"), skipped)
    flops = {
        findings[f"gpt2-moe-medium: {name}, MFU"].values["model_flops"]
        for name in ("top2", "shared", *POSITIONS)
    }
    assert len(flops) == 1, "contenders have equal FLOPs"


def test_generation(tmp_path: Path) -> None:
    findings = rehearse("generation", tmp_path)
    systems = [system.name for system in generation.SYSTEMS]
    passed = [f"cached, {system}" for system in systems]
    passed += [f"offloaded, {system}, {arm}" for system in systems for arm in generation.ARMS]
    measured = [f"speed, {arm}" for arm in ("resident", *generation.ARMS)]
    promised = dict.fromkeys(passed, "passed") | dict.fromkeys(measured, "measured")
    check_outcomes(findings, promised, {})
    assert findings["speed, early"].values["copies_s"] > 0
