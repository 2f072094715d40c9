"""Where an exchange runs: on side streams on CUDA, on gloo's worker threads on CPU.

This is the only module with streams and events of CUDA; whether there are any is asked of the
tensors here. Everything above has two verbs: `launch` issues communication without blocking the
thread that computes, `Flight.wait` makes the result usable.

On CUDA this is also the only place that allocates what an exchange fills, hands it over to compute
and decides when memory may be used again. Three rules keep both streams out of each other's memory:

    filled    is allocated while the side stream is current. Memory that compute has freed belongs
              to compute's stream, which may still be writing to it: the side stream waits for what
              it sends, not for everything that was enqueued since.
    received  is recorded as used by compute, so that the side stream gets it back no earlier than
              compute is done with it.
    sent      stays referenced until compute is ordered behind the exchange.

A flight also carries the two times by which the overlap is judged, in seconds:

    in flight = completion of the exchange - its start
    blocked   = time for which compute stood still in `wait`

so that `1 - blocked / in flight` is the share of the communication that was hidden.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from types import ModuleType
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor
from torch.distributed import Work

# Allocates what it fills and issues the collectives of one exchange; the arguments are what is sent
# and torch.distributed's `async_op`. Gives what will have been received, and the works to wait for.
Exchange = Callable[[list[Tensor], bool], tuple[list[Tensor], Sequence[Work | None]]]
Event = torch.cuda.Event
Moment = float | torch.cuda.Event
# Exchanges of one lane run one after the other. Numbers of rows do not queue behind rows, unless
# both have one communicator, as in an all-gather. Weights come from the host.
Lane = Literal["rows", "counts", "weights"]


class Flight(Protocol):
    """Communication that was launched."""

    def wait(self) -> list[Tensor]:
        """What was received; call once. All later work of the caller (CPU thread or current CUDA
        stream) is ordered behind the exchange."""

    def to_host(self) -> "HostCopy":
        """Copy the first received tensor to the host behind the exchange; before `wait`."""

    def times(self, clock: "Clock") -> tuple[float, float, float]:
        """(start, completion, blocked), in seconds of the clock; only after `wait`."""


class HostCopy(Protocol):
    """A small tensor on its way to the host."""

    def wait(self) -> tuple[Tensor, float]:
        """The values, on the CPU, and the seconds for which the host stood still."""


def launch(
    exchange: Exchange, sent: Sequence[Tensor], ready: Event | None = None, lane: Lane = "rows"
) -> Flight:
    """Start communication beside the work that the caller enqueues next.

    Args:
        exchange: called at once, where exchanges run; it reads `sent` and what it allocates itself.
        sent: what leaves.
        ready: what `now` returned when `sent` was filled; work enqueued since then does not delay
            the exchange. None for this moment.
        lane: what it may have to wait for.
    """
    dense = [tensor.contiguous() for tensor in sent]
    if any(copy is not tensor for copy, tensor in zip(dense, sent, strict=True)):
        ready = None  # the copies are made now
    if _cuda(dense[0]) is None:
        return _ThreadFlight(exchange, dense)
    return _StreamFlight(exchange, dense, ready, lane)


def fetch(slots: Sequence[Tensor], home: Sequence[Tensor]) -> Flight:
    """Start to copy weights to where they are computed with.

    Args:
        slots: what is written, contiguous; nobody may read it before `wait`.
        home: what is read, on the host; on CUDA pinned, or the copy keeps the host waiting.
    """

    def copy() -> None:
        for slot, values in zip(slots, home, strict=True):
            slot.copy_(values, non_blocking=True)

    def exchange(_: list[Tensor], async_op: bool) -> tuple[list[Tensor], list[Any]]:
        if async_op:
            return [], [_thread("expert-fetch").submit(copy)]
        copy()
        return [], []

    return launch(exchange, slots, lane="weights")


def aside(run: Callable[[], None]) -> Any:
    """CPU: let another thread do several exchanges one after the other, and give what to wait for.

    One thread does all of them in the order in which they were asked for. Ranks ask in one order,
    so that their calls of a group meet; nobody else may call that group meanwhile.
    """
    return _thread("relay").submit(run)


def now(tensor: Tensor) -> Event | None:
    """This point of the compute stream of the tensor's device; None where there are no streams."""
    cuda = _cuda(tensor)
    return None if cuda is None else cuda.current_stream(tensor.device).record_event()


def runs_ahead(tensor: Tensor) -> bool:
    """Whether the host enqueues work for a device, which it must not keep waiting."""
    return _cuda(tensor) is not None


def moment(tensor: Tensor) -> Moment:
    """This point of the work on the tensor's device: of the compute stream, or of the CPU."""
    cuda = _cuda(tensor)
    if cuda is None:
        return perf_counter()
    event = cuda.Event(enable_timing=True)
    event.record(cuda.current_stream(tensor.device))
    return event


class Clock:
    """Moments in seconds of `time.perf_counter`.

    Made when they have passed: it waits for the device, once for any number of moments. Durations
    are measured back from there, because an event's distance has 24 bits, which in hours would be
    milliseconds.

    Args:
        like: a tensor on the device whose moments are asked for.
    """

    def __init__(self, like: Tensor) -> None:
        self._end = moment(like)
        if not isinstance(self._end, float):
            self._end.synchronize()
        self._seconds = perf_counter()

    def seconds(self, at: Moment) -> float:
        """The time of a moment."""
        if isinstance(at, float):
            return at
        assert not isinstance(self._end, float)
        return self._seconds - at.elapsed_time(self._end) / 1e3


