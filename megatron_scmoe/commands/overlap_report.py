"""One self-contained HTML page from the traces of a run: what is hidden, what is exposed, and why.

    python tools/overlap_report.py TRACE_DIR [--output report.html] [--rank N]

TRACE_DIR is what the run had as --scmoe-trace-dir. The page needs no network and no script; how to
read it is in docs/overlap.md.

Exit codes: 0 done; 2 options or traces are wrong, or the page cannot be written.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megatron_scmoe import say
from megatron_scmoe.commands.trace_report.analysis import analyse
from megatron_scmoe.commands.trace_report.page import render
from megatron_scmoe.commands.trace_report.traces import TraceError, read_run
from megatron_scmoe.commands.trace_report.words import duration, percent


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without argparse's usage before it."""
        raise TraceError(f"{message} (see --help)")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Raises TraceError."""
    parser = _Parser(description="Traces of a run as one HTML page.", allow_abbrev=False)
    parser.add_argument("trace_dir", type=Path, help="the run's --scmoe-trace-dir")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="default: %(default)s"
    )
    parser.add_argument(
        "--rank", type=int, help="whose unit the timeline shows (default: the median unit of all)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    try:
        args = parse_arguments(argv)
        run = read_run(args.trace_dir)
        figures = analyse(run, args.rank)
        args.output.write_text(render(run, figures), encoding="utf-8")
    except (TraceError, OSError) as error:
        say.say(say.one_line(error))
        return 2
    print(
        f"wrote {args.output}: {percent(figures.total.hidden_share)} of the communication is "
        f"hidden, {duration(figures.total.exposed)} an iteration are exposed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
