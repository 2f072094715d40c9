"""The one form of a refusal: when it holds, what is wrong, what to do.

Imports nothing of the package, so that a refusal can stand beside what it is about.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, object] | bool | None


@dataclass(frozen=True)
class Refusal:
    """A row: options that cannot work, and the line that the user sees."""

    when: Callable[..., Found]
    """Whether it holds for the options: false, true, or values that the texts name."""
    line: str
    """What is wrong. A name in braces, here and below, is an option's or one from `when`."""
    remedy: str = ""
    """What to do."""
    reason: str = ""
    """Why, where it is not plain."""

    def text(self, found: Found, *options: Any) -> str:
        """`line: remedy.` or `line: reason; remedy.`"""
        causes = "; ".join(part for part in (self.reason, self.remedy) if part)
        template = f"{self.line}: {causes}." if causes else f"{self.line}."
        values: dict[str, Any] = {}
        for names in (*(getattr(option, "__dict__", {}) for option in options), found):
            values |= names if isinstance(names, Mapping) else {}
        return template.format_map(values)


def complaints(rows: Iterable[Refusal], *options: Any) -> Iterator[tuple[Refusal, str]]:
    """Rows that hold, and their lines, in order; a row may rely on those before it."""
    for row in rows:
        if found := row.when(*options):
            yield row, row.text(found, *options)


def refuse(rows: Iterable[Refusal], *options: Any) -> None:
    """Refuse what the first row says that holds.

    Args:
        options: what `when` of these rows takes: the parsed command line, or the two configs.

    Raises:
        ValueError: its line.
    """
    for _, line in complaints(rows, *options):
        raise ValueError(line)


def refuse_all(rows: Iterable[Refusal], *options: Any) -> None:
    """Refuse what any of some rows says, all of it at once; no row may rely on another.

    Raises:
        ValueError: their lines, one behind the other.
    """
    if lines := [line for _, line in complaints(rows, *options)]:
        raise ValueError(" ".join(lines))
