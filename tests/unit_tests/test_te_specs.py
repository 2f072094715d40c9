"""Specs of Transformer Engine layers, and what they put on disk. Nothing here runs its kernels.

Fused and unfused norms are where they belong; names and shapes on disk are the local specs'.

The CPU backend hides Transformer Engine from the host. To run all tests of this file without a GPU,
import it first: `pytest -p transformer_engine.pytorch tests/unit_tests/test_te_specs.py`.
"""

from functools import partial
from typing import Any

import pytest
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_scmoe import say
from megatron_scmoe.arguments import parse_and_validate_args
from megatron_scmoe.checks.shortcut import check_model
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.builder import ShortcutBlock
from megatron_scmoe.model.moe import ScMoELayer
from megatron_scmoe.model.specs import block_config, scmoe_block_spec
from megatron_scmoe.model.unit import NumberedLayer, ShortcutLayer, ShortcutLayerSubmodules
from tests.functional_tests.launch import TINY_MODEL, TINY_MOE

needs_te = pytest.mark.skipif(not HAVE_TE, reason="the host has no Transformer Engine here")

POSITIONS = ("pos1", "pos2", "pos3")
NORMS = ("own", "shared")
# Layer 1 is a plain dense layer; layers 2 and 3 are a unit (Pos-2, Pos-3).
PATTERN = [0, 0, 1]
ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"num_query_groups": 2},
    "mla": {"multi_latent_attention": True},
    "fused mla": {"multi_latent_attention": True, "mla_down_proj_fusion": True},
}


def host_config(attention: str, **options: Any) -> TransformerConfig:
    config_class = TransformerConfig if attention == "gqa" else MLATransformerConfig
    if attention != "gqa":
        latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_head_dim": 4, "qk_pos_emb_head_dim": 4}
        options = {"rope_type": "rope", "v_head_dim": 4, **latent, **options}
    defaults = {
        "num_layers": len(PATTERN),
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_moe_experts": 4,
        "moe_layer_freq": PATTERN,
        "moe_ffn_hidden_size": 12,
        "moe_shared_expert_intermediate_size": 12,
        "moe_shared_expert_gate": True,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "transformer_impl": "transformer_engine",
    }
    return config_class(**{**defaults, **ATTENTIONS[attention], **options})


def unit_and_plain(
    config: TransformerConfig, position: str, **options: Any
) -> tuple[ShortcutLayerSubmodules, TransformerLayerSubmodules]:
    """The unit of the last layer, and the plain first layer."""
    scmoe = ScMoEConfig(scmoe_shortcut_position=position, **options)
    check_model(config, scmoe)
    specs = scmoe_block_spec(config, scmoe).layer_specs
    assert specs[0].module is NumberedLayer
    assert specs[-1].module is ShortcutLayer
    assert (specs[-1].submodules.dense_layer is None) == (position == "pos1")
    return specs[-1].submodules, specs[0].submodules


def first_linear(layer: TransformerLayerSubmodules) -> dict[str, Any]:
    """The linear layers that read the input norm's output."""
    submodules = layer.self_attention.submodules
    names = ("linear_qkv", "linear_q_down_proj", "linear_kv_down_proj", "linear_qkv_down_proj")
    return {name: value for name in names if (value := getattr(submodules, name, None)) is not None}


def linear_fc1(layer: TransformerLayerSubmodules) -> Any:
    return layer.mlp.keywords["submodules"].linear_fc1


def norm_class(builder: Any) -> Any:
    """The host wraps TENorm where a residual could be fused into it, which we refuse."""
    return TENorm if builder.__name__ == "_TENormWithResidual" else builder


FUSED_INPUT = {
    "gqa": {"linear_qkv": TELayerNormColumnParallelLinear},
    "mla": None,
    "fused mla": {"linear_qkv_down_proj": TELayerNormColumnParallelLinear},
}
UNFUSED_INPUT = {
    "gqa": {"linear_qkv": TEColumnParallelLinear},
    "mla": {"linear_q_down_proj": TELinear, "linear_kv_down_proj": TELinear},
    "fused mla": {"linear_qkv_down_proj": TEColumnParallelLinear},
}


