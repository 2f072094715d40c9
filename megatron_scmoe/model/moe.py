"""The MoE of a shortcut unit: routed experts that read the shortcut, a shared expert that does not.

    MoE(x, z) = c_s * SE(x) + c_r * sum_i G(z)_i E_i(z)          [arXiv:2404.05019, (7), (14)-(17)]

x is the current representation, z the shortcut's. Differs from
megatron.core.transformer.moe.moe_layer.MoELayer: it has no forward of its own. The unit's schedule
calls the stages one by one, with dense work between them, and an object for every chunk of the
tokens holds what one stage hands to the next. Router, experts and shared expert are the host's.

Shapes: s sequence / TP, b batch, h hidden, T = s*b, E experts, R rows at this rank's experts
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.combine import COMBINES, SharedOutput
from megatron_scmoe.model.dispatch import dispatcher_of
from megatron_scmoe.model.dispatch.trip import Chunk, ExpertInput, Trip
from megatron_scmoe.model.experts.at_home import AT_HOME
from megatron_scmoe.model.experts.offload.experts import OffloadedExperts
from megatron_scmoe.model.experts.placed import deal_out, with_own_numbers
from megatron_scmoe.model.experts.weights import weights_of
from megatron_scmoe.model.routing import ROUTERS, wide_builder
from megatron_scmoe.model.routing.choice import Routing
from megatron_scmoe.overlap.branch import Leg, RoutedBranch
from megatron_scmoe.overlap.measure.choices import Choices
from megatron_scmoe.overlap.recorder import UnitRecorder


class ScMoELayer(MoELayer):
    """Stages of one MoE; see ShortcutLayer for the order in which they run."""

    token_dispatcher: Any  # the host's, until ours takes its place

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        scmoe: ScMoEConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        name: str | None = None,
        first: bool = False,
        expert_order: list[int] | None = None,
    ) -> None:
        """Build router, experts, shared expert and combine.

        Args beside the host's:
            scmoe: our options.
            first: whether no MoE layer stands in front.
            expert_order: the expert in every place, rank by rank, [E]; None for their own order.
        """
        at_home = scmoe.at_home
        columns = sum(at_home.values())
        chosen = ROUTERS[scmoe.scmoe_router]
        router = chosen.builder(submodules.router, columns, scmoe, first)
        dispatcher = dispatcher_of(config.moe_token_dispatcher_type, scmoe.scmoe_dispatch_copies)
        if config.moe_token_dispatcher_type != dispatcher.host_type:
            # The host chooses its own with an if/elif on the type (moe_layer.py:298).
            config = copy.copy(config)
            config.moe_token_dispatcher_type = dispatcher.host_type
        super().__init__(
            config=config,
            submodules=replace(submodules, router=wide_builder(router, columns)),
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        local = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        self.token_dispatcher = dispatcher.build(
            self.token_dispatcher, scmoe.ranks_per_node, self.config, pg_collection, local
        )
        self.expert_order: Tensor | None
        order = None if expert_order is None else torch.tensor(expert_order)
        self.register_buffer("expert_order", order, persistent=False)
        if expert_order is not None and not isinstance(self.experts, OffloadedExperts):
            weights = [weights_of(self.experts, place) for place in range(self.num_local_experts)]
            deal_out(weights, expert_order, self.ep_group)
        # An empty one would be in the way of whoever looks at the modules.
        self.at_home = (
            torch.nn.ModuleDict(
                {kind: AT_HOME[kind](self.config, number) for kind, number in at_home.items()}
            )
            if at_home
            else None
        )
        self.num_chunks = scmoe.scmoe_num_chunks
        self.input_scale = scmoe.scmoe_input_scale
        self.hands_on_logits = scmoe.scmoe_gating_residual
        self.recorder = UnitRecorder(scmoe.ranks_per_node)
        self.choices = Choices()
        ranks = torch.distributed.get_process_group_ranks(pg_collection.ep)
        self.nodes = [rank // scmoe.ranks_per_node for rank in ranks]
        self.router.routing = self.choices.watching(self.router.routing)
        self.combine_gate = COMBINES[scmoe.scmoe_combine].build(self.config)
        # The exchanges are not repeated in backward: recomputing "moe" means recomputing what
        # stands between them, and the shared expert.
        self.shared_experts_recompute |= self.moe_layer_recompute

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The host's, with experts under their own numbers wherever they lie."""
        state_dict = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.expert_order is None:
            return state_dict
        order = self.expert_order.tolist()
        return with_own_numbers(state_dict, f"{prefix}experts.", len(sharded_offsets), order)

    def forward(self, *args, **kwargs):
        raise RuntimeError("the stages of ScMoELayer are called by the schedule of ShortcutLayer")

    def choose_experts(
        self, z: Tensor, padding_mask: Tensor | None, before: Tensor | None = None
    ) -> Routing:
        """G(z) and the experts of every token.

        Args:
            z: [s, b, h].
            padding_mask: [s, b], True for padding.
            before: logits of the MoE layer in front, [s, b, E + H]; None in the first one.
        """
        experts = self.config.num_moe_experts
        assert experts is not None
        if not self.hands_on_logits:
            probs, routing_map = self.route(z, padding_mask)
            return Routing.of_columns(probs, routing_map, experts)
        probs, routing_map, logits = self.router.forward_with_logits(z, padding_mask, before)
        return replace(Routing.of_columns(probs, routing_map, experts), logits=logits)

    def depart(self, z: Tensor, routing: Routing, overlap: bool, route: int = 0) -> "RoutedTokens":
        """Send tokens on their way to their experts: permute them, ask for the numbers of rows.

        What they get from experts at home is computed here, while the others travel.

        Args:
            z: what the experts read, [s, b, h].
            routing: their experts.
            overlap: launch the exchanges of the backward pass early; otherwise wait at once.
            route: number of the routed branch.
        """
        flat = z.reshape(-1, z.shape[-1])
        if self.input_scale != 1:
            flat = flat * self.input_scale
        routing = routing.in_order(self.expert_order)
        if self.training and len(self.nodes) > 1:
            self.choices.visited(routing.routing_map, self.nodes)
        whole, rest = divmod(flat.shape[0], self.num_chunks)
        sizes = [whole + (chunk < rest) for chunk in range(self.num_chunks)]
        parts = zip(
            flat.split(sizes),
            routing.probs.split(sizes),
            routing.routing_map.split(sizes),
            strict=True,
        )
        # Evaluation is not recorded.
        recorder = self.recorder if self.training else None
        waited = self.recorder.host_waited if self.training else _forget
        trips = self.token_dispatcher.prepare(
            [Chunk(*part, routing.rows_per_token) for part in parts], waited
        )
        branch = RoutedBranch(overlap, recorder, route)
        legs = branch.depart([trip.cargo() for trip in trips])
        chunks = [RoutedChunk(self, *pair) for pair in zip(trips, legs, strict=True)]
        return RoutedTokens(z.shape, branch, chunks, self.experts_at_home(flat, routing))

    def experts_at_home(self, tokens: Tensor, routing: Routing) -> Tensor | None:
        """sum_i G(z)_i E_i(z) over the experts at home, [T, h], from tokens, [T, h]; None without
        such experts."""
        if self.at_home is None or routing.at_home is None:
            return None
        kinds: list[Any] = list(self.at_home.values())
        probs = routing.at_home.split([kind.number for kind in kinds], dim=1)
        first, *others = [kind(tokens, p) for kind, p in zip(kinds, probs, strict=True)]
        return sum(others, first).to(tokens.dtype)

    def announce(self, tokens_per_expert: Tensor | None) -> None:
        """Rows are on their way to this rank's experts, [e]: those that are not on the device come
        beside them."""
        if isinstance(self.experts, OffloadedExperts) and tokens_per_expert is not None:
            self.experts.announce(tokens_per_expert)

    def weighted_experts(self, rows: ExpertInput) -> Tensor:
        """G(z)_i E_i(z) of every row, [R, h]."""

        def compute(hidden_states: Tensor, probs: Tensor) -> Tensor:
            output, _ = self.experts(hidden_states, rows.tokens_per_expert, probs)
            return output

        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(compute, False, rows.hidden_states, rows.probs)
        return compute(rows.hidden_states, rows.probs)

    def shared_expert(self, x: Tensor) -> SharedOutput:
        """Shared expert and coefficient gate on x, [s, b, h]."""
        output = self.shared_experts_compute(x)
        return SharedOutput(output) if self.combine_gate is None else self.combine_gate(x, output)


