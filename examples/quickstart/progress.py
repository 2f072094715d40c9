"""Show a training run as one line that moves; everything that it prints goes into a file.

    torchrun ... pretrain_gpt_scmoe.py ... 2>&1 | python progress.py --log FILE --sequence-length N

The line has the iteration, the last losses, tokens a second, the hidden share of the all-to-all and
the time that is left. Lines of an error are shown as they come.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

ITERATION = re.compile(r"iteration +(\d+)/ +(\d+) \|")
FIELD = re.compile(r" ([a-z0-9 ()-]+): +([-+0-9.E]+)(%?) \|")
VALIDATION = re.compile(r"validation loss at iteration \d+ .*?lm loss value: ([-+0-9.E]+)")
ERROR = re.compile(r"error: |Error: |Traceback")


class Shown(NamedTuple):
    """What one line of the log says."""

    iteration: int
    iterations: int
    words: dict[str, str]
    """For the line, by name."""


def read_line(line: str, sequence_length: int) -> Shown | None:
    """An iteration's line; None for any other.

    Args:
        sequence_length: tokens of a sample.
    """
    found = ITERATION.search(line)
    if found is None:
        return None
    fields = {name: float(value) for name, value, _ in FIELD.findall(line)}
    words = {}
    if "lm loss" in fields:
        words["loss"] = f"{fields['lm loss']:.3f}"
    seconds = fields.get("elapsed time per iteration (ms)", 0.0) / 1e3
    if seconds and "global batch size" in fields:
        words["tokens/s"] = f"{fields['global batch size'] * sequence_length / seconds:,.0f}"
    if "a2a hidden" in fields:
        words["hidden"] = f"{fields['a2a hidden']:.0f}%"
    return Shown(int(found[1]), int(found[2]), words)


def follow(lines: Iterable[str], log: TextIO, sequence_length: int, screen: TextIO) -> None:
    """Write all lines to the log and show what they say until they end."""
    words: dict[str, str] = {}
    bar: tqdm | None = None
    for line in lines:
        log.write(line)
        shown = read_line(line, sequence_length)
        if shown is not None:
            if bar is None:
                # What stands in front of a resumed run is no work of this one.
                first = shown.iteration - 1
                bar = tqdm(total=shown.iterations, initial=first, file=screen, unit="it")
            words |= shown.words
            bar.set_postfix(words, refresh=False)
            bar.update(shown.iteration - bar.n)
        elif validation := VALIDATION.search(line):
            words["validation"] = f"{float(validation[1]):.3f}"
        elif ERROR.search(line):
            tqdm.write(line.rstrip(), file=screen)
    if bar is not None:
        bar.close()


def main() -> int:
    """Follow the standard input; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--log", type=Path, required=True, metavar="FILE", help="receives every line, appended"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        required=True,
        metavar="TOKENS",
        help="tokens of a sample, for tokens/s",
    )
    options = parser.parse_args()
    with options.log.open("a", encoding="utf-8") as log:
        follow(sys.stdin, log, options.sequence_length, sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
