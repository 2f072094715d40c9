"""What a model's parts cost, from its config: multiply-adds, parameters, saved activations.

One row of `_OPERATORS` for every step of a unit that computes. Numbers are of the whole operator;
whoever asks divides by the ranks that share it.

Shapes: h hidden, n heads, g query groups, d channels of a head, s tokens of a sequence
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.layer_specs import moe_layer_pattern
from megatron_scmoe.overlap.schedule import Step

# Gradients of the input and of the weights, a multiplication of the same size for each.
BACKWARD_FACTOR = 2


class _Operator(NamedTuple):
    weights: Callable[[TransformerConfig], int]
    """Matrix elements that a token is multiplied with."""
    saved: Callable[[TransformerConfig], int]
    """Elements kept for the backward pass, for each token."""
    context: Callable[[TransformerConfig], int] = lambda config: 0
    """Multiply-adds for each pair of a token and a position that it attends to."""


# Attention. ---------------------------------------------------------------------------------------


class _Widths(NamedTuple):
    """Channels of all heads together."""

    query: int
    key: int
    value: int
    output: int


def _widths(config: TransformerConfig) -> _Widths:
    """What the core of attention works on; latent attention gives every head keys of its own."""
    heads = config.num_attention_heads
    if config.multi_latent_attention:
        key = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
        value = heads * config.v_head_dim
        return _Widths(query=key, key=key, value=value, output=value)
    query = heads * config.kv_channels
    key = (config.num_query_groups or heads) * config.kv_channels
    return _Widths(query=query, key=key, value=key, output=query)


def _latents(config: TransformerConfig) -> int:
    """Channels between the down and up projections of latent attention, norms on them."""
    if not config.multi_latent_attention:
        return 0
    return (config.q_lora_rank or 0) + config.kv_lora_rank


def _qkv_weights(config: TransformerConfig) -> int:
    width, hidden = _widths(config), config.hidden_size
    if not config.multi_latent_attention:
        gate = width.output if config.attention_output_gate else 0
        return hidden * (width.query + gate + width.key + width.value)
    if config.q_lora_rank is None:
        query = hidden * width.query
    else:
        query = config.q_lora_rank * (hidden + width.query)
    rotary = config.qk_pos_emb_head_dim  # one rotary key for all heads
    up = config.num_attention_heads * config.qk_head_dim + width.value
    return query + hidden * (config.kv_lora_rank + rotary) + config.kv_lora_rank * up


def _qkv_saved(config: TransformerConfig) -> int:
    """Input and output of the norm, and latents."""
    return 2 * config.hidden_size + _latents(config)


def _core_saved(config: TransformerConfig) -> int:
    """Q, K and V; no scores (flash attention)."""
    width = _widths(config)
    return width.query + width.key + width.value


def _core_context(config: TransformerConfig) -> int:
    """Q K^T, and its product with V."""
    width = _widths(config)
    return width.query + width.output


def _projection_weights(config: TransformerConfig) -> int:
    return _widths(config).output * config.hidden_size


def _projection_saved(config: TransformerConfig) -> int:
    return _widths(config).output


# MLPs. --------------------------------------------------------------------------------------------


def _gates(config: TransformerConfig) -> int:
    """Outputs of the first linear layer for each input of the second."""
    return 2 if config.gated_linear_unit else 1


def _mlp_weights(config: TransformerConfig, intermediate_size: int) -> int:
    return config.hidden_size * intermediate_size * (_gates(config) + 1)


def _mlp_saved(config: TransformerConfig, intermediate_size: int) -> int:
    """Input and output of the norm, and both sides of the activation function."""
    return 2 * config.hidden_size + intermediate_size * (_gates(config) + 1)


def _expert_weights(config: TransformerConfig) -> int:
    return _mlp_weights(config, config.moe_ffn_hidden_size)


def _saved_by_experts(config: TransformerConfig) -> int:
    """The tap and its norm; for each copy of a token the rows sent, received and returned, and
    both sides of the activation function."""
    row = 3 * config.hidden_size + config.moe_ffn_hidden_size * (_gates(config) + 1)
    return 2 * config.hidden_size + round(rows_per_token(config) * row)


_QKV = _Operator(_qkv_weights, _qkv_saved)
_CORE_ATTENTION = _Operator(lambda config: 0, _core_saved, _core_context)
_PROJECTION = _Operator(_projection_weights, _projection_saved)
_OPERATORS = {
    Step.DENSE_QKV: _QKV,
    Step.DENSE_CORE_ATTENTION: _CORE_ATTENTION,
    Step.DENSE_PROJECTION: _PROJECTION,
    Step.QKV: _QKV,
    Step.CORE_ATTENTION: _CORE_ATTENTION,
    Step.PROJECTION: _PROJECTION,
    Step.DENSE_MLP: _Operator(
        lambda config: _mlp_weights(config, config.ffn_hidden_size),
        lambda config: _mlp_saved(config, config.ffn_hidden_size),
    ),
    Step.SHARED_EXPERT: _Operator(
        lambda config: _mlp_weights(config, config.moe_shared_expert_intermediate_size),
        lambda config: _mlp_saved(config, config.moe_shared_expert_intermediate_size),
    ),
    Step.EXPERTS: _Operator(
        lambda config: round(rows_per_token(config) * _expert_weights(config)), _saved_by_experts
    ),
}


# What others ask. ---------------------------------------------------------------------------------


def rows_per_token(config: TransformerConfig) -> float:
    """Copies of a token that travel: top-k, or the padded capacity."""
    if config.moe_pad_expert_input_to_capacity:
        return config.moe_router_topk * config.moe_expert_capacity_factor
    return config.moe_router_topk


def forward_flops(config: TransformerConfig, step: Step, seq_length: int) -> float:
    """FLOPs of one step for one token, forward. Causal: a token attends to s/2 positions."""
    operator = _OPERATORS[step]
    return 2 * (operator.weights(config) + operator.context(config) * seq_length / 2)


def logits_flops(config: TransformerConfig, vocab_size: int) -> int:
    """FLOPs of the output layer for one token, forward."""
    return 2 * config.hidden_size * vocab_size


def saved_activations(config: TransformerConfig, step: Step) -> int:
    """Elements that one step keeps for the backward pass, for each token. An estimate."""
    return _OPERATORS[step].saved(config)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, by who holds them."""

    dense: int
    """Split over tensor parallel ranks."""
    replicated: int
    """Whole on every rank."""
    experts: int
    """Split over expert parallel and expert tensor parallel ranks."""

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            self.dense + other.dense,
            self.replicated + other.replicated,
            self.experts + other.experts,
        )

    @property
    def total(self) -> int:
        return self.dense + self.replicated + self.experts


