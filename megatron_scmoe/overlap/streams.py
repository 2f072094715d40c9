"""Where an exchange runs: on a side stream on CUDA, on gloo's worker threads on CPU.

This is the only module that knows the device. Everything above it has two verbs: `launch` issues
communication without blocking the thread that computes, `Flight.wait` makes the result usable.

A flight also carries the two times by which the overlap is judged, in seconds:

    in flight = completion of the exchange - its start
    blocked   = time for which compute stood still in `wait`

so that `1 - blocked / in flight` is the share of the communication that was hidden.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from time import perf_counter
from typing import Protocol

import torch
from torch.distributed import Work

# Issues the collectives of one exchange; the argument is torch.distributed's `async_op`.
Issue = Callable[[bool], Sequence[Work | None]]


class Flight(Protocol):
    """Communication that was launched."""

    def wait(self) -> None:
        """Order all later work of the caller (CPU thread or current CUDA stream) after it."""

    def seconds(self) -> tuple[float, float]:
        """(in flight, blocked), in seconds; only after `wait`."""


def launch(issue: Issue, buffers: Sequence[torch.Tensor]) -> Flight:
    """Start communication beside the work that the caller enqueues next.

    Args:
        issue: issues the collectives; it may read and write `buffers` only.
        buffers: every tensor that the collectives read or write.
    """
    return _StreamFlight(issue, buffers) if buffers[0].is_cuda else _ThreadFlight(issue)


class _ThreadFlight:
    """CPU: the backend's own threads move the data, `wait` blocks the calling thread."""

    def __init__(self, issue: Issue) -> None:
        self._started = perf_counter()
        self._works = [work for work in issue(True) if work is not None]
        self._num_works = len(self._works)
        completed: list[float] = []
        for work in self._works:
            work.get_future().add_done_callback(lambda _: completed.append(perf_counter()))
        self._completed = completed
        self._blocked = 0.0
        self._waited = 0.0

    def wait(self) -> None:
        before = perf_counter()
        for work in self._works:
            work.wait()
        self._waited = perf_counter()
        self._blocked = self._waited - before
        # A work holds its output, and through it, in training, the graph that holds this flight.
        self._works.clear()

    def seconds(self) -> tuple[float, float]:
        # A callback may still be queued behind the waiting thread: completion is then the wait's
        # own end, never later.
        complete = len(self._completed) == self._num_works
        end = min(max(self._completed), self._waited) if complete else self._waited
        return end - self._started, min(self._blocked, end - self._started)


class _StreamFlight:
    """CUDA: the collectives run on one high-priority side stream per device."""

    def __init__(self, issue: Issue, buffers: Sequence[torch.Tensor]) -> None:
        device = buffers[0].device
        compute, side = torch.cuda.current_stream(device), _side_stream(device)
        side.wait_event(compute.record_event())
        self._device = device
        self._begin, self._end, self._before_wait, self._after_wait = (
            torch.cuda.Event(enable_timing=True) for _ in range(4)
        )
        with torch.cuda.stream(side):
            self._begin.record(side)
            issue(False)
            self._end.record(side)
        for buffer in buffers:
            # The allocator must not hand a buffer out again before the side stream is done.
            buffer.record_stream(side)

    def wait(self) -> None:
        compute = torch.cuda.current_stream(self._device)
        self._before_wait.record(compute)
        compute.wait_event(self._end)
        self._after_wait.record(compute)

    def seconds(self) -> tuple[float, float]:
        self._after_wait.synchronize()
        in_flight = self._begin.elapsed_time(self._end) / 1e3
        blocked = self._before_wait.elapsed_time(self._after_wait) / 1e3
        return in_flight, min(blocked, in_flight)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
