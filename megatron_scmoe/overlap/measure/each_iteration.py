"""What the overlap costs and hides, after every iteration: log line, TensorBoard, W&B, traces.

    a2a-seconds            time in flight, from start to completion, summed over the exchanges of
                           one iteration: dispatch and combine, forward and backward, every MoE
                           layer and micro-batch of a rank; mean over ranks
    a2a-exposed-seconds    the part of it for which compute stood still in a wait, same sum
    a2a-hidden-seconds     the rest
    a2a-hidden-share       hidden / in flight
    a2a-host-wait-seconds  time for which the host waited for numbers of rows before it could launch
                           or receive an exchange, same sum; on a GPU no time of compute, unless
                           compute waits for the host
    a2a-compute-slowdown   time of the dense operators of the window beside exchanges / alone, in
                           the backward pass, from the first iterations (adaptive.py)
    expert-slot-forward, expert-slot-backward
                           where the routed experts run
    gates-agree            share of the tokens whose two gates have the same first choice: how often
                           the rule of distinct experts fires, or with it off, how often both send
                           a token to one expert; mean over layers, and each layer's with the
                           host's suffix
    a2a-bytes, a2a-bytes-between-nodes
                           what a rank sent to other ranks, and the part that left its node, same
                           sum; a node has --scmoe-ranks-per-node ranks
    expert-load-imbalance  rows of the busiest expert / mean rows of an expert, mean over layers
    rank-load-imbalance    rows of the busiest expert parallel rank / mean rows of one, the same

What the routers have chosen is in choices.py. Measured where the exchanges run
(overlap/streams.py); evaluation is not counted.
"""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.training import get_args
from torch.distributed import ProcessGroup

from megatron_scmoe.overlap.measure.adaptive import (
    ALONE,
    FirstIterations,
    SlowDown,
    choose_routes,
    describe_choice,
    describe_routes,
    slow_down,
)
from megatron_scmoe.overlap.measure.choices import (
    SUMS,
    Choices,
    copies_per_token,
    in_words,
    over_layers,
    statistics,
)
from megatron_scmoe.overlap.measure.cost import UnitTimes
from megatron_scmoe.overlap.measure.time_left import TimeLeft
from megatron_scmoe.overlap.measure.trace import TRACED_OPTIONS, TRACED_PARAMETERS, TraceWriter
from megatron_scmoe.overlap.recorder import UnitRecord, UnitRecorder
from megatron_scmoe.overlap.schedule import Route, Slots, default_slots


class Unit(Protocol):
    """What is followed of a shortcut unit, and told to it."""

    attention_number: int
    slots: Slots
    further_routes: tuple[Route, ...]
    overlap: bool

    @property
    def recorder(self) -> UnitRecorder: ...

    @property
    def choices(self) -> Choices: ...

    @property
    def bias(self) -> torch.Tensor | None: ...

    @property
    def ep_group(self) -> ProcessGroup: ...


