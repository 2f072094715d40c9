"""Which attention layers form a unit, what number each part has, and where it runs.

The host is the judge: its numbers, its pipeline split, its names on disk.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_logging
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.checks.shortcut import check_model
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig, ShortcutBlock
from megatron_scmoe.model.specs import block_config, block_layers, scmoe_block_spec
from megatron_scmoe.model.unit import NumberedLayer, ShortcutLayer
from megatron_scmoe.overlap.schedule import POSITIONS
from tests.models import Case, build_block, run_block

# 1 for MoE.
PATTERNS = {
    "pairs": [0, 1] * 3,
    "every-fourth": [0, 0, 0, 1] * 2,
    "dense-prefix": [0, 0, 0, 1, 0, 1],
    "dense-end": [0, 1, 0, 1, 0, 0],
    "no-moe": [0, 0],
}


def host_config(pattern: list[int], **options: Any) -> TransformerConfig:
    host = {"moe_layer_freq": pattern, **options}
    return Case(host=host, num_layers=len(pattern)).host_config()


def scmoe_config(position: str, **options: Any) -> ScMoEConfig:
    return ScMoEConfig(scmoe_shortcut_position=position, **options)


# Grouping. --------------------------------------------------------------------------------------

PAIRED = {
    "pairs": [(0, 1), (2, 3), (4, 5)],
    "every-fourth": [(0,), (1,), (2, 3), (4,), (5,), (6, 7)],
    "dense-prefix": [(0,), (1,), (2, 3), (4, 5)],
    "dense-end": [(0, 1), (2, 3), (4,), (5,)],
    "no-moe": [(0,), (1,)],
}


@pytest.mark.parametrize("position", ["pos2", "pos3"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_moe_layers_are_joined_with_the_dense_layer_in_front(position: str, pattern: str) -> None:
    config = host_config(PATTERNS[pattern])
    assert block_layers(config, scmoe_config(position)) == PAIRED[pattern]
    assert block_config(config, scmoe_config(position)).num_layers == len(PAIRED[pattern])


@pytest.mark.parametrize("pattern", [*filter(any, PATTERNS.values()), [1, 1, 0, 1], 1], ids=str)
def test_pos1_units_are_single_layers(pattern: Any) -> None:
    num_layers = 4 if isinstance(pattern, int) else len(pattern)
    config = Case(host={"moe_layer_freq": pattern}, num_layers=num_layers).host_config()
    scmoe = scmoe_config("pos1")
    check_model(config, scmoe)
    assert block_layers(config, scmoe) == [(layer,) for layer in range(num_layers)]
    modules = [spec.module for spec in scmoe_block_spec(config, scmoe).layer_specs]
    is_moe = [1] * num_layers if isinstance(pattern, int) else pattern
    assert modules == [ShortcutLayer if moe else NumberedLayer for moe in is_moe]


@pytest.mark.parametrize("position", ["pos2", "pos3"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_specs(position: str, pattern: str) -> None:
    specs = scmoe_block_spec(host_config(PATTERNS[pattern]), scmoe_config(position)).layer_specs
    groups = PAIRED[pattern]
    assert [spec.module for spec in specs] == [
        ShortcutLayer if len(group) == 2 else NumberedLayer for group in groups
    ]
    assert [spec.params["attention_number"] for spec in specs] == [g[-1] + 1 for g in groups]


def test_block_config_changes_the_counted_layers_only() -> None:
    """Also what the host computed from the number of attention layers stays."""
    config = host_config([0, 1] * 3)
    block = block_config(config, scmoe_config("pos2"))
    assert config.num_layers == 6
    assert {k for k in vars(config) if getattr(config, k) is not getattr(block, k)} == {
        "num_layers"
    }


# Numbers. ---------------------------------------------------------------------------------------


def stock_block(config: TransformerConfig) -> TransformerBlock:
    """The baseline: the same attention layers, MoE with shared experts, no shortcut."""
    spec = get_gpt_decoder_block_spec(config, False, normalization=config.normalization)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return TransformerBlock(config=config, spec=spec, pg_collection=groups).double()


def scmoe_block(config: TransformerConfig, scmoe: ScMoEConfig) -> TransformerBlock:
    spec, groups = scmoe_block_spec(config, scmoe), ProcessGroupCollection.use_mpu_process_groups()
    return TransformerBlock(block_config(config, scmoe), spec, pg_collection=groups).double()


def attention_layers(block: TransformerBlock) -> list[Any]:
    """The layers in the order of the baseline: a unit's dense layer, then the unit itself."""
    nested = [[getattr(layer, "dense_layer", None), layer] for layer in block.layers]
    return [layer for pair in nested for layer in pair if layer is not None]


