"""From configs to the specs of a pipeline stage: which attention layers form a unit, where it runs.

On the command line and in the model's config, `num_layers` counts attention layers, as on the
baseline. The host's TransformerBlock gets a copy that counts *block layers*: a Pos-2 or Pos-3 unit
is one block layer that holds two attention layers. The translation happens in this file only.
"""

import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.gpt_layer_specs import LNImpl, get_gpt_decoder_layer_specs
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder, WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_scmoe.c2r import placement
from megatron_scmoe.checks.refusal import Found, Refusal, refuse
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model import names
from megatron_scmoe.model.attention import LatentDotProductAttention
from megatron_scmoe.model.dual_gating import DualGatingLayer, DualGatingMoE
from megatron_scmoe.model.experts.grouped import GroupedExperts, uses_grouped_experts
from megatron_scmoe.model.experts.offload.experts import Offload, offloaded
from megatron_scmoe.model.moe import ScMoELayer
from megatron_scmoe.model.norm import SequenceParallelTorchNorm
from megatron_scmoe.model.unit import (
    NumberedLayer,
    ShortcutLayer,
    ShortcutLayerSubmodules,
)
from megatron_scmoe.overlap.schedule import TAPS

# 0-based numbers of the attention layers of one block layer.
BlockLayer = tuple[int, ...]


def block_layers(config: TransformerConfig, scmoe: ScMoEConfig) -> list[BlockLayer]:
    """Group the attention layers into block layers.

    A Pos-1 unit taps its own input, so it is one layer; Pos-2 and Pos-3 join each MoE layer with
    the dense layer in front. Dense layers that no MoE layer follows stay plain.
    """
    pattern = moe_layer_pattern(config)
    if not TAPS[scmoe.scmoe_shortcut_position].is_pair:
        return [(layer,) for layer in range(config.num_layers)]
    groups: list[BlockLayer] = []
    for layer, is_moe in enumerate(pattern):
        if is_moe:
            groups[-1] = (*groups[-1], layer)
        else:
            groups.append((layer,))
    return groups


def moe_layer_pattern(config: TransformerConfig) -> list[int]:
    """1 for every MoE layer, 0 for every dense layer."""
    freq = config.moe_layer_freq
    if isinstance(freq, int):
        return [int(layer % freq == 0) for layer in range(config.num_layers)]
    return freq


def block_config(config: TransformerConfig, scmoe: ScMoEConfig) -> TransformerConfig:
    """The config of the host's TransformerBlock: `num_layers` counts block layers.

    A shallow copy, so that what the host computed from the number of attention layers (the output
    layers' initialisation) stays.

    Raises:
        ValueError: a pipeline stage would cut a unit in two.
    """
    layers = block_layers(config, scmoe)
    block = copy.copy(config)
    block.num_layers = len(layers)
    if config.pipeline_model_parallel_size > 1:
        block.pipeline_model_parallel_layout = _block_layout(config, layers)
        block.num_layers_in_first_pipeline_stage = None
        block.num_layers_in_last_pipeline_stage = None
        block.account_for_embedding_in_pipeline_split = False
        block.account_for_loss_in_pipeline_split = False
    return block


def scmoe_block_spec(
    config: TransformerConfig, scmoe: ScMoEConfig, vp_stage: int | None = None, pp_rank: int = 0
) -> TransformerBlockSubmodules:
    """Specs of the block layers that one pipeline stage builds.

    Args:
        config: the model's config; `num_layers` counts attention layers.
        vp_stage: virtual pipeline stage, None without interleaving.
        pp_rank: pipeline rank.
    """
    layers = block_layers(config, scmoe)
    if config.pipeline_model_parallel_size > 1:
        block = block_config(config, scmoe)
        offset = get_transformer_layer_offset(block, vp_stage, pp_rank)
        layers = layers[offset : offset + get_num_layers_to_build(block, vp_stage, pp_rank)]

    use_te = config.transformer_impl == "transformer_engine"
    # The host's own specs, one per attention layer; the pattern was checked, every entry is used.
    host_specs = with_local_replacements(
        get_gpt_decoder_layer_specs(
            config,
            use_transformer_engine=use_te,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
        ),
        config,
        scmoe.scmoe_offload,
    )
    norm = _norm(config)
    pattern = moe_layer_pattern(config)
    path = scmoe.scmoe_expert_placement
    placed = None if path is None else placement.read(path)
    specs = []
    for layer in layers:
        last = host_specs[layer[-1]].submodules
        params = {"layer_config": config, "attention_number": layer[-1] + 1}
        if pattern[layer[-1]]:
            first = host_specs[layer[0]].submodules if len(layer) == 2 else None
            order = None if placed is None else placed.order(layer[-1] + 1)
            specs.append(
                ModuleSpec(
                    module=unit_class(scmoe),
                    submodules=_unit_submodules(
                        first, last, scmoe, norm, 1 not in pattern[: layer[-1]], order
                    ),
                    params={**params, "scmoe": scmoe},
                )
            )
        else:
            plain = _with_disk_names(last)
            specs.append(ModuleSpec(module=NumberedLayer, submodules=plain, params=params))
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def unit_class(scmoe: ScMoEConfig) -> type[ShortcutLayer]:
    """The class of all units of a model."""
    return DualGatingLayer if scmoe.dual_gating else ShortcutLayer


