"""How many rows every rank has for every expert, known without stopping a device.

Without them no rank knows how many rows it will receive. They are gathered and copied to the host
beside the first dense work of the window; whoever needs them first waits for them, once for all
chunks of a unit.

Shapes: n ranks of the group, C chunks of the tokens, E experts or whatever else has rows
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scmoe.overlap.collectives import AllGather
from megatron_scmoe.overlap.streams import launch


class RowCounts:
    """Counts of one forward pass of a unit, on their way.

    Args:
        routing_maps: of every chunk, [T, E], bool.
        group: whose counts are wanted.
        host_waited: told the seconds for which the host stood still.
    """

    def __init__(
        self,
        routing_maps: Sequence[Tensor],
        group: ProcessGroup,
        host_waited: Callable[[float], None],
    ) -> None:
        self._host_waited = host_waited
        own = torch.stack([routing_map.sum(dim=0) for routing_map in routing_maps])
        self._shape = (group.size(), *own.shape)
        gather = AllGather(group)
        exchange = gather.exchange if gather.moves() else _stay
        self._flight = launch(exchange, [own], lane="counts")
        self._copy = self._flight.to_host()
        self._known: tuple[Tensor, Tensor] | None = None

    def on_host(self) -> Tensor:
        """[n, C, E], int64, on the CPU; blocks the host the first time."""
        return self._wait()[0]

    def on_device(self) -> Tensor:
        """[n, C, E], int64, where the tokens are; blocks the host the first time."""
        return self._wait()[1]

    def _wait(self) -> tuple[Tensor, Tensor]:
        if self._known is None:
            host, seconds = self._copy.wait()
            self._host_waited(seconds)
            (device,) = self._flight.wait()
            self._known = host.view(self._shape), device.view(self._shape)
        return self._known


class KnownRowCounts(RowCounts):
    """Counts that need no exchange: every rank has as many rows for every expert.

    Args:
        shape: [n, C, E].
        rows: of one rank for one expert, in every chunk.
        device: of the tokens.
    """

    def __init__(self, shape: tuple[int, int, int], rows: int, device: torch.device) -> None:
        # Filled on both sides: a copy would wait for the device.
        self._known = (torch.full(shape, rows), torch.full(shape, rows, device=device))


def _stay(sent: list[Tensor], async_op: bool) -> tuple[list[Tensor], list[None]]:
    """One rank's exchange with itself."""
    return sent, []