def numbers(layer: Any) -> tuple[int, int, int | None]:
    """What attention, core attention and router believe to be the number of their layer."""
    attention = layer.self_attention
    router = getattr(layer.mlp, "router", None)
    core = attention.core_attention.layer_number
    return attention.layer_number, core, None if router is None else router.layer_number


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_numbers_are_the_baselines(position: str, pattern: str) -> None:
    config = host_config(PATTERNS[pattern])
    block = scmoe_block(config, scmoe_config(position))
    ours = [numbers(layer) for layer in attention_layers(block)]
    assert ours == [numbers(layer) for layer in attention_layers(stock_block(config))]
    assert [layer.layer_number for layer in block.layers] == list(range(1, len(block.layers) + 1))
    groups = block_layers(config, scmoe_config(position))
    assert [layer.attention_number for layer in block.layers] == [g[-1] + 1 for g in groups]


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("pattern", ["pairs", "every-fourth", "dense-prefix"])
def test_losses_are_logged_where_the_baseline_logs_them(
    position: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = host_config(
        PATTERNS[pattern],
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.1,
    )

    def logged(block: TransformerBlock) -> dict[str, list[bool]]:
        tracker = MoEMetricsTracker()
        monkeypatch.setattr(moe_logging, "_MOE_METRICS_TRACKER", tracker)
        run_block(block, torch.randn(3, 2, config.hidden_size, dtype=torch.float64))
        return {name: (entry.values != 0).tolist() for name, entry in tracker.metrics.items()}

    ours = logged(scmoe_block(config, scmoe_config(position)))
    assert ours == logged(stock_block(config))
    assert ours["z_loss"] == [bool(moe) for moe in PATTERNS[pattern]]


# Pipeline stages. -------------------------------------------------------------------------------


@contextmanager
def pipeline_rank(rank: int, virtual_stages: int | None) -> Iterator[None]:
    """Be a rank of a pipeline for the host, which asks for it when it reads a layout."""
    parallel_state.set_pipeline_model_parallel_rank(rank)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual_stages)
    yield
    parallel_state.set_pipeline_model_parallel_rank(None)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


