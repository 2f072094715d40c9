"""All findings on one page: what failed first, then a table for each part."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_scmoe.words import markdown_table, write_whole
from tools.benchmarks.provenance import as_markdown
from tools.gpu_proof.results import OUTCOMES, ProofFinding


def write_summary(
    folder: Path,
    environment: dict[str, Any],
    findings: Sequence[ProofFinding],
    seconds: dict[str, float],
) -> str:
    """Write summary.json and summary.md.

    Args:
        seconds: that each part took; parts that did not run are not in it.

    Returns:
        a short text for the screen.
    """
    parts = list(dict.fromkeys(finding.part for finding in findings))
    counts = {part: Counter(f.outcome for f in findings if f.part == part) for part in parts}
    whole = {
        "environment": environment,
        "parts": {
            part: {outcome: counts[part][outcome] for outcome in OUTCOMES}
            | {"seconds": seconds.get(part)}
            for part in parts
        },
        "findings": [asdict(finding) for finding in findings],
    }
    write_whole(folder / "summary.json", json.dumps(whole, indent=1) + "\n")
    failed = [finding.line() for finding in findings if finding.outcome == "failed"]
    write_whole(folder / "summary.md", _page(environment, findings, parts, failed))
    rows = [
        f"{part:<20}" + "".join(f"{counts[part][outcome]:>10}" for outcome in OUTCOMES)
        + f"{seconds.get(part, 0):>9.0f} s"
        for part in parts
    ]  # fmt: skip
    head = f"{'':<20}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES)
    return "\n".join(["", *failed, *([""] if failed else []), head, *rows])


def _page(
    environment: dict[str, Any],
    findings: Sequence[ProofFinding],
    parts: Sequence[str],
    failed: Sequence[str],
) -> str:
    lines = ["# Proof on a GPU", "", as_markdown(environment), ""]
    if failed:
        lines += ["## Failed", "", *(f"- {line}" for line in failed), ""]
    for part in parts:
        rows = [_row(finding) for finding in findings if finding.part == part]
        head = ("s", "outcome", "what", "values", "note")
        lines += [f"## {part}", "", *markdown_table(head, rows), ""]
    return "\n".join(lines)


def _row(finding: ProofFinding) -> tuple[str, ...]:
    cells = (finding.outcome, finding.name, finding.values_text, finding.note)
    return f"{finding.at_s:.1f}", *(cell.replace("|", "\\|") for cell in cells)
