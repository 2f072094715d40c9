"""The processes beside a rank that write its checkpoints: they live as long as the rank wants.

With --async-save the host starts three for each rank: one that writes, the fork server that the
writer comes from, and one that carries results back. A launcher and Slurm send SIGTERM to all
processes of a rank, not to the rank alone; those die of it, and the checkpoint that the rank saves
on its way out (--exit-signal-handler) waits for them forever. A rank that is killed leaves them
behind: the restarted job would share its memory, and its files, with writers of the run before.

The functions without an underscore but the last three replace host symbols (replacements.py).
"""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.training import get_args

from megatron_scmoe import host

SECONDS_TO_NOTICE = 1.0  # that the rank is gone

# The host's: this is imported before it is replaced.
_host_loop: Callable[..., None] = PersistentAsyncCaller.async_loop


def only_for_its_rank(_: Callable[..., None]) -> Callable[..., None]:
    """`PersistentAsyncCaller.async_loop`, the writer's main function, of a writer that nobody but
    its rank can end."""
    return write_for_rank  # found by its name in the process that is started with it


def write_for_rank(*args: Any) -> None:
    """Main function of the writer, whose process has imported everything anew."""
    obey_the_rank_alone()
    host.prepare()
    _host_loop(*args)


def results_queue(_: Callable[..., Any]) -> Callable[..., Any]:
    """`get_write_results_queue` that needs no process unless one writes."""

    def replacement(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is None:
            if _writes_in_a_process():
                manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
                manager.start(obey_the_rank_alone)
                filesystem_async._results_queue = manager.Queue()
            else:
                filesystem_async._results_queue = queue.Queue()
        return filesystem_async._results_queue

    return replacement


def _writes_in_a_process() -> bool:
    """Whether the queue has to reach another process; it always may, at the price of one more."""
    try:
        return get_args().async_save
    except AssertionError:  # no training run: nobody has said
        return True


def starting_deaf(init_persistent_async_worker: Callable[..., None]) -> Callable[..., None]:
    """`init_persistent_async_worker` whose processes inherit that SIGTERM is blocked."""

    def replacement(*args: Any, **kwargs: Any) -> None:
        resource_tracker.ensure_running()  # it would unblock the signal when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            init_persistent_async_worker(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    return replacement


def obey_the_rank_alone() -> None:
    """Let this child of a rank leave when the rank ends it or is gone, for no other SIGTERM.

    Call it before the child starts threads.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank = multiprocessing.parent_process()
    threading.Thread(target=_leave_with, args=(rank,), daemon=True).start()


def _leave_with(rank: Any) -> None:
    while rank.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, SECONDS_TO_NOTICE)
        if received is not None and received.si_pid == rank.pid:
            break
    os._exit(1)


def check_writer() -> None:
    """Look after the writer; the host waits for a dead one forever.

    Raises:
        RuntimeError: its process has ended.
    """
    writer = PersistentAsyncCaller._persistent_process
    if writer is not None and writer.exitcode is not None:
        raise RuntimeError(
            f"the process that writes checkpoints has ended (exit code {writer.exitcode}; -9 often "
            "means that the host's memory is full)"
        )


@contextmanager
def not_waiting_for_a_dead_writer() -> Iterator[None]:
    """Let a save inside the block end when the writer does.

    The host waits, without looking, until the writer has taken its tensors, which is when memory is
    shortest.

    Raises:
        RuntimeError: its process has ended.
    """
    saved = threading.Event()
    threading.Thread(target=_wait_no_longer, args=(saved,), daemon=True).start()
    try:
        yield
    finally:
        saved.set()
    check_writer()


def _wait_no_longer(saved: threading.Event) -> None:
    caller = PersistentAsyncCaller
    while not saved.wait(SECONDS_TO_NOTICE):
        writer = caller._persistent_process
        if writer is None or writer.is_alive():
            continue
        for waiting in (caller._persistent_queue, caller._persistent_preload_q):
            waiting.cancel_join_thread()  # nobody reads what is on the way
        with suppress(ValueError):  # nobody waits, or not yet
            caller._persistent_preload_q.task_done()
