"""Whether a folder that one rank writes into is the same folder on every node."""

import os
import socket
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


class SharedFolderError(ValueError):
    """A folder that nodes do not share; the message is for the user."""


def has_several_nodes() -> bool:
    """Whether the launcher started ranks on other nodes too."""
    return os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")


def check_shared(folder: Path, option: str) -> None:
    """Let the first rank write a file that every other node has to see; nothing of it stays.

    A collective: all ranks of the default group call it. On one node a folder that is there is not
    written to. The first rank alone looks whether it is, for another may look when it has just made
    it.

    Raises:
        SharedFolderError: on every rank, with the hosts that do not see it, or why nothing can be
            written there.
    """
    first = torch.distributed.get_rank() == 0
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    name: list[Any] = [None]
    if first and (has_several_nodes() or not folder.is_dir()):
        name = [f".shared-{uuid.uuid4().hex}"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name[0]).touch()
        except OSError as error:
            name = [error]
    torch.distributed.broadcast_object_list(name)
    if name[0] is None:
        return
    if isinstance(name[0], OSError):
        raise SharedFolderError(f"{option} {folder} cannot be written: {name[0].strerror}.")
    file = folder / name[0]
    seen: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, (file.exists(), socket.gethostname(), folder))
    if first:
        with suppress(OSError):  # somebody else is there already
            file.unlink()
            for path in made:
                path.rmdir()
    if blind := sorted({host for sees, host, _ in seen if not sees}):
        raise SharedFolderError(
            f"{option} {seen[0][2]} is not the same folder everywhere: what rank 0 on {seen[0][1]} "
            f"writes there {', '.join(blind)} does not see; name one on a file system that all "
            "nodes share."
        )
