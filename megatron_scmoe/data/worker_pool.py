"""A function applied to a stream on every core, with the results in the stream's order.

A thin layer over concurrent.futures, whose pool, unlike multiprocessing.Pool, notices a worker
that was killed. Added here: a bounded number of items in flight, quiet workers (they leave SIGINT
to the parent and never outlive it), and a stop that does not wait for work under way.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_scmoe.data.interrupt import STOP_SIGNALS

ITEMS_PER_WORKER = 4  # in flight: enough that no worker waits while one item takes long


class WorkerDied(RuntimeError):
    """A worker process ended without an answer."""


def ordered_map[T, R](function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R]:
    """function(item) for each item, in order, computed by `workers` forked processes.

    The processes inherit `function`, so it may hold what cannot be pickled; items and results are
    pickled. Close the iterator (contextlib.closing) to stop early: workers are then killed.
    Raises WorkerDied if a worker is killed, and whatever `function` raises.
    """
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(function, os.getpid()),
    )
    pending: deque[Future[R]] = deque()
    try:
        with _blocked_signals():  # until a worker has set its own handlers
            executor.submit(os.getpid).result()
        for item in items:
            pending.append(executor.submit(_call, item))
            if len(pending) == ITEMS_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise WorkerDied(
            "a worker process was killed (out of memory?); use fewer --workers or free memory"
        ) from None
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


_function: Callable[[Any], Any]


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """Forked siblings hold each other's pipes open, so a worker whose parent was killed would
    wait for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
