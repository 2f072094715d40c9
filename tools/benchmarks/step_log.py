"""What a run of Megatron's loop says about its steps: the loss line and the timers.

A step is complete with the loss line, the timers of `--timing-log-level 1` behind it and the
forward-only pass that `--eval-interval 1` puts behind that:

     [time] iteration  3/  9 | ... | elapsed time per iteration (ms): 812.3 | ... |
    INFO:megatron.core.timers:(min, max) time across ranks (ms):
        forward-backward ...............................: (700.12, 701.34)
        all-grads-sync .................................: (80.12, 80.44)
    INFO:megatron.core.timers:(min, max) time across ranks (ms):
        evaluate .......................................: (201.10, 201.30)
     validation loss at iteration 3 | ...
"""

import re
from dataclasses import dataclass

_LOSS_LINE = re.compile(r"iteration +(\d+)/ *\d+ \|(.*)")
_FIELD = re.compile(r" ([\w ()-]+): +([-+0-9.Ee]+) \|")
_SLOTS = re.compile(r" expert slots: (\d+,\d+) \|")
_TIMER = re.compile(r"^ +([\w-]+) \.+: \(([0-9.]+), ([0-9.]+)\)")
_END = re.compile(r"^ validation loss at iteration (\d+) \|")


@dataclass(frozen=True)
class TrainingStep:
    """One training step and the forward-only pass behind it; all times in seconds."""

    iteration: int
    fields: dict[str, float]
    """Of the loss line, as printed there."""
    timers: dict[str, float]
    """The slower rank's."""
    slots: str | None = None
    """Where the experts run, forward and backward, for example `1,3`; None for stock contenders."""

    @property
    def train(self) -> float:
        """Forward, backward, gradient reduction and optimizer."""
        return self.fields["elapsed time per iteration (ms)"] / 1e3

    @property
    def layers(self) -> float:
        """Forward and backward of all micro-batches, without the reduction of the gradients."""
        return self.timers["forward-backward"] - self.timers["all-grads-sync"]

    @property
    def inference(self) -> float:
        """Forward only, without gradients, as many micro-batches as the training step has."""
        return self.timers["evaluate"]

    @property
    def exchange(self) -> float | None:
        """All-to-alls in flight; None for stock contenders, whose all-to-alls block."""
        return self._seconds("a2a (ms)")

    @property
    def exposed(self) -> float | None:
        """The part of it for which compute stood still."""
        return self._seconds("a2a exposed (ms)")

    def _seconds(self, field: str) -> float | None:
        return self.fields[field] / 1e3 if field in self.fields else None


class StepReader:
    """The lines of a run, put together one after the other."""

    def __init__(self) -> None:
        self._iteration: int | None = None
        self._fields: dict[str, float] = {}
        self._timers: dict[str, float] = {}
        self._slots: str | None = None

    def feed(self, line: str) -> TrainingStep | None:
        """The step that this line completes, if it does."""
        if match := _LOSS_LINE.search(line):
            self._iteration = int(match[1])
            self._fields = {name.strip(): float(value) for name, value in _FIELD.findall(match[2])}
            self._timers = {}
            slots = _SLOTS.search(match[2])
            self._slots = slots[1] if slots else None
        elif match := _TIMER.search(line):
            self._timers[match[1]] = float(match[3]) / 1e3
        elif (match := _END.search(line)) and self._iteration == int(match[1]):
            step = TrainingStep(self._iteration, self._fields, self._timers, self._slots)
            # The pass at the end of a run says the same once more.
            self._iteration, self._timers = None, {}
            return step
        return None
