"""All-to-all that overlaps in both directions: start and wait are each other's backward.

    forward    start: launch the exchange           wait: its result
    backward   start: result of the mirrored one    wait: launch the mirrored exchange

Autograd runs the node that was created last first, so the forward order alone gives the
overlapped backward, without hooks:

    forward    start | dense work | wait
    backward   wait launches | dense work's backward | start waits

Differs from megatron.core.tensor_parallel.mappings.all_to_all, whose forward and backward block.
All state travels in the handle, nothing lives on a module: any number of exchanges may be in
flight. Between start and wait only an empty token carries the graph edge, so that nobody can read
a half-filled buffer.

Shapes: N rows sent, R rows received; splits are rows per rank of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_scmoe.overlap.meter import ExchangeMeter
from megatron_scmoe.overlap.streams import Flight, launch


@dataclass(frozen=True)
class AllToAllPlan:
    """Who gets how many rows."""

    group: torch.distributed.ProcessGroup
    input_splits: list[int]
    """Rows sent to each rank of the group; sums to N."""
    output_splits: list[int]
    """Rows received from each rank of the group; sums to R."""
    meter: ExchangeMeter | None = None
    """Collects the times of the exchange and of its mirror, if wanted."""

    def mirrored(self) -> "AllToAllPlan":
        """The exchange that carries the gradients (or the experts' outputs) back."""
        return AllToAllPlan(self.group, self.output_splits, self.input_splits, self.meter)


class AllToAllHandle:
    """One exchange between `start` and `wait`."""

    def __init__(self, plan: AllToAllPlan, tensors: tuple[Tensor, ...]) -> None:
        self._plan = plan
        self._forward: _Transfer | None = None
        self._backward: _Transfer | None = None
        self._token: Tensor | None = _Start.apply(self, *tensors)

    def wait(self) -> tuple[Tensor, ...]:
        """The received tensors, each [R, ...], in the order in which they were sent; call it once.

        The graph now holds the token: kept here as well it would hold the graph in a cycle.
        """
        token, self._token = self._token, None
        return _Wait.apply(self, token)


class LocalHandle:
    """The exchange of a group of one rank: nothing moves."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors

    def wait(self) -> tuple[Tensor, ...]:
        tensors, self._tensors = self._tensors, ()
        return tensors


def start(plan: AllToAllPlan, *tensors: Tensor) -> AllToAllHandle | LocalHandle:
    """Launch the exchange of `tensors`, each [N, ...], and return at once."""
    if plan.group.size() == 1:
        return LocalHandle(tensors)
    return AllToAllHandle(plan, tensors)


class _Transfer:
    """Buffers and flight of one direction; the buffers live until the wait."""

    def __init__(self, plan: AllToAllPlan, tensors: Sequence[Tensor]) -> None:
        sent = [tensor.contiguous() for tensor in tensors]
        rows = sum(plan.output_splits)
        self._received = tuple(tensor.new_empty((rows, *tensor.shape[1:])) for tensor in sent)
        self._sent = sent
        self._meter = plan.meter

        def issue(async_op: bool) -> list[torch.distributed.Work | None]:
            return [
                torch.distributed.all_to_all_single(
                    output,
                    input_,
                    plan.output_splits,
                    plan.input_splits,
                    group=plan.group,
                    async_op=async_op,
                )
                for output, input_ in zip(self._received, sent, strict=True)
            ]

        self._flight: Flight = launch(issue, [*sent, *self._received])

    def complete(self) -> tuple[Tensor, ...]:
        self._flight.wait()
        if self._meter is not None:
            self._meter.add(self._flight)
        self._sent.clear()
        received, self._received = self._received, ()
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, handle: AllToAllHandle, *tensors: Tensor) -> Tensor:
        ctx.handle = handle
        handle._forward = _Transfer(handle._plan, tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _token_grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.handle._backward.complete()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, handle: AllToAllHandle, token: Tensor) -> tuple[Tensor, ...]:
        ctx.handle = handle
        assert handle._forward is not None
        return handle._forward.complete()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.handle._backward = _Transfer(ctx.handle._plan.mirrored(), grads)
        return None, grads[0].new_empty(0)
