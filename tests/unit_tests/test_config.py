"""Refusals: one line that names the option and a remedy that works."""

import re
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import moe_freq_type

from megatron_scmoe.checks.shortcut import check_model
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.experts.offload.experts import Offload
from megatron_scmoe.model.specs import block_config, block_layers
from megatron_scmoe.overlap.schedule import POSITIONS
from tests.models import Case
from tests.unit_tests.test_every_refusal import UNSUPPORTED, host_config


def refusal(config: TransformerConfig, **scmoe: Any) -> str:
    """The message of a check that must fail."""
    with pytest.raises(ValueError) as error:
        check_model(config, ScMoEConfig(**{"scmoe_shortcut_position": "pos2", **scmoe}))
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def check(config: TransformerConfig, **scmoe: Any) -> None:
    check_model(config, ScMoEConfig(**{"scmoe_shortcut_position": "pos2", **scmoe}))


# What the host offers and a unit does not. ------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_a_sound_model_is_not_refused(position: str) -> None:
    check(host_config(), scmoe_shortcut_position=position)


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_without_a_shortcut_nothing_is_refused(option: str) -> None:
    check(host_config(**UNSUPPORTED[option]), scmoe_shortcut_position="none")


@pytest.mark.parametrize(
    ("host", "scmoe", "line"),
    [
        ({"moe_token_dispatcher_type": "post"}, {}, "none of allgather, alltoall, flex."),
        ({}, {"scmoe_combine": "gate"}, "--scmoe-combine gate is none of add, cg1, cg2."),
        ({}, {"scmoe_dual_gating": "no"}, "--scmoe-dual-gating no is none of none, shared, sepa"),
        ({}, {"scmoe_router": "dice"}, "--scmoe-router dice is none of topk, heterogeneous, long"),
        ({}, {"scmoe_experts_at_home": {"cat": 1}}, "A kind of experts at home: cat is none of"),
    ],
)
def test_values_that_are_in_no_table(host: dict, scmoe: dict, line: str) -> None:
    """From Python: the command line knows no such values."""
    assert line in refusal(host_config(**host), **scmoe)


# Our own options. -------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "slots"), [("pos1", 5), ("pos2", 6), ("pos3", 9)])
def test_expert_slots(position: str, slots: int) -> None:
    for slot in range(slots):
        for text in (str(slot), f"0,{slot}", f"{slot},0"):
            check(host_config(), scmoe_shortcut_position=position, scmoe_expert_slot=text)
    for text in (str(slots), f"0,{slots}", f"{slots},0"):
        options = {"scmoe_shortcut_position": position, "scmoe_expert_slot": text}
        message = refusal(host_config(), **options)
        assert message.startswith(f"--scmoe-expert-slot {slots} is outside 0..{slots - 1}")
        assert "projection, shared_expert)" in message


@pytest.mark.parametrize("text", ["-1", "one", "1,2,3", "", "1.5", "Auto"])
def test_slots_that_are_no_numbers(text: str) -> None:
    message = refusal(host_config(), scmoe_shortcut_position="pos2", scmoe_expert_slot=text)
    assert message.startswith(f"--scmoe-expert-slot {text}: write auto, a number")


def test_slots_before_anything_is_measured() -> None:
    slots = {p: ScMoEConfig(scmoe_shortcut_position=p).initial_slots for p in POSITIONS}
    assert slots == {"pos1": (3, 3), "pos2": (1, 1), "pos3": (4, 4)}
    fixed = ScMoEConfig(scmoe_shortcut_position="pos3", scmoe_expert_slot="0, 5")
    assert fixed.initial_slots == (0, 5) and not fixed.measures_slots
    assert ScMoEConfig(scmoe_shortcut_position="pos3").measures_slots
    assert not ScMoEConfig(scmoe_shortcut_position="pos3", scmoe_overlap=False).measures_slots
    known = ScMoEConfig(scmoe_shortcut_position="pos3", scmoe_measured_slots=[2, 3])
    assert known.initial_slots == (2, 3) and not known.measures_slots


