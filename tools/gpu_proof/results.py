"""What the proof finds, on disk and on the screen as soon as it is known.

DIR/findings.jsonl    a finding a line, of all parts
"""

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Outcome = Literal["passed", "failed", "measured", "skipped"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FINDINGS = "findings.jsonl"


@dataclass(frozen=True)
class ProofFinding:
    """One thing that was looked at."""

    part: str
    name: str
    outcome: Outcome
    note: str = ""
    """What a reader should know beside the values; of a failure the reason."""
    values: dict[str, Any] = field(default_factory=dict)
    """Numbers by name; the name ends in the unit: `seconds`, `bytes`, `share`."""
    at_s: float = 0.0
    """Since the part began."""

    @property
    def values_text(self) -> str:
        return ", ".join(f"{name} {_short(value)}" for name, value in self.values.items())

    def line(self) -> str:
        return f"{self.outcome:<8} {self.part}: " + "; ".join(
            text for text in (self.name, self.values_text, self.note) if text
        )


class Results:
    """The findings of one part.

    Args:
        part: its name.
        folder: of the whole proof; exists.
        rehearsal: whether this is a CPU, for which the goals of a GPU say nothing.
        echo: whether to print each finding.
    """

    def __init__(self, part: str, folder: Path, rehearsal: bool = False, echo: bool = True) -> None:
        self.part = part
        self.folder = folder
        self._rehearsal = rehearsal
        self._echo = echo
        self._file = folder / FINDINGS
        self._began = time.perf_counter()

    def check(self, name: str, passed: bool, note: str = "", **values: Any) -> bool:
        """Something that is right or wrong."""
        self._add(name, "passed" if passed else "failed", note, values)
        return passed

    def goal(self, name: str, reached: bool, note: str = "", **values: Any) -> None:
        """A goal of speed or memory: of a GPU only, a CPU rehearses it."""
        if self._rehearsal:
            self.measured(name, "rehearsed on a CPU, where the goal says nothing", **values)
        else:
            self.check(name, reached, note, **values)

    def measured(self, name: str, note: str = "", **values: Any) -> None:
        """Something that is neither."""
        self._add(name, "measured", note, values)

    def skipped(self, name: str, why: str) -> None:
        """Something that cannot be looked at here."""
        self._add(name, "skipped", why, {})

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """An exception is a failed check, and the part goes on behind the block."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {error}".splitlines()[0][:300])

    def _add(self, name: str, outcome: Outcome, note: str, values: dict[str, Any]) -> None:
        at = round(time.perf_counter() - self._began, 3)
        finding = ProofFinding(self.part, name, outcome, note, values, at)
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(finding)) + "\n")
        if self._echo:
            print(finding.line(), flush=True)


def read_findings(folder: Path) -> list[ProofFinding]:
    """All findings in a folder, in order; a line that was cut off by a kill is left out."""
    path = folder / FINDINGS
    findings = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            findings.append(ProofFinding(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return findings


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
