"""The report of overlap_cluster: Markdown for readers, JSON for programs, both or neither."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_scmoe.words import markdown_table
from tools.benchmarks.calibration import LayerTime
from tools.benchmarks.goals import Goal
from tools.benchmarks.provenance import as_markdown
from tools.benchmarks.turns import Ratio, TimedTurn, TurnsRow


def write_report(
    folder: Path,
    environment: dict[str, Any],
    settings: dict[str, Any],
    unlimited: LayerTime,
    links: dict[float, LayerTime],
    turns: list[TimedTurn],
    rows: list[TurnsRow],
    goals: list[Goal],
) -> tuple[Path, Path]:
    """Write overlap_cluster.md and .json, and return their paths."""
    sections = {"Links": link_table(unlimited, links)}
    for share, time in links.items():
        own = [row for row in rows if row.share == share]
        sections[link_name(share, time)] = row_table(own)
    if goals:
        sections["Goals"] = goal_table(goals)
    content = {
        "environment": environment,
        "settings": settings,
        "links": [
            {"wanted_share": None, **unlimited.as_dict()},
            *({"wanted_share": share, **time.as_dict()} for share, time in links.items()),
        ],
        "rows": [asdict(row) for row in rows],
        "goals": [asdict(goal) for goal in goals],
        "turns": [asdict(turn) for turn in turns],
    }
    markdown = page("Two hosts, slow link", environment, settings, sections)
    return write_pair(folder, "overlap_cluster", markdown, content)


def write_pair(
    folder: Path,
    name: str,
    markdown: str,
    content: dict[str, Any],
    more: Mapping[str, dict[str, Any]] | None = None,
) -> tuple[Path, Path]:
    """Write NAME.md and NAME.json, and more JSON files; in place when all are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {f"{name}.json": content, **(more or {})}
    texts = {file: json.dumps(value, indent=2) + "\n" for file, value in contents.items()}
    texts[f"{name}.md"] = markdown
    for file, text in texts.items():
        (folder / f"{file}.tmp").write_text(text)
    for file in texts:
        os.replace(folder / f"{file}.tmp", folder / file)
    return folder / f"{name}.md", folder / f"{name}.json"


def page(
    title: str,
    environment: dict[str, Any],
    settings: Mapping[str, Any],
    sections: Mapping[str, list[str]],
) -> str:
    """A report in Markdown: what a result must say about itself, then lines by heading."""
    lines = [f"# {title}", "", as_markdown(environment), ""]
    lines += [", ".join(f"{name} {value}" for name, value in settings.items()) + ".", ""]
    for heading, section in sections.items():
        lines += [f"## {heading}", "", *section, ""]
    return "\n".join(lines)


def table_of(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of a table whose rows have the same columns, by name."""
    return markdown_table(list(rows[0]), (list(row.values()) for row in rows))


def link_name(share: float, time: LayerTime) -> str:
    """For example `Communication 60% of the top-2 MoE layer, 212 Mbit/s`."""
    return f"Communication {share:.0%} of the top-2 MoE layer, {rate_name(time)}"


def rate_name(time: LayerTime) -> str:
    """The rate of the link in words."""
    return "unlimited" if time.rate is None else f"{time.rate / 1e6:.0f} Mbit/s"


def link_table(unlimited: LayerTime, links: dict[float, LayerTime]) -> list[str]:
    """A line for every link, by its wanted share; first the one without a limit."""
    all_links = {"-": unlimited} | {f"{share:.0%}": time for share, time in links.items()}
    return table_of(
        [
            {
                "wanted": wanted,
                "link": rate_name(time),
                "training": f"{time.share:.1%}",
                "inference": f"{time.inference_share:.1%}",
                "all-to-all ms": f"{time.exchange * 1e3:.0f}",
                "rest of the layer ms": f"{time.other * 1e3:.0f}",
            }
            for wanted, time in all_links.items()
        ]
    )


def row_table(rows: list[TurnsRow]) -> list[str]:
    """Speeds are baseline's time over one's own; `/ unlimited` is time over time, 1 is ideal.

    Ratios are the median over repetitions, with their quartiles.
    """
    return table_of(
        [
            {
                "contender": row.contender,
                "slots": row.slots or "-",
                "step ms": f"{row.train * 1e3:.0f} +- {row.spread:.1%}",
                "speed": f"{_times(row.speed)} {row.baseline}",
                "time saved": f"{1 - 1 / row.speed.median:.1%}",
                "speed, forward + backward": _times(row.layers_speed),
                "hidden": "-" if row.hidden is None else f"{row.hidden:.1%}",
                "step / unlimited": _over(row.unlimited),
                "forward + backward / unlimited": _over(row.layers_unlimited),
                "inference ms": f"{row.inference * 1e3:.0f}",
                "inference speed": _times(row.inference_speed),
                "inference / unlimited": _over(row.inference_unlimited),
            }
            for row in rows
        ]
    )


def goal_table(goals: list[Goal]) -> list[str]:
    """A line for every goal, and whether it was reached."""
    body = [(goal.claim, goal.measured, "yes" if goal.reached else "**no**") for goal in goals]
    return markdown_table(("goal", "measured", "reached"), body)


def _times(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"


def _over(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.2f}-{ratio.high:.2f})"
