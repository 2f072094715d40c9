"""The entry script, with a clock at stock Megatron's MoE layers.

    torchrun ... tools/benchmarks/meter_moe_layer.py <options of pretrain_gpt_scmoe.py>

Adds four fields to the loss line, in milliseconds of one iteration, mean over ranks, summed over
layers and micro-batches: the time of the MoE layers and of the all-to-alls inside them, in
training (forward and backward) and in the forward-only pass that ended before this iteration.
All-to-alls of stock Megatron block, so both are plain wall-clock times.
"""

from megatron_scmoe import start

start.replace_host_symbols()

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from torch import Tensor

from pretrain_gpt_scmoe import main

LAYER, ALL_TO_ALL = "moe layer", "moe a2a"
LAYER_INFERENCE, ALL_TO_ALL_INFERENCE = "moe layer inference", "moe a2a inference"
FIELDS = (LAYER, ALL_TO_ALL, LAYER_INFERENCE, ALL_TO_ALL_INFERENCE)


class LayerClock:
    """Seconds by field, since the last reading."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(FIELDS, 0.0)
        self._started = 0.0
        self._training = False

    def begin(self, training: bool) -> None:
        """Enter a layer; what is timed until `end` is of this kind."""
        self._started = time.perf_counter()
        self._training = training

    def end(self) -> None:
        self._add(LAYER, LAYER_INFERENCE, self._started)

    def exchange(self, all_to_all: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.distributed.all_to_all_single`, timed."""

        @functools.wraps(all_to_all)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = all_to_all(*args, **kwargs)
            self._add(ALL_TO_ALL, ALL_TO_ALL_INFERENCE, started)
            return result

        return replacement

    def _add(self, training: str, inference: str, started: float) -> None:
        # Not is_grad_enabled(): inside of autograd functions, forward and backward, it is off.
        field = training if self._training else inference
        self.seconds[field] += time.perf_counter() - started


def timed_forward(forward: Callable[..., Any], clock: LayerClock) -> Callable[..., Any]:
    """`MoELayer.forward` between two readings of the clock, forward and backward."""

    @functools.wraps(forward)
    def replacement(self: MoELayer, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        clock.begin(torch.is_grad_enabled())
        output, bias = forward(self, hidden_states, *args, **kwargs)
        clock.end()
        if output.requires_grad:
            # Backward goes the other way: it enters at the output and leaves at the input.
            output.register_hook(lambda _: clock.begin(True))
            hidden_states.register_hook(lambda _: clock.end())
        return output, bias

    return replacement


class ClockTracker(MoEMetricsTracker):
    """The host's tracker of MoE losses, which reports once an iteration, and the clock."""

    def __init__(self, clock: LayerClock) -> None:
        super().__init__()
        self._clock = clock

    def report(self, *args: Any, **options: Any) -> str:
        losses = super().report(*args, **options)
        sums = torch.tensor(list(self._clock.seconds.values()), dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        means = (sums / torch.distributed.get_world_size() * 1e3).tolist()
        self._clock.seconds = dict.fromkeys(FIELDS, 0.0)
        return losses + "".join(
            f" {name} (ms): {mean:.3f} |" for name, mean in zip(FIELDS, means, strict=True)
        )


if __name__ == "__main__":
    the_clock = LayerClock()
    MoELayer.forward = timed_forward(MoELayer.forward, the_clock)
    torch.distributed.all_to_all_single = the_clock.exchange(torch.distributed.all_to_all_single)
    set_moe_metrics_tracker(ClockTracker(the_clock))
    main()