@needs_te
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("position", POSITIONS)
def test_only_the_tapped_norm_is_unfused(position: str, norm: str, attention: str) -> None:
    unit, plain = unit_and_plain(host_config(attention), position, scmoe_shortcut_norm=norm)

    def check_input(layer: TransformerLayerSubmodules, tapped: bool) -> None:
        if tapped or FUSED_INPUT[attention] is None:
            assert norm_class(layer.input_layernorm) is TENorm
            assert first_linear(layer) == UNFUSED_INPUT[attention]
        else:
            assert layer.input_layernorm is IdentityOp
            assert first_linear(layer) == FUSED_INPUT[attention]

    def check_dense_mlp(layer: TransformerLayerSubmodules, tapped: bool) -> None:
        if tapped:
            assert norm_class(layer.pre_mlp_layernorm) is TENorm
            assert linear_fc1(layer) is TEColumnParallelLinear
        else:
            assert layer.pre_mlp_layernorm is IdentityOp
            assert linear_fc1(layer) is TELayerNormColumnParallelLinear
        assert layer.mlp.keywords["submodules"].linear_fc2 is TERowParallelLinear

    shared = norm == "shared"
    check_input(plain, tapped=False)
    check_dense_mlp(plain, tapped=False)
    check_input(unit, tapped=shared and position == "pos1")
    assert norm_class(unit.pre_mlp_layernorm) is TENorm
    if unit.dense_layer is not None:
        check_input(unit.dense_layer, tapped=shared and position == "pos3")
        check_dense_mlp(unit.dense_layer, tapped=shared and position == "pos2")
    assert unit.shortcut_layernorm is (IdentityOp if shared else TENorm)
    assert unit.post_layernorm is IdentityOp


@needs_te
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("position", POSITIONS)
def test_experts(position: str, grouped: bool) -> None:
    unit, _ = unit_and_plain(host_config("gqa", moe_grouped_gemm=grouped), position)
    assert unit.mlp.func is ScMoELayer
    assert set(unit.mlp.keywords) == {"submodules", "scmoe"}
    moe = unit.mlp.keywords["submodules"]
    linears = moe.experts.keywords["submodules"]
    if grouped:
        assert moe.experts.func is TEGroupedMLP
        assert linears.linear_fc1 is TEColumnParallelGroupedLinear
        assert linears.linear_fc2 is TERowParallelGroupedLinear
    else:
        assert moe.experts.func is SequentialMLP
        assert linears.linear_fc1 is TEColumnParallelLinear
        assert linears.linear_fc2 is TERowParallelLinear
    assert isinstance(moe.shared_experts, partial)
    assert moe.shared_experts.keywords["submodules"].linear_fc1 is TEColumnParallelLinear


@needs_te
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("position", POSITIONS)
def test_qk_layernorm(position: str, attention: str) -> None:
    """With latent attention these norms are fused too; unfusing another norm leaves them alone."""
    config = host_config(attention, qk_layernorm=True)
    unit, plain = unit_and_plain(config, position, scmoe_shortcut_norm="shared")
    for layer in filter(None, (unit, unit.dense_layer, plain)):
        submodules = layer.self_attention.submodules
        if attention == "gqa":
            assert submodules.q_layernorm is submodules.k_layernorm is TENorm
        else:
            assert submodules.q_layernorm is submodules.kv_layernorm is IdentityOp
            assert submodules.linear_q_up_proj is TELayerNormColumnParallelLinear
            assert submodules.linear_kv_up_proj is TELayerNormColumnParallelLinear


@needs_te
def test_post_norm_and_final_norm() -> None:
    config = host_config("gqa")
    unit, _ = unit_and_plain(config, "pos2", scmoe_post_norm=True)
    assert unit.post_layernorm is TENorm
    block = scmoe_block_spec(config, ScMoEConfig(scmoe_shortcut_position="pos2"))
    assert block.layer_norm is TENorm


# Names on disk. ---------------------------------------------------------------------------------


def norm_names(layer: TransformerLayerSubmodules) -> set[str]:
    """The names, on disk, of the norms of one layer: its own, and those inside linear layers."""
    attention = layer.self_attention.submodules
    separate = {
        "input_layernorm.": layer.input_layernorm,
        "pre_mlp_layernorm.": layer.pre_mlp_layernorm,
        **{
            f"self_attention.{name}.": getattr(attention, name, None) or IdentityOp
            for name in ("q_layernorm", "k_layernorm", "kv_layernorm")
        },
    }
    in_memory = {name for name, norm in separate.items() if norm is not IdentityOp}
    linears = {f"self_attention.{name}": linear for name, linear in vars(attention).items()}
    if layer.mlp.func is not ScMoELayer:
        linears["mlp.linear_fc1"] = linear_fc1(layer)
    in_memory |= {
        f"{name}.layer_norm_"
        for name, linear in linears.items()
        if linear is TELayerNormColumnParallelLinear
    }
    names = layer.sharded_state_dict_keys_map
    return {names.get(name, name) for name in in_memory}


