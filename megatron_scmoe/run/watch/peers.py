"""Whether an error of this rank is another rank's doing."""

from torch.distributed import DistNetworkError, DistStoreError

# What gloo and NCCL say when another rank has left a collective or does not come.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timeout caused pair closure",
    "connectFullMesh failed",
    "remote process exited",
)


def lost_peer(error: BaseException | None) -> BaseException | None:
    """The error itself or the one behind it that says that another rank is gone or late, if any:
    the host wraps some in errors of its own."""
    while error is not None:
        if isinstance(error, (DistNetworkError, DistStoreError)):
            return error
        if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER):
            return error
        error = error.__cause__ or error.__context__
    return None


def is_late(error: BaseException) -> bool:
    """Whether a lost peer is late; otherwise its connection was closed: it is gone."""
    return "time" in str(error).lower()
