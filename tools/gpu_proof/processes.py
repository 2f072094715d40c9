"""Processes that a part has started, to the last one.

torchrun puts its ranks into sessions of their own, where killing its process group does not reach
them; and what it leaves behind when it is killed has another parent.
"""

import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

GIVE_UP_S = 10.0
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on what loses its parent below this process becomes a child of this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants() -> None:
    """Kill everything below this process and collect it.

    What the driver does not let go within GIVE_UP_S stays: the next part must still have its time.
    """
    deadline = time.monotonic() + GIVE_UP_S
    while (running := _descendants(os.getpid())) and time.monotonic() < deadline:
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    with suppress(ChildProcessError):  # none is left
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _descendants(ancestor: int) -> list[int]:
    """Without those that have ended and only wait to be collected."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # "pid (command) state parent ...", where the command may hold anything
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = children.get(ancestor, [])
    for process in found:
        found += children.get(process, [])
    return found
