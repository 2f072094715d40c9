"""What a rank knows about itself: where its main thread is and which collectives it has entered.

The collectives come from torch's flight recorder, which notes all of NCCL's and gloo's without our
help (the last 2000, TORCH_FR_BUFFER_SIZE). It does not note gloo's point-to-point messages, so
that a rank that waits for its pipeline neighbours is known by its main thread's stack.
"""

import json
import re
import sysconfig
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import p2p_communication
from megatron.training import get_args
from torch.distributed import distributed_c10d

PIPELINE = Path(p2p_communication.__file__).parent
LIBRARIES = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"))
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # gloo's, NCCL's


@dataclass(frozen=True)
class CollectiveCall:
    """One collective that a rank has entered."""

    name: str
    """As the backend calls it: all_to_all, recv 0<-1."""
    group: str
    """The group's description: EXPERT_MODEL_PARALLEL_GROUP."""
    key: str
    """The group's name, the same on all its ranks."""
    ranks: Sequence[int]
    """The group's ranks in the job; of a point-to-point message, sender and receiver."""
    number: int
    """Counts the group's collectives, on all its ranks alike; 0 for point-to-point messages."""
    seconds: float
    """Since it was entered."""
    done: bool
    """It completed or failed."""

    def __str__(self) -> str:
        group = {"": "a group", "default_pg": "the default group"}.get(self.group, self.group)
        return f"{self.name} of {group} (ranks {', '.join(map(str, self.ranks))})"


@dataclass(frozen=True)
class Report:
    """A rank's account of itself."""

    where: str
    """The main thread's innermost line that is neither torch's nor Python's own."""
    iteration: int | None
    """The iteration as the log counts it, None before the first."""
    collectives: Sequence[CollectiveCall]
    """The pending ones and the newest of each group with more than one rank, oldest first."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        fields = json.loads(text)
        fields["collectives"] = [
            CollectiveCall(**collective) for collective in fields["collectives"]
        ]
        return cls(**fields)


Line = tuple[CodeType, int]  # what a frame executes, and the line number


def lines_of_thread(frame: FrameType | None) -> list[Line]:
    """A running thread's stack, innermost first."""
    return [(each.f_code, number) for each, number in traceback.walk_stack(frame)]


def lines_of_error(error: BaseException) -> list[Line]:
    """Where an error was raised, innermost first."""
    frames = traceback.walk_tb(error.__traceback__)
    return [(each.f_code, number) for each, number in frames][::-1]


def make_report(lines: list[Line], seconds: float, failed: bool = False) -> Report:
    """The report of a rank.

    Args:
        lines: where its main thread is, or where it failed.
        seconds: since when the main thread has not moved.
        failed: a collective has raised an error; it is the newest, as far as anyone knows.
    """
    collectives = _recorded()
    if lines and Path(lines[0][0].co_filename).parent == PIPELINE:
        collectives += _pipeline_wait(seconds)
    if failed and collectives:
        collectives.append(replace(collectives.pop(), done=False))
    return Report(_where(lines), _iteration(), collectives)


def _where(lines: list[Line]) -> str:
    own = [line for line in lines if not line[0].co_filename.startswith((*LIBRARIES, "<"))]
    if not own:
        return "an unknown place"
    code, number = own[0]
    return f"{Path(code.co_filename).name}:{number} ({code.co_name})"


def _iteration() -> int | None:
    iteration = getattr(get_args(), "curr_iteration", None)
    return None if iteration is None else iteration + 1


def _pipeline_wait(seconds: float) -> list[CollectiveCall]:
    """gloo: a wait for pipeline neighbours; from the stack alone it is not known for which."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if torch.distributed.get_backend(group) != "gloo":
        return []
    ranks, place = torch.distributed.get_process_group_ranks(group), group.rank()
    neighbours = sorted({ranks[place - 1], ranks[place], ranks[(place + 1) % len(ranks)]})
    name, key = group.group_desc, group.group_name
    return [CollectiveCall("send/recv", name, key, neighbours, 0, seconds, False)]


def _recorded() -> list[CollectiveCall]:
    """What the flight recorders hold: pending entries and the newest of each group."""
    kept: dict[Any, tuple[int, CollectiveCall]] = {}
    now = time.time_ns()
    for recorder in RECORDERS:
        dump = getattr(torch._C._distributed_c10d, recorder, None)
        if dump is None:  # a build without NCCL
            continue
        for entry in json.loads(dump(True, False)).get("entries", ()):
            collective = _collective(entry, now)
            if len(collective.ranks) > 1:
                newest = (recorder, collective.key, entry["is_p2p"])
                key = newest if collective.done else (recorder, entry["record_id"])
                kept[key] = (entry["time_created_ns"], collective)
    return [collective for _, collective in sorted(kept.values(), key=lambda pair: pair[0])]


def _collective(entry: dict[str, Any], now: int) -> CollectiveCall:
    key, description = entry["process_group"]
    name = entry["profiling_name"].split(":", 1)[-1]
    try:
        members = distributed_c10d._resolve_process_group(key)
        ranks = torch.distributed.get_process_group_ranks(members)
    except (RuntimeError, KeyError, ValueError):  # destroyed
        ranks = []
    message = re.search(r"(\d+)(?:->|<-)(\d+)", name)
    if message and ranks:
        ranks = [ranks[int(end)] for end in message.groups()]
    number = 0 if entry["is_p2p"] else entry["collective_seq_id"]
    seconds = (now - entry["time_created_ns"]) / 1e9
    return CollectiveCall(name, description, key, ranks, number, seconds, entry["retired"])
