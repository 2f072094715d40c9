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
Event = torch.cuda.Event
Moment = float | torch.cuda.Event


class Flight(Protocol):
    """Communication that was launched."""

    def wait(self) -> None:
        """Order all later work of the caller (CPU thread or current CUDA stream) after it."""

    def times(self) -> tuple[float, float, float]:
        """(start, completion, blocked), in seconds of `moment_seconds`; only after `wait`."""


def launch(issue: Issue, buffers: Sequence[torch.Tensor], ready: Event | None = None) -> Flight:
    """Start communication beside the work that the caller enqueues next.

    Args:
        issue: issues the collectives; it may read and write `buffers` only.
        buffers: every tensor that the collectives read or write.
        ready: what `now` returned when the buffers to send were filled; work enqueued since then
            does not delay the exchange. None for this moment.
    """
    if buffers[0].is_cuda:
        return _StreamFlight(issue, buffers, ready)
    return _ThreadFlight(issue)


def hand_over(tensors: Sequence[torch.Tensor]) -> None:
    """Tell the allocator that tensors which an exchange has allocated are now the caller's."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def now(tensor: torch.Tensor) -> Event | None:
    """This point of the compute stream of the tensor's device; None where there are no streams."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def runs_ahead(tensor: torch.Tensor) -> bool:
    """Whether the host enqueues work for a device, which it must not keep waiting."""
    return tensor.is_cuda


def reduces_in_flight(tensor: torch.Tensor) -> bool:
    """Whether a reduce-scatter moves no more than each rank's parts (NCCL)."""
    return tensor.is_cuda


def moment() -> Moment:
    """This point of the work that is being issued: of the compute stream, or of the CPU."""
    if not torch.cuda.is_available():
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def moment_seconds(at: Moment) -> float:
    """A moment in seconds of `time.perf_counter`; waits until the device has reached it."""
    if isinstance(at, float):
        return at
    at.synchronize()
    event, seconds = _clock()
    return seconds + event.elapsed_time(at) / 1e3


@lru_cache
def _clock() -> tuple[Event, float]:
    """An event and the time at which the device reached it."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    return event, perf_counter()


class HostCopy:
    """A small tensor that an exchange fills, on its way to the host; the device goes on."""

    def __init__(self, flight: Flight, tensor: torch.Tensor) -> None:
        """Enqueue the copy behind the exchange that fills `tensor`."""
        self._flight = flight
        self._tensor = tensor
        self._event: Event | None = None
        if tensor.is_cuda:
            side = _side_stream(tensor.device)
            with torch.cuda.stream(side):
                self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host.copy_(tensor, non_blocking=True)
                self._event = side.record_event()

    def wait(self) -> torch.Tensor:
        """The values, on the CPU. Blocks the host."""
        self._flight.wait()
        if self._event is None:
            return self._tensor
        self._event.synchronize()
        return self._host


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

    def times(self) -> tuple[float, float, float]:
        # A callback may still be queued behind the waiting thread: completion is then the wait's
        # own end, never later.
        complete = len(self._completed) == self._num_works
        # Without works the exchange was complete when its launch returned.
        last = max(self._completed, default=self._started)
        end = min(last, self._waited) if complete else self._waited
        return self._started, end, min(self._blocked, end - self._started)


class _StreamFlight:
    """CUDA: the collectives run on one high-priority side stream per device."""

    def __init__(self, issue: Issue, buffers: Sequence[torch.Tensor], ready: Event | None) -> None:
        device = buffers[0].device
        side = _side_stream(device)
        side.wait_event(ready or torch.cuda.current_stream(device).record_event())
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

    def times(self) -> tuple[float, float, float]:
        self._after_wait.synchronize()
        begin, end = moment_seconds(self._begin), moment_seconds(self._end)
        blocked = self._before_wait.elapsed_time(self._after_wait) / 1e3
        return begin, end, min(blocked, end - begin)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
