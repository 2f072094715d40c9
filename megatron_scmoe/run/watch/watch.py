"""Who acts when a rank is lost: the main thread on an error, three small threads otherwise.

listener   blocks in the store until another rank raises the alarm
sampler    looks twice a second whether the main thread still moves; if it has waited in one
           collective for the time-out, raises the alarm. gloo then raises an error by itself,
           except in point-to-point messages; NCCL would end the process with a page of C++
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch.distributed import DistNetworkError, DistStoreError, Store, distributed_c10d

from megatron_scmoe.host.wheel import default_timeout
from megatron_scmoe.run.watch.account import Report, lines_of_error, lines_of_thread, make_report
from megatron_scmoe.run.watch.attempt import store_of_this_attempt
from megatron_scmoe.run.watch.board import Board, StoreLost
from megatron_scmoe.run.watch.peers import is_late, lost_peer
from megatron_scmoe.run.watch.verdict import Alarm, moment, verdict, waiting
from megatron_scmoe.say import EXIT_CODE, one_line, say, user_errors

SAMPLE_S = 0.5
MARGIN_S = 5.0  # ahead of the time-out at most: NCCL's own watchdog must not come before the line
END = b"\0"  # no signal's number
CLEAN_UP_S = 20.0  # for a rank to end by itself after a user error of another rank


@contextmanager
def watched_ranks(
    timeout: timedelta, user_errors_of_run: tuple[type[Exception], ...]
) -> Iterator[Store | None]:
    """Surround a run so that no rank outlives another for longer than the collectives' time-out.

    A rank that is lost or fails ends the process on all ranks, with one line from one of them. An
    error of a rank's own also keeps its traceback; one of `user_errors_of_run` is the line alone.

    Args:
        timeout: until all ranks have joined.

    Yields:
        The job's store, for `init_process_group`; None for a single rank.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        with user_errors(user_errors_of_run):
            yield None
        return
    store, board = _join(timeout)
    watch = Watch(board)
    try:
        yield store
    except user_errors_of_run as error:
        watch.fail(error, Alarm(board.rank, "refused", one_line(error), EXIT_CODE))
    except Exception as error:
        lost = lost_peer(error)
        if lost is not None:
            watch.fail(lost, Alarm(board.rank, "late" if is_late(lost) else "gone"))
        sys.excepthook(type(error), error, error.__traceback__)
        watch.fail(error, Alarm(board.rank, "error", f"{type(error).__name__}: {one_line(error)}"))
    finally:
        watch.close()


def _join(timeout: timedelta) -> tuple[Store, Board]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = store_of_this_attempt(rank, world_size, timeout)
        if store is None:
            store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        return store, Board(store, rank, world_size)
    except (RuntimeError, StoreLost) as error:
        if _speaks_alone():
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            say(f"the ranks cannot meet at {address}: {one_line(error)}")
        _leave(1)


