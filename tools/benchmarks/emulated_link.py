"""A link that exists only as time: every all-to-all lasts as long as its bytes would take.

For one rank alone, whose all-to-alls move nothing. Inside of `emulated_link` an exchange of the
layer is in flight for the time of the transfer, beside compute: on CUDA a kernel on the side
stream that counts clock cycles, on the CPU a time until which a wait sleeps. Stock Megatron's
all-to-alls block for the same time, where compute runs. Nothing takes a core or a network stack
from compute, as it would between two processes of one machine, and as little as on a network card.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from megatron_scmoe.overlap import collectives, streams
from megatron_scmoe.overlap.collectives import AllToAll


@dataclass
class Link:
    """One rank's link to the others; one transfer after the other."""

    bytes_per_s: float | None
    """Each direction; None without a limit."""
    ranks: int
    """In the expert parallel group: 1 / ranks of all rows stay at home."""
    bytes: int = 0
    """Sent so far."""
    seconds: float = 0.0
    """In transfers so far."""
    _free: float = field(default=0.0, repr=False)

    def send(self, nbytes: int) -> float:
        """Seconds that it takes."""
        leaving = nbytes * (self.ranks - 1) // self.ranks
        took = 0.0 if self.bytes_per_s is None else leaving / self.bytes_per_s
        self.bytes += leaving
        self.seconds += took
        return took

    def reserve(self, start: float, seconds: float) -> float:
        """When a transfer that starts at `start` is through, on the CPU's clock."""
        self._free = max(self._free, start) + seconds
        return self._free


class _Sleep:
    """A transfer on the CPU; see streams.Flight."""

    def __init__(self, link: Link, seconds: float, sent: list[Tensor]) -> None:
        self._sent = sent
        self._started = time.perf_counter()
        self._end = link.reserve(self._started, seconds)
        self._blocked = 0.0

    def wait(self) -> list[Tensor]:
        before = time.perf_counter()
        if before < self._end:
            time.sleep(self._end - before)
            # A sleep is late by some microseconds; nobody has computed in them.
            self._end = time.perf_counter()
            self._blocked = self._end - before
        return self._sent

    def times(self, clock: streams.Clock) -> tuple[float, float, float]:
        return self._started, self._end, self._blocked


@lru_cache
def _cycles_per_s() -> float:
    """Of the clock that torch.cuda._sleep counts."""
    cycles = 200_000_000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles // 10)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (begin.elapsed_time(end) / 1e3)


def sleep_on_stream(seconds: float) -> None:
    """A kernel that lasts as long, on the current stream."""
    torch.cuda._sleep(round(seconds * _cycles_per_s()))


def _blocking(link: Link, tensor: Tensor) -> Tensor:
    """Stock Megatron's all-to-all of one rank: the identity, after the time of the transfer, and so
    is its gradient."""
    _block(link, tensor)
    output = tensor.view_as(tensor)
    if output.requires_grad:
        output.register_hook(partial(_block, link))
    return output


def _block(link: Link, tensor: Tensor) -> None:
    seconds = link.send(tensor.nbytes)
    if tensor.is_cuda:
        sleep_on_stream(seconds)
    else:
        time.sleep(seconds)


@contextmanager
def emulated_link(link: Link) -> Iterator[None]:
    """All all-to-alls of expert parallelism take the time of `link`, forward and backward."""

    def launch(
        _exchange: streams.Exchange, sent: list[Tensor], ready: streams.Event | None
    ) -> streams.Flight:
        seconds = sum(link.send(tensor.nbytes) for tensor in sent)
        if not sent[0].is_cuda:
            return _Sleep(link, seconds, sent)  # type: ignore[return-value]

        def exchange(sent: list[Tensor], _async_op: bool) -> tuple[list[Tensor], list[Any]]:
            sleep_on_stream(seconds)
            return sent, []

        return streams.launch(exchange, sent, ready)

    def all_to_all(_group: Any, tensor: Tensor, *_splits: Any, **_options: Any) -> Tensor:
        return _blocking(link, tensor)

    with (
        mock.patch.object(AllToAll, "moves", lambda _: True),
        mock.patch.object(collectives, "launch", launch),
        mock.patch.object(token_dispatcher, "all_to_all", all_to_all),
    ):
        yield
