"""The table of names: its page is up to date, and it covers a model that is built by hand."""

from pathlib import Path

from megatron_scmoe.huggingface import tensor_names
from megatron_scmoe.huggingface.config import (
    LATENT,
    NEWER,
    ONLY,
    SAME_NAME,
    moe_layers,
    to_options,
)
from megatron_scmoe.huggingface.dialects import NEUTRAL
from megatron_scmoe.run.checkpoint.model_options import ARCHITECTURE, SCMOE

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_the_page_has_the_table() -> None:
    """`python -m megatron_scmoe.huggingface.tensor_names` prints it."""
    assert "\n".join(tensor_names.table()) in PAGE.read_text(encoding="utf-8")


def test_every_need_is_a_feature_and_every_dimension_a_size() -> None:
    config = {
        **dict.fromkeys(
            (
                "hidden_size",
                "vocab_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "intermediate_size",
                "moe_intermediate_size",
                "shared_expert_intermediate_size",
                "num_experts",
                "zero_experts",
                "copy_experts",
                "constant_experts",
                "max_position_embeddings",
            ),
            4,
        ),
        "position_embedding": "learned",
        "norm": "layernorm",
        "combine": "cg1",
        "shortcut_position": "pos2",
        "shortcut_norm": "own",
        "tie_word_embeddings": False,
        "gate_layers": 2,
        "dual_gating": "separate",
        "router": "c2r",
        **dict.fromkeys(
            (
                "qk_layernorm",
                "attention_bias",
                "attention_output_bias",
                "mlp_bias",
                "router_bias",
                "gated_linear_unit",
                "post_norm",
                "expert_bias",
                "gating_residual",
            ),
            True,
        ),
    }
    latent = {
        name: 2
        for name in (
            "kv_lora_rank",
            "q_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        )
    }
    plain = tensor_names.features(config | dict.fromkeys(latent))
    have = plain | tensor_names.features(config | latent | {"combine": "cg2"})
    sizes = tensor_names.sizes(config | dict.fromkeys(latent)) | tensor_names.sizes(config | latent)
    rows = [row for _, _, place in tensor_names.PLACES for row in place]
    needs = {need.removeprefix("no ") for row in rows for need in row.needs}
    assert needs == have | {"first MoE"}
    shapes = [part.shape for row in rows for part in row.parts]
    assert {dimension for shape in shapes for dimension in shape} == sizes.keys()


def test_layers_with_experts_are_those_of_the_host() -> None:
    """moe_layer_freq N is the layers 0, N, 2N, ... (gpt_layer_specs.py)."""
    assert moe_layers(1, 3) == [0, 1, 2]
    assert moe_layers(2, 5) == [0, 2, 4]
    assert moe_layers([0, 1, 0, 0], 4) == [1]


def test_every_option_that_makes_a_model_goes_both_ways_or_is_refused() -> None:
    """A new one would be lost without a word."""
    fields = {*SAME_NAME, "moe_layers", "head_dim", "tie_word_embeddings", "attention_bias"}
    config = {**dict.fromkeys(fields), **NEUTRAL, "norm": "rmsnorm"}
    config |= {"moe_layers": [0], "num_hidden_layers": 1, "hidden_size": 4, "kv_lora_rank": 4}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    known = to_options(config).keys() | ONLY.keys()
    unused = {"openai_gelu"}  # the host's GPT does not read it
    assert {*ARCHITECTURE, *SCMOE} - known == unused
    assert set(LATENT.values()) < known and NEWER.keys() < known