class UnitTracker(MoEMetricsTracker):
    """The host's tracker of MoE losses, and what the units do beside them.

    The host calls `report` once an iteration on every rank (training/training.py:2780).

    Args:
        position: the shortcut's, of all units.
        overlap: whether the units overlap; if not, there is nothing to measure.
        measures_slots: whether the first iterations decide where the experts run.
        trace_dir: where traces go, None for none.
        further: routed branches beside that of the position, of all units.
        columns: what the routers of all units choose among: routed experts, then those at home by
            kind.
    """

    def __init__(
        self,
        position: str,
        overlap: bool,
        measures_slots: bool,
        trace_dir: str | None = None,
        further: tuple[Route, ...] = (),
        columns: tuple[int, Mapping[str, int]] = (0, {}),
    ) -> None:
        super().__init__()
        self._columns = columns
        self.units: list[Unit] = []
        self.chunks: list[torch.nn.Module] = []
        self._position = position
        self._trace_dir = trace_dir
        self._trace: TraceWriter | None = None
        self._trace_failed = False
        self._measures_slots = measures_slots
        self._further = further
        self._first = FirstIterations(position, 1 + len(further)) if overlap else None
        self._beside: tuple[UnitTimes, UnitTimes] | None = None
        self._slow_down: SlowDown | None = None
        self._time_left = TimeLeft()

    def report(
        self, loss_scale: float, iteration: int, writer=None, wandb_writer=None, **options: Any
    ) -> str:
        """Log the iteration's metrics and return the console's part of them."""
        losses = super().report(loss_scale, iteration, writer, wandb_writer, **options)
        records = [unit.recorder.take() for unit in self.units]
        totals = self._totals(records)
        layers = self._choices()
        means = over_layers(layers)
        copies = copies_per_token(means, get_args().scmoe_dispatch_copies)
        if totals.in_flight > 0 and copies is not None:
            means["copies-per-token"] = copies
        # With the slots that the iteration ran with.
        self._trace_if_possible(iteration, records, means)
        # Those without overlap are no part of what the run shows.
        alone = (
            self._first is not None and self._first.phase is ALONE and not self._traced(iteration)
        )
        if totals.in_flight > 0:  # else one expert parallel rank: nothing travels
            self._measure(iteration, records)
        self._prepare(iteration + 1)

        scalars = {
            "expert-load-imbalance": totals.imbalance,
            "rank-load-imbalance": totals.rank_imbalance,
        }
        console = (
            f" expert load imbalance: {totals.imbalance:.2f} |"
            f" rank load imbalance: {totals.rank_imbalance:.2f} |"
        )
        if totals.in_flight > 0 and not alone:
            in_flight, exposed = totals.in_flight, totals.exposed
            share = 1 - exposed / in_flight
            scalars |= {
                "a2a-seconds": in_flight,
                "a2a-exposed-seconds": exposed,
                "a2a-hidden-seconds": in_flight - exposed,
                "a2a-hidden-share": share,
                "a2a-host-wait-seconds": totals.host_wait,
                "a2a-bytes": totals.sent,
                "a2a-bytes-between-nodes": totals.between_nodes,
            }
            console += (
                f" a2a (ms): {in_flight * 1e3:.1f} | a2a exposed (ms): {exposed * 1e3:.1f} | "
                f"a2a hidden: {share:.1%} | a2a host wait (ms): {totals.host_wait * 1e3:.1f} | "
                f"a2a (MB): {totals.sent / 1e6:.6g} | a2a between nodes (MB): "
                f"{totals.between_nodes / 1e6:.6g} |"
            )
        if self._slow_down is not None:
            scalars["a2a-compute-slowdown"] = self._slow_down.backward
            console += f" compute slow-down: {self._slow_down.backward:.3f} |"
        if self.units:
            slots = self.units[0].slots
            scalars |= {
                "expert-slot-forward": slots.forward,
                "expert-slot-backward": slots.backward,
            }
            console += f" expert slots: {slots.forward},{slots.backward} |"
        if "copies-per-token" in means:
            copies = means["copies-per-token"]
            console += f" copies per token: {copies:.2f} |"
        scalars |= {f"moe/{name}": value for name, value in means.items()}
        if options.get("per_layer_logging"):
            scalars |= {
                f"moe/{name}_layer_{layer}": value
                for layer, found in layers.items()
                for name, value in found.items()
            }
        console += in_words(means)
        if self._further and (shares := self._shares_of_same_choices(records)):
            mean = sum(shares.values()) / len(shares)
            scalars |= {"gates-agree": mean}
            scalars |= {f"moe/gates-agree_layer_{layer}": x for layer, x in shares.items()}
            by_layer = " ".join(f"{share:.0%}" for share in shares.values())
            console += f" gates agree: {mean:.1%} ({by_layer}) |"
        self._log_scalars(scalars, iteration, writer, wandb_writer)
        if left := self._time_left.after(iteration, get_args().train_iters, time.monotonic()):
            console += f" time left: {left} |"
        return losses + console

    def _choices(self) -> dict[int, dict[str, float]]:
        """Statistics by attention layer of the whole model, from 0; the same on every rank."""
        experts, kinds = self._columns
        width = experts + sum(kinds.values()) + len(SUMS)
        device = torch.cuda.current_device()
        rows = torch.zeros(get_args().num_layers, width, dtype=torch.float64, device=device)
        biased = torch.zeros((), dtype=torch.float64, device=device)
        for unit in self.units:
            row = unit.choices.take(unit.bias)
            if row is not None:
                rows[unit.attention_number - 1] = row
            biased += unit.bias is not None
        torch.distributed.all_reduce(rows)
        torch.distributed.all_reduce(biased)
        return {
            layer: statistics(row, kinds, biased.item() > 0)
            for layer, row in enumerate(rows.tolist())
            if row[experts + sum(kinds.values())] > 0
        }

    def _shares_of_same_choices(self, records: list[UnitRecord]) -> dict[int, float]:
        """By MoE layer of the whole model, from 0; the same on every rank."""
        counts = torch.zeros(
            get_args().num_layers, 2, dtype=torch.int64, device=torch.cuda.current_device()
        )
        for unit, record in zip(self.units, records, strict=True):
            if record.same_choices is not None:
                counts[unit.attention_number - 1] = record.same_choices
        torch.distributed.all_reduce(counts)
        return {
            layer: same / tokens
            for layer, (same, tokens) in enumerate(counts.tolist())
            if tokens > 0
        }

    def _measure(self, iteration: int, records: list[UnitRecord]) -> None:
        """Count one of the first iterations, and draw the conclusions."""
        if self._first is None or self._first.phase is None:
            return
        if self._first.phase is ALONE and self._traced(iteration):
            return  # it ran as the rest of the run does
        times = self._first.observe(records)
        if times is None:
            return
        if self._beside is None:
            self._beside = times
            if self._measures_slots:
                self._choose(times)
            return
        found = slow_down(self._beside, times)
        if not math.isnan(found.backward):  # something dense of the units is trained
            self._slow_down = found
            _print_once(
                f"dense compute beside exchanges takes {found.backward:.3f} of its time alone "
                f"backward, {found.forward:.3f} forward"
            )

    def _choose(self, times: tuple[UnitTimes, UnitTimes]) -> None:
        slots, further = chosen = choose_routes(self._position, self._further, *times)
        if further:
            _print_once(describe_routes(self._position, chosen, *times))
        else:
            before = default_slots(self._position)
            _print_once(describe_choice(self._position, slots, before, *times))
        # With the options into every checkpoint, so that a resumed run need not measure.
        all_slots = (slots, *(route.slots for route in further))
        get_args().scmoe_measured_slots = [number for pair in all_slots for number in pair]
        for unit in self.units:
            unit.slots, unit.further_routes = slots, further

    def _prepare(self, iteration: int) -> None:
        """Let the units do the next iteration as it is to be measured and traced."""
        traced = self._traced(iteration)
        phase = None if self._first is None else self._first.phase
        for unit in self.units:
            unit.recorder.records_steps = traced or (phase is not None and phase.records_steps)
            if self._first is not None:
                unit.overlap = phase is None or phase.overlap or traced

    def _traced(self, iteration: int) -> bool:
        args = get_args()
        return (
            self._trace_dir is not None
            and args.profile_step_start <= iteration < args.profile_step_end
        )

    def _write_trace(
        self, iteration: int, records: list[UnitRecord], means: Mapping[str, float]
    ) -> None:
        if not (self._traced(iteration) and self.units):
            return
        if self._trace is None:
            args, group = get_args(), self.units[0].ep_group
            facts = {name: getattr(args, name) for name in TRACED_OPTIONS}
            facts["params_dtype"] = str(args.params_dtype).removeprefix("torch.")
            facts["backend"] = torch.distributed.get_backend(group)
            facts |= traced_parameters(self.chunks)
            facts["compute_slow_down"] = self._slow_down and self._slow_down.backward
            facts["expert_parallel_ranks"] = torch.distributed.get_process_group_ranks(group)
            facts["scmoe_dispatch_copies"] = args.scmoe_dispatch_copies
            if self._further:
                facts["further_taps"] = [route.tap for route in self._further]
            rank = torch.distributed.get_rank()
            self._trace = TraceWriter(Path(str(self._trace_dir)), rank, facts)
        by_layer = {
            unit.attention_number: record for unit, record in zip(self.units, records, strict=True)
        }
        copies = means.get("copies-per-token")
        self._trace.add(iteration, by_layer, self.units[0].slots, copies)

    def _trace_if_possible(
        self, iteration: int, records: list[UnitRecord], means: Mapping[str, float]
    ) -> None:
        """A full disk ends this rank's traces, with one warning, and not the training."""
        if self._trace_failed:
            return
        try:
            self._write_trace(iteration, records, means)
        except OSError as error:
            self._trace_failed = True
            rank = torch.distributed.get_rank()
            print(f"WARNING: no more traces of rank {rank}: {error}", flush=True)

    def _totals(self, records: list[UnitRecord]) -> "_Totals":
        """Of this iteration; the same on every rank."""
        exchanges = [exchange for record in records for exchange in record.exchanges]
        ratios = self._load_ratios(records)
        sums = torch.tensor(
            [
                sum(x.end - x.begin for x in exchanges),
                sum(x.blocked for x in exchanges),
                sum(record.host_wait for record in records),
                sum(x.bytes for x in exchanges),
                sum(x.bytes_between_nodes for x in exchanges),
                sum(expert for expert, _ in ratios),
                sum(rank for _, rank in ratios),
                len(ratios),
            ],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        torch.distributed.all_reduce(sums)
        *of_ranks, experts, ranks, layers = sums.tolist()
        means = (x / torch.distributed.get_world_size() for x in of_ranks)
        ratios_of = (x / layers if layers else math.nan for x in (experts, ranks))
        return _Totals(*means, *ratios_of)

    def _load_ratios(self, records: list[UnitRecord]) -> list[tuple[float, float]]:
        """Busiest / mean over the expert parallel ranks, of experts and of ranks, of every layer of
        this rank."""
        counts = [x.tokens_per_expert for x in records if x.tokens_per_expert is not None]
        if not counts:
            return []
        group = self.units[0].ep_group
        own = torch.stack(counts).to(torch.cuda.current_device())  # [layers, e]
        gathered = own.new_empty(group.size() * len(own), own.shape[1])
        torch.distributed.all_gather_into_tensor(gathered, own, group=group)
        rows = gathered.unflatten(0, (-1, len(own))).double()  # [n, layers, e]
        of_ranks = rows.sum(dim=2)
        experts = rows.amax(dim=(0, 2)) / rows.mean(dim=(0, 2))
        ranks = of_ranks.amax(dim=0) / of_ranks.mean(dim=0)
        return [tuple(pair) for pair in torch.stack([experts, ranks]).nan_to_num(1.0).T.tolist()]


def traced_parameters(modules: Iterable[torch.nn.Module]) -> dict[str, int]:
    """Parameters of a rank by TRACED_PARAMETERS: numbers of them, shared experts among the dense
    ones, and bytes of one and of its gradient."""
    counts = dict.fromkeys(TRACED_PARAMETERS, 0)
    for name, parameter in (named for module in modules for named in module.named_parameters()):
        dense = getattr(parameter, "allreduce", True)  # what the host reduces over all ranks
        counts["dense_parameters" if dense else "expert_parameters"] += parameter.numel()
        if ".shared_experts." in name:
            counts["shared_expert_parameters"] += parameter.numel()
        gradient = getattr(parameter, "main_grad", parameter)
        counts["gradient_bytes"] = gradient.element_size()
        counts["parameter_bytes"] = parameter.element_size()
    return counts


class _Totals(NamedTuple):
    """Of one iteration, mean over ranks; see the head of this file."""

    in_flight: float
    exposed: float
    host_wait: float
    sent: float
    """Bytes."""
    between_nodes: float
    imbalance: float
    """Mean over the layers of all ranks."""
    rank_imbalance: float


def _print_once(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)