def test_experts_that_have_to_be_fetched_run_behind_the_whole_window() -> None:
    """Whatever a run with resident ones has measured; what is typed wins."""
    for position, last in {"none": 1, "pos1": 4, "pos2": 5, "pos3": 8}.items():
        options = {"scmoe_shortcut_position": position, "scmoe_offload": Offload("cpu", 2)}
        assert ScMoEConfig(**options, scmoe_measured_slots=[0, 0]).initial_slots == (last, last)
        assert ScMoEConfig(**options, scmoe_expert_slot="0").initial_slots == (0, 0)


def test_shortcut_is_off_by_default() -> None:
    assert not ScMoEConfig().enabled
    assert ScMoEConfig(scmoe_shortcut_position="pos1").enabled


@pytest.mark.parametrize("combine", ["add", "cg2"])
def test_hosts_gate_belongs_to_cg1(combine: str) -> None:
    message = refusal(host_config(moe_shared_expert_gate=True), scmoe_combine=combine)
    assert "--moe-shared-expert-gate is --scmoe-combine cg1" in message
    assert f"drop it to use {combine}" in message
    check(host_config(moe_shared_expert_gate=False), scmoe_combine=combine)


def test_cg1_needs_the_hosts_gate() -> None:
    message = refusal(host_config(moe_shared_expert_gate=False), scmoe_combine="cg1")
    assert "add --moe-shared-expert-gate" in message


def test_router_without_gradient() -> None:
    message = refusal(host_config(moe_router_pre_softmax=False))
    assert "--moe-router-topk 1" in message
    assert "add --moe-router-pre-softmax" in message
    for remedy in (
        {"moe_router_pre_softmax": True},
        {"moe_router_pre_softmax": False, "moe_router_topk": 2},
        {"moe_router_pre_softmax": False, "moe_router_score_function": "sigmoid"},
    ):
        check(host_config(**remedy))


# Which layers have experts. ---------------------------------------------------------------------


def advised_pattern(message: str) -> list[int]:
    """The --moe-layer-freq of a message, read as the command line reads it."""
    (pattern,) = re.findall(r"--moe-layer-freq '([^']*)'", message)
    return moe_freq_type(pattern)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("freq", [2, 4, 8])
def test_moe_first_is_refused_and_the_advice_works(position: str, freq: int) -> None:
    message = refusal(host_config(moe_layer_freq=freq), scmoe_shortcut_position=position)
    assert message.startswith(f"--moe-layer-freq {freq} puts the MoE first")
    pattern = advised_pattern(message)
    assert pattern == ([0] * (freq - 1) + [1]) * (8 // freq)
    check(host_config(moe_layer_freq=pattern), scmoe_shortcut_position=position)


@pytest.mark.parametrize("freq", [3, 9])
def test_moe_first_without_a_multiple(freq: int) -> None:
    message = refusal(host_config(moe_layer_freq=freq))
    assert f"--num-layers 8 is no multiple of {freq}" in message
    assert "a list with a 0 in front of every 1" in message


@pytest.mark.parametrize("position", ["pos2", "pos3"])
@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        ([1, 0, 0, 1], 1),
        ([0, 1, 1, 0], 3),
        ([0, 0, 1, 1], 4),
        (1, 1),
        ([0, 1, 1, 0, 1], 3),
        ([1, 1], 1),
    ],
    ids=str,
)
def test_pair_without_a_dense_layer(position: str, pattern: Any, layer: int) -> None:
    num_layers = 4 if isinstance(pattern, int) else len(pattern)
    config = host_config(num_layers=num_layers, moe_layer_freq=pattern)
    message = refusal(config, scmoe_shortcut_position=position)
    assert f"--scmoe-shortcut-position {position}" in message
    assert f"layer {layer} has none" in message
    # Both remedies.
    check(config, scmoe_shortcut_position="pos1")
    config.moe_layer_freq = advised_pattern(message)
    check(config, scmoe_shortcut_position=position)
    assert sum(config.moe_layer_freq) == num_layers // 2


