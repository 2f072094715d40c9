"""Each token goes once to every rank that has experts of it, and one sum comes back.

Or to every node: what differs is in relayed.py.

    (token, rank)  one row, and the token's weights for the experts there, [e]
    there          repeated for each of those experts, computed, summed
    (rank, token)  one row, added to those of the other ranks

Weights have a column for every expert of the rank; -inf says that the token is not for this one,
because the weight of a token that is may be 0. Weighted outputs are summed in the router's
precision and rounded once to travel, so that what differs from a row for every expert is the order
of sums of three and more.

Shapes: s sequence / TP, b batch, h hidden, T = s*b local tokens (of a chunk), E experts, D ranks
or nodes that a token may be sent to, e experts of each, N rows sent, S rows received by all expert
tensor parallel ranks, R rows for this rank's experts
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from torch import Tensor

from megatron_scmoe.model.dispatch.alltoall import AllToAllDispatcher, SentTrip
from megatron_scmoe.model.dispatch.passage import Passage
from megatron_scmoe.model.dispatch.row_counts import RowCounts
from megatron_scmoe.model.dispatch.trip import Chunk, ExpertInput
from megatron_scmoe.overlap.collectives import Collective

NOT_HERE = -torch.inf


class OncePerRankDispatcher(AllToAllDispatcher):
    """A row for every rank with at least one of a token's experts."""

    def prepare(
        self, chunks: list[Chunk], host_waited: Callable[[float], None]
    ) -> "list[OnceTrip]":
        """Permute the tokens by rank and ask the other ranks for their numbers of rows.

        One exchange tells the rows for every expert and those for every rank.
        """
        chunks = self.padded(chunks)
        maps = [self.counted(chunk.routing_map) for chunk in chunks]
        counts = RowCounts(maps, self.tp_ep_group, host_waited)
        return [OnceTrip(self, chunk, counts, index) for index, chunk in enumerate(chunks)]

    def most_rows(self, chunk: Chunk) -> int:
        """Rows that a chunk may have."""
        return min(super().most_rows(chunk), len(chunk.routing_map) * self.places)

    @property
    def places(self) -> int:
        """D."""
        return self.ep_group.size()

    @property
    def own_columns(self) -> slice:
        """Where among the weights of a row that was received those for this rank stand."""
        return slice(None)

    def counted(self, routing_map: Tensor) -> Tensor:
        """What rows are counted for, [T, E + ...], from [T, E]: experts first."""
        return torch.cat([routing_map, visits(routing_map, self.ep_group.size())], dim=1)

    def passage(self, counts: Tensor) -> Passage:
        """What travels.

        Args:
            counts: rows of all ranks for what is counted behind the experts, [EP, ETP, ...].
        """
        rank = self.ep_group.rank()
        sent, received = counts[rank, self.tp_group.rank()], counts[:, :, rank]
        return Passage(self.ep_group, self.tp_group, sent, received)


class OnceTrip(SentTrip):
    """Rows sorted by rank, sent there, repeated for its experts, and back as their sums."""

    _dispatcher: OncePerRankDispatcher

    def __init__(
        self, dispatcher: OncePerRankDispatcher, chunk: Chunk, counts: RowCounts, index: int
    ) -> None:
        sent = visits(chunk.routing_map, dispatcher.places)
        super().__init__(dispatcher, chunk, counts, index, sent)
        self._precision = torch.promote_types(chunk.probs.dtype, chunk.hidden_states.dtype)
        self._num_experts = chunk.routing_map.shape[1]
        rows, _, self._permutation, _, _ = permute(
            chunk.hidden_states, sent, num_out_tokens=self._most_rows, fused=self._fused
        )
        weights = chunk.probs.masked_fill(~chunk.routing_map, NOT_HERE)
        weights = weights.unflatten(1, (dispatcher.places, -1))
        # The same rows, as those of D * T tokens with one place to go.
        row_weights, *_ = permute(
            weights.transpose(0, 1).flatten(0, 1),
            sent.T.reshape(-1, 1),
            num_out_tokens=self._most_rows,
        )
        self._cargo = row_weights, rows

    def _passage_of(self, counts: Tensor) -> Passage:
        return self._dispatcher.passage(counts[:, :, self._num_experts :])

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """Each row once for every expert of this rank that it is for."""
        weights, rows = self._passage.gathered(received)
        weights = weights[:, self._dispatcher.own_columns].contiguous()
        self._here = weights != NOT_HERE
        self._received_shape = rows.shape
        rows, probs, self._order, _, _ = permute(
            rows,
            self._here,
            probs=weights,
            num_out_tokens=int(self.tokens_per_expert.sum()),
            fused=self._fused,
        )
        assert probs is not None
        return ExpertInput(rows, probs, self.tokens_per_expert)

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """The sum over this rank's experts for every row that came, in the router's precision; so
        are those of expert tensor parallel parts."""
        rows = unpermute(
            expert_output.to(self._precision),
            self._order,
            restore_shape=self._received_shape,
            routing_map=self._here,
            fused=self._fused,
        )
        rows = self._passage.summed(rows, self._precision).to(expert_output.dtype)
        return self._collective.mirrored(), rows


def visits(routing_map: Tensor, places: int) -> Tensor:
    """Whether a place has experts of a token, [T, D], from [T, E]; each has the next E / D."""
    return routing_map.unflatten(1, (places, -1)).any(dim=2)