PAIRS, FOURTHS = [0, 1] * 4, [0, 0, 0, 1] * 4
SPLITS: dict[str, tuple[list[int], int, dict[str, Any]]] = {
    "uniform-2": (PAIRS, 2, {}),
    "uniform-4": (PAIRS, 4, {}),
    "every-fourth": (FOURTHS, 4, {}),
    "cut-between-dense-layers": (FOURTHS, 8, {}),
    "first-stage": (PAIRS, 2, {"num_layers_in_first_pipeline_stage": 2}),
    "last-stage": (PAIRS, 2, {"num_layers_in_last_pipeline_stage": 2}),
    "first-and-last-stage": (
        PAIRS + [0, 1] * 2,
        4,
        {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2},
    ),
    "virtual": (PAIRS, 2, {"virtual_pipeline_model_parallel_size": 2}),
    "virtual-first-stage": (
        PAIRS + [0, 1] * 2,
        2,
        {"virtual_pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 4},
    ),
    "embedding": ([*PAIRS, 0], 2, {"account_for_embedding_in_pipeline_split": True}),
    "loss": ([0, *PAIRS], 2, {"account_for_loss_in_pipeline_split": True}),
    "embedding-and-loss": (
        [0, 1, *[0, 0, 1] * 2, 0, 1],
        4,
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    "embedding-and-loss-virtual": (
        [0, 0, 1, *PAIRS, 0, 0, 1],
        2,
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
            "virtual_pipeline_model_parallel_size": 2,
        },
    ),
    "layout": (PAIRS, 4, {"pipeline_model_parallel_layout": "E|tt|tttt|ttL"}),
    "layout-empty-stage": (PAIRS, 4, {"pipeline_model_parallel_layout": "Ett|tttt|tt|L"}),
    "layout-virtual": (PAIRS, 2, {"pipeline_model_parallel_layout": "Ett|tttt|tt|L"}),
    "layout-multiplied": (PAIRS, 4, {"pipeline_model_parallel_layout": "E,tt|(tt|)*2,tt,L"}),
}


def split_config(split: str) -> TransformerConfig:
    pattern, stages, options = SPLITS[split]
    return host_config(pattern, pipeline_model_parallel_size=stages, **options)


def all_stages(config: TransformerConfig) -> list[tuple[int, int | None]]:
    """(pipeline rank, virtual stage) of every stage, in the order of the layers."""
    virtual = config.virtual_pipeline_model_parallel_size
    return [
        (rank, None if virtual is None else stage)
        for stage in range(virtual or 1)
        for rank in range(config.pipeline_model_parallel_size)
    ]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_stages_hold_the_attention_layers_that_the_host_gives_them(
    split: str, position: str
) -> None:
    config, scmoe = split_config(split), scmoe_config(position)
    check_model(config, scmoe)
    block = block_config(config, scmoe)
    # The layout is the whole truth: the host takes no other option beside it.
    assert block.num_layers_in_first_pipeline_stage is None
    assert block.num_layers_in_last_pipeline_stage is None
    assert not block.account_for_embedding_in_pipeline_split
    assert not block.account_for_loss_in_pipeline_split
    covered = 0
    for rank, vp_stage in all_stages(config):
        with pipeline_rank(rank, config.virtual_pipeline_model_parallel_size):
            offset = get_transformer_layer_offset(config, vp_stage, rank)
            count = get_num_layers_to_build(config, vp_stage, rank)
            specs = scmoe_block_spec(config, scmoe, vp_stage, rank).layer_specs
            block_offset = get_transformer_layer_offset(block, vp_stage, rank)
            assert get_num_layers_to_build(block, vp_stage, rank) == len(specs)
        groups = block_layers(config, scmoe)[block_offset : block_offset + len(specs)]
        assert [spec.params["attention_number"] for spec in specs] == [g[-1] + 1 for g in groups]
        assert [layer for group in groups for layer in group] == list(range(offset, offset + count))
        covered += count
    assert covered == config.num_layers


# Names on disk. ---------------------------------------------------------------------------------


def shards(block: TransformerBlock) -> dict[str, tuple[Any, ...]]:
    """Name, global shape and offset of everything that a block saves."""
    state = block.sharded_state_dict()
    return {
        tensor.key: (tensor.global_shape, tensor.global_offset)
        for tensor in state.values()
        if hasattr(tensor, "global_shape")
    }


def baseline_shards(pattern: Any, num_layers: int) -> dict[str, tuple[Any, ...]]:
    """The stock block's, under the names of Transformer Engine's layers.

    The local spec alone calls the norm of a MoE layer a part of linear_fc1.
    """
    host = {"moe_layer_freq": pattern, "moe_shared_expert_gate": False}
    stock = stock_block(Case(host=host, num_layers=num_layers).host_config())
    is_moe = [1] * num_layers if isinstance(pattern, int) else pattern

    def name(key: str) -> str:
        layer = re.match(r"layers\.(\d+)\.", key)
        moe = is_moe[int(layer[1])] if layer else is_moe[0]
        return key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.") if moe else key

    return {name(key): value for key, value in shards(stock).items()}


def new_names(scmoe: ScMoEConfig) -> set[str]:
    """What a unit has and the baseline's MoE layer has not."""
    names = set()
    if scmoe.scmoe_combine == "cg1":
        names.add("mlp.shared_experts.gate_weight")
    if scmoe.scmoe_combine == "cg2":
        names.add("mlp.combine_gate.weight")
    if scmoe.scmoe_shortcut_norm == "own":
        names.add("shortcut_layernorm.weight")
    if scmoe.scmoe_post_norm:
        names.add("post_layernorm.weight")
    return names


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("combine", ["add", "cg1", "cg2"])
@pytest.mark.parametrize(("norm", "post"), [("own", False), ("own", True), ("shared", True)])
def test_names_are_the_baselines_and_the_new_ones(
    position: str, combine: str, norm: str, post: bool
) -> None:
    scmoe = scmoe_config(
        position, scmoe_combine=combine, scmoe_shortcut_norm=norm, scmoe_post_norm=post
    )
    pattern = PATTERNS["dense-prefix"]
    config = host_config(pattern, moe_shared_expert_gate=combine == "cg1")
    block = scmoe_block(config, scmoe)
    block.__class__ = ShortcutBlock
    ours, baseline = shards(block), baseline_shards(pattern, len(pattern))
    added = {
        f"layers.{i}.{name}" for i, moe in enumerate(pattern) if moe for name in new_names(scmoe)
    }
    assert ours.keys() == baseline.keys() | added
    assert {name: ours[name] for name in baseline} == baseline


@pytest.mark.usefixtures("single_rank")
def test_names_of_uniform_layers() -> None:
    """With experts in every layer the host stores all layers as slices of one tensor."""
    config = Case(host={"moe_layer_freq": 1}, num_layers=3).host_config()
    block = scmoe_block(config, scmoe_config("pos1"))
    block.__class__ = ShortcutBlock
    ours, baseline = shards(block), baseline_shards(1, 3)
    assert ours.keys() == baseline.keys() | {
        f"layers.{name}" for name in new_names(scmoe_config("pos1"))
    }
    assert {name: ours[name] for name in baseline} == baseline


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("split", ["uniform-2", "every-fourth", "virtual", "layout"])
def test_stages_save_what_one_stage_saves(split: str, position: str) -> None:
    config, scmoe = split_config(split), scmoe_config(position)
    whole = scmoe_block(host_config(config.moe_layer_freq), scmoe)
    whole.__class__ = ShortcutBlock
    block, groups = block_config(config, scmoe), ProcessGroupCollection.use_mpu_process_groups()
    saved: dict[str, tuple[Any, ...]] = {}
    stages = all_stages(config)
    for rank, vp_stage in stages:
        with pipeline_rank(rank, config.virtual_pipeline_model_parallel_size):
            spec = scmoe_block_spec(config, scmoe, vp_stage, rank)
            stage = TransformerBlock(
                block,
                spec,
                post_process=(rank, vp_stage) == stages[-1],
                pg_collection=groups,
                vp_stage=vp_stage,
            )
            stage.__class__ = ShortcutBlock
            own = shards(stage.double())
            assert stage.sharded_state_dict().keys() >= dict(stage.named_parameters()).keys()
            first = get_transformer_layer_offset(block, vp_stage, rank) + 1
        assert [layer.layer_number for layer in stage.layers] == list(
            range(first, first + len(stage.layers))
        )
        assert not own.keys() & saved.keys()
        saved |= own
    assert saved == shards(whole)


# The model. -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", ["none", *POSITIONS])
def test_model_builder(position: str) -> None:
    config = host_config([0, 1] * 2)
    model_config = ScMoEModelConfig(
        transformer=config, vocab_size=32, seq_length=8, scmoe=scmoe_config(position)
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = ScMoEModelBuilder(model_config).build_model(groups)
    modules = {type(layer) for layer in model.decoder.layers}
    if position == "none":
        assert type(model.decoder) is TransformerBlock
        assert not modules & {ShortcutLayer, NumberedLayer}
    else:
        assert type(model.decoder) is ShortcutBlock
        assert ShortcutLayer in modules
    assert model_config.transformer is config
    assert config.num_layers == 4
    names = model.sharded_state_dict()
    routers = {t.key for k, t in names.items() if k.endswith("router.weight")}
    assert routers == {"decoder.layers.1.mlp.router.weight", "decoder.layers.3.mlp.router.weight"}


@pytest.mark.usefixtures("single_rank")
def test_build_block_is_what_the_builder_builds() -> None:
    """The other tests' shortcut to a block has the parameters of the model's decoder."""
    case = Case()
    model_config = ScMoEModelConfig(
        transformer=case.host_config(), vocab_size=32, seq_length=8, scmoe=case.scmoe_config()
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    decoder = ScMoEModelBuilder(model_config).build_model(groups).decoder
    assert (
        dict(decoder.named_parameters()).keys() == dict(build_block(case).named_parameters()).keys()
    )
