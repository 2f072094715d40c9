"""Whether an error of this rank is another rank's doing."""

import torch

# What gloo and NCCL say when another rank left a collective or does not come.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timeout caused pair closure",
    "connectFullMesh failed",
    "remote process exited",
    "Watchdog caught collective operation timeout",
)
TIMED_OUT = ("Timed out", "timeout", "timed out")


def lost_peer(error: BaseException) -> bool:
    """Whether a collective or the store failed because another rank is gone or late."""
    stores = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    return isinstance(error, stores) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)
    )


def timed_out(error: BaseException) -> bool:
    """Whether it is late; otherwise its connection was closed, so that it is gone."""
    return any(text in str(error) for text in TIMED_OUT)
