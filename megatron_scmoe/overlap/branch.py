"""The routed branch of one forward pass: an autograd graph of its own, beside the dense one.

Autograd would run the experts' backward where the forward pass ran the experts, mirrored. Here the
two are chosen separately: the dense chain has places (between two of its operators), one of them
runs the routed work forward, one of them runs it backward.

    forward    depart ----- dense work ----- turn ----- dense work ----- arrive
                 |  dispatch in flight        |    combine in flight        |
                 `----------------------> experts -------------------------->'

    backward   arrive launches combine' | dense' | the turn runs experts', launches dispatch' |
               dense' | depart returns the gradients

`depart`, `turn` and `arrive` are nodes of the dense graph, chained by an empty token, so that
autograd keeps their order. The token lives where the cargo lives: on a GPU, autograd runs the
backward of a node on the thread and the stream of its output's device. What happens between depart
and arrive is the branch's own graph of each chunk, from the received tensors to what is sent back,
and the turn's backward runs it as activation checkpointing does. Nothing lives on a module; any
number of branches may be in flight.

Shapes: N rows sent, R rows received, of each chunk of the tokens
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_scmoe.overlap.collectives import Collective, Transfer
from megatron_scmoe.overlap.own_graph import OwnGraph
from megatron_scmoe.overlap.recorder import Activity, Direction, UnitRecorder
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.overlap.streams import Event, now


@dataclass
class _Chunk:
    """One chunk on its way."""

    cargo: list[Tensor]
    """What departs, each [N, ...]; empty once it is sent."""
    rows: list[int | None]
    """How many rows of each departed, N; None of integers, for which no gradient comes back."""
    dispatch: Collective | None = None
    transfer: Transfer | None = None
    """The exchange in flight, whichever it is."""
    graph: OwnGraph | None = None
    """From what was received, each [R, ...], to what was sent back, [R, ...]."""
    combine: Collective | None = None
    result: Tensor | None = None
    """What came back, [N, ...]."""
    grad: Tensor | None = None
    """Gradient of the result, until it is sent."""

    def complete(self) -> list[Tensor]:
        """What the exchange in flight brings."""
        assert self.transfer is not None
        transfer, self.transfer = self.transfer, None
        return transfer.complete()


class RoutedBranch:
    """The exchanges of one forward pass and the work between them.

    Args:
        overlap: launch the exchanges of the backward pass early; otherwise wait at once.
        recorder: collects the times of all exchanges, forward and backward, if wanted.
    """

    def __init__(self, overlap: bool = True, recorder: UnitRecorder | None = None) -> None:
        self._overlap = overlap
        self._recorder = recorder
        self._pass_number = 0 if recorder is None else recorder.pass_number
        self._chunks: list[_Chunk] = []
        self._ready: Event | None = None
        self._token: Tensor | None = None
        self._turned = False

    # Forward. ---------------------------------------------------------------------------------

    def depart(self, cargo: Sequence[Sequence[Tensor]]) -> None:
        """Take what every chunk sends, each [N, ...], out of the dense graph."""
        tensors = [tensor for chunk in cargo for tensor in chunk]
        # The chain exists even if nothing in front of it is trained: the experts may be.
        anchor = tensors[0].new_empty(0, dtype=torch.float32)
        anchor.requires_grad_(torch.is_grad_enabled())
        self._token = _Depart.apply(self, [len(chunk) for chunk in cargo], anchor, *tensors)
        self._ready = now(tensors[0])

    def send(self, chunk: int, collective: Collective) -> None:
        """Launch the exchange of a chunk's cargo, or of its first rows, and return at once."""
        own = self._chunks[chunk]
        own.dispatch = collective
        log = self._log("dispatch", "forward", chunk)
        own.transfer = Transfer(collective, own.cargo, log, self._ready)
        own.cargo = []

    def receive(self, chunk: int) -> list[Tensor]:
        """What the other ranks sent, each [R, ...]; it begins the chunk's own graph."""
        own = self._chunks[chunk]
        received = own.complete()
        if torch.is_grad_enabled():
            own.graph = OwnGraph()
            received = own.graph.enter(received)
        return received

    def send_back(self, chunk: int, collective: Collective, rows: Tensor) -> None:
        """Launch the exchange of the chunk's results, [R, ...], and return at once."""
        own = self._chunks[chunk]
        own.combine = collective
        if own.graph is not None:
            own.graph.leave([rows])
        log = self._log("combine", "forward", chunk)
        own.transfer = Transfer(collective, [rows.detach()], log)

    def wait(self) -> None:
        """Complete the exchanges of all results."""
        for own in self._chunks:
            (own.result,) = own.complete()

    def turn(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Mark the place of the dense chain whose backward runs the routed work's backward.

        Args:
            tensors: all that the dense operator in front hands to the one behind.
        """
        if not torch.is_grad_enabled() or self._turned:
            return tensors
        self._turned = True
        self._token, *passed = _Turn.apply(self, self._token, *tensors)
        return tuple(passed)

    def arrive(self) -> tuple[Tensor, ...]:
        """Results of every chunk, each [N, ...], back in the dense graph.

        The graph now holds the token: kept here as well it would hold the graph in a cycle.
        """
        self.turn(())  # the last place, if no other was passed
        token, self._token = self._token, None
        return _Arrive.apply(self, token)

    def abandon(self) -> None:
        """The pass ends here, by an error: the token would hold the graph in a cycle."""
        self._token = None

    # Backward. --------------------------------------------------------------------------------

    def _take_gradients(self, grads: Sequence[Tensor]) -> None:
        """Gradients of the results leave, in the order in which they will be awaited."""
        for own, grad in zip(self._chunks, grads, strict=True):
            own.grad = grad
        if self._overlap:
            for chunk in reversed(range(len(self._chunks))):
                self._send_gradient(chunk)

    def _send_gradient(self, chunk: int) -> None:
        own = self._chunks[chunk]
        assert own.combine is not None and own.grad is not None
        log = self._log("combine", "backward", chunk)
        own.transfer = Transfer(own.combine.mirrored(), [own.grad], log)
        own.grad = None

    def _turn_back(self) -> None:
        """Backward of the routed work, chunk by chunk, the last one first.

        Raises:
            RuntimeError: it has run before and its graph is gone.
        """
        interrupted = None if self._recorder is None else self._recorder.current
        for chunk in reversed(range(len(self._chunks))):
            own = self._chunks[chunk]
            if own.transfer is None and own.grad is None:
                break  # nobody used the results
            self._switch(Step.WAIT_COMBINE, chunk)
            if own.transfer is None:
                self._send_gradient(chunk)
            grads = own.complete()
            self._switch(Step.EXPERTS, chunk)
            assert own.graph is not None
            grads = own.graph.backward(grads)
            self._switch(Step.START_DISPATCH, chunk)
            assert own.dispatch is not None
            log = self._log("dispatch", "backward", chunk)
            own.transfer = Transfer(own.dispatch.mirrored(), grads, log)
            del grads
            if not self._overlap:
                own.cargo = own.complete()
        if self._recorder is not None:
            self._recorder.switch(interrupted)

    def _switch(self, step: Step, chunk: int) -> None:
        if self._recorder is not None:
            self._recorder.switch(self._activity(step.value, "backward", chunk))

    def _activity(self, name: str, direction: Direction, chunk: int) -> Activity:
        return Activity(name, direction, chunk, self._pass_number)

    def _log(
        self, name: str, direction: Direction, chunk: int
    ) -> tuple[UnitRecorder, Activity] | None:
        if self._recorder is None:
            return None
        return self._recorder, self._activity(name, direction, chunk)

    def _returned_gradients(self) -> list[Tensor | None]:
        """Gradients of all that departed; None where there is none."""
        grads: list[Tensor | None] = []
        for own in self._chunks:
            if own.transfer is not None:
                own.cargo = own.complete()
            returned: Iterator[Tensor | None] = iter(own.cargo or repeat(None))
            grads += [None if rows is None else _of_rows(next(returned), rows) for rows in own.rows]
            own.cargo = []
        return grads


def _of_rows(grad: Tensor | None, rows: int) -> Tensor | None:
    """A gradient of all rows from that of those which were sent, the first ones."""
    if grad is None or grad.shape[0] == rows:
        return grad
    whole = grad.new_zeros(rows, *grad.shape[1:])
    whole[: grad.shape[0]] = grad
    return whole


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, branch: RoutedBranch, sizes: Sequence[int], anchor: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.branch = branch
        departing = iter(tensors)
        for size in sizes:
            # Copied here if they have to be: what `ready` marks is complete.
            cargo = [next(departing).detach().contiguous() for _ in range(size)]
            rows = [x.shape[0] if x.is_floating_point() else None for x in cargo]
            branch._chunks.append(_Chunk(cargo, rows))
        return anchor.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _token_grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.branch._returned_gradients()


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch: RoutedBranch, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.branch = branch
        ctx.set_materialize_grads(False)
        return token.view_as(token), *(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(
        ctx, token_grad: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.branch._turn_back()
        return None, token_grad, *grads


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch: RoutedBranch, token: Tensor) -> tuple[Tensor, ...]:
        ctx.branch = branch
        ctx.device, ctx.dtype = token.device, token.dtype
        results = tuple(chunk.result for chunk in branch._chunks)
        for chunk in branch._chunks:
            chunk.result = None
        return results  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.branch._take_gradients(grads)
        return None, torch.zeros(0, dtype=ctx.dtype, device=ctx.device)
