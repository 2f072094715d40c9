"""The local spec's attention with widths of its own for keys and values."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_scmoe.model.attention import LatentDotProductAttention
from megatron_scmoe.model.specs import scmoe_block_spec
from tests.models import Case
from tests.unit_tests.test_te_specs import ATTENTIONS, host_config, unit_and_plain

SEQUENCE, BATCH, HEADS, KEY, VALUE = 5, 2, 4, 6, 3


def test_equals_torch(single_rank: None) -> None:
    config = Case(host={"num_query_groups": HEADS}).host_config()
    attention = LatentDotProductAttention(
        config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=0.3,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        k_channels=KEY,
        v_channels=VALUE,
    )
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(SEQUENCE, BATCH, HEADS, width, generator=generator, dtype=torch.float64)
        for width in (KEY, KEY, VALUE)
    )
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    output = attention(query, key, value, mask)

    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)), is_causal=True, scale=0.3
    )
    assert output.shape == (SEQUENCE, BATCH, HEADS * VALUE)
    torch.testing.assert_close(output, expected.permute(2, 0, 1, 3).flatten(2))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_used_for_latent_attention_only(attention: str) -> None:
    unit, plain = unit_and_plain(host_config(attention, transformer_impl="local"), "pos2")
    expected = DotProductAttention if attention == "gqa" else LatentDotProductAttention
    for layer in (unit, unit.dense_layer, plain):
        assert layer.self_attention.submodules.core_attention is expected


class FusedLayerNorm:
    """Stands in for the host's wrapper of apex, which cannot be imported here."""


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_apex_norms_are_kept(monkeypatch: pytest.MonkeyPatch, sequence_parallel: bool) -> None:
    """With apex, its LayerNorm serves every norm, under sequence parallelism too."""
    for module in ("core.models.backends", "core.models.gpt.gpt_layer_specs"):
        monkeypatch.setattr(f"megatron.{module}.LNImpl", FusedLayerNorm)
    monkeypatch.setattr("megatron_scmoe.model.specs.LNImpl", FusedLayerNorm)
    parallel = {"tensor_model_parallel_size": 2} if sequence_parallel else {}
    config = host_config(
        "gqa",
        transformer_impl="local",
        normalization="LayerNorm",
        sequence_parallel=sequence_parallel,
        **parallel,
    )
    unit, plain = unit_and_plain(config, "pos2", scmoe_post_norm=True)
    for layer in (unit, unit.dense_layer, plain):
        assert layer.input_layernorm is layer.pre_mlp_layernorm is FusedLayerNorm
    assert unit.shortcut_layernorm is unit.post_layernorm is FusedLayerNorm
    scmoe = Case().scmoe_config()
    assert scmoe_block_spec(config, scmoe).layer_norm is FusedLayerNorm
