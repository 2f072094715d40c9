"""One shortcut unit: a dense layer, a MoE layer, and the shortcut between them.

    h --attention--> a --MLP--> m --attention--> b --------- shared expert --+--> out
    |                |          |                                            |
    pos3             pos2       pos1   (tap)                                  |
    +---> norm > router > dispatch ......... experts ......... combine -------+

    H_{l+1} = H_{l+1}^MH + c_s SE(H_{l+1}^MH) + c_r sum_i G(z)_i E_i(z)

[arXiv:2404.05019, (7)-(10), (14)-(17)]

The tapped tensor z never leaves the unit, so neither pipeline stages nor recomputation can cut the
shortcut. To the host's TransformerBlock a unit is one layer: `layer_number` counts the block's
layers. Attention, router and logs inside it use the number of their attention layer, as on the
baseline. A Pos-1 unit reads its own MoE layer's input and has no dense layer.

Shapes: s sequence / TP, b batch, h hidden
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import batched
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import get_transformer_layer_offset
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import get_pg_rank
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.combine import SharedOutput
from megatron_scmoe.model.moe import RoutedChunk, RoutedTokens
from megatron_scmoe.model.routing.choice import Routing
from megatron_scmoe.overlap.measure.choices import Choices
from megatron_scmoe.overlap.recorder import Activity, UnitRecorder, mark_backward
from megatron_scmoe.overlap.runner import Runner
from megatron_scmoe.overlap.schedule import (
    TAPS,
    Route,
    Slots,
    Step,
    Task,
    build_schedule,
    window,
)
from megatron_scmoe.overlap.streams import runs_ahead


class NumberedLayer(TransformerLayer):
    """A host layer whose position in the block differs from the number of its attention layer.

    Args:
        config: the block's config, which counts block layers.
        layer_config: the model's config, which counts attention layers.
        attention_number: 1-based number of the attention layer over the whole model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_config: TransformerConfig,
        attention_number: int,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(
            config=layer_config,
            submodules=submodules,
            layer_number=attention_number,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            add_layer_offset=False,
        )
        self.attention_number = attention_number
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, get_pg_rank(pg_collection.pp)
        )


@dataclass
class ShortcutLayerSubmodules(TransformerLayerSubmodules):
    """The MoE layer's submodules, and what the shortcut adds to them."""

    dense_layer: TransformerLayerSubmodules | None = None
    """The dense layer in front; None for Pos-1."""
    shortcut_layernorm: LayerNormBuilder = IdentityOp
    """Norm of the tapped tensor, if it has one of its own."""
    post_layernorm: LayerNormBuilder = IdentityOp
    """Norm of the merged output before the residual add, if there is one."""


@dataclass(frozen=True)
class Tap:
    """What a route has read, and where its tokens go."""

    z: Tensor
    """Normed, [s, b, h]."""
    routing: Routing


@dataclass
class UnitPass:
    """One forward pass through a unit: what its steps hand on."""

    hidden_states: Tensor
    """Main branch, [s, b, h]."""
    attention_arguments: dict[str, Any]
    padding_mask: Tensor | None
    packed_seq_params: Any
    carried: Tensor | None = None
    """What the unit before has carried here, [s, b, ...], and what this one carries on."""
    inside: tuple[Tensor, ...] | None = None
    """What one operator of the attention hands to the next, while the steps between them run."""
    taps: dict[int, Tap] = field(default_factory=dict)
    """By route, until its tokens depart."""
    routed: dict[int, RoutedTokens] = field(default_factory=dict)
    """By route."""
    samples: int | None = None
    """Micro-batch size, if what is tapped was un-flattened from a packed sequence."""
    shared: SharedOutput | None = None
    """None before there is one, and in a unit without a shared expert."""


