"""What ranks tell each other when collectives no longer work, through the job's store.

The store lives in rank 0 or in torchrun's agent. A store that is gone raises, one that is stopped
never answers: every operation here runs in a thread of its own and is given up after a while.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any, cast

from torch.distributed import PrefixStore, Store

from megatron_scmoe.run.watch.account import Report
from megatron_scmoe.run.watch.verdict import Alarm

STORE_S = 3.0  # until a silent store counts as lost
ANSWER_S = 2.0  # for a rank to answer
SPEECH_S = 10.0  # for the rank that raised the alarm to say its line
POLL_S = 0.05
LISTEN = timedelta(days=1)


class StoreLost(Exception):
    """The store does not answer: rank 0 or torchrun's agent, whichever holds it, is lost."""


class Board:
    """A rank's access to what all ranks post."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._in_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # Any: torch's stubs do not know all that its stores can do.
        self._store = cast(Any, PrefixStore("watched ranks", store))
        # A blocking wait occupies a connection: the listener and the speaker have their own.
        self._listening = self._store.clone()
        self._speaking: Any = None
        here = f"{socket.gethostname()}, pid {os.getpid()}"
        self._do(lambda store: store.set(f"host {rank}", here))

    @property
    def holder(self) -> str:
        """Who holds the store."""
        who = "rank 0" if self._in_rank_0 else "the job's store, held by torchrun,"
        return f"{who} ({os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']})"

    def listen(self) -> bool:
        """Block until this rank is called: by an alarm (True), or by itself at the end."""
        key = f"call {self.rank}"
        self._listening.wait([key], LISTEN)
        return self._listening.get(key) == b"alarm"

    def stop_listening(self) -> None:
        """End this rank's `listen`."""
        self._do(lambda store: store.set(f"call {self.rank}", "end"))

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """The alarm that counts: this one, whereupon all ranks are called, or an earlier one."""
        text = json.dumps(asdict(alarm))
        first = Alarm(**json.loads(self._do(lambda store: store.compare_set("alarm", "", text))))
        if first.rank == self.rank:
            keys = [f"call {rank}" for rank in range(self.world_size)]
            self._do(lambda store: store.multi_set(keys, ["alarm"] * len(keys)))
        return first

    def alarm(self) -> Alarm:
        """The alarm for which this rank was called."""
        return Alarm(**json.loads(self._do(lambda store: store.get("alarm"))))

    def post(self, report: Report) -> None:
        """Answer an alarm."""
        self._do(lambda store: store.set(f"report {self.rank}", report.to_json()))

    def reports(self) -> dict[int, Report]:
        """The reports of all ranks that answer in time, this rank's first."""
        found: dict[int, Report] = {}
        missing = [self.rank, *(rank for rank in range(self.world_size) if rank != self.rank)]
        deadline = time.monotonic() + ANSWER_S
        while missing and time.monotonic() < deadline:
            for rank in list(missing):
                text = self._get(f"report {rank}")
                if text is not None:
                    found[rank] = Report.from_json(text)
                    missing.remove(rank)
            time.sleep(POLL_S)
        return found

    def hosts(self) -> dict[int, str]:
        """Host and process of every rank."""
        return {
            rank: self._get(f"host {rank}") or "has not joined" for rank in range(self.world_size)
        }

    def set_spoken(self) -> None:
        """The line is out: all may leave."""
        self._do(lambda store: store.set("spoken", ""))

    def inherits_speech(self) -> bool:
        """Wait for the line of the rank that raised the alarm. If it does not come: whether this
        rank is the first of those that waited."""
        deadline = time.monotonic() + SPEECH_S
        while self._get("spoken") is None:
            if time.monotonic() > deadline:
                return self._do(lambda store: store.add("heirs", 1)) == 1
            time.sleep(POLL_S)
        return False

    def leave(self) -> None:
        """Say that this rank leaves; a rank 0 that holds the store gives the others time."""
        deadline = time.monotonic() + STORE_S
        left = self._do(lambda store: store.add("left", 1))
        while self._in_rank_0 and self.rank == 0 and left < self.world_size:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
            left = self._do(lambda store: store.add("left", 0))

    def _get(self, key: str) -> str | None:
        present = self._do(lambda store: store.check([key]))
        return self._do(lambda store: store.get(key)).decode() if present else None

    def _do(self, operation: Callable[[Any], Any]) -> Any:
        """The operation's result; StoreLost if the store fails or does not answer."""
        result: list[Any] = []
        error: list[Exception] = []

        def run() -> None:
            try:
                if self._speaking is None:
                    self._speaking = self._store.clone()
                result.append(operation(self._speaking))
            except Exception as failure:
                error.append(failure)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(STORE_S)
        if not result:
            raise StoreLost("does not answer" if not error else "is gone")
        return result[0]
