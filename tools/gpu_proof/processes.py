"""Processes that a part has started, to the last one.

torchrun puts its ranks into sessions of their own, where killing its process group does not reach
them; and what it leaves behind when it is killed has another parent.
"""

import ctypes
import time
from contextlib import suppress

import psutil

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
    while (running := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in running:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(running, timeout=0.05)