@dataclass
class RoutedChunk:
    """One chunk of the tokens: to the experts, through them, and back."""

    layer: ScMoELayer
    trip: Trip
    leg: Leg
    _rows: ExpertInput | None = None
    _output: Tensor | None = None

    def start_dispatch(self) -> None:
        """Launch the exchange; blocks the host until the numbers of rows are known."""
        self.leg.send(self.trip.collective())
        self.layer.announce(self.trip.tokens_per_expert)

    def wait_dispatch(self) -> None:
        """Rows for this rank's experts, [R, h]."""
        self._rows = self.trip.expert_input(self.leg.receive())
        if self.layer.training:
            self.layer.recorder.routed(self._rows.tokens_per_expert)

    def experts(self) -> None:
        """G(z)_i E_i(z): weighted expert outputs, [R, h]."""
        rows, self._rows = self._rows, None
        assert rows is not None
        self._output = self.layer.weighted_experts(rows)

    def start_combine(self) -> None:
        """Send the weighted outputs, [R, h], back to their tokens."""
        output, self._output = self._output, None
        assert output is not None
        self.leg.send_back(*self.trip.reply(output))

    def restore(self, rows: Tensor) -> Tensor:
        """sum_i G(z)_i E_i(z) of the chunk's tokens, [T, h], from what came back."""
        return self.trip.restore(rows)


@dataclass
class RoutedTokens:
    """The tokens of one forward pass on one route."""

    shape: torch.Size
    """[s, b, h]."""
    branch: RoutedBranch
    """Their way through the graph."""
    chunks: list[RoutedChunk]
    """Their parts, which are exchanged one by one."""
    at_home: Tensor | None
    """What experts at home give them, [T, h]; None without such experts."""

    def output(self) -> Tensor:
        """sum_i G(z)_i E_i(z), [s, b, h], back in the dense graph."""
        returned = zip(self.chunks, self.branch.arrive(), strict=True)
        first, *others = [chunk.restore(rows) for chunk, rows in returned]
        tokens = torch.cat([first, *others]) if others else first
        if self.at_home is not None:
            tokens = tokens + self.at_home
        return tokens.view(self.shape)


def _forget(_seconds: float) -> None:
    pass
