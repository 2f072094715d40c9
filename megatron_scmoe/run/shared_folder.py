"""Whether a folder that one rank writes into is the same folder on every node."""

import os
import socket
import uuid
from pathlib import Path
from typing import Any

import torch


class SharedFolderError(ValueError):
    """A folder that nodes do not share; the message is for the user."""


def check_shared(folder: Path, option: str) -> None:
    """Let the first rank write a file that every other node has to see.

    A collective: all ranks of the default group call it. On one node there is nothing to check.

    Raises:
        SharedFolderError: on every rank, with the hosts that do not see it.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return
    name: list[Any] = [f".shared-{uuid.uuid4().hex}"]
    torch.distributed.broadcast_object_list(name)
    file = folder / name[0]
    first = torch.distributed.get_rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    torch.distributed.barrier()
    seen: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, (file.exists(), socket.gethostname()))
    if first:
        file.unlink()
    if blind := sorted({host for sees, host in seen if not sees}):
        raise SharedFolderError(
            f"{option} {folder} is not the same folder everywhere: what rank 0 on {seen[0][1]} "
            f"writes there {', '.join(blind)} does not see; name one on a file system that all "
            "nodes share."
        )
