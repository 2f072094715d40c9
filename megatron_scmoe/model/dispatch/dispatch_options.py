"""What dispatchers read of ScMoEConfig."""

from typing import Protocol


class DispatchOptions(Protocol):
    """Options of ours; see config.py."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks of the job that share a node."""
