"""The oracle: ScMoE (arXiv:2404.05019) as loops over tokens and experts, in plain PyTorch.

It is written from the equations and shares no code with the package or with Megatron; tests compare
the package with it in float64, values and every gradient. Slow on purpose: each expert sees one
token at a time, each query one prefix of keys, so that there is nothing to get wrong.

One unit is the paper's pair: Block-MLP (l), the "dense half", then Block-MoE (l+1), the "MoE half".

    H_l^MH     = H_{l-1}   + Attn_l(H_{l-1})                                                   (10)
    H_l^MLP    = H_l^MH    + MLP_l(H_l^MH)                                                      (9)
    H_{l+1}^MH = H_l^MLP   + Attn_{l+1}(H_l^MLP)                                                (8)
    H_{l+1}    = H_{l+1}^MH + SE(H_{l+1}^MH) + sum_i G(z)_i E_i(z)                              (7)

The tap z is H_l^MLP (pos1), H_l^MH (pos2) or H_{l-1} (pos3). With two gates (DGMoE, appendix A.2)
there is no shared expert, and x = H_{l+1}^MH goes to an expert too:

    H_{l+1}    = H_{l+1}^MH + G(z)_i E_i(z) + G(x)_j E_j(x)                                    (23)

The paper omits norms; here every
block is pre-norm, as in Megatron. Where the paper is silent Megatron-Core 0.19 decides, and the
docstring says so. Parameters come as {name: tensor} under the layer's own names, see `unit_shapes`.

Shapes: s sequence, b batch, h hidden, T = s*b tokens (token t = i*b + j), E experts, K top-k,
        n query heads, g query groups, d head size, F intermediate size
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]

_CHOICES = {
    "position": ("pos1", "pos2", "pos3"),
    "combine": ("add", "cg1", "cg2"),
    "shortcut_norm": ("own", "shared"),
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_token_drop_policy": ("probs", "position"),
    "drop_ties": ("first", "topk"),
    "dual_gating": ("none", "shared", "separate"),
    "activation": ("swiglu", "gelu"),
    "normalization": ("RMSNorm", "LayerNorm"),
}


@dataclass(frozen=True)
class ReferenceConfig:
    """Everything the equations need; fields shared with Megatron keep its name and meaning.

    position: which tensor is the tap z, pos1 | pos2 | pos3
    combine: add | cg1 (14)(15) | cg2 (16)(17)
    shortcut_norm: own (a norm of its own on z) | shared (the norm that already reads z)
    post_norm: normalise shared + routed before the residual addition
    moe_router_pre_softmax: softmax over all E experts before the selection, not renormalised after
        it; False is (2)(3), softmax over the K selected logits
    moe_router_score_function: softmax | sigmoid (renormalised over the selection when K > 1)
    moe_expert_capacity_factor: None, or each expert keeps ceil(T*K/E * factor) of the T tokens
        it is given; Megatron counts the tokens of one rank, so give it those of one rank
    moe_token_drop_policy: probs (largest weights stay) | position (earliest tokens stay)
    drop_ties: first (earliest token stays) | topk (whichever torch.topk returns on this device,
        which is what Megatron does; with policy "position" every decision is a tie)
    router_score_dtype: dtype of the score function; None keeps that of the logits. Megatron
        computes it in float32 even when the logits are float64
    rotary_dtype: the same for the rotary angles, float32 in Megatron
    rotary_base: None means no rotary embedding
    dual_gating: none | shared (both gates have one weight) | separate; not none: no shared expert
    distinct_experts: the gate on x takes its second expert where the gate on z has its first
    """

    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int | None
    position: str = "pos2"
    combine: str = "add"
    shortcut_norm: str = "own"
    post_norm: bool = False
    moe_router_pre_softmax: bool = True
    moe_router_score_function: str = "softmax"
    moe_router_topk_scaling_factor: float | None = None
    moe_expert_capacity_factor: float | None = None
    moe_token_drop_policy: str = "probs"
    drop_ties: str = "first"
    activation: str = "swiglu"
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    rotary_base: float | None = None
    rotary_percent: float = 1.0
    router_score_dtype: torch.dtype | None = None
    rotary_dtype: torch.dtype | None = None
    dual_gating: str = "none"
    distinct_experts: bool = True

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}, not one of {allowed}")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError("num_attention_heads is not a multiple of num_query_groups")
        if not 1 <= self.moe_router_topk <= self.num_moe_experts:
            raise ValueError("moe_router_topk is not between 1 and num_moe_experts")
        if (self.dual_gating != "none") != (self.moe_shared_expert_intermediate_size is None):
            raise ValueError("two gates have no shared expert, one gate has one")


@dataclass(frozen=True)
class OracleRouting:
    """weights: what multiplies each expert's output, zero where not routed, (T, E)
    map: which experts each token really visits, bool, (T, E)"""

    weights: Tensor
    map: Tensor


@dataclass(frozen=True)
class UnitTrace:
    """Every intermediate of one unit, so that a test can say where two computations part.

    tap: z, (s, b, h)                           routed_input: z after its norm, (s, b, h)
    logits: router logits, (T, E)               routing: after dropping
    attention_output: H_{l+1}^MH, (s, b, h)     shared_input: the same after its norm, (s, b, h)
    shared_output, routed_output: before combining, (s, b, h); None without a shared expert
    output: H_{l+1}, (s, b, h)
    current_logits: of the gate on x, (T, E)    selection: of the gate on z, before dropping
    current_routing: of the gate on x, after dropping; all three for two gates only
    """

    tap: Tensor
    routed_input: Tensor
    logits: Tensor
    routing: OracleRouting
    attention_output: Tensor
    shared_input: Tensor
    shared_output: Tensor | None
    routed_output: Tensor
    output: Tensor
    selection: list[list[int]] | None = None
    current_logits: Tensor | None = None
    current_routing: OracleRouting | None = None


# ---------------------------------------------------------------------------- parameters


def dense_layer_shapes(config: ReferenceConfig, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a plain transformer layer. Linear weights are (out, in), no biases."""
    shapes = _attention_shapes(config, prefix)
    shapes |= _mlp_shapes(config, prefix + "mlp.", config.ffn_hidden_size)
    return shapes