def _speaks_alone() -> bool:
    """Whether this rank says what it knows when ranks cannot agree on one: the first rank of each
    node, and rank 1, because rank 0 may be the one that is lost."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or os.environ["RANK"] == "1"


class Watch:
    """What watches this rank's main thread, and acts and answers for it."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._main = threading.get_ident()
        self._error: BaseException | None = None
        self._heard: Alarm | None = None  # another rank's, for which this one has been called
        self._failed = threading.Event()  # the main thread has
        self._closed = threading.Event()
        self._stopping = threading.Lock()
        self._position: object = None
        self._moved = time.monotonic()
        self._signals = _Signals()
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._listen, self._sample, self._await_signal)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """The run is over: this rank raises no alarm and answers none."""
        self._closed.set()
        self._signals.close()
        try:
            self._board.stop_listening()
            self._board.leave()
        except StoreLost:
            return  # rank 0 held it and has left before
        for thread in self._threads:
            thread.join()

    def fail(self, error: BaseException, alarm: Alarm) -> NoReturn:
        """The main thread cannot go on."""
        self._error = error
        self._failed.set()
        self._stop(alarm)

    def _listen(self) -> None:
        try:
            if not self._board.listen():
                return
            alarm = self._heard = self._board.alarm()
        except (DistNetworkError, DistStoreError, StoreLost):
            return  # rank 0 has left: at the end of a run that is no reason to act
        if alarm.cause == "refused":
            # The same error may be on its way here, and its cleaning up.
            self._failed.wait(CLEAN_UP_S)
        self._stop(alarm)

    def _await_signal(self) -> None:
        if self._signals.wait():
            # Not what this rank has died of, if torchrun sends it: some rank does not answer.
            self._stop(Alarm(self._board.rank, "terminated", code=128 + signal.SIGTERM))

    def _sample(self) -> None:
        while not self._closed.wait(SAMPLE_S):
            position = self._main_position()
            if position != self._position:
                self._position, self._moved = position, time.monotonic()
            timeout = _collective_timeout()
            # Reading the recorder takes a while: not as long as the main thread moves.
            if timeout is not None and time.monotonic() - self._moved > timeout / 2:
                limit = timeout - min(MARGIN_S, timeout / 10)
                if any(c.seconds > limit for c in self._report().collectives if not c.done):
                    self._stop(Alarm(self._board.rank, "late"))

    def _main_position(self) -> object:
        """What changes whenever the main thread enters a collective or executes Python code."""
        frame = sys._current_frames()[self._main]
        groups: list[Any] = list(distributed_c10d._world.pg_map)
        entered = sum(group._get_sequence_number_for_group() for group in groups)
        return id(frame), frame.f_lasti, entered

    def _report(self) -> Report:
        if self._error is not None:
            return make_report(lines_of_error(self._error), 0.0, failed=True)
        lines = lines_of_thread(sys._current_frames()[self._main])
        return make_report(lines, time.monotonic() - self._moved)

    def _stop(self, alarm: Alarm) -> NoReturn:
        """Raise the alarm, or join the one that was raised before; one thread of a rank does."""
        with self._stopping:
            self._closed.set()
            board, report = self._board, self._report()
            # The main thread may fail because the rank that raised it has left.
            alarm = self._heard or alarm
            try:
                alarm = board.raise_alarm(alarm)
                board.post(report)
                if alarm.rank == board.rank or board.inherits_speech():
                    say(self._line(alarm, report))
                    board.set_spoken()
                board.leave()
            except StoreLost as lost:
                # Whoever raised an alarm of another rank's has said its line or will.
                if alarm.rank == board.rank and _speaks_alone():
                    say(
                        f"{board.holder} {lost}; {waiting(board.rank, report, [0])}. The job stops."
                    )
            _leave(alarm.code)

    def _line(self, alarm: Alarm, report: Report) -> str:
        if alarm.cause == "refused":
            return alarm.message
        hosts = self._board.hosts()
        who = f"rank {alarm.rank} ({hosts[alarm.rank]})"
        if alarm.cause == "error":
            return f"{who} failed {moment(report)}: {alarm.message}. The job stops."
        reports = self._board.reports()
        if alarm.cause == "terminated" and len(reports) == len(hosts):
            return f"{who} received SIGTERM {moment(report)}. The job stops."
        return verdict(alarm, reports, hosts, _collective_timeout())


class _Signals:
    """SIGTERM for a thread: the main thread may be in C++ for long and would not handle it.

    Does nothing where SIGTERM has a handler already, such as that of --exit-signal-handler.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._installed = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._installed:
            os.set_blocking(self._write, False)
            signal.set_wakeup_fd(self._write)
            signal.signal(signal.SIGTERM, lambda *_: None)
            os.register_at_fork(after_in_child=self._uninstall)

    def wait(self) -> bool:
        """Block until SIGTERM (True) or the end of the run."""
        while (number := os.read(self._read, 1)) != END:
            if number[0] == signal.SIGTERM:
                return True
        return False

    def close(self) -> None:
        """The main thread's; ends `wait`. To close the pipe would not: forked children hold it."""
        self._uninstall()
        os.write(self._write, END)
        os.close(self._write)

    def _uninstall(self) -> None:
        if self._installed:
            self._installed = False
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _collective_timeout() -> float | None:
    """In seconds; the host gives all groups the default group's. None before there are any."""
    if not torch.distributed.is_initialized():
        return None
    return default_timeout().total_seconds()


def _leave(code: int) -> NoReturn:
    """End the process from any thread. The ordinary end would wait for collectives."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
