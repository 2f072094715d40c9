"""How long a run will go on, for the log line."""

from collections import deque
from datetime import timedelta

ITERATIONS = 100  # whose mean it is, with all evaluation and saving between them


class TimeLeft:
    """By the last iterations of this process."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=ITERATIONS + 1)

    def after(self, iteration: int, last: int, now: float) -> str:
        """Days, hours, minutes and seconds as text; empty where nothing is known or left.

        Args:
            iteration: that has ended.
            last: with which the run ends.
            now: seconds of any clock.
        """
        self._seen.append((iteration, now))
        first, began = self._seen[0]
        if iteration == first or iteration >= last:
            return ""
        seconds = (now - began) / (iteration - first) * (last - iteration)
        return str(timedelta(seconds=round(seconds)))
