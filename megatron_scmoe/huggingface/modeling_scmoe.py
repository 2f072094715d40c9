"""ScMoE language models (arXiv:2404.05019) for Hugging Face transformers.

This file is copied beside the weights and loaded from there: it imports torch and transformers
alone. One layer is an attention and an MLP or a MoE, as on Megatron's side; what the routed experts
of a unit read is handed from the dense layer to the MoE layer behind it:

    H_l^MH      = H_{l-1}    + Attn_l(N(H_{l-1}))                                  (10)
    H_l^MLP     = H_l^MH     + MLP_l(N(H_l^MH))                                    (9)
    H_{l+1}^MH  = H_l^MLP    + Attn_{l+1}(N(H_l^MLP))                              (8)
    H_{l+1}     = H_{l+1}^MH + P( c_s SE(x) + c_r sum_i G(z)_i E_i(z) )            (7)

x is N(H_{l+1}^MH); z the normed tap, which is H_l^MLP (pos1), H_l^MH (pos2) or H_{l-1} (pos3), and
x itself without a shortcut. P is a norm or the identity. With two gates (DGMoE, (23)) G(x)_j E_j(x)
takes the place of the shared expert's part.

Shapes: b batch, s sequence, h hidden, T = b*s tokens, E routed experts, Z zero-computation experts,
        K top-k, n query heads, g key-value heads, d head size, F intermediate size
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_scmoe import ScMoEConfig

# Hidden states, and what else is handed to the next layer.
LayerOutput = tuple[Tensor, Tensor | None, Tensor | None]


def _norm(config: ScMoEConfig, size: int | None = None) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(size or config.hidden_size, eps=config.rms_norm_eps)


def _float32_at_least(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# Positions. ---------------------------------------------------------------------------------------


class ScMoERotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding (arXiv:2104.09864), [b, s, r] each.

    r is the part of the head that turns; in both halves of r the angles are the same.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__()
        assert config.rope_parameters is not None
        self.config = config
        # Names and buffers as dynamic_rope_update and PreTrainedModel._init_weights want them.
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ScMoEConfig, **_: Any) -> tuple[Tensor, float]:
        """Frequencies, [r / 2], and the factor of cosines and sines."""
        assert config.rope_parameters is not None and config.head_dim is not None
        size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of x, [b, s, h], for its device and type, and positions, [b, s]."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first r features of every head, [b, n, s, d].

    Interleaved, pairs (2i, 2i + 1) turn, and leave their places for (i, i + r/2): scores are the
    same, because queries and keys do so alike.
    """
    r = cos.shape[-1]
    cos, sin = cos[..., : r // 2].unsqueeze(1), sin[..., : r // 2].unsqueeze(1)
    turned, rest = x.split((r, x.shape[-1] - r), dim=-1)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


# Attention. ---------------------------------------------------------------------------------------


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch, from [b, n, s, d] to [b, s, n, d], and its weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=_float32_at_least(scores)).to(query.dtype)
    weights = functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ScMoEAttention(nn.Module):
    """What both kinds of attention share: the core and the output projection."""

    def __init__(
        self, config: ScMoEConfig, layer_idx: int, head_size: int, value_size: int
    ) -> None:
        super().__init__()
        # Reading a field of transformers' configs is slow: what every token asks for is kept.
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.rope_interleaved = config.rope_interleaved
        self.scaling = config.softmax_scale or head_size**-0.5
        self.num_key_value_groups = 1
        self.o_proj = nn.Linear(
            config.num_attention_heads * value_size,
            config.hidden_size,
            bias=config.attention_output_bias,
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [b, s, h] from heads [b, n or g, s, d], and the weights if they exist."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class ScMoEGroupedQueryAttention(ScMoEAttention):
    """Grouped-query attention (arXiv:2305.13245); multi-head attention has as many groups."""

    def __init__(self, config: ScMoEConfig, layer_idx: int) -> None:
        assert config.head_dim is not None and config.num_key_value_heads is not None
        super().__init__(config, layer_idx, config.head_dim, config.head_dim)
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, query_size, bias=bias)
        self.k_proj = nn.Linear(hidden, key_size, bias=bias)
        self.v_proj = nn.Linear(hidden, key_size, bias=bias)
        self.q_norm = _norm(config, config.head_dim) if config.qk_layernorm else None
        self.k_norm = _norm(config, config.head_dim) if config.qk_layernorm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """From [b, s, h] to [b, s, h], and the weights if they exist."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if position_embeddings is not None:
            query = rotate(query, *position_embeddings, self.rope_interleaved)
            key = rotate(key, *position_embeddings, self.rope_interleaved)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.attend(query, key, value, attention_mask, **kwargs)


class ScMoELatentAttention(ScMoEAttention):
    """Multi-latent attention (arXiv:2405.04434). The cache holds the latents."""

    def __init__(self, config: ScMoEConfig, layer_idx: int) -> None:
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        assert config.kv_lora_rank is not None
        assert nope is not None and rope is not None and value is not None
        super().__init__(config, layer_idx, nope + rope, value)
        self.head_sizes = (nope, rope)
        self.value_size = value
        self.latent_size = config.kv_lora_rank
        heads, hidden, bias = config.num_attention_heads, config.hidden_size, config.attention_bias
        # What the output of an expansion is multiplied with, by the size of its latent.
        self.scales = {
            size: (hidden / size) ** 0.5
            for size in (config.q_lora_rank, config.kv_lora_rank)
            if size is not None and config.mla_scale
        }
        self.q_proj = None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = self._latent_norm(config, config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + rope, bias=bias)
        self.kv_a_layernorm = self._latent_norm(config, config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (nope + value), bias=False)

    @staticmethod
    def _latent_norm(config: ScMoEConfig, size: int) -> nn.Module:
        return _norm(config, size) if config.qk_layernorm else nn.Identity()

    def _expand(self, projection: nn.Linear, latent: Tensor, head_size: int) -> Tensor:
        """Heads [b, n, s, d] from a latent [b, s, rank], with LongCat-Flash's scale."""
        expanded = projection(latent)
        if self.scales:
            expanded = expanded * self.scales[latent.shape[-1]]
        return expanded.unflatten(-1, (-1, head_size)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """From [b, s, h] to [b, s, h], and the weights if they exist."""
        nope, rope = self.head_sizes
        if self.q_proj is not None:
            query = self.q_proj(hidden_states).unflatten(-1, (-1, nope + rope)).transpose(1, 2)
        else:
            query_latent = self.q_a_layernorm(self.q_a_proj(hidden_states))
            query = self._expand(self.q_b_proj, query_latent, nope + rope)
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split(
            (self.latent_size, rope), dim=-1
        )
        # One head each, so that caches of every kind can hold them.
        latent, key_rope = self.kv_a_layernorm(latent).unsqueeze(1), key_rope.unsqueeze(1)
        if position_embeddings is not None:
            query_nope, query_rope = query.split((nope, rope), dim=-1)
            query_rope = rotate(query_rope, *position_embeddings, self.rope_interleaved)
            query = torch.cat((query_nope, query_rope), dim=-1)
            key_rope = rotate(key_rope, *position_embeddings, self.rope_interleaved)
        if past_key_values is not None:
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)
        key_value = self._expand(self.kv_b_proj, latent.squeeze(1), nope + self.value_size)
        key, value = key_value.split((nope, self.value_size), dim=-1)
        key = torch.cat((key, key_rope.expand(-1, key.shape[1], -1, -1)), dim=-1)
        return self.attend(query, key, value, attention_mask, **kwargs)


