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
from functools import lru_cache
from time import perf_counter

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron_scmoe.overlap.own_graph import OwnGraph
from megatron_scmoe.overlap.recorder import Activity, UnitRecorder
from megatron_scmoe.overlap.streams import Event, launch

Exchanged = tuple[list[Tensor], list[Work | None]]
"""What will have been received, and what to wait for."""


class Collective(ABC):
    """One kind of exchange; `streams.launch` calls it and looks after the memory."""

    group: ProcessGroup
    """Who takes part."""
    blocks_host = False
    """Whether `exchange` returns when the numbers of rows are known, and not at once."""

    @abstractmethod
    def mirrored(self) -> "Collective":
        """The exchange that goes the other way."""

    @abstractmethod
    def moves(self) -> bool:
        """Whether anything travels; otherwise what is sent is what is received."""

    def leaving(self, tensor: Tensor) -> Tensor:
        """What is sent of a tensor: its first rows, [N, ...]."""
        return tensor

    @abstractmethod
    def exchange(self, sent: list[Tensor], async_op: bool) -> Exchanged:
        """Called where exchanges run: allocate what will be filled and start filling it.

        Args:
            sent: each [N, ...].

        Returns:
            what will be received, and what to wait for if `async_op`.
        """

    @abstractmethod
    def bytes_to(self, sent: list[Tensor]) -> Sequence[int] | Tensor:
        """What this rank sends to each rank of the group, [n], nothing to itself."""

    def bytes_sent(self, sent: list[Tensor]) -> int | Tensor:
        """What it sends to other ranks."""
        to = self.bytes_to(sent)
        return to.sum() if isinstance(to, Tensor) else sum(to)

    def bytes_between_nodes(self, sent: list[Tensor], ranks_per_node: int) -> int | Tensor:
        """The part of it that leaves this node."""
        to, away = self.bytes_to(sent), _on_other_nodes(self.group, ranks_per_node)
        if isinstance(to, Tensor):
            return sum((to[place] for place in away), to.new_zeros(()))
        return sum(to[place] for place in away)

    def result(self, received: Tensor) -> Tensor:
        """What the caller gets of what was received, [R, ...]; called where compute runs."""
        return received


@dataclass(frozen=True)
class PerTensor(Collective):
    """An exchange by one call of torch.distributed for each tensor."""

    group: ProcessGroup

    def moves(self) -> bool:
        return self.group.size() > 1

    def exchange(self, sent: list[Tensor], async_op: bool) -> Exchanged:
        buffers = [self.buffer(tensor) for tensor in sent]
        pairs = zip(buffers, sent, strict=True)
        return buffers, [self.issue(buffer, tensor, async_op) for buffer, tensor in pairs]

    @abstractmethod
    def buffer(self, sent: Tensor) -> Tensor:
        """An empty tensor for what `issue` writes."""

    @abstractmethod
    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        """Call torch.distributed."""

    def bytes_to(self, sent: list[Tensor]) -> list[int]:
        own = self.group.rank()
        of_tensors = [self._bytes_to(tensor) for tensor in sent]
        sums = [sum(parts) for parts in zip(*of_tensors, strict=True)]
        return [0 if rank == own else size for rank, size in enumerate(sums)]

    @abstractmethod
    def _bytes_to(self, sent: Tensor) -> list[int]:
        """Of one tensor, to this rank too."""


@dataclass(frozen=True)
class AllToAll(PerTensor):
    """Rows for each rank of the group, one rank's after the other's.

    Of a tensor with more rows than are sent the last ones stay behind.
    """

    input_splits: list[int]
    """Rows sent to each rank; sums to N."""
    output_splits: list[int]
    """Rows received from each rank; sums to R."""

    def mirrored(self) -> "AllToAll":
        return AllToAll(self.group, self.output_splits, self.input_splits)

    def leaving(self, tensor: Tensor) -> Tensor:
        return tensor[: sum(self.input_splits)]

    def buffer(self, sent: Tensor) -> Tensor:
        return sent.new_empty((sum(self.output_splits), *sent.shape[1:]))

    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        splits = self.output_splits, self.input_splits
        return torch.distributed.all_to_all_single(
            buffer, sent, *splits, group=self.group, async_op=async_op
        )

    def _bytes_to(self, sent: Tensor) -> list[int]:
        row = sent.shape[1:].numel() * sent.element_size()
        return [rows * row for rows in self.input_splits]


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

    def _bytes_to(self, sent: Tensor) -> list[int]:
        return [sent.nbytes] * self.group.size()


