"""What a run says on stderr: single lines, and how far it is."""

import sys
import time
from pathlib import Path
from typing import IO


def say(message: str) -> None:
    """One line on stderr, whatever the message holds (a terminal's bar is wiped first)."""
    line = " ".join(message.split())
    if len(line) > 500:
        line = line[:500] + "..."
    wipe = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{wipe}{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


class Progress:
    """Documents, documents/s and MB/s of JSON: a bar on a terminal, else a line now and then."""

    def __init__(self, disk_bytes: int, log_interval: int, stream: IO[str]) -> None:
        from tqdm import tqdm

        self._start = time.monotonic()
        self._log_interval = self._next_log = log_interval
        self._stream = stream
        self.documents = self.text_bytes = 0
        self._before = (0, 0)  # documents and bytes of the run that this one goes on from
        tqdm.monitor_interval = 0  # no thread in a process that forks
        self._bar = tqdm(
            total=disk_bytes or None,
            unit="B",
            unit_scale=True,
            disable=not stream.isatty(),
            file=stream,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def go_on(self, documents: int, text_bytes: int) -> None:
        """What was done before this run."""
        self.documents, self.text_bytes = self._before = (documents, text_bytes)

    def add(self, documents: int, text_bytes: int, disk_bytes: int) -> None:
        self.documents += documents
        self.text_bytes += text_bytes
        self._bar.set_postfix_str(str(self), refresh=False)
        self._bar.update(disk_bytes)
        if self._bar.disable and self.documents >= self._next_log:
            print(f"Processed {self}", file=self._stream, flush=True)
            self._next_log = (self.documents // self._log_interval + 1) * self._log_interval

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        documents, text_bytes = self.documents - self._before[0], self.text_bytes - self._before[1]
        return (
            f"{self.documents} documents ({documents / seconds:.1f} docs/s, "
            f"{text_bytes / seconds / 1e6:.2f} MB/s)"
        )
