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

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
from megatron_scmoe.model.moe import RoutedWork, SharedOutput
from megatron_scmoe.overlap.recorder import Activity, UnitRecorder, mark_backward
from megatron_scmoe.overlap.schedule import (
    PER_CHUNK,
    PLACES,
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


@dataclass
class _Pass:
    """One forward pass through a unit: what its steps hand on."""

    tasks: deque[Task]
    """What is still to be done."""
    hidden_states: Tensor
    """Main branch, [s, b, h]."""
    attention_arguments: dict[str, Any]
    padding_mask: Tensor | None
    packed_seq_params: Any
    context: Tensor | None = None
    inside: tuple[Tensor, ...] | None = None
    """What one operator of the attention hands to the next, while the steps between them run."""
    tap: tuple[Tensor, Tensor, Tensor] | None = None
    """Normed z [s, b, h], router weights and routing map [T, E]."""
    samples: int | None = None
    """Micro-batch size, if z was un-flattened from a packed sequence."""
    work: RoutedWork | None = None
    shared: SharedOutput | None = None


class ShortcutLayer(NumberedLayer):
    """Dense layer + MoE layer with a shortcut around the dense work between tap and merge.

    Attributes, which hold from the next forward pass on:
        slots: where the routed experts run.
        overlap: whether exchanges are launched early and awaited late. Changes no bit of a result.
        operators_ahead: on a GPU, dense operators that are enqueued before the host waits for the
            numbers of rows.
    """

    operators_ahead = 1

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ShortcutLayerSubmodules,
        scmoe: ScMoEConfig,
        layer_config: TransformerConfig,
        attention_number: int,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_config=layer_config,
            attention_number=attention_number,
            layer_number=layer_number,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
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
        self.shortcut_layernorm = submodules.shortcut_layernorm(
            config=layer_config,
            hidden_size=layer_config.hidden_size,
            eps=layer_config.layernorm_epsilon,
        )
        self.post_layernorm = submodules.post_layernorm(
            config=layer_config,
            hidden_size=layer_config.hidden_size,
            eps=layer_config.layernorm_epsilon,
        )
        self._pass: _Pass | None = None
        if submodules.dense_layer is not None:
            self._open_attention(
                self.dense_layer.self_attention, Step.DENSE_CORE_ATTENTION, Step.DENSE_PROJECTION
            )
        self._open_attention(self.self_attention, Step.CORE_ATTENTION, Step.PROJECTION)
        self.slots = scmoe.initial_slots
        self.overlap = scmoe.scmoe_overlap

    @property
    def recorder(self) -> UnitRecorder:
        """What this unit did and when."""
        return self.mlp.recorder

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
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        **attention_arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the schedule.

        Args:
            hidden_states: [s, b, h].
            attention_mask: [1 or b, 1, s, s], bool, True where masked.
            padding_mask: [b, s], True for padding; only the router's losses use it.
            packed_seq_params: the host's description of packed sequences.
            attention_arguments: further arguments of the host's attention.

        Returns:
            hidden states [s, b, h], and the context that the host's block passes on.
        """
        run = _Pass(
            tasks=deque(self._schedule(hidden_states)),
            hidden_states=hidden_states,
            attention_arguments={
                "attention_mask": attention_mask,
                "padding_mask": padding_mask,
                "packed_seq_params": packed_seq_params,
                **attention_arguments,
            },
            padding_mask=padding_mask,
            packed_seq_params=packed_seq_params,
            context=attention_arguments.get("context"),
        )
        self._pass = run
        if self.training:
            self.recorder.begin_pass(hidden_states)
        try:
            self._advance(run)
        except BaseException:
            if run.work is not None:
                run.work.branch.abandon()
            raise
        finally:
            self._pass = None
            self._switch(None)
        return run.hidden_states, run.context

    def _advance(self, run: _Pass, until: Step | None = None) -> None:
        """Do the next tasks, up to `until`, which the caller is about to do."""
        while run.tasks:
            step, number = run.tasks.popleft()
            if step not in PLACES:
                self._switch(step, number)
            if step is until:
                return
            if step in PER_CHUNK or step is Step.MARK:
                getattr(self, step.value)(run, number)
            else:
                getattr(self, step.value)(run)

    def _switch(self, step: Step | None, chunk: int = 0) -> None:
        if not self.training:
            return
        number = self.recorder.pass_number
        self.recorder.switch(
            None if step is None else Activity(step.value, "forward", chunk, number)
        )

    def _open_attention(self, attention: Module, core: Step, projection: Step) -> None:
        """Let the steps between the operators of an attention run where they belong.

        The host's attention is one call. Its core and its output projection are modules: what the
        schedule has in front of them runs when they are about to be called.
        """
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
            module.register_forward_pre_hook(partial(self._reach, step), with_kwargs=True)

    def _reach(
        self, step: Step, module: Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pre-hook: do what the schedule has in front of this operator."""
        run = self._pass
        if run is None or Task(step) not in run.tasks:
            return None
        run.inside = tuple(x for x in arguments if isinstance(x, Tensor) and x.requires_grad)
        self._advance(run, until=step)
        passed, run.inside = iter(run.inside), None
        changed = (
            next(passed) if isinstance(x, Tensor) and x.requires_grad else x for x in arguments
        )
        return tuple(changed), options

    # Dense work. ------------------------------------------------------------------------------

    def dense_qkv(self, run: _Pass) -> None:
        """H_l^MH = H_{l-1} + MultiHead(H_{l-1})  [(10)]; the three steps are one call."""
        run.hidden_states, run.context = self.dense_layer._forward_attention(
            run.hidden_states, **run.attention_arguments
        )

    def dense_mlp(self, run: _Pass) -> None:
        """H_l^MLP = H_l^MH + MLP(H_l^MH)  [(9)]"""
        run.hidden_states = self.dense_layer._forward_mlp(
            run.hidden_states, run.attention_arguments.get("inference_context")
        )

    def qkv(self, run: _Pass) -> None:
        """H_{l+1}^MH = H_l^MLP + MultiHead(H_l^MLP)  [(8)]; the three steps are one call."""
        run.hidden_states, run.context = self._forward_attention(
            run.hidden_states, **run.attention_arguments
        )

    def _inside_attention(self, run: _Pass) -> None:
        """Done by the call; its place was not passed (a recomputed core, an inference kernel)."""

    dense_core_attention = dense_projection = core_attention = projection = _inside_attention

    def shared_expert(self, run: _Pass) -> None:
        """c_s SE(H_{l+1}^MH)  [(7)]"""
        run.shared = self.mlp.shared_expert(self._forward_pre_mlp_layernorm(run.hidden_states))

    # Routed work. -----------------------------------------------------------------------------

    def route(self, run: _Pass) -> None:
        """Tap the main branch: z, G(z) and the experts of every token."""
        z = self._shortcut_norm(run.hidden_states)
        z, padding_mask, run.samples = self._maybe_unflatten_for_moe(
            z, run.padding_mask, run.packed_seq_params
        )
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        run.tap = (z, *self.mlp.route(z, padding_mask))

    def prepare_dispatch(self, run: _Pass) -> None:
        assert run.tap is not None
        run.work = self.mlp.prepare_dispatch(*run.tap, overlap=self.overlap)
        run.tap = None

    def start_dispatch(self, run: _Pass) -> None:
        self.mlp.start_dispatch(run.work)

    def wait_dispatch(self, run: _Pass, chunk: int) -> None:
        self.mlp.wait_dispatch(run.work, chunk)

    def experts(self, run: _Pass, chunk: int) -> None:
        """G(z)_i E_i(z)  [(7)]"""
        self.mlp.routed_experts(run.work, chunk)

    def start_combine(self, run: _Pass, chunk: int) -> None:
        self.mlp.start_combine(run.work, chunk)

    def wait_combine(self, run: _Pass) -> None:
        assert run.work is not None
        run.work.branch.wait()

    # Places between dense operators. ----------------------------------------------------------

    def turn(self, run: _Pass) -> None:
        """Where the backward pass runs the experts."""
        assert run.work is not None
        self._at_this_place(run, run.work.branch.turn)

    def mark(self, run: _Pass, operators: int) -> None:
        """Where the backward pass turns to the last of the window's first `operators`."""
        if operators == 0:
            before = None
        else:
            step = window(self._scmoe.scmoe_shortcut_position)[operators - 1]
            number = self.recorder.pass_number
            before = Activity(step.value, "backward", pass_number=number)
        self._at_this_place(run, partial(mark_backward, self.recorder, before))

    @staticmethod
    def _at_this_place(
        run: _Pass, node: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    ) -> None:
        """Put a node of the graph between what is computed and what follows."""
        if run.inside is not None:
            run.inside = node(run.inside)
        elif run.shared is not None:
            (output,) = node((run.shared.output,))
            run.shared = replace(run.shared, output=output)
        else:
            (run.hidden_states,) = node((run.hidden_states,))

    def merge(self, run: _Pass) -> None:
        """H_{l+1} = H_{l+1}^MH + [norm] (c_s SE + c_r sum_i G_i E_i)  [(7), (14)-(17)]"""
        routed_output = self._maybe_reflatten_from_moe(
            self.mlp.routed_output(run.work), run.packed_seq_params, run.samples
        )
        merged = self.post_layernorm(self.mlp.merge(routed_output, run.shared))
        residual = run.hidden_states
        if self.config.fp32_residual_connection:
            residual = residual.float()
        run.hidden_states = self._forward_post_mlp((merged, None), residual)

    def _shortcut_norm(self, tapped: Tensor) -> Tensor:
        """z, [s, b, h]. The paper leaves the norm open: own (NVIDIA), or shared (LongCat-Flash),
        which is the norm that the main branch applies to the same tensor. A shared norm is
        evaluated twice, here and inside the host's attention or MLP."""
        position = self._scmoe.scmoe_shortcut_position
        if self._scmoe.scmoe_shortcut_norm == "own":
            return self.shortcut_layernorm(tapped)
        if position == "pos1":
            return self.input_layernorm(tapped)
        if position == "pos2":
            return self.dense_layer.pre_mlp_layernorm(tapped)
        return self.dense_layer.input_layernorm(tapped)
