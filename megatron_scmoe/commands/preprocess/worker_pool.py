"""A function applied to a stream on every core, with the results in the stream's order.

Differs from multiprocessing.Pool and concurrent.futures in that each worker has a pipe of its own,
whose far end nobody else holds: a worker that is killed, even halfway through sending a result, is
an end of file to the parent, and a parent that is killed is one to its workers. On a shared queue
either can wait for ever. A worker gets its next item after its last result was received in full,
so parent and worker never both wait to send.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_scmoe.commands.preprocess.interrupt import STOP_SIGNALS

ITEMS_PER_WORKER = 4  # encoded or being encoded: enough to work on while one item takes long


class WorkerDied(RuntimeError):
    """A worker process ended without an answer."""

    def __init__(self) -> None:
        super().__init__(
            "a worker process was killed (out of memory?); use fewer --workers or free memory"
        )


def ordered_map[T, R](function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R]:
    """function(item) for each item, in order, computed by at most `workers` forked processes.

    The processes inherit `function`, so it may hold what cannot be pickled; items and results are
    pickled. Close the iterator (contextlib.closing) to stop early: workers are then killed.

    Raises:
        WorkerDied: a worker was killed. Whatever `function` raises is raised too.
    """
    source = enumerate(items)
    team: list[_Worker] = []
    results: dict[int, R] = {}  # received but not yet yielded
    following = 0  # number of the item whose result is yielded next
    more = True
    try:
        while True:
            while more:
                idle = [worker for worker in team if worker.number is None]
                taken = len(results) + len(team) - len(idle)
                if taken == ITEMS_PER_WORKER * workers or not (idle or len(team) < workers):
                    break
                number, item = next(source, (-1, None))
                more = number >= 0
                if more:
                    if not idle:  # no more processes than there is work for
                        idle = [_start(function, team)]
                    idle[0].send(number, item)
            busy = any(worker.number is not None for worker in team)
            for worker in _answering(team, block=busy and following not in results):
                number, result = worker.receive()
                results[number] = result
            if following in results:
                yield results.pop(following)
                following += 1
            elif not busy:
                return
    except BaseException:
        for worker in team:
            worker.process.kill()
        raise
    finally:
        for worker in team:
            worker.connection.close()
        for worker in team:
            worker.process.join()


def _start(function: Callable[[Any], Any], team: list["_Worker"]) -> "_Worker":
    """One worker more for the team."""
    with _blocked_signals():  # until it has set its own handlers
        team.append(_Worker(function, team))
    return team[-1]


class _Worker:
    """A process, the pipe to it, and the number of the item it works on (None: idle)."""

    def __init__(self, function: Callable[[Any], Any], earlier: list["_Worker"]) -> None:
        context = multiprocessing.get_context("fork")
        self.number: int | None = None
        self.connection, far_end = context.Pipe()
        inherited = [self.connection, *(worker.connection for worker in earlier)]
        self.process = context.Process(
            target=_work, args=(function, far_end, inherited), daemon=True
        )
        self.process.start()
        far_end.close()

    def send(self, number: int, item: object) -> None:
        # Raised outside the handler: CPython 3.12.1 can crash when it collects the half-sent
        # message that the broken pipe's traceback would keep.
        with contextlib.suppress(OSError):
            self.connection.send(item)
            self.number = number
            return
        raise WorkerDied

    def receive(self) -> tuple[int, Any]:
        answer = None
        with contextlib.suppress(EOFError, OSError):  # the end, between two results or within one
            answer = self.connection.recv()
        if answer is None:
            raise WorkerDied
        result, error = answer
        if error is not None:
            raise error
        assert self.number is not None, "only a worker at work answers"
        number, self.number = self.number, None
        return number, result


def _answering(team: list[_Worker], block: bool) -> list[_Worker]:
    """The workers that have an answer, or have died; with `block` at least one."""
    ready = wait([worker.connection for worker in team], timeout=None if block else 0)
    return [worker for worker in team if worker.connection in ready]


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _work(
    function: Callable[[Any], Any], connection: Connection, inherited: list[Connection]
) -> None:
    """What a worker does until its parent closes the pipe or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for other in inherited:
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = connection.recv()
            result, failure = None, None
            try:
                result = function(item)
            except Exception as error:  # raised again in the parent
                failure = error
            connection.send((result, failure))
