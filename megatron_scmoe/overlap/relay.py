"""An exchange in two hops: once to every node, and on to those of its ranks that want a row.

    Relay    [N, ...] --across--> [M, ...] --copied--> [P, ...] --inside--> [R, ...]
    Merge    [N, ...] <--across-- [M, ...] <--summed-- [P, ...] <--inside-- [R, ...]

Each is the other's way back, for outputs as for gradients. Between the hops something is computed
where exchanges run: on CUDA on the side stream, on the CPU in the thread of `streams.aside`, so
that compute waits for neither hop. All sizes are known on the host before.

Shapes: N rows sent, M rows that this rank hands on, P copies of them, R rows received
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scmoe.overlap.collectives import AllToAll, Collective, Exchanged
from megatron_scmoe.overlap.streams import aside


class Fork:
    """Who gets which rows, known once they have arrived; both ways read it.

    Args:
        wanted: from the first tensor that arrived, [M, ...], which ranks of the node want each row,
            [M, r].
    """

    def __init__(self, wanted: Callable[[Tensor], Tensor]) -> None:
        self._wanted = wanted
        self._rows: Tensor | None = None

    def find(self, arrived: Tensor, copies: int) -> None:
        """Read it from what arrived, unless it is known."""
        if self._rows is None:
            by_rank = self._wanted(arrived).T.flatten()
            # As the host's permutation does: those that are wanted first, in their order.
            chosen = by_rank.argsort(descending=True, stable=True)[:copies]
            self._rows = chosen % len(arrived)

    def copied(self, rows: Tensor) -> Tensor:
        """[P, ...] from [M, ...], one rank's rows after the other's."""
        assert self._rows is not None
        return rows.index_select(0, self._rows)

    def summed(self, copies: Tensor, rows: int) -> Tensor:
        """[M, ...] from [P, ...], in single precision at least, rounded once."""
        assert self._rows is not None
        precision = torch.promote_types(copies.dtype, torch.float32)
        sums = copies.new_zeros((rows, *copies.shape[1:]), dtype=precision)
        return sums.index_add_(0, self._rows, copies.to(precision)).to(copies.dtype)


@dataclass(frozen=True)
class TwoHops(Collective):
    """Both ways."""

    across: AllToAll
    """Between ranks of the same place in their nodes."""
    inside: AllToAll
    """Between the ranks of a node."""
    fork: Fork

    def moves(self) -> bool:
        return self.across.moves()

    @property
    def group(self) -> ProcessGroup:  # type: ignore[override]
        return self.across.group

    def bytes_to(self, sent: list[Tensor]) -> list[int]:
        hops = (self.across.bytes_to(sent), self.inside.bytes_to(sent))
        return [sum(parts) for parts in zip(*hops, strict=True)]

    def _run(self, buffers: list[Tensor], run: Callable[[], None], async_op: bool) -> Exchanged:
        if async_op:
            return buffers, [aside(run)]
        run()
        return buffers, []


class Relay(TwoHops):
    """There: every row crosses once, and is copied where it arrives."""

    def mirrored(self) -> "Merge":
        return Merge(self.across.mirrored(), self.inside.mirrored(), self.fork)

    def leaving(self, tensor: Tensor) -> Tensor:
        return self.across.leaving(tensor)

    def exchange(self, sent: list[Tensor], async_op: bool) -> Exchanged:
        received = [self.inside.buffer(tensor) for tensor in sent]

        def run() -> None:
            arrived, _ = self.across.exchange(sent, False)
            self.fork.find(arrived[0], sum(self.inside.input_splits))
            for buffer, rows in zip(received, arrived, strict=True):
                self.inside.issue(buffer, self.fork.copied(rows), False)

        return self._run(received, run, async_op)


class Merge(TwoHops):
    """Back: copies of a row are summed on the node, and the sum crosses once."""

    def mirrored(self) -> Relay:
        return Relay(self.across.mirrored(), self.inside.mirrored(), self.fork)

    def leaving(self, tensor: Tensor) -> Tensor:
        return self.inside.leaving(tensor)

    def exchange(self, sent: list[Tensor], async_op: bool) -> Exchanged:
        received = [self.across.buffer(tensor) for tensor in sent]

        def run() -> None:
            copies, _ = self.inside.exchange(sent, False)
            for buffer, rows in zip(received, copies, strict=True):
                sums = self.fork.summed(rows, sum(self.across.input_splits))
                self.across.issue(buffer, sums, False)

        return self._run(received, run, async_op)
