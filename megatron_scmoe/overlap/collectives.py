"""Exchanges of rows between ranks that are launched now and completed later.

Every collective knows the one that carries gradients the other way:

    all-to-all <-> all-to-all with the splits swapped        all-gather <-> reduce-scatter
    a fused exchange of the host's <-> its backward

so that whatever goes there can come back by `mirrored()`, be it an expert's output or a gradient.

Shapes: N rows sent, R rows received, n ranks of the group
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import ProcessGroup, Work

from megatron_scmoe.overlap.recorder import Activity, UnitRecorder
from megatron_scmoe.overlap.streams import (
    Event,
    Flight,
    hand_over,
    launch,
    reduces_in_flight,
)


class Collective(ABC):
    """One kind of exchange."""

    @abstractmethod
    def mirrored(self) -> "Collective":
        """The exchange that goes the other way."""

    @abstractmethod
    def launch(self, sent: list[Tensor], ready: Event | None) -> tuple[Flight | None, list[Tensor]]:
        """Start it and return at once: no flight where nothing moves, and what will be filled.

        Args:
            sent: each [N, ...].
            ready: the point of the compute stream behind which they are filled; now by default.
        """

    @abstractmethod
    def bytes_sent(self, sent: list[Tensor]) -> int | Tensor:
        """What this rank sends to other ranks."""

    @abstractmethod
    def results(self, filled: list[Tensor]) -> list[Tensor]:
        """What the caller gets of what was filled, each [R, ...]."""


@dataclass(frozen=True)
class PerTensor(Collective):
    """An exchange by one call of torch.distributed for each tensor."""

    group: ProcessGroup
    """Who takes part."""

    @abstractmethod
    def buffer(self, sent: Tensor) -> Tensor:
        """An empty tensor for what `issue` writes."""

    @abstractmethod
    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        """Call torch.distributed."""

    def launch(self, sent: list[Tensor], ready: Event | None) -> tuple[Flight | None, list[Tensor]]:
        if self.group.size() == 1:
            return None, sent
        buffers = [self.buffer(tensor) for tensor in sent]

        def issue(async_op: bool) -> list[Work | None]:
            pairs = zip(buffers, sent, strict=True)
            return [self.issue(buffer, tensor, async_op) for buffer, tensor in pairs]

        return launch(issue, [*sent, *buffers], ready), buffers

    def bytes_sent(self, sent: list[Tensor]) -> int:
        return sum(self._bytes_sent(tensor) for tensor in sent)

    @abstractmethod
    def _bytes_sent(self, sent: Tensor) -> int:
        """Of one tensor."""

    def results(self, filled: list[Tensor]) -> list[Tensor]:
        return [self.result(buffer) for buffer in filled]

    def result(self, buffer: Tensor) -> Tensor:
        """What the caller gets of a filled buffer, [R, ...]."""
        return buffer


@dataclass(frozen=True)
class AllToAll(PerTensor):
    """Rows for each rank of the group, one rank's after the other's."""

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

    def _bytes_sent(self, sent: Tensor) -> int:
        rows = sum(self.input_splits) - self.input_splits[self.group.rank()]
        return rows * sent[0:1].nbytes if rows else 0


@dataclass(frozen=True)
class AllGather(PerTensor):
    """The rows of all ranks, R = n N; every rank has the same number."""

    def mirrored(self) -> "ReduceScatter":
        return ReduceScatter(self.group)

    def buffer(self, sent: Tensor) -> Tensor:
        return sent.new_empty((self.group.size() * sent.shape[0], *sent.shape[1:]))

    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        return torch.distributed.all_gather_into_tensor(
            buffer, sent, group=self.group, async_op=async_op
        )

    def _bytes_sent(self, sent: Tensor) -> int:
        return (self.group.size() - 1) * sent.nbytes


@dataclass(frozen=True)
class ReduceScatter(PerTensor):
    """The sum over ranks of each rank's part of the rows, R = N / n."""

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

    def _bytes_sent(self, sent: Tensor) -> int:
        size = self.group.size()
        return (size - 1) * (sent.nbytes // size)

    def result(self, buffer: Tensor) -> Tensor:
        if reduces_in_flight(buffer):
            return buffer
        return buffer.unflatten(0, (self.group.size(), -1)).sum(dim=0)


class Fused(Collective):
    """An exchange by a function that autograd can take back, such as DeepEP's dispatch.

    It is called where exchanges run, and so is its backward. Its graph is its own: it begins at
    copies of what is sent and ends at what is received.

    Args:
        function: sent tensors to received ones; what it does not block for may run later.
        rows_leaving: rows that this rank sends to other ranks, []. The way back is taken to carry
            as many, which holds for the mean over ranks.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], rows_leaving: int | Tensor
    ) -> None:
        self._function = function
        self._rows_leaving = rows_leaving
        self._inputs: list[Tensor] = []
        self._outputs: list[GradientEdge] = []

    def mirrored(self) -> "FusedBackward":
        return FusedBackward(self)

    def launch(self, sent: list[Tensor], ready: Event | None) -> tuple[Flight, list[Tensor]]:
        differentiable = torch.is_grad_enabled()
        received: list[Tensor] = []

        def issue(_async_op: bool) -> list[Work | None]:
            inputs = [tensor.detach().requires_grad_(differentiable) for tensor in sent]
            received.extend(self._function(*inputs))
            if differentiable:
                self._inputs = inputs
                # The edges lead to the graph without holding the received rows.
                self._outputs = [get_gradient_edge(tensor) for tensor in received]
            return []

        return launch(issue, sent, ready), received

    def take_back(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of what was sent from those of what was received; call once."""
        inputs, self._inputs = self._inputs, []
        outputs, self._outputs = self._outputs, []
        return torch.autograd.grad(outputs, inputs, grads)

    def bytes_sent(self, sent: list[Tensor]) -> int | Tensor:
        """Of the rows; their weights are not counted."""
        return self._rows_leaving * sent[0][0].nbytes

    def results(self, filled: list[Tensor]) -> list[Tensor]:
        hand_over(filled)
        return [tensor.detach() for tensor in filled]


class FusedBackward(Collective):
    """The way back of a fused exchange."""

    def __init__(self, there: Fused) -> None:
        self._there = there

    def mirrored(self) -> Fused:
        return self._there

    def launch(self, sent: list[Tensor], ready: Event | None) -> tuple[Flight, list[Tensor]]:
        received: list[Tensor] = []

        def issue(_async_op: bool) -> list[Work | None]:
            received.extend(self._there.take_back(sent))
            return []

        return launch(issue, sent, ready), received

    def bytes_sent(self, sent: list[Tensor]) -> int | Tensor:
        return self._there.bytes_sent(sent)

    def results(self, filled: list[Tensor]) -> list[Tensor]:
        hand_over(filled)
        return filled


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
        self._flight, self._buffers = collective.launch(self._sent, ready)

    def complete(self) -> list[Tensor]:
        """The received tensors, each [R, ...], in the order in which they were sent; call once."""
        buffers, self._buffers = self._buffers, []
        if self._flight is None:
            return buffers
        self._flight.wait()
        if self._log is not None:
            recorder, activity = self._log
            recorder.exchanged(activity, self._flight, self._collective.bytes_sent(self._sent))
        self._sent.clear()
        return self._collective.results(buffers)
