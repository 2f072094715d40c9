"""Configuration of ScMoE language models (arXiv:2404.05019) for Hugging Face transformers.

This file is copied beside the weights and loaded from there: it imports transformers alone. Field
names are those of transformers' own models where they have one.
"""

from typing import Any, ClassVar

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

OLDEST_TRANSFORMERS = "5.19.0"

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"ScMoE models need transformers {OLDEST_TRANSFORMERS} or newer, and "
        f"{transformers.__version__} is installed: pip install -U transformers"
    )

# What transformers' Auto classes load from beside the weights.
AUTO_MAP = {
    "AutoConfig": "configuration_scmoe.ScMoEConfig",
    "AutoModel": "modeling_scmoe.ScMoEModel",
    "AutoModelForCausalLM": "modeling_scmoe.ScMoEForCausalLM",
}

# Values that modeling_scmoe.py knows.
CHOICES: dict[str, tuple[str, ...]] = {
    "shortcut_position": ("none", "pos1", "pos2", "pos3"),
    "combine": ("add", "cg1", "cg2"),
    "shortcut_norm": ("own", "shared"),
    "router": ("topk", "heterogeneous", "longcat", "c2r"),
    "scaled_experts": ("all", "routed"),
    "dual_gating": ("none", "shared", "separate"),
    "scoring_func": ("softmax", "sigmoid", "sqrtsoftplus"),
    "norm": ("rmsnorm", "layernorm"),
    "position_embedding": ("rope", "learned", "none"),
}