def unit_shapes(
    config: ReferenceConfig, dense_half: bool, expert_bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one unit: optional dense half ("dense_layer.") and MoE half."""
    h, experts = config.hidden_size, config.num_moe_experts
    shapes = dense_layer_shapes(config, "dense_layer.") if dense_half else {}
    shapes |= _attention_shapes(config, "")
    shapes["mlp.router.weight"] = (experts, h)
    if expert_bias:
        shapes["mlp.router.expert_bias"] = (experts,)
    for expert in range(experts):
        prefix = f"mlp.experts.local_experts.{expert}."
        shapes |= _mlp_shapes(config, prefix, config.moe_ffn_hidden_size)
    size = config.moe_shared_expert_intermediate_size
    if size is not None:
        shapes |= _mlp_shapes(config, "mlp.shared_experts.", size)
    if config.dual_gating == "separate":
        shapes["mlp.current_router.weight"] = (experts, h)
        if expert_bias:
            shapes["mlp.current_router.expert_bias"] = (experts,)
    if config.combine == "cg1":
        shapes["mlp.shared_experts.gate_weight"] = (1, h)
    if config.combine == "cg2":
        shapes["mlp.combine_gate.weight"] = (2, h)
    if config.shortcut_norm == "own":
        shapes |= _norm_shapes(config, "shortcut_layernorm")
    if config.post_norm:
        shapes |= _norm_shapes(config, "post_layernorm")
    return shapes


def random_parameters(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random leaves that require gradients; norm weights are around 1 so that they matter."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("layernorm.weight"):
            value = 1 + 0.2 * value
        elif name.endswith(("layernorm.bias", "expert_bias")):
            value = 0.2 * value
        else:
            value = value / math.sqrt(shape[-1])
        params[name] = value.to(dtype).requires_grad_(not name.endswith("expert_bias"))
    return params


def gradients(loss: Tensor, tensors: Parameters) -> dict[str, Tensor]:
    """d loss / d tensor by name; zeros, not None, for an expert that no token visited."""
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    wanted = [tensors[name] for name in names]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def _norm_shapes(config: ReferenceConfig, name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {name + ".weight": (config.hidden_size,)}
    if config.normalization == "LayerNorm":
        shapes[name + ".bias"] = (config.hidden_size,)
    return shapes


def _attention_shapes(config: ReferenceConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    h, d = config.hidden_size, config.kv_channels
    n, g = config.num_attention_heads, config.num_query_groups
    shapes = _norm_shapes(config, prefix + "input_layernorm")
    shapes[prefix + "self_attention.linear_qkv.weight"] = ((n + 2 * g) * d, h)
    shapes[prefix + "self_attention.linear_proj.weight"] = (h, n * d)
    return shapes | _norm_shapes(config, prefix + "pre_mlp_layernorm")


def _mlp_shapes(config: ReferenceConfig, prefix: str, size: int) -> dict[str, tuple[int, ...]]:
    rows = 2 * size if config.activation == "swiglu" else size
    return {
        prefix + "linear_fc1.weight": (rows, config.hidden_size),
        prefix + "linear_fc2.weight": (config.hidden_size, size),
    }


def _check_parameters(params: Parameters, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a missing, unread or misshapen parameter: it would make a comparison meaningless."""
    missing, unread = sorted(shapes.keys() - params.keys()), sorted(params.keys() - shapes.keys())
    if missing or unread:
        raise ValueError(f"parameters missing: {missing}; parameters nobody reads: {unread}")
    for name, shape in shapes.items():
        if tuple(params[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(params[name].shape)}, expected {shape}")


# ---------------------------------------------------------------------------- dense operations


def norm(params: Parameters, name: str, x: Tensor, config: ReferenceConfig) -> Tensor:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension."""
    weight = params[name + ".weight"]
    if config.normalization == "RMSNorm":
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + config.layernorm_epsilon) * weight
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    scaled = centred / torch.sqrt(variance + config.layernorm_epsilon)
    return scaled * weight + params[name + ".bias"]


def mlp(params: Parameters, prefix: str, x: Tensor, config: ReferenceConfig) -> Tensor:
    """swiglu: W2 (silu(W_gate x) * W_up x) with [W_gate; W_up] = fc1; gelu: W2 gelu(W1 x) (erf).

    x: (..., h) -> (..., h)
    """
    inner = x @ params[prefix + "linear_fc1.weight"].T
    if config.activation == "swiglu":
        size = inner.shape[-1] // 2
        gate, up = inner[..., :size], inner[..., size:]
        inner = gate * torch.sigmoid(gate) * up
    else:
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ params[prefix + "linear_fc2.weight"].T


def rope(x: Tensor, config: ReferenceConfig) -> Tensor:
    """Rotary embedding (arXiv:2104.09864), non-interleaved: feature i turns with i + r/2.

    x: one head, (s, d). Only the first r = int(d * rotary_percent) features turn.
    """
    if config.rotary_base is None:
        return x
    r = int(x.shape[-1] * config.rotary_percent)
    dtype = config.rotary_dtype or x.dtype
    frequencies = 1.0 / config.rotary_base ** (torch.arange(0, r, 2, dtype=dtype) / r)
    angles = torch.arange(x.shape[0], dtype=dtype)[:, None] * frequencies
    cos, sin = torch.cos(angles).to(x.dtype), torch.sin(angles).to(x.dtype)
    first, second, rest = x[:, : r // 2], x[:, r // 2 : r], x[:, r:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attention(params: Parameters, prefix: str, x: Tensor, config: ReferenceConfig) -> Tensor:
    """MultiHead of (8) and (10): causal grouped-query attention (arXiv:2305.13245).

    The rows of linear_qkv are, per query group, [its query heads..., its key, its value].

    x: normalised input, (s, b, h) -> (s, b, h), before the residual addition
    """
    d, groups = config.kv_channels, config.num_query_groups
    heads_per_group = config.num_attention_heads // groups
    qkv = x @ params[prefix + "self_attention.linear_qkv.weight"].T
    sequences = []
    for j in range(x.shape[1]):
        heads = []
        for group in range(groups):
            start = group * (heads_per_group + 2) * d
            blocks = [
                qkv[:, j, start + i * d : start + (i + 1) * d] for i in range(heads_per_group + 2)
            ]
            key, value = rope(blocks[-2], config), blocks[-1]
            for head in range(heads_per_group):
                query = rope(blocks[head], config)
                heads.append(_attend(query, key, value))
        sequences.append(torch.cat(heads, dim=-1))
    context = torch.stack(sequences, dim=1)
    return context @ params[prefix + "self_attention.linear_proj.weight"].T


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one head, of every position over itself and those before. all (s, d)"""
    scores = query @ key.T / math.sqrt(query.shape[-1])
    later = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    return torch.softmax(scores.masked_fill(later, -math.inf), dim=-1) @ value


# ---------------------------------------------------------------------------- routing


def reference_route(
    router_weight: Tensor,
    tokens: Tensor,
    config: ReferenceConfig,
    expert_bias: Tensor | None = None,
) -> OracleRouting:
    """G of (2)-(4), no noise, then the capacity rule.

    router_weight: (E, h); tokens: (T, h); expert_bias: (E,)
    """
    return route_logits(tokens @ router_weight.T, config, expert_bias)


def route_logits(
    logits: Tensor,
    config: ReferenceConfig,
    expert_bias: Tensor | None = None,
    taken: list[list[int]] | None = None,
) -> OracleRouting:
    """`reference_route` from the logits (T, E) on; taken: as for `gate`."""
    num_tokens, num_experts = logits.shape
    weights, selection = gate(logits, config, expert_bias, taken)
    rows = []
    routing_map = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    for t in range(num_tokens):
        row = [torch.zeros((), dtype=logits.dtype) for _ in range(num_experts)]
        for rank, e in enumerate(selection[t]):
            row[e] = weights[t, rank]
            routing_map[t, e] = True
        rows.append(torch.stack(row))
    return drop_over_capacity(OracleRouting(torch.stack(rows), routing_map), config)


def gate(
    logits: Tensor,
    config: ReferenceConfig,
    expert_bias: Tensor | None = None,
    taken: list[list[int]] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Weights (T, K) and experts (T lists of K) of each token, best first. logits: (T, E)

    taken: experts of each token that are not chosen again (appendix A.2); scores stay as they are

    softmax, not pre_softmax: G = Softmax(KeepTopK(H, k)), (2)(3); weight 1 for k = 1
    softmax, pre_softmax: the k largest of Softmax(H), as they are
    sigmoid: the bias moves the selection only; the k scores are divided by their sum if k > 1
    """
    k = config.moe_router_topk
    dtype = config.router_score_dtype or logits.dtype
    sigmoid = config.moe_router_score_function == "sigmoid"
    if expert_bias is not None and not sigmoid:
        raise ValueError("expert_bias needs the sigmoid score function")

    if sigmoid:
        scores = torch.sigmoid(logits.to(dtype))
    elif config.moe_router_pre_softmax:
        scores = torch.softmax(logits.to(dtype), dim=-1)
    else:
        scores = logits
    ranked = scores if expert_bias is None else scores + expert_bias.to(dtype)
    selection = _select(ranked, k, taken)
    weights = torch.stack(
        [torch.stack([scores[t, e] for e in experts]) for t, experts in enumerate(selection)]
    )
    if sigmoid and k > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    if not sigmoid and not config.moe_router_pre_softmax:
        weights = torch.softmax(weights.to(dtype), dim=-1)
    if config.moe_router_topk_scaling_factor:
        weights = weights * config.moe_router_topk_scaling_factor
    return weights.to(logits.dtype), selection


def _select(scores: Tensor, k: int, taken: list[list[int]] | None) -> list[list[int]]:
    """T lists of the k best experts of scores, (T, E), that are not taken."""
    if taken is None:
        return [select_top_k(row, k) for row in scores]
    ranking = [select_top_k(row, k + len(taken[t])) for t, row in enumerate(scores)]
    return [[e for e in row if e not in taken[t]][:k] for t, row in enumerate(ranking)]


def select_top_k(scores: Tensor, k: int) -> list[int]:
    """Indices of the k largest scores, largest first; the lowest index wins a tie. scores: (E,)"""
    remaining = dict(enumerate(scores.tolist()))
    selected: list[int] = []
    for _ in range(k):
        best = max(remaining, key=lambda e: remaining[e])
        selected.append(best)
        del remaining[best]
    return selected


def expert_capacity(num_tokens: int, config: ReferenceConfig) -> int:
    """ceil(T*K/E * factor) (GShard, arXiv:2006.16668, sec. 3.2, in Megatron's rounding)."""
    assert config.moe_expert_capacity_factor is not None
    assignments = num_tokens * config.moe_router_topk
    return math.ceil(assignments / config.num_moe_experts * config.moe_expert_capacity_factor)


def drop_over_capacity(routing: OracleRouting, config: ReferenceConfig) -> OracleRouting:
    """Keep at most `expert_capacity` tokens per expert; a dropped assignment gets weight zero.

    The weights that stay are not renormalised.
    """
    if config.moe_expert_capacity_factor is None:
        return routing
    num_tokens, num_experts = routing.weights.shape
    capacity = min(expert_capacity(num_tokens, config), num_tokens)
    by_weight = config.moe_token_drop_policy == "probs"
    kept = torch.zeros_like(routing.map)
    for e in range(num_experts):
        if config.drop_ties == "topk":
            column = routing.weights[:, e] if by_weight else routing.map[:, e].int()
            queue = torch.topk(column, capacity, sorted=False).indices.tolist()
        else:
            queue = [t for t in range(num_tokens) if routing.map[t, e]]
            if by_weight:
                # The sort is stable, also reversed: of equal weights the earlier token stays.
                queue.sort(key=routing.weights[:, e].tolist().__getitem__, reverse=True)
        for t in queue[:capacity]:
            kept[t, e] = routing.map[t, e]
    return OracleRouting(
        torch.where(kept, routing.weights, torch.zeros_like(routing.weights)), kept
    )


def load_balancing_loss(
    logits: Tensor, config: ReferenceConfig, coeff: float, taken: list[list[int]] | None = None
) -> Tensor:
    """Megatron's "aux_loss": coeff * E * sum_i f_i P_i (Switch, arXiv:2101.03961, (4)-(6)).

    f_i is the share of the T*K selections that went to expert i and P_i its mean score. Selection
    and scores are the loss's own: no expert bias, no dropping, softmax over all experts whatever
    pre_softmax says, sigmoid scores normalised over all experts. logits: (T, E); taken: experts of
    each token that it does not select, and does not count
    """
    num_tokens, num_experts = logits.shape
    dtype = config.router_score_dtype or logits.dtype
    if config.moe_router_score_function == "softmax":
        scores = torch.softmax(logits.to(dtype), dim=-1)
    else:
        scores = torch.sigmoid(logits.to(dtype))
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    counts = [0] * num_experts
    for selected in _select(scores, config.moe_router_topk, taken):
        for e in selected:
            counts[e] += 1
    total = torch.zeros((), dtype=dtype)
    for e in range(num_experts):
        fraction = counts[e] / (num_tokens * config.moe_router_topk)
        total = total + fraction * scores[:, e].mean()
    return coeff * num_experts * total


def z_loss(logits: Tensor, coeff: float) -> Tensor:
    """coeff * mean over tokens of (log sum_i exp H_i)^2 (ST-MoE, arXiv:2202.08906, (5))."""
    total = torch.zeros((), dtype=logits.dtype)
    for t in range(logits.shape[0]):
        total = total + torch.logsumexp(logits[t], dim=-1) ** 2
    return coeff * total / logits.shape[0]


# ---------------------------------------------------------------------------- layers


def routed_experts(
    params: Parameters, tokens: Tensor, routing: OracleRouting, config: ReferenceConfig
) -> Tensor:
    """sum_i G(z)_i E_i(z), one token and one expert at a time, (1). tokens: (T, h) -> (T, h)"""
    outputs = []
    for t in range(tokens.shape[0]):
        output = torch.zeros_like(tokens[t])
        for e in range(config.num_moe_experts):
            if routing.map[t, e]:
                expert = mlp(params, f"mlp.experts.local_experts.{e}.", tokens[t], config)
                output = output + routing.weights[t, e] * expert
        outputs.append(output)
    return torch.stack(outputs)


def combine(
    params: Parameters, x: Tensor, shared: Tensor, routed: Tensor, config: ReferenceConfig
) -> Tensor:
    """Merge shared and routed outputs, sec. 5.2; x is the shared expert's input. all (s, b, h)

    add: SE + MoE
    cg1: c SE + MoE,          c = Sigmoid(W x)         (14)(15)
    cg2: c_0 SE + c_1 MoE,    c = Softmax(W x)         (16)(17)
    """
    if config.combine == "cg1":
        return torch.sigmoid(x @ params["mlp.shared_experts.gate_weight"].T) * shared + routed
    if config.combine == "cg2":
        c = torch.softmax(x @ params["mlp.combine_gate.weight"].T, dim=-1)
        return c[..., 0:1] * shared + c[..., 1:2] * routed
    return shared + routed


def attention_block(
    params: Parameters, prefix: str, hidden_states: Tensor, config: ReferenceConfig
) -> Tensor:
    """(8) or (10) with its pre-norm: H + Attn(norm(H)). (s, b, h) -> (s, b, h)"""
    x = norm(params, prefix + "input_layernorm", hidden_states, config)
    return hidden_states + attention(params, prefix, x, config)


def mlp_block(
    params: Parameters, prefix: str, hidden_states: Tensor, config: ReferenceConfig
) -> Tensor:
    """(9) with its pre-norm: H + MLP(norm(H)). (s, b, h) -> (s, b, h)"""
    x = norm(params, prefix + "pre_mlp_layernorm", hidden_states, config)
    return hidden_states + mlp(params, prefix + "mlp.", x, config)


def reference_dense_layer(
    params: Parameters, hidden_states: Tensor, config: ReferenceConfig, prefix: str = ""
) -> Tensor:
    """Block-MLP, (10) then (9). Reads the names that start with prefix. (s, b, h) -> (s, b, h)"""
    own = {name: value for name, value in params.items() if name.startswith(prefix)}
    _check_parameters(own, dense_layer_shapes(config, prefix))
    return mlp_block(params, prefix, attention_block(params, prefix, hidden_states, config), config)


def reference_unit(params: Parameters, hidden_states: Tensor, config: ReferenceConfig) -> Tensor:
    """One unit, (7)-(10). (s, b, h) -> (s, b, h)"""
    return trace_unit(params, hidden_states, config).output


def trace_unit(params: Parameters, hidden_states: Tensor, config: ReferenceConfig) -> UnitTrace:
    """`reference_unit` with every intermediate kept. hidden_states: H_{l-1}, (s, b, h)

    Without a dense half the tap is the unit's own input, H_l (pos1, "MoE in every block").
    """
    dense_half = "dense_layer.input_layernorm.weight" in params
    if not dense_half and config.position != "pos1":
        raise ValueError(f"{config.position} taps the dense half, which this unit does not have")
    expert_bias = params.get("mlp.router.expert_bias")
    _check_parameters(params, unit_shapes(config, dense_half, expert_bias is not None))

    moe_input = hidden_states
    taps = {"pos3": hidden_states}
    if dense_half:
        taps["pos2"] = attention_block(params, "dense_layer.", hidden_states, config)
        moe_input = mlp_block(params, "dense_layer.", taps["pos2"], config)
    taps["pos1"] = moe_input
    tap = taps[config.position]

    shared_norm = {
        "pos1": "input_layernorm",
        "pos2": "dense_layer.pre_mlp_layernorm",
        "pos3": "dense_layer.input_layernorm",
    }[config.position]
    norm_name = "shortcut_layernorm" if config.shortcut_norm == "own" else shared_norm
    routed_input = norm(params, norm_name, tap, config)
    tokens = routed_input.reshape(-1, config.hidden_size)
    logits = tokens @ params["mlp.router.weight"].T
    routing = route_logits(logits, config, expert_bias)
    routed = routed_experts(params, tokens, routing, config).reshape(tap.shape)

    attention_output = attention_block(params, "", moe_input, config)
    shared_input = norm(params, "pre_mlp_layernorm", attention_output, config)
    shared = selection = current_logits = current_routing = None
    if config.dual_gating == "none":
        shared = mlp(params, "mlp.shared_experts.", shared_input, config)
        merged = combine(params, shared_input, shared, routed, config)
    else:
        name = "mlp.router" if config.dual_gating == "shared" else "mlp.current_router"
        current = shared_input.reshape(-1, config.hidden_size)
        current_logits = current @ params[f"{name}.weight"].T
        _, selection = gate(logits, config, expert_bias)
        taken = selection if config.distinct_experts else None
        current_bias = params.get(f"{name}.expert_bias")
        current_routing = route_logits(current_logits, config, current_bias, taken)
        merged = routed + routed_experts(params, current, current_routing, config).reshape(
            tap.shape
        )
    if config.post_norm:
        merged = norm(params, "post_layernorm", merged, config)
    return UnitTrace(
        tap=tap,
        routed_input=routed_input,
        logits=logits,
        routing=routing,
        attention_output=attention_output,
        shared_input=shared_input,
        shared_output=shared,
        routed_output=routed,
        output=attention_output + merged,
        selection=selection,
        current_logits=current_logits,
        current_routing=current_routing,
    )


def reference_block(
    layers: Sequence[Parameters],
    hidden_states: Tensor,
    config: ReferenceConfig,
    moe_frequency: int,
    final_layernorm: Parameters | None = None,
) -> Tensor:
    """A stack with MoE in every moe_frequency-th transformer layer, the last of each period.

    layers: one entry per unit or per plain dense layer. Frequency 1: units without a dense half;
        2: units; 4: dense, dense, unit, and so on
    final_layernorm: {"final_layernorm.weight": (h,)[, "final_layernorm.bias"]}
    """
    is_moe: list[bool] = []
    for params in layers:
        if "mlp.router.weight" in params:
            hidden_states = reference_unit(params, hidden_states, config)
            is_moe += [False, True] if "dense_layer.input_layernorm.weight" in params else [True]
        else:
            hidden_states = reference_dense_layer(params, hidden_states, config)
            is_moe.append(False)
    if is_moe != [(i + 1) % moe_frequency == 0 for i in range(len(is_moe))]:
        raise ValueError(f"layers {is_moe} (True = MoE) do not have frequency {moe_frequency}")
    if final_layernorm is not None:
        hidden_states = norm(final_layernorm, "final_layernorm", hidden_states, config)
    return hidden_states
