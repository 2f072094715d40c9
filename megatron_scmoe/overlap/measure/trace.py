"""Traces of some iterations in Chrome's format, for Perfetto and tools/overlap_report.py.

One file for each rank. Lanes: dense compute, experts, dispatch and combine, forward and backward.
Times are microseconds of the machine's wall clock, so that ranks of one machine line up; between
machines they are as good as the machines' clocks.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_scmoe.overlap.recorder import Activity, UnitRecord
from megatron_scmoe.overlap.schedule import Slots
from megatron_scmoe.words import write_whole

# What a trace says about the run: options, layout, what data parallelism reduces, and the expert
# slots of every iteration.
TRACED_OPTIONS = (
    "scmoe_shortcut_position",
    "scmoe_num_chunks",
    "scmoe_overlap",
    "num_layers",
    "hidden_size",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "num_experts",
    "moe_router_topk",
    "moe_token_dispatcher_type",
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "overlap_grad_reduce",
    "use_distributed_optimizer",
)
TRACED_PARAMETERS = (
    "dense_parameters",
    "shared_expert_parameters",
    "expert_parameters",
    "gradient_bytes",
    "parameter_bytes",
)
TRACED_LAYOUT = ("params_dtype", "backend", "expert_parallel_ranks", "compute_slow_down")
BY_ITERATION = ("expert_slots", "copies_per_token", "expert_rows")
MOST_CHUNKS = 1000
LANES = ("dense compute", "experts", "dispatch", "combine")
EXCHANGES = ("dispatch", "combine")


class TraceWriter:
    """The iterations of one rank, written as they come.

    Args:
        folder: made if it does not exist.
        rank: names the file.
        facts: what a reader should know about the run (position, layout, sizes).
    """

    def __init__(self, folder: Path, rank: int, facts: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank-{rank:05d}.json"
        self._rank = rank
        self._by_iteration: dict[str, dict[int, Any]] = {name: {} for name in BY_ITERATION}
        self._facts = dict(facts) | self._by_iteration
        # The largest difference is that of two readings with nothing in between.
        self._offset = max(time.time() - time.perf_counter() for _ in range(10))
        self._events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        ]
        self._named: set[int] = set()
        for direction in ("forward", "backward"):
            for lane in LANES:
                self._name_lane(_thread(lane, direction), f"{lane}, {direction}")

    def add(
        self,
        iteration: int,
        records: Mapping[int, UnitRecord],
        slots: Slots,
        copies: float | None = None,
    ) -> None:
        """Add what the units did in an iteration and write the file anew, whole or not at all.

        Args:
            records: by the number of the MoE layer, from 1.
            slots: where the experts ran.
            copies: rows that an all-to-all made of a token, mean; None where none was made.
        """
        counts = [record.tokens_per_expert for record in records.values()]
        rows = sum(int(count.sum()) for count in counts if count is not None)
        for name, value in zip(BY_ITERATION, (slots, copies, rows), strict=True):
            self._by_iteration[name][iteration] = value
        for layer, record in records.items():
            for span in record.steps:
                self._add(iteration, layer, span.activity, span.begin, span.end)
            for exchange in record.exchanges:
                self._add(
                    iteration,
                    layer,
                    exchange.activity,
                    exchange.begin,
                    exchange.end,
                    blocked_us=round(exchange.blocked * 1e6, 3),
                    bytes=exchange.bytes,
                    bytes_between_nodes=exchange.bytes_between_nodes,
                )
        content = {"traceEvents": self._events, "otherData": self._facts}
        write_whole(self._path, json.dumps(content))

    def _add(
        self, iteration: int, layer: int, activity: Activity, begin: float, end: float, **more: Any
    ) -> None:
        # Microseconds since 1970 are whole quarters: taking the duration from them, and not from
        # the times, leaves neighbours neighbours. Viewers drop what overlaps in a lane.
        begin_us, end_us = ((at + self._offset) * 1e6 for at in (begin, end))
        self._events.append(
            {
                "ph": "X",
                "name": f"layer {layer} {activity.name}",
                "cat": activity.direction,
                "pid": self._rank,
                "tid": self._lane(activity),
                "ts": begin_us,
                "dur": end_us - begin_us,
                "args": {
                    "iteration": iteration,
                    "layer": layer,
                    "step": activity.name,
                    "chunk": activity.chunk,
                    **({"route": activity.route} if activity.route else {}),
                    "pass": activity.pass_number,
                    **more,
                },
            }
        )

    def _lane(self, activity: Activity) -> int:
        """The thread of an activity: what is in flight together, chunks and routes, has its own."""
        travels = activity.name in EXCHANGES
        lane = activity.name if activity.name in LANES else "dense compute"
        chunk, route = (activity.chunk, activity.route) if travels else (0, 0)
        thread = _thread(lane, activity.direction, chunk, route)
        if thread not in self._named:
            of_route = f" of route {route}" if route else ""
            self._name_lane(thread, f"{lane} {chunk + 1}{of_route}, {activity.direction}")
        return thread

    def _name_lane(self, thread: int, name: str) -> None:
        self._named.add(thread)
        common = {"ph": "M", "pid": self._rank, "tid": thread}
        self._events += [
            {**common, "name": "thread_name", "args": {"name": name}},
            {**common, "name": "thread_sort_index", "args": {"sort_index": thread}},
        ]


def _thread(lane: str, direction: str, chunk: int = 0, route: int = 0) -> int:
    order = LANES.index(lane) + (len(LANES) if direction == "backward" else 0)
    return MOST_CHUNKS * (order + 2 * len(LANES) * route) + chunk
