"""What only a GPU can show about this package, in ten minutes of one.

    python -m tools.gpu_proof --minutes 8 --output DIR [--only PART] [--device cpu]

Each part runs in a process of its own and is killed at its limit with all that it started. What it
found until then stays. Later parts are skipped when time is over. docs/gpu.md says what each shows.

    DIR/environment.json   card, driver, versions, commit; first of all
    DIR/findings.jsonl     a finding a line, as soon as it is known
    DIR/log.txt            what the parts and their runs printed
    DIR/summary.json, .md  at the end

Exit code 1 if a check failed, 2 if nothing could be tried.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tools.benchmarks.provenance import describe
from tools.gpu_proof.parts import PACKAGE, PARTS, ProofPart
from tools.gpu_proof.processes import adopt_orphans, kill_descendants
from tools.gpu_proof.results import FINDINGS, ProofFinding, Results, read_findings
from tools.gpu_proof.summary import write_summary

MINIMUM_S = 20.0
"""With less a part cannot do more than start."""
REHEARSAL = 4.0
"""Times the limit that a part has on the GPU: two cores, and others may use them."""
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
LOG = "log.txt"
KEPT_CHARACTERS = 300


class Proof:
    """All parts, one after the other.

    Args:
        package: of the parts' modules.
        folder: receives everything; exists.
        seconds: for all parts together.
    """

    def __init__(self, package: str, folder: Path, device: str, seconds: float) -> None:
        self._package = package
        self._folder = folder
        self._device = device
        self._deadline = time.time() + seconds
        self._shown = 0
        self.seconds: dict[str, float] = {}
        """By part."""

    def run(self, name: str, part: ProofPart) -> None:
        results = Results(name, self._folder, echo=False)
        left = self._deadline - time.time()
        if left < MINIMUM_S:
            results.skipped("the part", f"{max(left, 0):.0f} s are left, it needs {MINIMUM_S:.0f}")
        else:
            limit_s = part.limit_s * (REHEARSAL if self._device == "cpu" else 1)
            self._run(name, part, min(limit_s, left), results)
        self._show()

    def _run(self, name: str, part: ProofPart, limit_s: float, results: Results) -> None:
        began = time.time()
        deadline = began + limit_s
        module = f"{self._package}.{part.module or name}"
        what = [module, name, str(self._folder), self._device, str(deadline)]
        environment = os.environ | part.environment
        if self._device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (self._folder / LOG).open("ab") as log:
            log.write(f"\n==== {name}, {limit_s:.0f} s\n".encode())
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu_proof.child", *what],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            while (code := process.poll()) is None and time.time() < deadline:
                self._show()
                time.sleep(0.1)
            kill_descendants()
        with (self._folder / FINDINGS).open("a") as findings:
            findings.write("\n")  # in case that a line was cut off
        self.seconds[name] = round(time.time() - began, 1)
        if code is None:
            results.check("the part ends", False, f"killed at its limit of {limit_s:.0f} s")
        elif code != 0:
            results.check("the part ends", False, f"{_how(code)}: {self._last_line(start)}")

    def _last_line(self, start: int) -> str:
        """Of the log behind that byte: where a traceback says what was wrong."""
        lines = (self._folder / LOG).read_bytes()[start:].decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")[:KEPT_CHARACTERS]

    def _show(self) -> None:
        """Print the findings that are new."""
        findings = read_findings(self._folder)
        for finding in findings[self._shown :]:
            print(finding.line(), flush=True)
        self._shown = len(findings)


def main(
    argv: Sequence[str] | None = None,
    package: str = PACKAGE,
    parts: Mapping[str, ProofPart] = PARTS,
) -> int:
    """The exit code."""
    args = parse_args(argv, tuple(parts))
    if args.device == "cuda" and not torch.cuda.is_available():
        return _refused("no CUDA device here; --device cpu rehearses the proof at tiny sizes")
    if (args.output / FINDINGS).exists():
        return _refused(f"{args.output} holds an earlier proof: choose another --output")
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(CONNECTIONS, "32")  # with 1 nothing runs beside anything
    environment = describe()
    (args.output / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")

    adopt_orphans()
    proof = Proof(package, args.output.resolve(), args.device, args.minutes * 60)
    try:
        for name, part in parts.items():
            if name in (args.only or parts):
                proof.run(name, part)
    finally:
        kill_descendants()
        findings = read_findings(args.output)
        print(write_summary(args.output, environment, findings, proof.seconds), flush=True)
    return 1 if any(_failed(finding) for finding in findings) else 0


def parse_args(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_proof", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        default=8.0,
        metavar="MINUTES",
        help="for all parts together (default: 8)",
    )
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder for what is found")
    add("--only", action="append", choices=names, metavar="PART", help=f"one of {', '.join(names)}")
    add(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal (default: cuda)"
    )
    return parser.parse_args(argv)


def _failed(finding: ProofFinding) -> bool:
    return finding.outcome == "failed"


def _how(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


def _refused(why: str) -> int:
    print(f"gpu_proof: error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