def with_local_replacements(
    spec: Any, config: TransformerConfig, offload: Offload | None = None
) -> Any:
    """Replace what the local spec cannot do in a (nested) spec, and experts that are offloaded.

    See norm.py, attention.py, experts/grouped.py and experts/offload/. Without sequence
    parallelism, latent attention and grouped or offloaded experts the spec is returned as it is.
    """
    replacements: dict[Any, Any] = {}
    if config.sequence_parallel:
        replacements[WrappedTorchNorm] = SequenceParallelTorchNorm
    if config.multi_latent_attention:
        replacements[DotProductAttention] = LatentDotProductAttention
    if uses_grouped_experts(config):
        replacements[SequentialMLP] = GroupedExperts
    if offload is not None:
        resident = replacements.get(SequentialMLP, SequentialMLP)
        replacements[SequentialMLP] = partial(offloaded(resident), offload=offload)
    return _replaced(spec, replacements) if replacements else spec


def _replaced(spec: Any, replacements: dict[Any, Any]) -> Any:
    if isinstance(spec, type):
        return replacements.get(spec, spec)
    if isinstance(spec, partial):
        keywords = {name: _replaced(value, replacements) for name, value in spec.keywords.items()}
        return partial(_replaced(spec.func, replacements), *spec.args, **keywords)
    if isinstance(spec, list):
        return [_replaced(item, replacements) for item in spec]
    if is_dataclass(spec):
        spec = copy.copy(spec)
        for field in fields(spec):
            setattr(spec, field.name, _replaced(getattr(spec, field.name), replacements))
    return spec


def _norm(config: TransformerConfig) -> LayerNormBuilder:
    """The norm that stands on its own: Transformer Engine's, apex's or torch's."""
    if config.transformer_impl == "transformer_engine":
        return TENorm
    # apex has no RMSNorm that the host would use.
    host_norm = WrappedTorchNorm if config.normalization == "RMSNorm" else LNImpl
    return with_local_replacements(host_norm, config)


def _unit_submodules(
    dense: TransformerLayerSubmodules | None,
    moe: TransformerLayerSubmodules,
    scmoe: ScMoEConfig,
    norm: LayerNormBuilder,
    first_moe: bool,
    expert_order: list[int] | None,
) -> ShortcutLayerSubmodules:
    if not scmoe.own_norm:
        layer, _, tapped = TAPS[scmoe.scmoe_shortcut_position].norm.rpartition(".")
        if layer:
            assert dense is not None
            dense = _unfused(dense, tapped, norm)
        else:
            moe = _unfused(moe, tapped, norm)
    moe = _with_disk_names(moe)
    values = {field.name: getattr(moe, field.name) for field in fields(moe)}
    # The host's MLP slot is a partial of MoELayer with the submodules bound.
    assert isinstance(moe.mlp, partial) and moe.mlp.func is MoELayer
    moe_class = DualGatingMoE if scmoe.dual_gating else ScMoELayer
    values["mlp"] = partial(
        moe_class, scmoe=scmoe, first=first_moe, expert_order=expert_order, **moe.mlp.keywords
    )
    return ShortcutLayerSubmodules(
        **values,
        dense_layer=None if dense is None else _with_disk_names(dense),
        shortcut_layernorm=norm if scmoe.own_norm else IdentityOp,
        post_layernorm=norm if scmoe.scmoe_post_norm else IdentityOp,
    )


