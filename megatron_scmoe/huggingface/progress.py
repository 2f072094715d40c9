"""How far a conversion is, on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

EVERY_S = 0.1
WIPE = "\r\033[K"


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Write share and seconds left over and over on one line, which is gone at the end.

    Args:
        total: of whatever the block counts.

    Yields:
        A function that takes how much of it was done since its last call.
    """
    begin = shown = monotonic()
    done = 0
    terminal = sys.stderr.isatty()

    def advance(number: int) -> None:
        nonlocal done, shown
        done += number
        now = monotonic()
        if terminal and now - shown >= EVERY_S and done:
            shown = now
            left = (now - begin) * (total - done) / done
            text = f"{WIPE}{what} {done / total:.0%}, {left:.0f} s left"
            print(text, end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if terminal:
            print(WIPE, end="", file=sys.stderr, flush=True)
