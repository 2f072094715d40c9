"""What the all-to-alls cost, in Megatron's log line, TensorBoard and W&B.

    a2a-seconds          time in flight, from start to completion, summed over the exchanges of one
                         iteration: dispatch and combine, forward and backward, every MoE layer and
                         micro-batch of a rank; mean over ranks
    a2a-blocked-seconds  the part of it for which compute stood still in a wait, same sum
    a2a-hidden-share     1 - blocked / in flight

Measured where the exchanges run (overlap/streams.py); evaluation is not counted.
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)

from megatron_scmoe.moe.moe_layer import ScMoELayer
from megatron_scmoe.overlap.meter import ExchangeMeter


def log_exchanges(model: GPTModel) -> None:
    """Let the training loop report the exchanges of this model chunk."""
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, ExchangeTracker):
        tracker = ExchangeTracker()
        set_moe_metrics_tracker(tracker)
    tracker.meters += [module.meter for module in model.modules() if isinstance(module, ScMoELayer)]


class ExchangeTracker(MoEMetricsTracker):
    """The host's tracker of MoE losses, and the exchanges beside them.

    The host calls `report` once an iteration on every rank (training/training.py:2780).
    """

    def __init__(self) -> None:
        super().__init__()
        self.meters: list[ExchangeMeter] = []

    def report(
        self, loss_scale: float, iteration: int, writer=None, wandb_writer=None, **options: Any
    ) -> str:
        """Log the iteration's metrics and return the console's part of them."""
        losses = super().report(loss_scale, iteration, writer, wandb_writer, **options)
        in_flight, blocked = self._mean_over_ranks()
        if in_flight == 0:  # one expert parallel rank: nothing travels
            return losses
        scalars = {
            "a2a-seconds": in_flight,
            "a2a-blocked-seconds": blocked,
            "a2a-hidden-share": 1 - blocked / in_flight,
        }
        self._log_scalars(scalars, iteration, writer, wandb_writer)
        return (
            f"{losses} a2a (ms): {in_flight * 1e3:.1f} | "
            f"a2a hidden: {scalars['a2a-hidden-share']:.1%} |"
        )

    def _mean_over_ranks(self) -> tuple[float, float]:
        readings = [meter.read() for meter in self.meters]
        sums = torch.tensor(
            [sum(column) for column in zip((0.0, 0.0), *readings, strict=True)],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        torch.distributed.all_reduce(sums)
        in_flight, blocked = (sums / torch.distributed.get_world_size()).tolist()
        return in_flight, blocked
