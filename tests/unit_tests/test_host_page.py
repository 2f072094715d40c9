"""docs/host-defects.md has every row of the table of replaced host symbols.

`python -m tests.unit_tests.test_host_page` prints its tables anew.
"""

from pathlib import Path

from megatron_scmoe.host.replace import Replacement
from megatron_scmoe.start import all_rows

PAGE = Path(__file__).parents[2] / "docs" / "host-defects.md"


def tables() -> str:
    """The rows in Markdown: those of every machine, then those of one without a CUDA device."""
    everywhere = [row for row in all_rows() if row.condition != "cpu"]
    cpu = [row for row in all_rows() if row.condition == "cpu"]
    return (
        f"## On every machine\n\n{_table(everywhere, with_condition=True)}\n\n"
        f"## Without a CUDA device\n\n{_table(cpu, with_condition=False)}\n"
    )


def _table(rows: list[Replacement], with_condition: bool) -> str:
    header = ["replaced", *(["when"] if with_condition else []), "where the host has it", "why"]
    lines = [header, ["---"] * len(header)]
    for symbol, condition, host_file, reason, _ in rows:
        condition_cell = [condition] if with_condition else []
        lines.append([f"`{symbol}`", *condition_cell, host_file, reason])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def test_page_has_the_table() -> None:
    assert f"{tables()}\n" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(tables(), end="")
