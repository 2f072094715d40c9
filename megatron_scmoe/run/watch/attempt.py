"""A key-value store for each attempt of a job that torchrun restarts.

From 2.4 on torchrun keeps one store for all attempts (pytorch/pytorch#135712, #167288). Ranks that
come back find the addresses of ranks that are dead, and the attempt ends with "Connection refused".
The restart count that a rank is told does not tell attempts apart, an agent that joins late starts
at 0, so ranks agree on a number through the store itself.
"""

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

SECONDS_BETWEEN_LOOKS = 0.01


def store_of_this_attempt(rank: int, world_size: int, timeout: timedelta) -> Store | None:
    """A store without leftovers, or None where the launcher does not share one.

    Raises:
        RuntimeError: not all ranks of this attempt are there in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = TCPStore(address, port, is_master=False, timeout=timeout)
    agree = _number_for_others if rank == 0 else _number_from_first
    return PrefixStore(f"attempt {agree(shared, rank, world_size, timeout)}", shared)


def _number_for_others(store: Store, rank: int, world_size: int, timeout: timedelta) -> int:
    """Take a number that no attempt had and answer who asks, the dead included, until every rank of
    this attempt has it.

    Raises:
        RuntimeError: some are not there in time.
    """
    attempt = store.add("attempts", 1)
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} are not there after {timeout}")
        for other in sorted(missing):
            if store.check([f"joined {attempt} {other}"]):
                missing.remove(other)
            elif store.check([f"question {other}"]):
                question = store.get(f"question {other}").decode()
                store.set(f"answer {question}", str(attempt))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return attempt


def _number_from_first(store: Store, rank: int, world_size: int, timeout: timedelta) -> int:
    question = uuid.uuid4().hex
    store.set(f"question {rank}", question)
    attempt = int(store.get(f"answer {question}"))  # waits
    store.set(f"joined {attempt} {rank}", "")
    return attempt
