"""A GPT model with shortcut units, built by the host's own builder."""

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import (
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import get_pg_rank
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model import names
from megatron_scmoe.model.attention import scale_latents
from megatron_scmoe.model.specs import (
    block_config,
    scmoe_block_spec,
    unit_class,
    with_local_replacements,
)
from megatron_scmoe.model.unit import ShortcutLayer
from megatron_scmoe.overlap.measure.chosen_together import watch_run
from megatron_scmoe.overlap.measure.each_iteration import UnitTracker


@dataclass(kw_only=True)
class ScMoEModelConfig(GPTModelConfig):
    """The host's model config, and ours beside it."""

    builder: ClassVar[str] = "megatron_scmoe.model.builder.ScMoEModelBuilder"
    scmoe: ScMoEConfig = field(default_factory=ScMoEConfig)


class ScMoEModelBuilder(GPTModelBuilder):
    """What builds the host's GPTModel of shortcut units, or the stock model without a shortcut."""

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[GPTModel]:
        scmoe = self._model_config.scmoe
        if scmoe.enabled:
            # Not while the chunks are built: stages with embeddings wait for each other there.
            agree_on_slots(scmoe)
        models = super().build_distributed_models(*args, **kwargs)
        if scmoe.scmoe_collaboration_dir is not None:
            watch_run(models)
        return models

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        model_config = copy.copy(self._model_config)
        config, scmoe = model_config.transformer, model_config.scmoe
        if scmoe.enabled:
            spec = scmoe_block_spec(config, scmoe, vp_stage, get_pg_rank(pg_collection.pp))
            model_config.transformer = block_config(config, scmoe)
        else:
            stock = default_layer_spec(model_config, vp_stage)
            spec = with_local_replacements(stock, config, scmoe.scmoe_offload)
        model_config.transformer_layer_spec = lambda _: spec
        model = GPTModelBuilder(model_config).build_model(
            pg_collection, pre_process, post_process, vp_stage
        )
        if scmoe.scmoe_mla_scale:
            scale_latents(model)
        if scmoe.enabled:
            # GPTModel builds TransformerBlock by name (gpt_model.py:227); ours has the same layout
            # and overrides one method.
            model.decoder.__class__ = ShortcutBlock
            # Whoever asks the model counts attention layers, such as the inference contexts, which
            # hold keys and values for each of them; only the block counts its own layers.
            model.config = config
            track_units(model, scmoe)
        return model


def track_units(model: GPTModel, scmoe: ScMoEConfig) -> None:
    """Let the training loop report on the units of this model chunk."""
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, UnitTracker):
        tracker = UnitTracker(
            scmoe.scmoe_shortcut_position,
            scmoe.scmoe_overlap,
            scmoe.measures_slots,
            scmoe.scmoe_trace_dir,
            unit_class(scmoe).further_routes,
            (model.config.num_moe_experts or 0, scmoe.at_home),
        )
        set_moe_metrics_tracker(tracker)
    tracker.chunks.append(model)
    tracker.units += [module for module in model.modules() if isinstance(module, ShortcutLayer)]


def agree_on_slots(scmoe: ScMoEConfig) -> None:
    """Measure the expert slots on every rank if one of them has to.

    Each rank has compared its own machine with its checkpoint's (run/checkpoint/resume.py), before
    ranks could speak; ranks that measure alone would wait for the others forever.
    """
    if scmoe.scmoe_expert_slot != "auto":
        return
    device = torch.cuda.current_device()
    known = torch.tensor(float(scmoe.scmoe_measured_slots is not None), device=device)
    torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MIN)
    if not known:
        scmoe.scmoe_measured_slots = None


class ShortcutBlock(TransformerBlock):
    """A block whose checkpoints have the baseline's names (names.py); in memory a unit is one
    layer."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        if any(getattr(layer.mlp, "hands_on_logits", False) for layer in self.layers):
            # The first MoE layer lacks what the others have, so that they are no one tensor.
            metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        state_dict = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        numbers = [(layer.layer_number, layer.attention_number) for layer in self.layers]
        apply_prefix_mapping(state_dict, names.layers(prefix, numbers))
        return state_dict
