"""What the overlap costs and hides, after every iteration: log line, TensorBoard, W&B, traces.

    a2a-seconds            time in flight, from start to completion, summed over the exchanges of
                           one iteration: dispatch and combine, forward and backward, every MoE
                           layer and micro-batch of a rank; mean over ranks
    a2a-exposed-seconds    the part of it for which compute stood still in a wait, same sum
    a2a-hidden-seconds     the rest
    a2a-hidden-share       hidden / in flight
    expert-slot-forward, expert-slot-backward
                           where the routed experts run
    expert-load-imbalance  rows of the busiest expert / mean rows of an expert, mean over layers

Measured where the exchanges run (overlap/streams.py); evaluation is not counted.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.training import get_args

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.overlap.adaptive import SlotChooser, choose_slots, describe_choice
from megatron_scmoe.overlap.recorder import UnitRecord
from megatron_scmoe.overlap.trace import TRACED_OPTIONS, TraceWriter
from megatron_scmoe.shortcut_layer import ShortcutLayer


def watch_units(model: GPTModel, scmoe: ScMoEConfig) -> None:
    """Let the training loop report on the units of this model chunk."""
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, UnitTracker):
        tracker = UnitTracker(scmoe)
        set_moe_metrics_tracker(tracker)
    tracker.units += [module for module in model.modules() if isinstance(module, ShortcutLayer)]


class UnitTracker(MoEMetricsTracker):
    """The host's tracker of MoE losses, and what the units do beside them.

    The host calls `report` once an iteration on every rank (training/training.py:2780).
    """

    def __init__(self, scmoe: ScMoEConfig) -> None:
        super().__init__()
        self.units: list[ShortcutLayer] = []
        self._position = scmoe.scmoe_shortcut_position
        self._trace_dir = scmoe.scmoe_trace_dir
        self._trace: TraceWriter | None = None
        self._chooser = SlotChooser(self._position) if scmoe.measures_slots else None

    def report(
        self, loss_scale: float, iteration: int, writer=None, wandb_writer=None, **options: Any
    ) -> str:
        """Log the iteration's metrics and return the console's part of them."""
        losses = super().report(loss_scale, iteration, writer, wandb_writer, **options)
        records = [unit.recorder.take() for unit in self.units]
        in_flight, exposed = self._mean_over_ranks(records)
        imbalance = self._load_imbalance(records)
        self._write_trace(iteration, records)  # with the slots that the iteration ran with
        if in_flight > 0:  # else one expert parallel rank: nothing travels
            self._choose(records)
        for unit in self.units:
            wanted = self._traced(iteration + 1) or (
                self._chooser is not None and self._chooser.wants_steps
            )
            unit.recorder.records_steps = wanted

        scalars = {"expert-load-imbalance": imbalance}
        console = f" expert load imbalance: {imbalance:.2f} |"
        if in_flight > 0:
            hidden = in_flight - exposed
            scalars |= {
                "a2a-seconds": in_flight,
                "a2a-exposed-seconds": exposed,
                "a2a-hidden-seconds": hidden,
                "a2a-hidden-share": hidden / in_flight,
            }
            console += (
                f" a2a (ms): {in_flight * 1e3:.1f} | a2a exposed (ms): {exposed * 1e3:.1f} | "
                f"a2a hidden: {hidden / in_flight:.1%} |"
            )
        if self.units:
            slots = self.units[0].slots
            scalars |= {
                "expert-slot-forward": slots.forward,
                "expert-slot-backward": slots.backward,
            }
            console += f" expert slots: {slots.forward},{slots.backward} |"
        self._log_scalars(scalars, iteration, writer, wandb_writer)
        return losses + console

    def _choose(self, records: list[UnitRecord]) -> None:
        times = None if self._chooser is None else self._chooser.observe(records)
        if times is None:
            return
        self._chooser = None
        slots = choose_slots(*times)
        if torch.distributed.get_rank() == 0:
            before = ScMoEConfig(scmoe_shortcut_position=self._position).initial_slots  # type: ignore[arg-type]
            print(describe_choice(self._position, slots, before, *times), flush=True)
        # With the options into every checkpoint, so that a resumed run need not measure.
        get_args().scmoe_measured_slots = list(slots)
        for unit in self.units:
            unit.slots = slots

    def _traced(self, iteration: int) -> bool:
        args = get_args()
        return (
            self._trace_dir is not None
            and args.profile_step_start <= iteration < args.profile_step_end
        )

    def _write_trace(self, iteration: int, records: list[UnitRecord]) -> None:
        if not (self._traced(iteration) and self.units):
            return
        if self._trace is None:
            args, group = get_args(), self.units[0].mlp.ep_group
            facts = {name: getattr(args, name) for name in TRACED_OPTIONS}
            facts["params_dtype"] = str(args.params_dtype).removeprefix("torch.")
            facts["backend"] = torch.distributed.get_backend(group)
            facts["expert_parallel_ranks"] = torch.distributed.get_process_group_ranks(group)
            rank = torch.distributed.get_rank()
            self._trace = TraceWriter(Path(str(self._trace_dir)), rank, facts)
        by_layer = {
            unit.attention_number: record for unit, record in zip(self.units, records, strict=True)
        }
        self._trace.add(iteration, by_layer, self.units[0].slots)

    @staticmethod
    def _mean_over_ranks(records: list[UnitRecord]) -> tuple[float, float]:
        """(in flight, exposed), in seconds."""
        exchanges = [exchange for record in records for exchange in record.exchanges]
        sums = torch.tensor(
            [sum(x.end - x.begin for x in exchanges), sum(x.blocked for x in exchanges)],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        torch.distributed.all_reduce(sums)
        in_flight, exposed = (sums / torch.distributed.get_world_size()).tolist()
        return in_flight, exposed

    def _load_imbalance(self, records: list[UnitRecord]) -> float:
        """Busiest expert / mean, over the expert parallel ranks of a layer; mean over layers."""
        device = torch.cuda.current_device()
        ratios = torch.zeros(2, dtype=torch.float64, device=device)  # sum, number of layers
        if self.units:
            group = self.units[0].mlp.ep_group
            counts = [record.tokens_per_expert for record in records]
            rows = torch.stack([x for x in counts if x is not None]).double().to(device)
            busiest, total = rows.amax(dim=1), rows.sum(dim=1)
            torch.distributed.all_reduce(busiest, torch.distributed.ReduceOp.MAX, group=group)
            torch.distributed.all_reduce(total, group=group)
            mean = total / (rows.shape[1] * group.size())
            ratios[0], ratios[1] = (busiest / mean).nan_to_num(1.0).sum(), len(mean)
        torch.distributed.all_reduce(ratios)
        return (ratios[0] / ratios[1]).item()
