"""What happens when a run is told to stop: SIGINT and SIGTERM become one exception."""

import contextlib
import signal
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process received the signal `signum`; whoever catches it only cleans up."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class InterruptGuard:
    """Raise `Interrupted` in the main thread at the first stop signal and ignore later ones,
    so that cleaning up is not cut short.

    Python drops an exception that a handler raises inside a finalizer, so a long loop should also
    call `check`.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._shielded = False

    def __enter__(self) -> "InterruptGuard":
        self._previous = {stop: signal.signal(stop, self._handle) for stop in STOP_SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for stop, handler in self._previous.items():
            signal.signal(stop, handler)

    def _handle(self, signum: int, frame: object) -> None:
        if self._signum is None:
            self._signum = signum
            if not self._shielded:
                raise Interrupted(signum)

    def check(self) -> None:
        """Raise `Interrupted` if a stop signal has come."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """A block that must run to its end once begun; a signal that comes meanwhile is too late
        to stop anything and is ignored."""
        self.check()
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
            self._signum = None
