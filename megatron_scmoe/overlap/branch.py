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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_scmoe.overlap.collectives import Collective, Transfer
from megatron_scmoe.overlap.own_graph import OwnGraph
from megatron_scmoe.overlap.recorder import Activity, Direction, UnitRecorder
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.overlap.streams import Event, now


class RoutedBranch:
    """The exchanges of one forward pass and the work between them.

    Args:
        overlap: launch the exchanges of the backward pass early; otherwise wait at once.
        recorder: collects the times of all exchanges, forward and backward, if wanted.
        route: its number among the routed branches of the unit.
    """

    def __init__(
        self, overlap: bool = True, recorder: UnitRecorder | None = None, route: int = 0
    ) -> None:
        self._overlap = overlap
        self._log = _Log(recorder, 0 if recorder is None else recorder.pass_number, route)
        self._legs: list[Leg] = []
        self._token: Tensor | None = None
        self._turned = False

    # Forward. ---------------------------------------------------------------------------------

    def depart(self, cargo: Sequence[Sequence[Tensor]]) -> "list[Leg]":
        """Take what every chunk sends, each [N, ...], out of the dense graph; a leg for each."""
        tensors = [tensor for chunk in cargo for tensor in chunk]
        # The chain exists even if nothing in front of it is trained: the experts may be.
        anchor = tensors[0].new_empty(0, dtype=torch.float32)
        anchor.requires_grad_(torch.is_grad_enabled())
        self._token = _Depart.apply(self, [len(chunk) for chunk in cargo], anchor, *tensors)
        ready = now(tensors[0])
        for leg in self._legs:
            leg.ready = ready
        return self._legs

    def wait(self) -> None:
        """Complete the exchanges of all results."""
        for leg in self._legs:
            (leg.result,) = leg.complete()

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
        for leg, grad in zip(self._legs, grads, strict=True):
            leg.grad = grad
        if self._overlap:
            for leg in reversed(self._legs):
                leg.send_gradient()

    def _turn_back(self) -> None:
        """Backward of the routed work, chunk by chunk, the last one first.

        Raises:
            RuntimeError: it has run before and its graph is gone.
        """
        recorder = self._log.recorder
        interrupted = None if recorder is None else recorder.current
        for leg in reversed(self._legs):
            if leg.transfer is None and leg.grad is None:
                break  # nobody used the results
            self._log.switch(Step.WAIT_COMBINE, leg.number)
            if leg.transfer is None:
                leg.send_gradient()
            grads = leg.complete()
            self._log.switch(Step.EXPERTS, leg.number)
            assert leg.graph is not None
            grads = leg.graph.backward(grads)
            self._log.switch(Step.START_DISPATCH, leg.number)
            leg.send_gradient_back(grads)
            del grads
            if not self._overlap:
                leg.cargo = leg.complete()
        if recorder is not None:
            recorder.switch(interrupted)

    def _returned_gradients(self) -> list[Tensor | None]:
        """Gradients of all that departed; None where there is none."""
        grads: list[Tensor | None] = []
        for leg in self._legs:
            if leg.transfer is not None:
                leg.cargo = leg.complete()
            returned: Iterator[Tensor | None] = iter(leg.cargo or repeat(None))
            grads += [None if rows is None else _of_rows(next(returned), rows) for rows in leg.rows]
            leg.cargo = []
        return grads


class _Log(NamedTuple):
    """Where the times of a branch go, and how its work is called there."""

    recorder: UnitRecorder | None
    pass_number: int
    route: int

    def of(
        self, name: str, direction: Direction, chunk: int
    ) -> tuple[UnitRecorder, Activity] | None:
        """For an exchange."""
        if self.recorder is None:
            return None
        return self.recorder, Activity(name, direction, chunk, self.pass_number, self.route)

    def switch(self, step: Step, chunk: int) -> None:
        """Compute turns to a step of the backward pass."""
        if (log := self.of(step.value, "backward", chunk)) is not None:
            log[0].switch(log[1])


@dataclass
class Leg:
    """One chunk of the tokens on its way there and back."""

    number: int
    """Of the chunk."""
    log: "_Log"
    cargo: list[Tensor]
    """What departs, each [N, ...]; empty once it is sent."""
    rows: list[int | None]
    """How many rows of each departed, N; None of integers, for which no gradient comes back."""
    ready: Event | None = None
    """The point of the compute stream behind which the cargo is filled."""
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

    def send(self, collective: Collective) -> None:
        """Launch the exchange of the cargo, or of its first rows, and return at once."""
        self.dispatch = collective
        log = self.log.of("dispatch", "forward", self.number)
        self.transfer = Transfer(collective, self.cargo, log, self.ready)
        self.cargo = []

    def receive(self) -> list[Tensor]:
        """What the other ranks sent, each [R, ...]; it begins the chunk's own graph."""
        received = self.complete()
        if torch.is_grad_enabled():
            self.graph = OwnGraph()
            received = self.graph.enter(received)
        return received

    def send_back(self, collective: Collective, rows: Tensor) -> None:
        """Launch the exchange of the results, [R, ...], and return at once."""
        self.combine = collective
        if self.graph is not None:
            self.graph.leave([rows])
        log = self.log.of("combine", "forward", self.number)
        self.transfer = Transfer(collective, [rows.detach()], log)

    def send_gradient(self) -> None:
        """Launch the exchange of the result's gradient, [N, ...]."""
        assert self.combine is not None and self.grad is not None
        log = self.log.of("combine", "backward", self.number)
        self.transfer = Transfer(self.combine.mirrored(), [self.grad], log)
        self.grad = None

    def send_gradient_back(self, grads: list[Tensor]) -> None:
        """Launch the exchange of the gradients of what was received, each [R, ...]."""
        assert self.dispatch is not None
        log = self.log.of("dispatch", "backward", self.number)
        self.transfer = Transfer(self.dispatch.mirrored(), grads, log)

    def complete(self) -> list[Tensor]:
        """What the exchange in flight brings."""
        assert self.transfer is not None
        transfer, self.transfer = self.transfer, None
        return transfer.complete()


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
        for number, size in enumerate(sizes):
            # Copied here if they have to be: what `ready` marks is complete.
            cargo = [next(departing).detach().contiguous() for _ in range(size)]
            rows = [x.shape[0] if x.is_floating_point() else None for x in cargo]
            branch._legs.append(Leg(number, branch._log, cargo, rows))
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
        results = tuple(leg.result for leg in branch._legs)
        for leg in branch._legs:
            leg.result = None
        return results  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.branch._take_gradients(grads)
        return None, torch.zeros(0, dtype=ctx.dtype, device=ctx.device)