@dataclass(frozen=True)
class ReduceScatter(PerTensor):
    """The sum over ranks of each rank's part of the rows, R = N / n."""

    def mirrored(self) -> AllGather:
        return AllGather(self.group)

    def buffer(self, sent: Tensor) -> Tensor:
        if self._by_gloo():
            return torch.empty_like(sent)
        return sent.new_empty((sent.shape[0] // self.group.size(), *sent.shape[1:]))

    def issue(self, buffer: Tensor, sent: Tensor, async_op: bool) -> Work | None:
        if self._by_gloo():
            # It would reduce everything on every rank: twice the bytes. The parts are summed here.
            return torch.distributed.all_to_all_single(
                buffer, sent, group=self.group, async_op=async_op
            )
        return torch.distributed.reduce_scatter_tensor(
            buffer, sent, group=self.group, async_op=async_op
        )

    def _bytes_to(self, sent: Tensor) -> list[int]:
        size = self.group.size()
        return [sent.nbytes // size] * size

    def result(self, received: Tensor) -> Tensor:
        if self._by_gloo():
            return received.unflatten(0, (self.group.size(), -1)).sum(dim=0)
        return received

    def _by_gloo(self) -> bool:
        return torch.distributed.get_backend(self.group) == "gloo"


class Fused(Collective):
    """An exchange by a function that autograd can take back, such as DeepEP's dispatch.

    It is called where exchanges run, and so is its backward. Its graph is its own: it begins at
    what is sent and ends at what is received.

    Args:
        function: sent tensors to received ones; what it does not block for may run later.
        group: who takes part.
        rows_to: rows that this rank sends to each of them, [n], nothing to itself. The way back is
            taken to carry as many, which holds for the mean over ranks.
        blocks_host: whether the function waits for the numbers of rows.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        group: ProcessGroup,
        rows_to: Tensor,
        blocks_host: bool = False,
    ) -> None:
        self._function = function
        self.group = group
        self._rows_to = rows_to
        self.blocks_host = blocks_host
        self._graph: OwnGraph | None = None

    def mirrored(self) -> "FusedBackward":
        return FusedBackward(self)

    def moves(self) -> bool:
        return True

    def exchange(self, sent: list[Tensor], async_op: bool) -> Exchanged:
        if not torch.is_grad_enabled():
            return list(self._function(*sent)), []
        self._graph = OwnGraph()
        received = self._function(*self._graph.enter(sent))
        self._graph.leave(received)
        return [tensor.detach() for tensor in received], []

    def take_back(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients of what was sent, [N, ...], from those of what came, [R, ...]; call once."""
        assert self._graph is not None
        graph, self._graph = self._graph, None
        return graph.backward(list(grads))

    def bytes_to(self, sent: list[Tensor]) -> Tensor:
        """Of the rows; their weights are not counted."""
        return self._rows_to * (sent[0].shape[1:].numel() * sent[0].element_size())


class FusedBackward(Collective):
    """The way back of a fused exchange."""

    def __init__(self, there: Fused) -> None:
        self._there = there
        self.group = there.group

    def mirrored(self) -> Fused:
        return self._there

    def moves(self) -> bool:
        return True

    def exchange(self, sent: list[Tensor], async_op: bool) -> Exchanged:
        return self._there.take_back(sent), []

    def bytes_to(self, sent: list[Tensor]) -> Tensor:
        return self._there.bytes_to(sent)


class Transfer:
    """One exchange in flight, or none where nothing moves.

    Args:
        collective: what is exchanged with whom.
        tensors: each [N, ...], or with more rows than are sent; referenced until it is complete.
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
        self._log = log
        sent = [collective.leaving(tensor) for tensor in tensors]
        self._bytes: tuple[int | Tensor, int | Tensor] = (0, 0)
        if log is not None:
            nodes = collective.bytes_between_nodes(sent, log[0].ranks_per_node)
            self._bytes = collective.bytes_sent(sent), nodes
        began = perf_counter()
        self._flight = launch(collective.exchange, sent, ready) if collective.moves() else None
        if log is not None and collective.blocks_host:
            log[0].host_waited(perf_counter() - began)
        self._home = sent if self._flight is None else []

    def complete(self) -> list[Tensor]:
        """The received tensors, each [R, ...], in the order in which they were sent; call once."""
        if self._flight is None:
            home, self._home = self._home, []
            return home
        received = self._flight.wait()
        if self._log is not None:
            recorder, activity = self._log
            recorder.exchanged(activity, self._flight, *self._bytes)
        return [self._collective.result(tensor) for tensor in received]


@lru_cache
def _on_other_nodes(group: ProcessGroup, ranks_per_node: int) -> list[int]:
    """Places in a group of the ranks that do not share this rank's node."""
    nodes = [rank // ranks_per_node for rank in torch.distributed.get_process_group_ranks(group)]
    own = nodes[group.rank()]
    return [place for place, node in enumerate(nodes) if node != own]
