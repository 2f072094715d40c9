"""Executes the schedule of one unit, also inside the calls of the host's attention.

The host's attention is one call. Its core and its output projection are modules: what the schedule
has in front of them runs when they are about to be called.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module

from megatron_scmoe.overlap.recorder import Activity, UnitRecorder
from megatron_scmoe.overlap.schedule import Step, Task

# No work of the unit: where its backward pass is watched, or told to run the experts.
PLACES = (Step.MARK, Step.TURN)


class Pass(Protocol):
    """One forward pass through a unit, as far as the runner knows it."""

    inside: tuple[Tensor, ...] | None
    """What one operator of the attention hands to the next, while the steps between them run."""


@dataclass
class _Running:
    """A pass, and what is still to be done in it."""

    run: Any
    tasks: deque[Task]


class Runner:
    """The tasks of a schedule, done in order.

    Args:
        steps: what is done for each step, given the pass and the task.
        recorder: is told what compute turns to.
    """

    def __init__(
        self, steps: Mapping[Step, Callable[[Any, Task], None]], recorder: UnitRecorder
    ) -> None:
        self._steps = steps
        self._recorder = recorder
        self._running: _Running | None = None
        self._recorded = False

    def execute(self, run: Pass, tasks: tuple[Task, ...], recorded: bool) -> None:
        """Do all tasks.

        Args:
            run: the pass that is handed to each of them.
            recorded: whether this pass is on record; evaluation is not.
        """
        self._running = _Running(run, deque(tasks))
        self._recorded = recorded
        try:
            self._advance(self._running)
        finally:
            self._running = None
            self._turn_to(None)

    def open(self, module: Module, step: Step) -> None:
        """Let a module that is called inside of another step wait for what stands in front of it.

        Args:
            step: what the schedule calls the module.
        """
        module.register_forward_pre_hook(partial(self._reach, step), with_kwargs=True)

    def _advance(self, running: _Running, until: Step | None = None) -> None:
        """Do the next tasks, up to `until`, which the caller is about to do."""
        while running.tasks:
            task = running.tasks.popleft()
            if task.step not in PLACES:
                self._turn_to(task)
            if task.step is until:
                return
            self._steps[task.step](running.run, task)

    def _reach(
        self, step: Step, module: Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pre-hook: do what the schedule has in front of this operator."""
        running = self._running
        if running is None or Task(step) not in running.tasks:
            return None
        run = running.run
        run.inside = tuple(x for x in arguments if isinstance(x, Tensor) and x.requires_grad)
        self._advance(running, until=step)
        passed, run.inside = iter(run.inside), None
        changed = (
            next(passed) if isinstance(x, Tensor) and x.requires_grad else x for x in arguments
        )
        return tuple(changed), options

    def _turn_to(self, task: Task | None) -> None:
        if not self._recorded:
            return
        number = self._recorder.pass_number
        self._recorder.switch(
            None
            if task is None
            else Activity(task.step.value, "forward", task.number, number, task.route)
        )
