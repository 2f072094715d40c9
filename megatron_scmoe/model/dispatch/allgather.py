"""Every token goes to all ranks, and each picks those of its experts.

Shapes: s sequence / TP, b batch, h hidden, T = s*b local tokens (of a chunk), E experts, e local
experts, R rows for this rank's experts
"""

from collections.abc import Callable

from megatron.core.transformer.moe.moe_utils import permute, unpermute
from torch import Tensor

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.dispatch.row_counts import RowCounts
from megatron_scmoe.model.dispatch.trip import Chunk, Dispatcher, ExpertInput
from megatron_scmoe.overlap.collectives import AllGather, Collective, ReduceScatter


class AllGatherDispatcher(Dispatcher):
    """Every token is sent to all ranks, which pick those of their experts."""

    host_type = "allgather"
    refusals = (
        Refusal(
            lambda config, scmoe: config.moe_router_padding_for_quantization,
            "--moe-router-padding-for-quantization with --moe-token-dispatcher-type allgather does "
            "not work with a shortcut",
            "use alltoall, or drop the padding",
            "the host pads the rows of the other dispatchers only",
        ),
    )

    def prepare(
        self, chunks: list[Chunk], host_waited: Callable[[float], None]
    ) -> "list[AllGatherTrip]":
        """Nothing is computed before the exchange."""
        maps = [chunk.routing_map for chunk in chunks]
        counts = RowCounts(maps, self.tp_ep_group, host_waited)
        return [AllGatherTrip(self, chunk, counts, index) for index, chunk in enumerate(chunks)]


class AllGatherTrip:
    """Tokens gathered from the expert (tensor) parallel ranks; outputs summed over them."""

    tokens_per_expert: Tensor | None = None

    def __init__(
        self, dispatcher: AllGatherDispatcher, chunk: Chunk, counts: RowCounts, index: int
    ) -> None:
        self._dispatcher = dispatcher
        self._fused = dispatcher.config.moe_permute_fusion
        self._dtype = chunk.hidden_states.dtype
        self._counts, self._index = counts, index
        # Small ones first, as in an all-to-all.
        self._cargo: tuple[Tensor, ...] = (chunk.routing_map, chunk.probs, chunk.hidden_states)

    def cargo(self) -> tuple[Tensor, ...]:
        """Routing map and router weights, [T, E], and hidden states, [T, h]."""
        cargo, self._cargo = self._cargo, ()
        return cargo

    def collective(self) -> Collective:
        """One number of tokens on all ranks: no need to know the numbers of rows."""
        return AllGather(self._dispatcher.tp_ep_group)

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """The tokens of this rank's experts; a token of several experts is repeated."""
        routing_map, probs, hidden_states = received
        local = self._dispatcher.local_experts
        self._local_map = routing_map[:, local].contiguous()
        self._shape = hidden_states.shape
        self._probs_dtype = probs.dtype
        tokens_per_expert = self._counts.on_host()[:, self._index, local].sum(dim=0)
        rows, row_probs, self._permutation, _, _ = permute(
            hidden_states,
            self._local_map,
            probs=probs[:, local].contiguous(),
            num_out_tokens=int(tokens_per_expert.sum()),
            fused=self._fused,
        )
        return ExpertInput(rows, row_probs, tokens_per_expert)

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """Outputs in the order of all ranks' tokens, in the router's precision."""
        rows = unpermute(
            expert_output,
            self._permutation,
            restore_shape=self._shape,
            routing_map=self._local_map,
            fused=self._fused,
        )
        return ReduceScatter(self._dispatcher.tp_ep_group), rows.to(self._probs_dtype)

    def restore(self, rows: Tensor) -> Tensor:
        """The sum is of this rank's tokens already."""
        return rows.to(self._dtype)