def _unfused(
    layer: TransformerLayerSubmodules, name: str, norm: LayerNormBuilder
) -> TransformerLayerSubmodules:
    """Give a layer a separate norm where Transformer Engine fuses it into the next linear layer.

    A fused norm's output does not exist as a tensor, so the routed experts could not share it.
    """
    if getattr(layer, name) is not IdentityOp:
        return layer
    linear = TESpecProvider().column_parallel_linear()
    if name == "pre_mlp_layernorm":
        assert isinstance(layer.mlp, partial)
        submodules = replace(layer.mlp.keywords["submodules"], linear_fc1=linear)
        mlp = partial(layer.mlp.func, **{**layer.mlp.keywords, "submodules": submodules})
        return replace(layer, pre_mlp_layernorm=norm, mlp=mlp)
    assert isinstance(layer.self_attention, ModuleSpec)
    attention = copy.copy(layer.self_attention)
    # Latent attention fuses this norm with --mla-down-proj-fusion only.
    is_mla = isinstance(attention.submodules, MLASelfAttentionSubmodules)
    first_linear = {"linear_qkv_down_proj" if is_mla else "linear_qkv": linear}
    attention.submodules = replace(attention.submodules, **first_linear)
    return replace(layer, input_layernorm=norm, self_attention=attention)


def _with_disk_names(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """Name every norm on disk as Transformer Engine's layers do, fused or not.

    The host's local specs differ in the norm of a MoE layer, and with latent attention they have no
    fused names at all.
    """
    assert isinstance(layer.mlp, partial) and isinstance(layer.self_attention, ModuleSpec)
    is_latent = isinstance(layer.self_attention.submodules, MLASelfAttentionSubmodules)
    on_disk = names.norms(layer.sharded_state_dict_keys_map, layer.mlp.func is MoELayer, is_latent)
    return replace(layer, sharded_state_dict_keys_map=on_disk)


def pipeline_stages(config: TransformerConfig) -> list[list[range]]:
    """Attention layers of every stage, as [virtual stage][pipeline rank]."""
    pp_size = config.pipeline_model_parallel_size
    vp_size = config.virtual_pipeline_model_parallel_size or 1
    layout = config.pipeline_model_parallel_layout
    stages: list[list[range]] = []
    next_layer = 0
    for vp_stage in range(vp_size):
        stages.append([])
        for pp_rank in range(pp_size):
            if layout is not None:
                count = layout.layout[pp_rank][vp_stage].count(LayerType.decoder)
            else:
                stage = vp_stage if vp_size > 1 else None
                count = get_num_layers_to_build(config, stage, pp_rank)
            stages[-1].append(range(next_layer, next_layer + count))
            next_layer += count
    return stages


def _cut_unit(config: TransformerConfig, layers: list[BlockLayer]) -> Found:
    """The first stage that begins inside a unit, and a layout that cuts none."""
    units = {layer[-1] for layer in layers if len(layer) > 1}
    virtual = config.virtual_pipeline_model_parallel_size
    cuts = [
        (f"{pp_rank} (virtual stage {vp_stage})" if virtual else f"{pp_rank}", stage.start)
        for vp_stage, ranks in enumerate(pipeline_stages(config))
        for pp_rank, stage in enumerate(ranks)
        if len(stage) > 0 and stage.start in units
    ]
    if not cuts:
        return False
    stages = config.pipeline_model_parallel_size * (virtual or 1)
    # As even as units allow: block layer i goes to stage i * stages // len(layers).
    sizes = [0] * stages
    for index, layer in enumerate(layers):
        sizes[index * stages // len(layers)] += len(layer)
    rows = ["t" * size for size in sizes]
    rows[0], rows[-1] = "E" + rows[0], rows[-1] + "L"
    where, start = cuts[0]
    return {"where": where, "before": start, "here": start + 1, "layout": "|".join(rows)}


CUT_UNIT = Refusal(
    _cut_unit,
    "pipeline stage {where} would start at layer {here}, inside the unit of layers {before} and "
    "{here}",
    "a unit cannot be cut. In place of the other options of the split use for example "
    "--pipeline-model-parallel-layout '{layout}'",
)


def _block_layout(
    config: TransformerConfig, layers: list[BlockLayer]
) -> PipelineParallelLayerLayout:
    """The same split into stages, counted in block layers.

    Raises:
        ValueError: a stage ends inside a unit.
    """
    refuse((CUT_UNIT,), config, layers)
    rows = [
        [LayerType.decoder] * sum(1 for layer in layers if layer[0] in stage)
        for ranks in pipeline_stages(config)
        for stage in ranks
    ]
    rows[0].insert(0, LayerType.embedding)
    rows[-1].append(LayerType.loss)
    return PipelineParallelLayerLayout(rows, config.pipeline_model_parallel_size)