class ShortcutLayer(NumberedLayer):
    """Dense layer + MoE layer with a shortcut around the dense work between tap and merge.

    Attributes, which hold from the next forward pass on:
        slots: where the routed experts run.
        overlap: whether exchanges are launched early and awaited late. Changes no bit of a result.
        operators_ahead: on a GPU, dense operators that are enqueued before the host waits for the
            numbers of rows.
        further_routes: routed branches beside that of the shortcut position.
    """

    operators_ahead = 1
    further_routes: tuple[Route, ...] = ()

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ShortcutLayerSubmodules,
        scmoe: ScMoEConfig,
        layer_config: TransformerConfig,
        attention_number: int,
        vp_stage: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            config, submodules, layer_config, attention_number, vp_stage=vp_stage, **others
        )
        self._scmoe = scmoe
        if submodules.dense_layer is not None:
            self.dense_layer = build_module(
                ModuleSpec(module=TransformerLayer, submodules=submodules.dense_layer),
                config=layer_config,
                layer_number=attention_number - 1,
                pg_collection=self.pg_collection,
                vp_stage=vp_stage,
                add_layer_offset=False,
            )
            # In front, as it runs: the host fills gradient buckets in the order of modules.
            for name in [name for name in self._modules if name != "dense_layer"]:
                self._modules[name] = self._modules.pop(name)
        self.shortcut_layernorm, self.post_layernorm = (
            norm(
                config=layer_config,
                hidden_size=layer_config.hidden_size,
                eps=layer_config.layernorm_epsilon,
            )
            for norm in (submodules.shortcut_layernorm, submodules.post_layernorm)
        )
        self.slots = scmoe.initial_slots
        if scmoe.scmoe_expert_slot == "auto" and scmoe.scmoe_measured_slots is not None:
            measured = [Slots(*pair) for pair in batched(scmoe.scmoe_measured_slots, 2)]
            self.further_routes = tuple(
                route._replace(slots=slots)
                for route, slots in zip(self.further_routes, measured[1:], strict=True)
            )
        self.overlap = scmoe.scmoe_overlap
        self._runner = Runner(self._steps(), self.recorder)
        if submodules.dense_layer is not None:
            self._open_attention(
                self.dense_layer.self_attention, Step.DENSE_CORE_ATTENTION, Step.DENSE_PROJECTION
            )
        self._open_attention(self.self_attention, Step.CORE_ATTENTION, Step.PROJECTION)

    def _steps(self) -> dict[Step, Callable[[UnitPass, Task], None]]:
        """What the unit does for each step of its schedule."""

        def with_chunk(do: Callable[[RoutedChunk], None]) -> Callable[[UnitPass, Task], None]:
            return lambda run, task: do(run.routed[task.route].chunks[task.number])

        return {
            # The main branch: H_{l-1} -> H_l^MH -> H_l^MLP -> H_{l+1}^MH -> out.
            Step.DENSE_QKV: self.dense_attention,
            Step.DENSE_CORE_ATTENTION: self.inside_attention,
            Step.DENSE_PROJECTION: self.inside_attention,
            Step.DENSE_MLP: self.dense_mlp,
            Step.QKV: self.attention,
            Step.CORE_ATTENTION: self.inside_attention,
            Step.PROJECTION: self.inside_attention,
            Step.SHARED_EXPERT: self.shared_expert,
            # The routed branch: tap -> norm > router > dispatch > experts > combine.
            Step.ROUTE: self.tap,
            Step.PREPARE_DISPATCH: self.depart,
            Step.START_DISPATCH: self.start_dispatch,
            Step.WAIT_DISPATCH: with_chunk(RoutedChunk.wait_dispatch),
            Step.EXPERTS: with_chunk(RoutedChunk.experts),
            Step.START_COMBINE: with_chunk(RoutedChunk.start_combine),
            Step.WAIT_COMBINE: lambda run, task: run.routed[task.route].branch.wait(),
            # Where they meet, in the backward pass and in the forward pass.
            Step.TURN: self.turn,
            Step.MARK: self.mark,
            Step.MERGE: self.merge,
        }

    @property
    def recorder(self) -> UnitRecorder:
        """What this unit did and when."""
        return self.mlp.recorder

    @property
    def choices(self) -> Choices:
        """What its router has chosen."""
        return self.mlp.choices

    @property
    def bias(self) -> Tensor | None:
        """What selects experts beside their scores, [E + H], if anything does."""
        return getattr(self.mlp.router, "expert_bias", None)

    @property
    def ep_group(self) -> ProcessGroup:
        """Ranks that share the experts."""
        return self.mlp.ep_group

    def _schedule(self, hidden_states: Tensor) -> tuple[Task, ...]:
        """What the next forward pass does, in order."""
        # Asked of the data: the host moves a module to its device after it was built.
        ahead = self.operators_ahead if runs_ahead(hidden_states) else 0
        return build_schedule(
            self._scmoe.scmoe_shortcut_position,
            self.slots,
            self.overlap,
            self._scmoe.scmoe_num_chunks,
            operators_ahead=ahead,
            marked=self.recorder.records_steps,
            further=self.further_routes,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        context: Tensor | None = None,
        **attention_arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the schedule.

        Args:
            hidden_states: [s, b, h].
            attention_mask: [1 or b, 1, s, s], bool, True where masked.
            padding_mask: [b, s], True for padding; only the router's losses use it.
            packed_seq_params: the host's description of packed sequences.
            context: what the unit before has carried here, [s, b, ...].
            attention_arguments: further arguments of the host's attention.

        Returns:
            hidden states [s, b, h], and what is carried to the next unit.
        """
        run = UnitPass(
            hidden_states=hidden_states,
            attention_arguments={
                "attention_mask": attention_mask,
                "padding_mask": padding_mask,
                "packed_seq_params": packed_seq_params,
                **attention_arguments,
            },
            padding_mask=padding_mask,
            packed_seq_params=packed_seq_params,
            # GPT's layers have no cross attention; what the host hands from layer to layer for it,
            # also through recomputation, is free.
            carried=context,
        )
        if self.training:
            self.recorder.begin_pass(hidden_states)
        try:
            self._runner.execute(run, self._schedule(hidden_states), recorded=self.training)
        except BaseException:
            for routed in run.routed.values():
                routed.branch.abandon()
            raise
        return run.hidden_states, run.carried

    def _open_attention(self, attention: Module, core: Step, projection: Step) -> None:
        """Let the steps between the operators of an attention run where they belong."""
        config = self.config
        recomputed = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )
        # A recomputed core is called without a graph, and once more in the backward pass: what
        # stands in front of it runs behind it.
        places = [(projection, attention.linear_proj)]
        if not recomputed:
            places.append((core, attention.core_attention))
        for step, module in places:
            assert isinstance(module, Module)
            self._runner.open(module, step)

    # Dense work. ------------------------------------------------------------------------------

    def dense_attention(self, run: UnitPass, _: Task) -> None:
        """H_l^MH = H_{l-1} + MultiHead(H_{l-1})  [(10)]; the three steps are one call."""
        run.hidden_states, _ = self.dense_layer._forward_attention(
            run.hidden_states, **run.attention_arguments
        )

    def dense_mlp(self, run: UnitPass, _: Task) -> None:
        """H_l^MLP = H_l^MH + MLP(H_l^MH)  [(9)]"""
        run.hidden_states = self.dense_layer._forward_mlp(
            run.hidden_states, run.attention_arguments.get("inference_context")
        )

    def attention(self, run: UnitPass, _: Task) -> None:
        """H_{l+1}^MH = H_l^MLP + MultiHead(H_l^MLP)  [(8)]; the three steps are one call."""
        run.hidden_states, _ = self._forward_attention(run.hidden_states, **run.attention_arguments)

    def inside_attention(self, run: UnitPass, _: Task) -> None:
        """Done by the call; its place was not passed (a recomputed core, an inference kernel)."""

    def shared_expert(self, run: UnitPass, _: Task) -> None:
        """c_s SE(H_{l+1}^MH)  [(7)]; without a shared expert a place between two routes."""
        if self.mlp.shared_experts is None:
            return
        run.shared = self.mlp.shared_expert(self._forward_pre_mlp_layernorm(run.hidden_states))

    # Routed work. -----------------------------------------------------------------------------

    def tap(self, run: UnitPass, task: Task) -> None:
        """Read the main branch: z, G(z) and the experts of every token."""
        z = self.tapped_norm(run.hidden_states, task.route)
        z, padding_mask, run.samples = self._maybe_unflatten_for_moe(
            z, run.padding_mask, run.packed_seq_params
        )
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        routing = self.choose_experts(run, task, z, padding_mask)
        if self.training:
            topk = self.config.moe_router_topk
            self.mlp.choices.add(routing.routing_map, routing.at_home_map, topk)
        run.taps[task.route] = Tap(z, routing)

    def tapped_norm(self, tapped: Tensor, route: int) -> Tensor:
        """z, [s, b, h]. The paper leaves the norm open: own (NVIDIA), or shared (LongCat-Flash),
        which is the norm that the main branch applies to the same tensor. A shared norm is
        evaluated twice, here and inside the host's attention or MLP."""
        if self._scmoe.own_norm:
            return self.shortcut_layernorm(tapped)
        norm = TAPS[self._scmoe.scmoe_shortcut_position].norm
        return self.get_submodule(norm)(tapped)

    def choose_experts(
        self, run: UnitPass, task: Task, z: Tensor, padding_mask: Tensor | None
    ) -> Routing:
        """G(z) and the experts of every token, from z, [s, b, h].

        The taps of the routes before, and what the unit before has carried here, are in `run`.
        """
        routing = self.mlp.choose_experts(z, padding_mask, run.carried)
        if routing.logits is not None:
            run.carried = routing.logits
        return routing

    def depart(self, run: UnitPass, task: Task) -> None:
        """The tokens leave the dense graph."""
        tap = run.taps[task.route]
        run.routed[task.route] = self.mlp.depart(tap.z, tap.routing, self.overlap, task.route)
        if task.route == len(self.further_routes):
            run.taps.clear()  # no route is left that could look at them

    def start_dispatch(self, run: UnitPass, task: Task) -> None:
        """Launch the exchanges of all chunks; blocks the host until their sizes are known."""
        for chunk in run.routed[task.route].chunks:
            chunk.start_dispatch()

    # Places between dense operators. ----------------------------------------------------------

    def turn(self, run: UnitPass, task: Task) -> None:
        """Where the backward pass runs the experts."""
        _at_this_place(run, run.routed[task.route].branch.turn)

    def mark(self, run: UnitPass, task: Task) -> None:
        """Where the backward pass is done with all but the first `task.number` operators of the
        window, and turns to the last of those."""
        if task.number == 0:
            before = None
        else:
            step = window(self._scmoe.scmoe_shortcut_position)[task.number - 1]
            number = self.recorder.pass_number
            before = Activity(step.value, "backward", pass_number=number)
        _at_this_place(run, partial(mark_backward, self.recorder, before))

    def merge(self, run: UnitPass, _: Task) -> None:
        """H_{l+1} = H_{l+1}^MH + [norm] (c_s SE + c_r sum_i G_i E_i)  [(7), (14)-(17)]"""
        first, *further = [routed.output() for routed in run.routed.values()]
        routed_output = self._maybe_reflatten_from_moe(
            sum(further, first), run.packed_seq_params, run.samples
        )
        merged = routed_output if run.shared is None else run.shared.merge(routed_output)
        merged = self.post_layernorm(merged)
        residual = run.hidden_states
        if self.config.fp32_residual_connection:
            residual = residual.float()
        run.hidden_states = self._forward_post_mlp((merged, None), residual)


def _at_this_place(run: UnitPass, node: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> None:
    """Put a node of the graph between what is computed and what follows."""
    if run.inside is not None:
        run.inside = node(run.inside)
    elif run.shared is not None:
        (output,) = node((run.shared.output,))
        run.shared = replace(run.shared, output=output)
    else:
        (run.hidden_states,) = node((run.hidden_states,))
