"""Tiny blocks of units, with the oracle's parameters in them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_scmoe.checks.shortcut import check_model
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.specs import block_config, scmoe_block_spec
from tests.reference import ReferenceConfig

SEQUENCE, BATCH = 6, 2
ROTARY_BASE = 10000


@dataclass
class Case:
    """One model: our options, and what differs from the tiny default of the host's."""

    scmoe: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    moe_frequency: int = 2
    num_layers: int = 4

    def scmoe_config(self) -> ScMoEConfig:
        return ScMoEConfig(**{"scmoe_shortcut_position": "pos2", **self.scmoe})

    def host_config(self) -> TransformerConfig:
        """float64, GQA, SwiGLU, RMSNorm, 4 experts, top-1."""
        pattern = [0] * (self.moe_frequency - 1) + [1]
        repeats = self.num_layers // self.moe_frequency
        combine = self.scmoe_config().scmoe_combine
        defaults: dict[str, Any] = {
            "num_layers": self.num_layers,
            "hidden_size": 16,
            "ffn_hidden_size": 24,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 4,
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 12,
            "moe_shared_expert_intermediate_size": None if self.scmoe_config().dual_gating else 20,
            "moe_router_topk": 1,
            "moe_router_pre_softmax": True,
            "moe_router_load_balancing_type": "none",
            "moe_shared_expert_gate": combine == "cg1",
            "moe_token_dispatcher_type": "alltoall",
            "moe_layer_freq": 1 if self.moe_frequency == 1 else pattern * repeats,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "params_dtype": torch.float64,
            "pipeline_dtype": torch.float64,
            "use_cpu_initialization": True,
            "transformer_impl": "local",
            "attention_softmax_in_fp32": False,
        }
        latent = self.host.get("multi_latent_attention", False)
        config_type = MLATransformerConfig if latent else TransformerConfig
        return config_type(**{**defaults, **self.host})

    def reference_config(self) -> ReferenceConfig:
        """The same model for the oracle."""
        config, scmoe = self.host_config(), self.scmoe_config()
        return ReferenceConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            kv_channels=config.kv_channels,
            ffn_hidden_size=config.ffn_hidden_size,
            num_moe_experts=config.num_moe_experts,
            moe_router_topk=config.moe_router_topk,
            moe_ffn_hidden_size=config.moe_ffn_hidden_size,
            moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
            position=scmoe.scmoe_shortcut_position,
            combine=scmoe.scmoe_combine,
            shortcut_norm=scmoe.scmoe_shortcut_norm,
            post_norm=scmoe.scmoe_post_norm,
            moe_router_pre_softmax=config.moe_router_pre_softmax,
            moe_router_score_function=config.moe_router_score_function,
            moe_router_topk_scaling_factor=config.moe_router_topk_scaling_factor,
            moe_expert_capacity_factor=config.moe_expert_capacity_factor,
            moe_token_drop_policy=config.moe_token_drop_policy,
            drop_ties="topk",
            activation="swiglu" if config.gated_linear_unit else "gelu",
            normalization=config.normalization,
            layernorm_epsilon=config.layernorm_epsilon,
            rotary_base=ROTARY_BASE,
            # The host computes scores and angles in float32 whatever the model's precision is.
            router_score_dtype=torch.float32,
            rotary_dtype=torch.float32,
            dual_gating=scmoe.scmoe_dual_gating,
            distinct_experts=scmoe.scmoe_distinct_experts,
        )


def build_block(case: Case) -> TransformerBlock:
    """The host's block, built from our specs, on the current process groups."""
    config, scmoe = case.host_config(), case.scmoe_config()
    check_model(config, scmoe)
    block = TransformerBlock(
        config=block_config(config, scmoe),
        spec=scmoe_block_spec(config, scmoe),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return block.to(config.params_dtype)


def parameters_by_expert(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters()` under the oracle's names: stacked experts one by one."""
    for name, parameter in module.named_parameters():
        if ".experts.linear_fc" not in name:
            yield name, parameter
            continue
        for index, weight in enumerate(parameter.data):
            if parameter.grad is not None:
                weight.grad = parameter.grad[index]
            yield name.replace(".experts.", f".experts.local_experts.{index}."), weight


def run_block(
    block: TransformerBlock, hidden_states: Tensor, padding_mask: Tensor | None = None
) -> Tensor:
    """Causal forward pass with rotary embedding, [s, b, h] -> [s, b, h]."""
    config = block.config
    length = hidden_states.shape[0] * (
        config.tensor_model_parallel_size if config.sequence_parallel else 1
    )
    rotary = RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=1.0,
        rotary_base=ROTARY_BASE,
        use_cpu_initialization=True,
    )(length)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return block(
        hidden_states=hidden_states,
        attention_mask=mask,
        # Multi-latent attention has a rotary embedding of its own.
        rotary_pos_emb=None if config.multi_latent_attention else rotary,
        padding_mask=padding_mask,
    )
