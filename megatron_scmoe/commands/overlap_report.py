"""What is hidden, what is exposed, and why, from the traces of a run.

    python tools/overlap_report.py TRACE_DIR [--picture overlap.png] [--rank N]

TRACE_DIR is what the run had as --scmoe-trace-dir. Prints the report; --picture also draws a unit
to scale and what each rank hides. How to read both is in docs/overlap.md.

Exit codes: 0 done; 2 options or traces are wrong, or the picture cannot be written.
"""

import argparse
import sys
from pathlib import Path

from megatron_scmoe import say


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        ValueError: they cannot be read, or the folder does not exist.
    """
    parser = say.OneLineParser(ValueError, description="What the traces of a run say.")
    parser.add_argument("trace_dir", type=Path, help="the run's --scmoe-trace-dir")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw into this file too: .png, .svg, .pdf"
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="whose unit is drawn (default: the median unit of all)",
    )
    args = parser.parse_args(argv)
    if not args.trace_dir.is_dir():
        raise ValueError(f"{args.trace_dir} is not a folder; give what --scmoe-trace-dir was")
    return args


def main(argv: list[str] | None = None) -> int:
    """Print the report and return the exit code."""
    say.one_line_interrupts()
    try:
        args = parse_arguments(argv)
    except ValueError as error:
        say.say(say.one_line(error))
        return 2

    # These import torch, which takes seconds.
    from megatron_scmoe.commands.trace_report.analysis import analyse
    from megatron_scmoe.commands.trace_report.picture import draw
    from megatron_scmoe.commands.trace_report.report_text import render
    from megatron_scmoe.commands.trace_report.traces import TraceError, read_run

    try:
        run = read_run(args.trace_dir)
        figures = analyse(run, args.rank)
        if args.picture:
            draw(figures, args.picture)
    except (TraceError, OSError) as error:
        say.say(say.one_line(error))
        return 2
    print(render(run, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