@pytest.mark.parametrize("qk_layernorm", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "transformer_impl", ["local", pytest.param("transformer_engine", marks=needs_te)]
)
def test_norms_have_one_name_on_disk(
    transformer_impl: str, position: str, norm: str, attention: str, qk_layernorm: bool
) -> None:
    config = host_config(attention, qk_layernorm=qk_layernorm, transformer_impl=transformer_impl)
    unit, plain = unit_and_plain(config, position, scmoe_shortcut_norm=norm)
    if attention == "gqa":
        expected = {"self_attention.linear_qkv.layer_norm_"}
        if qk_layernorm:
            expected |= {"self_attention.q_layernorm.", "self_attention.k_layernorm."}
    else:
        expected = {"input_layernorm."}
        if qk_layernorm:
            linears = ("linear_q_up_proj", "linear_kv_up_proj")
            expected |= {f"self_attention.{linear}.layer_norm_" for linear in linears}
    assert norm_names(unit) == expected | {"pre_mlp_layernorm."}
    for layer in filter(None, (unit.dense_layer, plain)):
        assert norm_names(layer) == expected | {"mlp.linear_fc1.layer_norm_"}


def names_and_shapes(
    config: TransformerConfig, scmoe: ScMoEConfig
) -> set[tuple[str, tuple[int, ...]]]:
    """What a block of this config puts on disk, apart from quantization state."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    block = TransformerBlock(
        config=block_config(config, scmoe),
        spec=scmoe_block_spec(config, scmoe),
        pg_collection=groups,
    )
    block.__class__ = ShortcutBlock
    metadata = {"dp_cp_group": groups.dp_cp, "singleton_local_shards": False}
    values = nested_values(block.sharded_state_dict(metadata=metadata))
    return {
        (value.key, tuple(value.data.shape))
        for value in values
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }


@needs_te
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("position", POSITIONS)
def test_checkpoints_are_the_local_specs(
    single_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    position: str,
    norm: str,
    attention: str,
    grouped: bool,
) -> None:
    """Real modules of both kinds. Transformer Engine's need the GPU to run, but not to exist: their
    constructors only ask whether there is one."""
    options = {"qk_layernorm": True, "gated_linear_unit": True, "moe_grouped_gemm": grouped}
    options |= {"use_cpu_initialization": True, "attention_backend": AttnBackend.unfused}
    scmoe = ScMoEConfig(
        scmoe_shortcut_position=position, scmoe_shortcut_norm=norm, scmoe_post_norm=True
    )
    local = names_and_shapes(host_config(attention, transformer_impl="local", **options), scmoe)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert names_and_shapes(host_config(attention, **options), scmoe) == local
    assert len(local) > 20


def test_missing_transformer_engine_on_a_gpu_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way from the command line, where the CPU backend does not switch the option."""
    monkeypatch.setattr("megatron_scmoe.host.cpu.no_cuda_device", lambda: False)
    monkeypatch.setattr("megatron_scmoe.checks.shortcut.HAVE_TE", False)
    options = [*TINY_MODEL, *TINY_MOE, "--mock-data", "--scmoe-shortcut-position", "pos1"]
    monkeypatch.setattr("sys.argv", ["pretrain_gpt_scmoe.py", *options])
    with pytest.raises(SystemExit), say.user_errors():
        parse_and_validate_args()
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if "error: " in line)
    assert "needs Transformer Engine" in line
    assert "use --transformer-impl local" in line


def test_missing_transformer_engine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = host_config("gqa")
    monkeypatch.setattr("megatron_scmoe.checks.shortcut.HAVE_TE", False)
    for position in ("none", "pos2"):
        with pytest.raises(ValueError, match="Transformer Engine, which is not installed") as error:
            check_model(config, ScMoEConfig(scmoe_shortcut_position=position))
        assert "\n" not in str(error.value)
