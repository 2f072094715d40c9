"""Traces of some iterations in Chrome's format, for Perfetto and tools/overlap_report.py.

One file for each rank. Lanes: dense compute, experts, dispatch and combine, forward and backward.
Times are microseconds of the machine's wall clock, so that ranks of one machine line up; between
machines they are as good as the machines' clocks.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_scmoe.overlap.recorder import Activity, UnitRecord
from megatron_scmoe.overlap.schedule import Slots, Step

# What a trace says about the run, beside its expert slots.
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
)
TRACED_LAYOUT = ("params_dtype", "backend", "expert_parallel_ranks")
LANES = ("dense compute", "experts", "dispatch", "combine")
_LANE_OF = {
    Step.EXPERTS.value: "experts",
    "dispatch": "dispatch",
    "combine": "combine",
}


class TraceWriter:
    """Collects the iterations of one rank and writes them as they come.

    Args:
        folder: made if it does not exist.
        rank: names the file.
        facts: what a reader should know about the run (position, layout, sizes).
    """

    def __init__(self, folder: Path, rank: int, facts: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank-{rank:05d}.json"
        self._rank = rank
        self._facts = dict(facts)
        self._slots: dict[int, Slots] = {}
        self._offset = time.time() - time.perf_counter()
        self._events = self._lane_names()

    def add(self, iteration: int, records: Mapping[int, UnitRecord], slots: Slots) -> None:
        """Add what the units did in an iteration and write the file anew, whole or not at all.

        Args:
            records: by the number of the MoE layer, from 1.
            slots: where the experts ran.
        """
        self._slots[iteration] = slots
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
                )
        facts = self._facts | {"expert_slots": self._slots}
        text = json.dumps({"traceEvents": self._events, "otherData": facts})
        partial = self._path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, self._path)

    def _add(
        self, iteration: int, layer: int, activity: Activity, begin: float, end: float, **more: Any
    ) -> None:
        lane = _LANE_OF.get(activity.name, "dense compute")
        self._events.append(
            {
                "ph": "X",
                "name": f"layer {layer} {activity.name}",
                "cat": activity.direction,
                "pid": self._rank,
                "tid": _thread(lane, activity.direction),
                "ts": round((begin + self._offset) * 1e6, 3),
                "dur": round((end - begin) * 1e6, 3),
                "args": {
                    "iteration": iteration,
                    "layer": layer,
                    "step": activity.name,
                    "chunk": activity.chunk,
                    "pass": activity.pass_number,
                    **more,
                },
            }
        )

    def _lane_names(self) -> list[dict[str, Any]]:
        names = [
            {
                "ph": "M",
                "name": "process_name",
                "pid": self._rank,
                "args": {"name": f"rank {self._rank}"},
            }
        ]
        for direction in ("forward", "backward"):
            for lane in LANES:
                thread = _thread(lane, direction)
                common = {"ph": "M", "pid": self._rank, "tid": thread}
                names.append(
                    {**common, "name": "thread_name", "args": {"name": f"{lane}, {direction}"}}
                )
                names.append(
                    {**common, "name": "thread_sort_index", "args": {"sort_index": thread}}
                )
        return names


def _thread(lane: str, direction: str) -> int:
    return LANES.index(lane) + (len(LANES) if direction == "backward" else 0)