class ScMoEConfig(PreTrainedConfig):
    """What one model is.

    Layers are attention layers: `num_hidden_layers` counts them, and each has its index in the
    key-value cache. With pos2 and pos3 a MoE layer and the dense layer in front form a unit.

    Args:
        head_dim: of queries and keys; None for hidden_size / num_attention_heads.
        intermediate_size: of dense layers.
        moe_intermediate_size: of one routed expert.
        shared_expert_intermediate_size: 0 for no shared expert.
        moe_layers: indices of the layers with a MoE; None for every second one, the last of each
            pair.
        shortcut_position: where the routed experts read: none (their own layer, behind its
            attention), pos1 (their own layer's input), pos2 (the dense layer in front, behind its
            attention), pos3 (that layer's input).
        combine: how shared and routed outputs meet: add, cg1 (a sigmoid gate on the shared
            expert), cg2 (a softmax gate on both).
        shortcut_norm: own, or shared with the main branch, which normalises the same tensor.
        post_norm: normalise the sum of shared and routed outputs.
        router: heterogeneous (arXiv:2410.07348) and longcat (arXiv:2509.01322) differ from topk in
            their balancing losses; with c2r (arXiv:2504.01337) a token's other experts are among
            the c2r_top_t best partners of its first, which lie beside the gate's weight.
        router_tau: weight of a zero-computation expert in the heterogeneous loss.
        routed_topk: routed experts that a token is to have on average by the longcat loss; None for
            their share of all.
        balance_groups: groups of routed experts in the longcat loss.
        gating_residual: add a matrix times the router logits of the MoE layer in front
            (arXiv:2410.07348).
        gate_layers: 2 for a router with an inner layer, 8 (E + Z) wide, and tanh.
        renormalise: give the weight of zero experts to the others.
        input_scale: what all experts read is multiplied by it.
        dual_gating: two gates over one pool of experts in place of one and a shared expert
            (DGMoE), with one weight or separate ones.
        distinct_experts: the second gate never chooses what the first has chosen.
        scoring_func: from router logits to scores.
        pre_softmax: softmax over all experts, in front of the selection, not behind it over those
            that were selected.
        norm_topk_prob: divide the selected scores by their sum.
        routed_scaling_factor: what they are multiplied with in the end.
        scaled_experts: whether those of zero-computation experts are too.
        expert_bias: a bias for each expert moves the selection, not the scores.
        n_group, topk_group: groups of experts, and how many of them a token may use; None for all.
        zero_experts, copy_experts, constant_experts: zero-computation experts of each kind
            (arXiv:2410.07348), which the router numbers behind the routed ones.
        hidden_act: activation of all MLPs and experts.
        gated_linear_unit: act(gate(x)) * up(x), not act(up(x)).
        attention_bias: of queries, keys and values, or of the down projections of latent attention.
        attention_output_bias: of the output projection.
        mlp_bias: of all MLPs and experts.
        router_bias: added to the router logits.
        norm: of all norms.
        rms_norm_eps: of all norms, of LayerNorm too.
        qk_layernorm: normalise queries and keys, or the latents of latent attention.
        rope_interleaved: features 2i and 2i + 1 turn together, not i and i + r/2.
        softmax_scale: of attention scores; None for 1 / sqrt(head size).
        kv_lora_rank: of multi-latent attention; None for grouped-query attention.
        q_lora_rank: None for queries without a latent.
        mla_scale: multiply what comes from a latent by sqrt(hidden_size / its rank).
        router_aux_loss_coef: coefficient of the balancing loss, for each MoE layer.
    """

    model_type = "scmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 4096
    moe_intermediate_size: int = 2048
    shared_expert_intermediate_size: int = 0
    num_experts: int = 8
    num_experts_per_tok: int = 1
    moe_layers: list[int] | None = None
    shortcut_position: str = "pos2"
    combine: str = "add"
    shortcut_norm: str = "own"
    post_norm: bool = False
    router: str = "topk"
    router_tau: float = 0.75
    routed_topk: float | None = None
    c2r_top_t: int | None = None
    balance_groups: int = 1
    gating_residual: bool = False
    gate_layers: int = 1
    renormalise: bool = False
    input_scale: float = 1.0
    dual_gating: str = "none"
    distinct_experts: bool = True
    scoring_func: str = "softmax"
    pre_softmax: bool = True
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    scaled_experts: str = "all"
    expert_bias: bool = False
    n_group: int | None = None
    topk_group: int | None = None
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    hidden_act: str = "silu"
    gated_linear_unit: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    router_bias: bool = False
    norm: str = "rmsnorm"
    rms_norm_eps: float = 1e-5
    qk_layernorm: bool = False
    position_embedding: str = "rope"
    rope_parameters: dict | None = None
    rope_interleaved: bool = False
    max_position_embeddings: int = 4096
    softmax_scale: float | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    mla_scale: bool = False
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    auto_map: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.kv_lora_rank is not None:
            self.head_dim = self.qk_rope_head_dim  # what the rotary embedding turns
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_layers is None:
            self.moe_layers = list(range(1, self.num_hidden_layers, 2))
        # transformers adds only the class that it saves; servers ask for the others.
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        super().__post_init__(**kwargs)
        self._check()

    @property
    def first_copy_expert(self) -> int:
        """Number of the first expert behind the zero experts."""
        return self.num_experts + self.zero_experts

    @property
    def zero_computation_experts(self) -> int:
        """Experts that the router numbers behind the routed ones."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    def _check(self) -> None:
        """Refuse what modeling_scmoe.py would compute wrongly or not at all.

        Raises:
            ValueError: the field, and what it may be.
        """
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, and this modeling_scmoe.py knows "
                    f"{', '.join(known)}: use the files that were exported with the model"
                )
        assert self.moe_layers is not None
        if not set(self.moe_layers) <= set(range(self.num_hidden_layers)):
            raise ValueError(
                f"moe_layers {self.moe_layers} are not all below num_hidden_layers "
                f"{self.num_hidden_layers}"
            )
        if self.shortcut_position in ("pos2", "pos3"):
            for layer in self.moe_layers:
                if layer == 0 or layer - 1 in self.moe_layers:
                    raise ValueError(
                        f"layer {layer} of moe_layers has no dense layer in front, which "
                        f"shortcut_position {self.shortcut_position} reads"
                    )
        if self.combine != "add" and not self.shared_expert_intermediate_size:
            raise ValueError(
                f"combine {self.combine} weighs a shared expert, and "
                "shared_expert_intermediate_size is 0"
            )
        if self.expert_bias and self.scoring_func == "softmax" and not self.pre_softmax:
            raise ValueError("expert_bias needs scores in front of the selection: set pre_softmax")
        least = max(1, self.num_experts_per_tok - 1)
        if self.router == "c2r" and (
            self.zero_computation_experts
            or self.dual_gating != "none"
            or not least <= (self.c2r_top_t or 0) < self.num_experts
        ):
            raise ValueError(
                f"router c2r wants c2r_top_t in {least}..{self.num_experts - 1}, and neither "
                "dual_gating nor zero-computation experts"
            )
        if self.dual_gating != "none" and (
            self.num_experts_per_tok != 1
            or self.shortcut_position == "none"
            or self.shared_expert_intermediate_size
            or self.zero_computation_experts
        ):
            raise ValueError(
                f"dual_gating {self.dual_gating} wants num_experts_per_tok 1 and a shortcut, and "
                "neither a shared expert nor zero-computation experts"
            )
        latent = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim)
        if self.kv_lora_rank is not None and None in latent:
            raise ValueError(
                "kv_lora_rank wants qk_nope_head_dim, qk_rope_head_dim and v_head_dim too"
            )


ScMoEConfig.register_for_auto_class()
