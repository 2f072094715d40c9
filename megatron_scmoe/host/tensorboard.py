"""TensorBoard on a disk that is full: curves end, with one warning, and training does not.

TensorBoard writes in a thread of its own, whose error comes out of the next call of the writer.
"""

import threading
from collections.abc import Callable
from typing import Any

THREAD = "_AsyncWriterThread"  # tensorboard/summary/writer/event_file_writer.py


class CurvesThatMayEnd:
    """A SummaryWriter that does nothing more once it could not write.

    Args:
        writer: torch's.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._ended = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._writer, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._ended:
                return None
            try:
                return attribute(*args, **kwargs)
            except OSError as error:
                self._ended = True
                _warn(error)

        return call


def writer_that_may_end(set_tensorboard_writer: Callable[[Any], None]) -> Callable[[Any], None]:
    """`_set_tensorboard_writer` whose writer is a CurvesThatMayEnd, or none on a full disk."""

    def replacement(args: Any) -> None:
        from megatron.training import global_vars

        threading.excepthook = _without_writers(threading.excepthook)
        try:
            set_tensorboard_writer(args)
        except OSError as error:
            return _warn(error)
        if (writer := global_vars._GLOBAL_TENSORBOARD_WRITER) is not None:
            global_vars._GLOBAL_TENSORBOARD_WRITER = CurvesThatMayEnd(writer)

    return replacement


def _without_writers(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Errors of the writer's thread are not printed: they come out of the writer."""

    def replacement(failed: Any) -> None:
        if type(failed.thread).__name__ != THREAD or not issubclass(failed.exc_type, OSError):
            hook(failed)

    return replacement


def _warn(error: OSError) -> None:
    print(f"WARNING: no more curves in --tensorboard-dir: {error}", flush=True)