def test_single_layer_has_one_remedy() -> None:
    message = refusal(host_config(num_layers=1, moe_layer_freq=1))
    assert "use pos1" in message
    assert "--moe-layer-freq" not in message


# Pipeline stages. -------------------------------------------------------------------------------


def pipeline_config(freq: list[int], stages: int, **options: Any) -> TransformerConfig:
    host = {"moe_layer_freq": freq, "pipeline_model_parallel_size": stages, **options}
    return Case(host=host, num_layers=len(freq)).host_config()


CUTS: dict[str, tuple[TransformerConfig, str]] = {
    "uniform": (pipeline_config([0, 1] * 3, 2), "stage 1 would start at layer 4"),
    "one-layer-each": (pipeline_config([0, 1] * 2, 4), "stage 1 would start at layer 2"),
    "first-stage": (
        pipeline_config([0, 1] * 3, 2, num_layers_in_first_pipeline_stage=1),
        "stage 1 would start at layer 2",
    ),
    "plain-layers-first": (
        pipeline_config([0, 0, 0, 1, 0, 1], 2),
        "stage 1 would start at layer 4",
    ),
    "embedding": (
        pipeline_config([0, 0, 1, 0, 1], 2, account_for_embedding_in_pipeline_split=True),
        "stage 1 would start at layer 3",
    ),
    "virtual": (
        pipeline_config([0, 1] * 4, 2, virtual_pipeline_model_parallel_size=4),
        r"stage 1 \(virtual stage 0\) would start at layer 2",
    ),
    "layout": (
        pipeline_config([0, 1] * 3, 2, pipeline_model_parallel_layout="Et|tttttL"),
        "stage 1 would start at layer 2",
    ),
    "virtual-layout": (
        pipeline_config([0, 1] * 3, 2, pipeline_model_parallel_layout="Ett|t|tt|tL"),
        r"stage 0 \(virtual stage 1\) would start at layer 4",
    ),
}


@pytest.mark.parametrize("position", ["pos2", "pos3"])
@pytest.mark.parametrize("cut", CUTS)
def test_cut_unit_is_refused_and_the_advice_works(position: str, cut: str) -> None:
    config, expected = CUTS[cut]
    scmoe = ScMoEConfig(scmoe_shortcut_position=position)
    with pytest.raises(ValueError, match=f"^pipeline {expected}, inside the unit of") as error:
        block_config(config, scmoe)
    message = str(error.value)
    assert "\n" not in message
    assert "In place of the other options of the split" in message
    (layout,) = re.findall(r"--pipeline-model-parallel-layout '([^']*)'", message)

    advised = pipeline_config(
        config.moe_layer_freq,
        config.pipeline_model_parallel_size,
        pipeline_model_parallel_layout=layout,
    )
    assert (
        advised.virtual_pipeline_model_parallel_size == config.virtual_pipeline_model_parallel_size
    )
    block = block_config(advised, scmoe)
    assert block.num_layers == len(block_layers(config, scmoe))
    # As even as whole block layers allow.
    stages = [layers for rank in block.pipeline_model_parallel_layout.layout for layers in rank]
    sizes = [sum(layer.name == "decoder" for layer in layers) for layers in stages]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("cut", CUTS)
def test_pos1_units_are_never_cut(cut: str) -> None:
    config, _ = CUTS[cut]
    block = block_config(config, ScMoEConfig(scmoe_shortcut_position="pos1"))
    assert block.num_layers == config.num_layers


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("layernorm_zero_centered_gamma", "drop --apply-layernorm-1p"),
        ("persist_layer_norm", "add --no-persist-layer-norm"),
        ("memory_efficient_layer_norm", "drop --memory-efficient-layer-norm"),
    ],
)
@pytest.mark.parametrize("position", ["none", "pos2"])
def test_what_torch_norms_cannot_do_is_refused(position: str, option: str, remedy: str) -> None:
    config = host_config(**{option: True})
    assert remedy in refusal(config, scmoe_shortcut_position=position)
