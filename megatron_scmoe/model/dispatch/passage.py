"""Rows on the way to the ranks of their experts, each of which several ranks may share.

An all-to-all brings them to the expert parallel ranks; the expert tensor parallel ranks then gather
what each of them got, because all have a part of every expert. Back, their parts are summed.

Shapes: EP and ETP ranks of the groups, N rows sent, R rows received, S rows of all ETP ranks
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, dtype
from torch.distributed import ProcessGroup

from megatron_scmoe.overlap.collectives import AllToAll, Collective


@dataclass(frozen=True)
class Passage:
    """Which rows travel, known on the host."""

    ep_group: ProcessGroup
    tp_group: ProcessGroup
    sent: Tensor
    """Rows for every expert parallel rank, [EP], on the CPU; they sum up to N."""
    received: Tensor
    """Rows from every one, for each of its expert tensor parallel ranks, [EP, ETP], on the CPU."""

    @property
    def rows(self) -> int:
        """N."""
        return int(self.sent.sum())

    def collective(self) -> Collective:
        """From [N, ...] to [R, ...]."""
        return self._between_ranks()

    def _between_ranks(self) -> AllToAll:
        received = self.received[:, self.tp_group.rank()]
        return AllToAll(self.ep_group, self.sent.tolist(), received.tolist())

    def gathered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What all expert tensor parallel ranks received, each [S, ...], from [R, ...]."""
        if self.tp_group.size() == 1:
            return list(tensors)
        return [
            gather_from_sequence_parallel_region(
                tensor, group=self.tp_group, output_split_sizes=self._rows_by_tp_rank()
            )
            for tensor in tensors
        ]

    def summed(self, rows: Tensor, precision: dtype) -> Tensor:
        """The sums over expert tensor parallel ranks of what this rank received, [R, ...], from
        [S, ...].

        Args:
            precision: of the sum.
        """
        if self.tp_group.size() == 1:
            return rows
        return reduce_scatter_to_sequence_parallel_region(
            rows.to(precision), group=self.tp_group, input_split_sizes=self._rows_by_tp_rank()
        ).to(rows.dtype)

    def _rows_by_tp_rank(self) -> list[int]:
        return self.received.sum(dim=0).tolist()