# MLP and MoE. -------------------------------------------------------------------------------------


class ScMoEMLP(nn.Module):
    """act(gate(x)) * up(x) or act(up(x)), then down; [b, s, h] -> [b, s, h]."""

    def __init__(self, config: ScMoEConfig, intermediate_size: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = (
            nn.Linear(hidden, intermediate_size, bias=bias) if config.gated_linear_unit else None
        )
        self.up_proj = nn.Linear(hidden, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GateChoice(NamedTuple):
    """What one gate has chosen."""

    z: Tensor
    """What the gate and its experts read, [T, h]."""
    logits: Tensor
    """[T, E + Z]"""
    weights: Tensor
    """[T, K]"""
    experts: Tensor
    """[T, K]"""


class ScMoETopKRouter(nn.Module):
    """G(z) and the experts of every token, (2)-(4); at least in float32.

    Scores, selection, normalisation and groups are those of Megatron's TopKRouter.
    """

    e_score_correction_bias: Tensor  # with expert_bias
    partners: Tensor  # of every expert all others, best first, with router c2r

    def __init__(self, config: ScMoEConfig, is_first: bool = True) -> None:
        """is_first: whether no MoE layer stands in front."""
        super().__init__()
        self.config = config
        columns = config.num_experts + config.zero_computation_experts
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_experts
        self.has_bias, self.renormalises = config.expert_bias, config.renormalise
        self.groups, self.top_k_groups = config.n_group, config.topk_group
        self.score = _SCORES[config.scoring_func]
        self.compares_logits = config.scoring_func == "softmax" and not config.pre_softmax
        self.normalises = config.norm_topk_prob
        self.scaling_factor = config.routed_scaling_factor
        self.scales_all = config.scaled_experts == "all"
        self.first_copy = config.first_copy_expert
        inner = config.hidden_size if config.gate_layers == 1 else 8 * columns
        self.weight = nn.Parameter(torch.empty(columns, inner))
        self.bias = nn.Parameter(torch.empty(columns)) if config.router_bias else None
        self.inner_weight = self.residual_weight = None
        if config.gate_layers == 2:
            self.inner_weight = nn.Parameter(torch.empty(inner, config.hidden_size))
        if config.gating_residual and not is_first:
            self.residual_weight = nn.Parameter(torch.empty(columns, columns))
        if config.expert_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(columns))
        self.top_t = config.c2r_top_t if config.router == "c2r" else None
        if self.top_t is not None:
            self.register_buffer("partners", torch.zeros(columns, columns - 1, dtype=torch.int64))

    def forward(
        self, z: Tensor, before: Tensor | None = None, taken: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E + Z], weights [T, K] and experts [T, K].

        Args:
            z: [T, h].
            before: logits of the MoE layer in front, [T, E + Z].
            taken: experts of every token that it does not get, [T, K].
        """
        with maybe_autocast(z.device.type, enabled=False):
            logits = self._logits(z.to(_float32_at_least(z)), before)
        scores = self.scores(logits)
        experts = self.select(scores, taken)
        weights = scores.gather(1, experts)
        if self.compares_logits:
            weights = weights.softmax(dim=-1)
        if self.normalises:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.scaling_factor != 1:
            scaled = weights * self.scaling_factor
            is_routed = experts < self.num_experts
            weights = scaled if self.scales_all else torch.where(is_routed, scaled, weights)
        if self.renormalises:
            is_zero = (experts >= self.num_experts) & (experts < self.first_copy)
            weights = weights.masked_fill(is_zero, 0.0)
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / total.clamp(min=torch.finfo(total.dtype).tiny)
        return logits, weights, experts

    def _logits(self, z: Tensor, before: Tensor | None) -> Tensor:
        if self.inner_weight is not None:
            z = functional.linear(z, self.inner_weight.to(z.dtype)).tanh()
        bias = None if self.bias is None else self.bias.to(z.dtype)
        logits = functional.linear(z, self.weight.to(z.dtype), bias)
        if self.residual_weight is not None:
            assert before is not None
            logits = logits + functional.linear(before, self.residual_weight.to(z.dtype))
        return logits

    def scores(self, logits: Tensor) -> Tensor:
        """What the selection compares, but for the bias, [T, E + Z]."""
        return logits if self.compares_logits else self.score(logits)

    def select(self, scores: Tensor, taken: Tensor | None = None) -> Tensor:
        """The experts of every token, [T, K], from scores, [T, E + Z]."""
        ranked = scores.detach()
        if self.has_bias:
            ranked = ranked + self.e_score_correction_bias
        if taken is not None:
            ranked = ranked.scatter(1, taken, float("-inf"))
        if self.groups and self.top_k_groups:
            ranked = self._within(ranked, self.groups, self.top_k_groups)
        return self.constrained(ranked).topk(self.top_k, dim=-1).indices

    def constrained(self, ranked: Tensor) -> Tensor:
        """Scores, [T, E], without the experts that are not among the best partners of a token's
        best one (arXiv:2504.01337)."""
        if self.top_t is None:
            return ranked
        own = torch.eye(len(self.partners), dtype=torch.bool, device=ranked.device)
        allowed = own.scatter(1, self.partners[:, : self.top_t], True)
        return ranked.masked_fill(~allowed[ranked.argmax(dim=1)], float("-inf"))

    def _within(self, ranked: Tensor, groups: int, best: int) -> Tensor:
        """Scores, [T, E], without the experts of groups that a token may not use: of the `best`
        groups; each counts with the sum of its K / best largest scores."""
        of_groups = ranked.unflatten(-1, (groups, -1))
        largest = of_groups.topk(self.top_k // best, dim=-1).values
        allowed = largest.sum(dim=-1).topk(best, dim=-1).indices
        forbidden = torch.ones_like(of_groups[..., 0], dtype=torch.bool).scatter(1, allowed, False)
        return of_groups.masked_fill(forbidden.unsqueeze(-1), float("-inf")).flatten(1)


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: functional.softplus(logits).sqrt(),
}


@use_experts_implementation
class ScMoEStackedExperts(nn.Module):
    """Weights of all routed experts, and a loop over them: `experts_implementation="eager"`.

    transformers' other implementations take its place: grouped_mm, its default, and batched_mm.
    """

    # What use_experts_implementation adds.
    has_gate: bool
    has_bias: bool
    _apply_gate: Callable[[Tensor], Tensor]

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__()
        experts, hidden = config.num_experts, config.hidden_size
        size = config.moe_intermediate_size
        rows = 2 * size if config.gated_linear_unit else size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, rows, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))
        if config.mlp_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, rows))
            self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    @property
    def up_proj(self) -> Tensor:
        """What transformers' implementations call the first projection without a gate."""
        return self.gate_up_proj

    @property
    def up_proj_bias(self) -> Tensor:
        return self.gate_up_proj_bias

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """From tokens [T, h], their experts and weights, [T, K] each, to [T, h]."""
        output = torch.zeros_like(hidden_states)
        chosen, order = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts]
        for expert, rows in enumerate(order[: int(counts.sum())].split(counts.tolist())):
            if len(rows) == 0:
                continue
            tokens = rows // top_k_index.shape[1]
            inner = functional.linear(
                hidden_states[tokens], self.gate_up_proj[expert], self._bias("gate_up", expert)
            )
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            rows_out = functional.linear(inner, self.down_proj[expert], self._bias("down", expert))
            weighted = rows_out * top_k_weights.flatten()[rows, None]
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output

    def _bias(self, projection: str, expert: int) -> Tensor | None:
        return getattr(self, f"{projection}_proj_bias")[expert] if self.has_bias else None

    def _rows_on_disk(self, prefix: str) -> dict[str, Tensor]:
        """What belongs to each name on disk: weights [out, in] and biases [out] of one expert."""
        found = {}
        for kind, end in (("weight", ""), ("bias", "_bias"))[: 1 + self.has_bias]:
            for expert, rows in enumerate(getattr(self, f"gate_up_proj{end}")):
                parts = rows.chunk(2) if self.has_gate else (rows,)
                for projection, part in zip(("gate", "up")[-len(parts) :], parts, strict=True):
                    found[f"{prefix}{expert}.{projection}_proj.{kind}"] = part
            for expert, rows in enumerate(getattr(self, f"down_proj{end}")):
                found[f"{prefix}{expert}.down_proj.{kind}"] = rows
        return found

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take experts by their names on disk, too, as many as there are: when the Trainer resumes
        it gives the content of a file to `load_state_dict`, which converts nothing."""
        on_disk = self._rows_on_disk(prefix)
        if on_disk.keys() & state_dict.keys():
            for name, rows in on_disk.items():
                value = state_dict.pop(name, None)
                if value is None:
                    missing_keys += [name] * strict  # of a file of several it lies in another
                elif value.shape != rows.shape:
                    error_msgs.append(f"{name} is {[*value.shape]}, not {[*rows.shape]}")
                else:
                    rows.copy_(value)
            own = {prefix + name: value for name, value in self.named_parameters(recurse=False)}
            state_dict.update(own)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


class ScMoEExperts(ScMoEStackedExperts):
    """sum_i G(z)_i E_i(z) over the routed experts. A row of weight 0 is not computed."""

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        # What the implementations ask for, and the decorator sets for a whole class.
        self.has_gate = config.gated_linear_unit
        self.has_bias = config.mlp_bias
        # They skip rows of an expert number that does not exist, as expert parallelism has them.
        self._is_expert_parallel = config.zero_computation_experts > 0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """From tokens [T, h], their experts and weights, [T, K] each, to [T, h]."""
        if self._is_expert_parallel:
            top_k_index = top_k_index.masked_fill(top_k_weights == 0, self.num_experts)
        return super().forward(hidden_states, top_k_index, top_k_weights)


class ScMoEConstantExperts(nn.Module):
    """E_i(z) = a_1 z + a_2 v_i, [a_1, a_2] = Softmax(W_i z)  [arXiv:2410.07348, (5)]"""

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__()
        number, hidden = config.constant_experts, config.hidden_size
        self.mix_weight = nn.Parameter(torch.empty(number, 2, hidden))
        self.vector = nn.Parameter(torch.empty(number, hidden))

    def forward(self, z: Tensor, weights: Tensor) -> Tensor:
        """Their weighted sum, [T, h], from tokens [T, h] and weights [T, n]."""
        mix = torch.einsum("th,nch->tnc", z, self.mix_weight).softmax(dim=-1)
        of_input, of_vector = (weights[..., None] * mix).unbind(dim=-1)
        return of_input.sum(dim=1, keepdim=True) * z + of_vector.to(z.dtype) @ self.vector


class ScMoEZeroComputationExperts(nn.Module):
    """Zero, copy and constant experts (arXiv:2410.07348, (3)-(5)), numbered in this order."""

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__()
        self.first_copy = config.first_copy_expert
        self.first_constant = self.first_copy + config.copy_experts
        self.last = self.first_constant + config.constant_experts
        self.constant = ScMoEConstantExperts(config) if config.constant_experts else None

    def forward(self, z: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """From tokens [T, h], all their experts and weights, [T, K] each, to [T, h]."""
        is_copy = (top_k_index >= self.first_copy) & (top_k_index < self.first_constant)
        output = (top_k_weights * is_copy).sum(dim=1, keepdim=True) * z
        if self.constant is not None:
            numbers = torch.arange(self.first_constant, self.last, device=z.device)
            chosen = top_k_index.unsqueeze(-1) == numbers  # [T, K, n]
            output = output + self.constant(z, (top_k_weights.unsqueeze(-1) * chosen).sum(dim=1))
        return output.to(z.dtype)


class ScMoESparseMoeBlock(nn.Module):
    """P( c_s SE(x) + c_r sum_i G(z)_i E_i(z) ), (7) and (14)-(17), or with two gates (23)."""

    def __init__(self, config: ScMoEConfig, is_first: bool = True) -> None:
        super().__init__()
        self.num_experts, self.input_scale = config.num_experts, config.input_scale
        self.has_two_gates = config.dual_gating != "none"
        self.has_distinct_experts = config.distinct_experts
        self.gate = ScMoETopKRouter(config, is_first)
        self.current_gate = ScMoETopKRouter(config) if config.dual_gating == "separate" else None
        self.experts = ScMoEExperts(config)
        self.zero_computation = (
            ScMoEZeroComputationExperts(config) if config.zero_computation_experts else None
        )
        size = config.shared_expert_intermediate_size
        self.shared_expert = ScMoEMLP(config, size) if size else None
        gates = {"cg1": ("shared_expert_gate", 1), "cg2": ("combine_gate", 2)}
        self.shared_expert_gate: nn.Module | None = None
        self.combine_gate: nn.Module | None = None
        if config.combine in gates:
            name, width = gates[config.combine]
            setattr(self, name, nn.Linear(config.hidden_size, width, bias=False))
        has_own_norm = config.shortcut_position != "none" and config.shortcut_norm == "own"
        self.shortcut_layernorm = _norm(config) if has_own_norm else None
        self.post_layernorm = _norm(config) if config.post_norm else None

    @property
    def routers(self) -> list[ScMoETopKRouter]:
        """Of every gate, in the order in which they choose."""
        if not self.has_two_gates:
            return [self.gate]
        return [self.gate, self.gate if self.current_gate is None else self.current_gate]

    def choose(self, x: Tensor, tap: Tensor, before: Tensor | None = None) -> list[GateChoice]:
        """What each gate chooses.

        Args:
            x: what a shared expert or the second gate reads, [b, s, h].
            tap: what the first gate reads, [b, s, h].
            before: logits of the MoE layer in front, [T, E + Z].
        """
        first, *further = self.routers
        z = tap if self.shortcut_layernorm is None else self.shortcut_layernorm(tap)
        z, current = z.flatten(0, 1), x.flatten(0, 1)
        route = GateChoice(z, *first(z, before))
        taken = route.experts if self.has_distinct_experts else None
        return [route, *(GateChoice(current, *router(current, None, taken)) for router in further)]

    def forward(self, x: Tensor, routes: list[GateChoice]) -> Tensor:
        """From what the shared expert reads, [b, s, h], and what was chosen, to [b, s, h]."""
        first, *further = [self.routed(route).view(x.shape) for route in routes]
        output = sum(further, first)
        if self.shared_expert is not None:
            output = self._combined(x, self.shared_expert(x), output)
        return output if self.post_layernorm is None else self.post_layernorm(output)

    def _combined(self, x: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        """Sum of both outputs, [b, s, h], weighted by the gates on x, (14)-(17)."""
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x).sigmoid() * shared
        if self.combine_gate is not None:
            of_shared, of_routed = self.combine_gate(x).softmax(dim=-1).split(1, dim=-1)
            shared, routed = of_shared * shared, of_routed * routed
        return shared + routed

    def routed(self, route: GateChoice) -> Tensor:
        """sum_i G(z)_i E_i(z), [T, h], over experts of every kind.

        To the module `experts`, which a server replaces by a kernel of its own, a zero-computation
        expert is the last routed one with weight 0.
        """
        z, _, weights, experts = route
        if self.input_scale != 1:
            z = z * self.input_scale
        if self.zero_computation is None:
            return self.experts(z, experts, weights)
        last = self.num_experts - 1
        output = self.experts(z, experts.clamp(max=last), weights * (experts <= last))
        return output + self.zero_computation(z, experts, weights)


# The model. ---------------------------------------------------------------------------------------


class ScMoEDecoderLayer(GradientCheckpointingLayer):
    """An attention and an MLP or a MoE."""

    def __init__(self, config: ScMoEConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.moe_layers is not None
        self.position = config.shortcut_position
        self.shares_norm = config.shortcut_norm == "shared"
        self.is_moe = layer_idx in config.moe_layers
        crosses = self.position in ("pos2", "pos3")
        self.reads_before = self.is_moe and crosses
        self.is_tapped = crosses and layer_idx + 1 in config.moe_layers
        is_latent = config.kv_lora_rank is not None
        attention = ScMoELatentAttention if is_latent else ScMoEGroupedQueryAttention
        self.self_attn = attention(config, layer_idx)
        self.hands_on_logits = config.gating_residual
        self.mlp = (
            ScMoESparseMoeBlock(config, is_first=layer_idx == min(config.moe_layers))
            if self.is_moe
            else ScMoEMLP(config, config.intermediate_size)
        )
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(
        self,
        hidden_states: Tensor,
        tap: Tensor | None = None,
        router_logits: Tensor | None = None,
        **kwargs: Any,
    ) -> LayerOutput:
        """One layer.

        Args:
            hidden_states: [b, s, h].
            tap: what the routed experts read, if the layer in front has it, [b, s, h].
            router_logits: of the MoE layer in front, for a gating residual, [T, E + Z].
            kwargs: what the attention takes.

        Returns:
            the same three for the next layer.
        """
        entered, entered_normed = hidden_states, self.input_layernorm(hidden_states)
        attention, _ = self.self_attn(entered_normed, **kwargs)
        hidden_states = entered + attention
        x = self.post_attention_layernorm(hidden_states)
        if self.position == "none":
            tapped = x
        elif self.position == "pos2":
            tapped = x if self.shares_norm else hidden_states
        else:
            tapped = entered_normed if self.shares_norm else entered
        if not isinstance(self.mlp, ScMoESparseMoeBlock):
            tap = tapped if self.is_tapped else None
            return hidden_states + self.mlp(x), tap, router_logits
        read = tap if self.reads_before else tapped
        assert read is not None
        routes = self.mlp.choose(x, read, router_logits)
        router_logits = routes[0].logits if self.hands_on_logits else None
        return hidden_states + self.mlp(x, routes), None, router_logits


class ScMoEPreTrainedModel(PreTrainedModel):
    """Initialisation, and what the models can do."""

    config: ScMoEConfig
    config_class = ScMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScMoEDecoderLayer"]  # noqa: RUF012 - as transformers declares it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(ScMoETopKRouter, index=0),
        "hidden_states": ScMoEDecoderLayer,
        "attentions": ScMoEAttention,
    }
    # A regular expression: "mlp.gate" would be every gate_proj too.
    _keep_in_fp32_modules_strict = [r"mlp\.(current_)?gate\."]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ScMoETopKRouter):
            for weight in module.parameters():
                init.normal_(weight, mean=0.0, std=std)
            if self.config.expert_bias:
                init.zeros_(module.e_score_correction_bias)
            if module.top_t is not None:  # those that come next; a checkpoint brings others
                columns = len(module.partners)
                steps = torch.arange(columns)[:, None] + torch.arange(1, columns)
                init.copy_(module.partners, steps % columns)
        elif isinstance(module, ScMoEStackedExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
            if self.config.mlp_bias:
                init.zeros_(module.gate_up_proj_bias)
                init.zeros_(module.down_proj_bias)
        elif isinstance(module, ScMoEConstantExperts):
            init.normal_(module.mix_weight, mean=0.0, std=std)
            init.normal_(module.vector)  # as MoE++'s released code does


class ScMoEModel(ScMoEPreTrainedModel):
    """The decoder: token ids to the last hidden states."""

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position_embedding == "learned"
            else None
        )
        self.layers = nn.ModuleList(
            [ScMoEDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config)
        self.rotary_emb = (
            ScMoERotaryEmbedding(config) if config.position_embedding == "rope" else None
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Decode.

        Args:
            input_ids: [b, s].
            attention_mask: [b, s so far], 0 for padding.
            position_ids: [b, s].
            past_key_values: keys and values of the tokens before, one entry for each layer.
            inputs_embeds: in place of input_ids, [b, s, h].
            use_cache: return keys and values.

        Raises:
            ValueError: input_ids and inputs_embeds are both given, or none of them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (position_ids + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states, tap, router_logits = inputs_embeds, None, None
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        rotary = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states, tap, router_logits = layer(
                hidden_states,
                tap,
                router_logits,
                position_embeddings=rotary,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    routers: Sequence[ScMoETopKRouter],
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The balancing loss of pretraining, summed over layers, without its coefficient.

    topk and c2r: (E + Z) sum_i f_i P_i (arXiv:2101.03961, (4)), f_i the share of all selections
    that went to expert i, P_i its mean score, normalised over experts; the loss's own selection
    knows neither expert bias nor groups.
    Mixtral's in transformers is K times as large and averages over layers.

    heterogeneous: the same with weight tau for zero-computation experts (arXiv:2410.07348, (7)).

    longcat: sum_j f_j P_j over groups of routed experts and one of the others; f_j is what a group
    was selected in proportion to what it should be (arXiv:2509.01322, (3)-(5)).

    Two gates have a loss each; the second one's counts what it selects among the experts that the
    first has left.

    Args:
        router_logits: of every gate, [T, E + Z].
        routers: of every gate.
        attention_mask: [b, s so far], 0 for padding, which does not count.
    """
    losses = []
    taken: Tensor | None = None
    for logits, router in zip(router_logits, routers, strict=True):
        config = router.config
        scores = _SCORES[config.scoring_func](logits)
        scores = scores / scores.sum(dim=-1, keepdim=True)
        experts = router.select(router.scores(logits))
        has_second = config.dual_gating != "none" and config.distinct_experts and taken is None
        taken, before = (experts if has_second else None), taken
        if config.router != "longcat":
            left = scores if before is None else scores.scatter(1, before, float("-inf"))
            experts = router.constrained(left).topk(config.num_experts_per_tok, dim=-1).indices
        counts = torch.ones_like(scores[:, :1])
        if attention_mask is not None:
            length = len(logits) // len(attention_mask)
            counts = attention_mask[:, -length:].reshape(-1, 1).to(scores)
        selected = torch.zeros_like(scores).scatter(1, experts, 1.0)
        frequencies = (selected * counts).sum(dim=0) / counts.sum()
        means = (scores * counts).sum(dim=0) / counts.sum()
        losses.append((_wanted_weights(config, frequencies) * means).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _wanted_weights(config: ScMoEConfig, frequencies: Tensor) -> Tensor:
    """What multiplies the mean score of every expert, [E + Z], from selections for each token."""
    top_k, experts, columns = config.num_experts_per_tok, config.num_experts, len(frequencies)
    if config.router != "longcat":
        eta = torch.ones_like(frequencies)
        if config.router == "heterogeneous":
            eta[experts:] = config.router_tau
        return columns / top_k * eta * frequencies
    groups = config.balance_groups
    routed_top_k = config.routed_topk or top_k * experts / columns
    routed = frequencies[:experts].view(groups, -1).sum(dim=1) / (routed_top_k / groups)
    others = frequencies[experts:]
    others = (others.sum() / (top_k - routed_top_k)).expand_as(others)
    return torch.cat([routed.repeat_interleave(experts // groups), others])


class ScMoEForCausalLM(ScMoEPreTrainedModel, GenerationMixin):
    """The decoder and the output layer: token ids to the logits of the next ones."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        self.model = ScMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Predict; see `ScMoEModel.forward` for the other arguments.

        Args:
            labels: [b, s], -100 where there is no loss; shifted here.
            output_router_logits: return the router's logits and the balancing loss, which is added
                to the loss with the coefficient `router_aux_loss_coef`.
            logits_to_keep: only those of so many last tokens, 0 for all, or of these positions.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        last = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if last else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits and outputs.router_logits:
            mask = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
            moes = [x for x in self.model.modules() if isinstance(x, ScMoESparseMoeBlock)]
            routers = [router for moe in moes for router in moe.routers]
            aux_loss = load_balancing_loss(outputs.router_logits, routers, mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


# Files. -------------------------------------------------------------------------------------------


class StackExperts(ConversionOps):
    """up_proj and gate_proj of every expert, [F, ...] each, to gate_up_proj, [E, 2F, ...].

    Without a gate there is up_proj alone, which transformers' own operations would cut in two on
    their way back. It is the first pattern because transformers looks for that one.
    """

    @torch.no_grad()
    def convert(
        self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        gate_last = [
            torch.stack(input_dict[name]) for name in source_patterns if name in input_dict
        ]
        return {target_patterns[0]: torch.cat(gate_last[::-1], dim=1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return UnstackExperts()


class UnstackExperts(ConversionOps):
    """The way back of StackExperts."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict,
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        (fused,) = input_dict.values()
        names = target_patterns[::-1] if kwargs["config"].gated_linear_unit else target_patterns[:1]
        return {
            name.replace("*", str(expert)): part.contiguous()
            for expert, rows in enumerate(fused[0] if isinstance(fused, list) else fused)
            for name, part in zip(names, rows.chunk(len(names)), strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return StackExperts()


def _expert_files() -> list[WeightConverter | WeightRenaming]:
    """On disk each expert has linear layers of its own, as in most of transformers' MoE models."""
    converters: list[WeightConverter | WeightRenaming] = []
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        converters += [
            WeightConverter(
                [f"mlp.experts.*.up_proj.{kind}", f"mlp.experts.*.gate_proj.{kind}"],
                f"mlp.experts.gate_up_proj{suffix}",
                [StackExperts()],
            ),
            WeightConverter(
                f"mlp.experts.*.down_proj.{kind}",
                f"mlp.experts.down_proj{suffix}",
                [MergeModulelist(dim=0)],
            ),
        ]
    return converters


# Again for each directory that this file is loaded from.
register_checkpoint_conversion_mapping("scmoe", _expert_files(), overwrite=True)

ScMoEModel.register_for_auto_class("AutoModel")
ScMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
