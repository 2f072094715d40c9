"""Each token goes once to every node that has experts of it, and is handed on inside.

    (token, node)  one row, to the rank of the same place in that node, with the token's weights for
                   all experts of the node
    (token, rank)  one row, from there to every rank of the node that has experts of it
    there          as in once.py
    back           the ranks' sums are summed on the node, and one row crosses

The numbers of rows of all hops are in the one exchange of counts: a column for every expert, every
rank and every node. Nodes are equal blocks of consecutive ranks of the expert parallel group.

Shapes: n nodes, r ranks of each, EP = n r and ETP ranks of the groups, T local tokens, E experts, N
rows sent, M rows that this rank hands on
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_scmoe.model.dispatch.once import NOT_HERE, OncePerRankDispatcher, visits
from megatron_scmoe.model.dispatch.passage import Passage
from megatron_scmoe.overlap.collectives import AllToAll
from megatron_scmoe.overlap.relay import Fork, Relay


class OncePerNodeDispatcher(OncePerRankDispatcher):
    """A row for every node with at least one of a token's experts, handed on inside the node."""

    ranks: int
    """r."""

    @classmethod
    def build(cls, host: MoETokenDispatcher, ranks_per_node: int, *layer: Any) -> Self:
        """As the others.

        Raises:
            ValueError: the expert parallel group is not laid out in equal blocks over nodes.
        """
        dispatcher = cls(*layer)
        ranks = torch.distributed.get_process_group_ranks(dispatcher.ep_group)
        nodes = [rank // ranks_per_node for rank in ranks]
        dispatcher.ranks = nodes.count(nodes[0])
        blocks = [node for node in dict.fromkeys(nodes) for _ in range(dispatcher.ranks)]
        if nodes != blocks:
            raise ValueError(f"expert parallel ranks {ranks} are not equal blocks of nodes {nodes}")
        return dispatcher

    @property
    def places(self) -> int:
        return self.ep_group.size() // self.ranks

    @property
    def own_columns(self) -> slice:
        experts = self.local_experts.stop - self.local_experts.start
        first = self._place * experts
        return slice(first, first + experts)

    def counted(self, routing_map: Tensor) -> Tensor:
        return torch.cat([super().counted(routing_map), visits(routing_map, self.places)], dim=1)

    def passage(self, counts: Tensor) -> "RelayedPassage":
        shape = self.places, self.ranks
        rank, tp_rank = self.ep_group.rank(), self.tp_group.rank()
        node = rank // self.ranks
        by_rank, by_node = counts.split([self.ep_group.size(), self.places], dim=2)
        # A rank hands on what those of its place in all nodes sent: [r, ETP, EP].
        handed_on = by_rank.unflatten(0, shape).sum(dim=0)
        there, here, sent = (torch.zeros(shape, dtype=counts.dtype) for _ in range(3))
        received = sent.new_zeros(*shape, self.tp_group.size())
        sent[node] = handed_on[self._place, tp_rank].unflatten(0, shape)[node]
        received[node] = handed_on[:, :, rank]
        there[:, self._place] = by_node[rank, tp_rank]
        here[:, self._place] = by_node.unflatten(0, shape)[:, self._place, tp_rank, node]
        return RelayedPassage(
            self.ep_group,
            self.tp_group,
            sent.flatten(),
            received.flatten(0, 1),
            AllToAll(self.ep_group, there.flatten().tolist(), here.flatten().tolist()),
            self.ranks,
        )

    @property
    def _place(self) -> int:
        """In the node."""
        return self.ep_group.rank() % self.ranks


@dataclass(frozen=True)
class RelayedPassage(Passage):
    """Rows that cross to a rank of every node, and from there as the others do."""

    across: AllToAll
    ranks: int
    """r."""

    @property
    def rows(self) -> int:
        return sum(self.across.input_splits)

    def collective(self) -> Relay:
        return Relay(self.across, self._between_ranks(), Fork(self._wanted))

    def _wanted(self, weights: Tensor) -> Tensor:
        """Which ranks of the node have experts of a row, [M, r], from its weights, [M, r e]."""
        return visits(weights != NOT_HERE, self.ranks)
