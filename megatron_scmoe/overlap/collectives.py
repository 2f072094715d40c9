"""Exchanges of rows between ranks that are launched now and completed later; no autograd here.

Every collective knows the one that carries gradients the other way:

    all-to-all <-> all-to-all with the splits swapped        all-gather <-> reduce-scatter

so that whatever goes there can come back by `mirrored()`, be it an expert's output or a gradient.

Shapes: N rows sent, R rows received, n ranks of the group
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron_scmoe.overlap.recorder import Activity, UnitRecorder
from megatron_scmoe.overlap.streams import Event, Flight, launch, reduces_in_flight


class Collective(Protocol):
    """One kind of exchange over one group."""

    @property
    def group(self) -> ProcessGroup:
        """Who takes part."""

    def mirrored(self) -> "Collective":
        """The exchange that goes the other way."""

    def buffer(self, sent: Tensor) -> Tensor:
        """An empty tensor for what `issue` writes."""

    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        """Call torch.distributed."""

    def bytes_sent(self, sent: Tensor) -> int:
        """What this rank sends to other ranks."""

    def result(self, buffer: Tensor) -> Tensor:
        """What the caller gets of a filled buffer, [R, ...]."""


@dataclass(frozen=True)
class AllToAll:
    """Rows for each rank of the group, one rank's after the other's."""

    group: ProcessGroup
    input_splits: list[int]
    """Rows sent to each rank; sums to N."""
    output_splits: list[int]
    """Rows received from each rank; sums to R."""

    def mirrored(self) -> "AllToAll":
        return AllToAll(self.group, self.output_splits, self.input_splits)

    def buffer(self, sent: Tensor) -> Tensor:
        return sent.new_empty((sum(self.output_splits), *sent.shape[1:]))

    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        splits = self.output_splits, self.input_splits
        return torch.distributed.all_to_all_single(
            buffer, sent, *splits, group=self.group, async_op=async_op
        )

    def bytes_sent(self, sent: Tensor) -> int:
        rows = sum(self.input_splits) - self.input_splits[self.group.rank()]
        return rows * sent[0:1].nbytes if rows else 0

    def result(self, buffer: Tensor) -> Tensor:
        return buffer


@dataclass(frozen=True)
class AllGather:
    """The rows of all ranks, R = n N; every rank has the same number."""

    group: ProcessGroup

    def mirrored(self) -> "ReduceScatter":
        return ReduceScatter(self.group)

    def buffer(self, sent: Tensor) -> Tensor:
        return sent.new_empty((self.group.size() * sent.shape[0], *sent.shape[1:]))

    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        return torch.distributed.all_gather_into_tensor(
            buffer, sent, group=self.group, async_op=async_op
        )

    def bytes_sent(self, sent: Tensor) -> int:
        return (self.group.size() - 1) * sent.nbytes

    def result(self, buffer: Tensor) -> Tensor:
        return buffer


@dataclass(frozen=True)
class ReduceScatter:
    """The sum over ranks of each rank's part of the rows, R = N / n."""

    group: ProcessGroup

    def mirrored(self) -> AllGather:
        return AllGather(self.group)

    def buffer(self, sent: Tensor) -> Tensor:
        if reduces_in_flight(sent):
            return sent.new_empty((sent.shape[0] // self.group.size(), *sent.shape[1:]))
        return torch.empty_like(sent)

    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        if reduces_in_flight(sent):
            return torch.distributed.reduce_scatter_tensor(
                buffer, sent, group=self.group, async_op=async_op
            )
        # gloo would reduce everything on every rank: twice the bytes. The parts are summed here.
        return torch.distributed.all_to_all_single(
            buffer, sent, group=self.group, async_op=async_op
        )

    def bytes_sent(self, sent: Tensor) -> int:
        size = self.group.size()
        return (size - 1) * (sent.nbytes // size)

    def result(self, buffer: Tensor) -> Tensor:
        if reduces_in_flight(buffer):
            return buffer
        return buffer.unflatten(0, (self.group.size(), -1)).sum(dim=0)


class Transfer:
    """One exchange in flight.

    Args:
        collective: what is exchanged with whom.
        tensors: each [N, ...]; they stay referenced until the exchange is complete.
        log: the recorder that gets the times of the exchange, and its name there; if wanted.
        ready: the point of the compute stream behind which `tensors` are filled; now by default.
    """

    def __init__(
        self,
        collective: Collective,
        tensors: Sequence[Tensor],
        log: tuple[UnitRecorder, Activity] | None = None,
        ready: Event | None = None,
    ) -> None:
        self._collective = collective
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._log = log
        self._flight: Flight | None = None
        if collective.group.size() == 1:  # nothing moves
            self._buffers = self._sent
            return
        self._buffers = [collective.buffer(tensor) for tensor in self._sent]

        def issue(async_op: bool) -> list[Work | None]:
            pairs = zip(self._buffers, self._sent, strict=True)
            return [collective.issue(buffer, sent, async_op) for buffer, sent in pairs]

        self._flight = launch(issue, [*self._sent, *self._buffers], ready)

    def complete(self) -> list[Tensor]:
        """The received tensors, each [R, ...], in the order in which they were sent; call once."""
        buffers, self._buffers = self._buffers, []
        if self._flight is None:
            return buffers
        self._flight.wait()
        if self._log is not None:
            recorder, activity = self._log
            sent = sum(self._collective.bytes_sent(tensor) for tensor in self._sent)
            recorder.exchanged(activity, self._flight, sent)
        self._sent.clear()
        return [self._collective.result(buffer) for buffer in buffers]