class _ThreadFlight:
    """CPU: the backend's own threads move the data, `wait` blocks the calling thread."""

    def __init__(self, exchange: Exchange, sent: list[Tensor]) -> None:
        self._sent = sent
        self._started = perf_counter()
        self._received, works = exchange(sent, True)
        self._works = [work for work in works if work is not None]
        self._num_works = len(self._works)
        completed: list[float] = []
        for work in self._works:
            work.get_future().add_done_callback(lambda _: completed.append(perf_counter()))
        self._completed = completed
        self._blocked = 0.0
        self._waited = 0.0

    def wait(self) -> list[Tensor]:
        before = perf_counter()
        for work in self._works:
            work.wait()
        self._waited = perf_counter()
        self._blocked = self._waited - before
        # A work holds its output, and through it, in training, the graph that holds this flight.
        self._works.clear()
        self._sent = []
        received, self._received = self._received, []
        return received

    def to_host(self) -> HostCopy:
        return _Here(self._works, self._received[0])

    def times(self, clock: Clock) -> tuple[float, float, float]:
        # A callback may still be queued behind the waiting thread: completion is then the wait's
        # own end, never later.
        complete = len(self._completed) == self._num_works
        # Without works the exchange was complete when its launch returned.
        last = max(self._completed, default=self._started)
        end = min(last, self._waited) if complete else self._waited
        return self._started, end, min(self._blocked, end - self._started)


class _Aside(Future[None]):
    """CPU: what another thread does, as a work of torch.distributed."""

    def wait(self) -> None:
        self.result()

    def get_future(self) -> Self:
        return self


class _Thread:
    """CPU: does what it is given, in order.

    An executor of the standard library would not let a process end, after an error, while an
    exchange waits for a rank that does not come.
    """

    def __init__(self, name: str) -> None:
        self._given: SimpleQueue[tuple[Callable[[], None], _Aside]] = SimpleQueue()
        Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, run: Callable[[], None]) -> _Aside:
        done = _Aside()
        self._given.put((run, done))
        return done

    def _work(self) -> None:
        while True:
            run, done = self._given.get()
            try:
                run()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)
            # Until the next one comes they would hold what was exchanged.
            del run, done


@lru_cache
def _thread(name: str) -> _Thread:
    """One for each name."""
    return _Thread(name)


class _Here:
    """CPU: the tensor is on the host already, once its exchange is complete."""

    def __init__(self, works: Sequence[Work], tensor: Tensor) -> None:
        self._works = tuple(works)
        self._tensor = tensor

    def wait(self) -> tuple[Tensor, float]:
        before = perf_counter()
        for work in self._works:
            work.wait()
        self._works = ()
        return self._tensor, perf_counter() - before


class _StreamFlight:
    """CUDA: the collectives run on a high-priority side stream, one for each lane and device."""

    def __init__(
        self, exchange: Exchange, sent: list[Tensor], ready: Event | None, lane: Lane
    ) -> None:
        cuda = _cuda(sent[0])
        assert cuda is not None
        self._cuda, self._device = cuda, sent[0].device
        self._side = _side_stream(cuda, self._device, lane)
        self._sent = sent
        self._begin, self._end, self._before_wait, self._after_wait = (
            cuda.Event(enable_timing=True) for _ in range(4)
        )
        self._side.wait_event(ready or cuda.current_stream(self._device).record_event())
        with cuda.stream(self._side):
            self._begin.record(self._side)
            self._received, _ = exchange(sent, False)
            self._end.record(self._side)

    def wait(self) -> list[Tensor]:
        compute = self._cuda.current_stream(self._device)
        self._before_wait.record(compute)
        compute.wait_event(self._end)
        self._after_wait.record(compute)
        received, self._received = self._received, []
        for tensor in received:
            tensor.record_stream(compute)
        # Whoever uses this memory next does so behind the exchange.
        self._sent = []
        return received

    def __del__(self) -> None:
        # Nobody waited: the side stream may still read what is freed now.
        for tensor in self._sent:
            tensor.record_stream(self._side)

    def to_host(self) -> HostCopy:
        with self._cuda.stream(self._side):
            return _Coming(_to_host(self._received[0]), self._side.record_event())

    def times(self, clock: Clock) -> tuple[float, float, float]:
        begin = clock.seconds(self._begin)
        in_flight = self._begin.elapsed_time(self._end) / 1e3
        blocked = self._before_wait.elapsed_time(self._after_wait) / 1e3
        return begin, begin + in_flight, min(blocked, in_flight)


class _Coming:
    """CUDA: the tensor is on the host once the device has reached an event."""

    def __init__(self, tensor: Tensor, event: Event) -> None:
        self._tensor = tensor
        self._event = event

    def wait(self) -> tuple[Tensor, float]:
        before = perf_counter()
        self._event.synchronize()
        return self._tensor, perf_counter() - before


def _cuda(tensor: Tensor) -> ModuleType | None:
    """Streams and events of the tensor's device; None where the calling thread computes."""
    return torch.cuda if tensor.is_cuda else None


def _to_host(tensor: Tensor) -> Tensor:
    """A pinned copy that the current stream makes; the host goes on."""
    return tensor.to("cpu", non_blocking=True)


@lru_cache
def _side_stream(cuda: ModuleType, device: torch.device, lane: Lane) -> torch.cuda.Stream:
    return cuda.Stream(device, priority=-1)
