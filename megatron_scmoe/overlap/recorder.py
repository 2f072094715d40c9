"""What a unit did and when: its exchanges always, every step of it while someone looks.

Compute does one thing at a time, so its part of the record is a line that is cut wherever the unit
turns to something else: `switch`. Exchanges run beside it and bring their own times.

Times are seconds on the clock of this process (`time.perf_counter`).
"""

from dataclasses import dataclass, field
from itertools import batched
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_scmoe.overlap.streams import Clock, Flight, Moment, moment

Direction = Literal["forward", "backward"]


class Activity(NamedTuple):
    """Something that a unit does: a step of the schedule, or an exchange."""

    name: str
    """Value of a Step; "dispatch" or "combine"."""
    direction: Direction
    chunk: int = 0
    pass_number: int = 0
    """Which forward pass of the iteration it belongs to, from 1: a backward pass has the number of
    the forward pass that built its graph."""
    route: int = 0
    """The routed branch that it belongs to."""


class Span(NamedTuple):
    """An activity between two times."""

    activity: Activity
    begin: float
    end: float


class Exchange(NamedTuple):
    """An exchange between two times."""

    activity: Activity
    begin: float
    end: float
    blocked: float
    """Seconds for which compute stood still until it was complete."""
    bytes: int
    """That this rank sent to other ranks."""
    bytes_between_nodes: int = 0
    """The part of them that left its node."""


@dataclass
class UnitRecord:
    """What a unit did since the record was last taken."""

    exchanges: list[Exchange] = field(default_factory=list)
    steps: list[Span] = field(default_factory=list)
    """Empty unless steps were recorded."""
    host_wait: float = 0.0
    """Seconds for which the host waited for numbers of rows. On a device this is no time in which
    compute stood still, unless the host is what compute waits for."""
    tokens_per_expert: Tensor | None = None
    """Rows of every local expert, [e], summed over the passes; None without a pass."""
    same_choices: Tensor | None = None
    """Of a unit with two gates: tokens whose gates have the same first choice, and all tokens, [2],
    on the device; None of other units."""


class UnitRecorder:
    """The record of one unit, collected over the micro-batches of an iteration.

    Args:
        ranks_per_node: ranks of the job that share a node.
    """

    def __init__(self, ranks_per_node: int = 1) -> None:
        self.ranks_per_node = ranks_per_node
        self.records_steps = False
        """Whether the steps are wanted: it costs a time stamp at every turn."""
        self.current: Activity | None = None
        """What compute does, while steps are recorded."""
        self.pass_number = 0
        """Of the forward pass that runs."""
        self._flights: list[tuple[Activity, Flight]] = []
        self._bytes: list[int | Tensor] = []
        self._turns: list[tuple[Activity | None, Moment]] = []
        self._host_wait = 0.0
        self._tokens_per_expert: Tensor | None = None
        self._same_choices: Tensor | None = None
        self._like = torch.empty(0)

    def begin_pass(self, hidden_states: Tensor) -> None:
        """A forward pass begins; all of its work is on the device of `hidden_states`."""
        self.pass_number += 1
        self._like = hidden_states.new_empty(0)

    def switch(self, activity: Activity | None) -> None:
        """Compute turns to something else, or away from this unit."""
        if self.records_steps:
            self.current = activity
            self._turns.append((activity, moment(self._like)))

    def exchanged(
        self,
        activity: Activity,
        flight: Flight,
        bytes_sent: int | Tensor,
        between_nodes: int | Tensor,
    ) -> None:
        """An exchange has been waited for."""
        self._flights.append((activity, flight))
        self._bytes += (bytes_sent, between_nodes)

    def host_waited(self, seconds: float) -> None:
        """The host stood still until it knew numbers of rows."""
        self._host_wait += seconds

    def routed(self, tokens_per_expert: Tensor) -> None:
        """The experts are given this many rows, [e], on the CPU."""
        counted = tokens_per_expert.clone()
        if self._tokens_per_expert is not None:
            counted += self._tokens_per_expert
        self._tokens_per_expert = counted

    def gates_chose(self, same: Tensor) -> None:
        """Whether the first choices of both gates are the same expert, of every token, bool."""
        number = same.sum()
        counted = torch.stack([number, torch.full_like(number, same.numel())])
        if self._same_choices is not None:
            counted += self._same_choices
        self._same_choices = counted

    def take(self) -> UnitRecord:
        """The record since the last call. Synchronizes with the device: once an iteration."""
        flights, self._flights = self._flights, []
        sent, self._bytes = self._bytes, []
        turns, self._turns = self._turns, []
        tokens, self._tokens_per_expert = self._tokens_per_expert, None
        same, self._same_choices = self._same_choices, None
        host_wait, self._host_wait = self._host_wait, 0.0
        self.pass_number = 0
        clock = Clock(self._like)
        numbers = _on_host(sent)
        exchanges = [
            Exchange(activity, *flight.times(clock), *sizes)
            for (activity, flight), sizes in zip(flights, batched(numbers, 2), strict=True)
        ]
        times = [clock.seconds(at) for _, at in turns]
        steps = [
            Span(activity, begin, end)
            for (activity, _), begin, end in zip(turns, times, times[1:], strict=False)
            if activity is not None
        ]
        return UnitRecord(exchanges, steps, host_wait, tokens, same)


def _on_host(numbers: list[int | Tensor]) -> list[int]:
    """Numbers and tensors of one number each, those of a device by one copy."""
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    copied = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(copied) if isinstance(number, Tensor) else number for number in numbers]


class _Mark(torch.autograd.Function):
    """Identity between two dense operators; its backward says that the one behind is done."""

    @staticmethod
    def forward(ctx, recorder: UnitRecorder, before: Activity | None, *tensors: Tensor):
        ctx.recorder, ctx.before = recorder, before
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        ctx.recorder.switch(ctx.before)
        return None, None, *grads


def mark_backward(
    recorder: UnitRecorder, before: Activity | None, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Record when the backward pass turns to the operator in front of this place.

    Args:
        before: the backward of that operator; None if it belongs to another unit.
        tensors: all that it hands to the operator behind.
    """
    wanted = tuple(tensor for tensor in tensors if tensor.requires_grad)
    if not (recorder.records_steps and torch.is_grad_enabled() and wanted):
        return tensors
    marked = iter(_Mark.apply(recorder, before, *wanted))
    return tuple(next(marked) if tensor.requires_grad else tensor for tensor in tensors)