def layer_parameters(config: TransformerConfig, scmoe: ScMoEConfig, layer: int) -> Parameters:
    """Parameters of one attention layer and its MLP or MoE, 0-based number.

    Covers what a shortcut unit may have: no biases but --add-qkv-bias. The down projections of
    latent attention count as split, as in the host's local spec; Transformer Engine's layers hold
    them on every tensor parallel rank.
    """
    hidden, width = config.hidden_size, _widths(config)
    norm = norm_parameters(config, hidden)
    dense = _QKV.weights(config) + _PROJECTION.weights(config)
    replicated = 2 * norm  # in front of attention, in front of MLP or MoE
    if config.add_qkv_bias and not config.multi_latent_attention:
        dense += width.query + width.key + width.value
    if config.qk_layernorm:
        channels = _latents(config) if config.multi_latent_attention else 2 * config.kv_channels
        replicated += norm_parameters(config, channels)
    if not moe_layer_pattern(config)[layer]:
        dense += _OPERATORS[Step.DENSE_MLP].weights(config)
        return Parameters(dense, replicated, 0)

    dense += _OPERATORS[Step.SHARED_EXPERT].weights(config)
    replicated += hidden * config.num_moe_experts  # router
    replicated += {"add": 0, "cg1": hidden, "cg2": 2 * hidden}[scmoe.scmoe_combine]
    replicated += norm if scmoe.scmoe_shortcut_norm == "own" else 0
    replicated += norm if scmoe.scmoe_post_norm else 0
    return Parameters(dense, replicated, config.num_moe_experts * _expert_weights(config))


def norm_parameters(config: TransformerConfig, channels: int) -> int:
    """Parameters of one norm."""
    return channels * (1 if config.normalization == "RMSNorm" else 2)
