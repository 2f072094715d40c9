"""Parameters, FLOPs and kept activations of a model, operator by operator, from its configs alone.

Arithmetic only: no tensor and no process group, so that it answers for any layout on any machine.
tests/unit_tests/test_counts.py holds every number against the built module tree. What a rank holds
of it stands in memory.py.

Conventions:

    parameters   of the whole model, tied embeddings once
    activated    the parameters that one token meets: K of E experts for each gate, fewer by the
                 share of those at home, everything else
    FLOPs        forward, one token: matrix products only, 2 per multiply-add; causal attention
                 counts the half of the score matrix that is not masked. Backward takes twice as
                 many. Recomputation is not counted
    kept bytes   what autograd keeps for the backward pass, of one micro-batch on one rank, with
                 fused norms and balanced routing; selective recomputation of core_attn, mlp, moe,
                 shared_experts and layernorm is taken into account, full recomputation is not

Shapes: s sequence, b micro-batch, h hidden, E experts, K top-k
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.model.combine import COMBINES, of_host
from megatron_scmoe.model.experts.at_home import AT_HOME
from megatron_scmoe.model.routing import ROUTERS, with_columns
from megatron_scmoe.model.routing.dual import GATINGS
from megatron_scmoe.model.specs import moe_layer_pattern

# What Megatron leaves out of the FLOPs that --log-throughput divides: outputs of a few columns.
NOT_IN_MODEL_FLOPS = ("router", "merge")


@dataclass(frozen=True)
class Weights:
    """Parameters, by how ranks share them."""

    tensor: int = 0
    """Split over tensor parallel ranks."""
    replicated: int = 0
    """Whole on every tensor parallel rank."""
    expert: int = 0
    """Split over expert and expert tensor parallel ranks."""

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(
            self.tensor + other.tensor,
            self.replicated + other.replicated,
            self.expert + other.expert,
        )

    @property
    def total(self) -> int:
        return self.tensor + self.replicated + self.expert

    def dense_on_rank(self, config: TransformerConfig) -> int:
        """Parameters of one rank that all data parallel ranks share."""
        return self.tensor // config.tensor_model_parallel_size + self.replicated

    def expert_on_rank(self, config: TransformerConfig) -> int:
        """Parameters of one rank that its expert data parallel ranks share."""
        return self.expert // (
            config.expert_model_parallel_size * (config.expert_tensor_parallel_size or 1)
        )


@dataclass(frozen=True)
class Operator:
    """One operator of one layer."""

    weights: Weights
    activated: int
    """Parameters that one token meets."""
    flops: int
    """Forward, one token."""
    kept_bytes: float
    """One micro-batch on one rank of its stage."""


@dataclass(frozen=True)
class LayerSize:
    """One attention layer: `qkv`, `core_attention` and `projection`, then `mlp`, or `router`,
    `experts`, `shared_expert` and `merge`, the steps of overlap/schedule.py. A norm counts with the
    operator that reads it, the combine gate and the post-norm with `merge`."""

    operators: dict[str, Operator]

    @property
    def weights(self) -> Weights:
        return sum((operator.weights for operator in self.operators.values()), Weights())

    @property
    def kept_bytes(self) -> float:
        return sum(operator.kept_bytes for operator in self.operators.values())


@dataclass(frozen=True)
class ModelSize:
    """The whole model."""

    layers: tuple[LayerSize, ...]
    """By attention layer."""
    embedding: Operator
    output: Operator
    """Final norm, output layer and loss. Tied: the weights are the embedding's, `weights` has the
    norm only."""
    tied: bool
    hidden_bytes: float
    """One [s, b, h] between layers, on one rank."""
    config: TransformerConfig = field(repr=False)

    @property
    def operators(self) -> list[tuple[str, Operator]]:
        inner = [item for layer in self.layers for item in layer.operators.items()]
        return [("embedding", self.embedding), *inner, ("output", self.output)]

    @property
    def parameters(self) -> int:
        return sum(operator.weights.total for _, operator in self.operators)

    @property
    def activated_parameters(self) -> int:
        return sum(operator.activated for _, operator in self.operators)

    @property
    def flops(self) -> int:
        """Forward, one token: every matrix product."""
        return sum(operator.flops for _, operator in self.operators)

    @property
    def model_flops(self) -> int:
        """The same without routers and gates, as Megatron counts for every model."""
        return sum(
            operator.flops for name, operator in self.operators if name not in NOT_IN_MODEL_FLOPS
        )


def model_size(model: ScMoEModelConfig, seq_length: int, micro_batch_size: int) -> ModelSize:
    """Count a model.

    Args:
        model: the model; parallel sizes are those of its TransformerConfig.
        seq_length: s of one sample.
        micro_batch_size: b.

    Raises:
        ValueError: the model has a part that is not counted here; one line that names it.
    """
    check_countable(model.transformer)
    counter = _Counter(model.transformer, model.scmoe, seq_length, micro_batch_size)
    vocab_size = model.vocab_size
    assert vocab_size is not None
    if model.should_pad_vocab:
        vocab_size = calculate_padded_vocab_size(
            vocab_size,
            model.make_vocab_size_divisible_by,
            model.transformer.tensor_model_parallel_size,
            logging_enabled=False,
        )
    pattern = moe_layer_pattern(model.transformer)
    has_experts = model.transformer.num_moe_experts is not None
    layers = tuple(
        counter.layer(has_experts and bool(is_moe), first_moe=1 not in pattern[:number])
        for number, is_moe in enumerate(pattern)
    )
    table = vocab_size * model.transformer.hidden_size
    # Megatron takes --max-position-embeddings for the model's `seq_length`.
    positions = (
        model.seq_length * model.transformer.hidden_size
        if model.position_embedding_type == "learned_absolute"
        else 0
    )
    tied = model.share_embeddings_and_output_weights
    return ModelSize(
        layers=layers,
        embedding=counter.embedding(table, positions),
        output=counter.output(vocab_size, tied),
        tied=tied,
        hidden_bytes=counter.kept(outer=model.transformer.hidden_size),
        config=model.transformer,
    )


def check_countable(config: TransformerConfig) -> None:
    """Refuse what Megatron builds and this module does not count.

    Raises:
        ValueError: one line.
    """
    for name, present in {
        "multi-token prediction": bool(config.mtp_num_layers),
        "latent MoE": config.moe_latent_size is not None,
        "heterogeneous layers": config.heterogeneous_block_specs,
        "an experimental attention": config.experimental_attention_variant is not None,
        "experts with biases": config.num_moe_experts is not None and config.add_bias_linear,
        "a learned softmax offset": config.softmax_type == "learnable",
    }.items():
        if present:
            raise ValueError(f"{name} is not counted")


class _Projections(NamedTuple):
    """From the hidden states to queries, keys and values."""

    split: int
    """Matrix elements split over tensor parallel ranks."""
    key_width: int
    """Of one head; a query's too."""
    value_width: int
    keys_and_values: int
    """Kept elements of one token."""
    norms: int
    """Parameters."""
    duplicated: int = 0
    """Matrix elements that every tensor parallel rank has."""
    split_biases: int = 0
    latents: int = 0
    """Kept elements of one token."""


class _Counter:
    """Operators of one model; every method follows the module that the host builds."""

    def __init__(
        self, config: TransformerConfig, scmoe: ScMoEConfig, seq_length: int, micro_batch_size: int
    ) -> None:
        self.config = config
        self.scmoe = scmoe
        self.hidden = config.hidden_size
        self.norm_weights = 1 if config.normalization == "RMSNorm" else 2
        # h -> 2f for a gated unit, h -> f without.
        self.up = 2 if config.gated_linear_unit else 1
        self.bytes = config.params_dtype.itemsize
        self.heads = config.num_attention_heads
        self.groups = config.num_query_groups or self.heads
        self.seq_length = seq_length
        self.tp = config.tensor_model_parallel_size
        # Tokens of a rank, between tensor parallel layers and inside them.
        self.inner_tokens = seq_length * micro_batch_size // config.context_parallel_size
        self.outer_tokens = self.inner_tokens // (self.tp if config.sequence_parallel else 1)

    def layer(self, is_moe: bool, first_moe: bool) -> LayerSize:
        operators = self._attention()
        if is_moe:
            operators |= {
                "router": self._router(first_moe),
                "experts": self._experts(),
                "shared_expert": self._shared_expert(),
                "merge": self._merge(),
            }
        else:
            operators["mlp"] = self._dense_mlp()
        return LayerSize(operators)

    def embedding(self, table: int, positions: int) -> Operator:
        return Operator(
            Weights(tensor=table, replicated=positions),
            activated=table + positions,
            flops=0,
            kept_bytes=self._dropout_mask(),
        )

    def output(self, vocab_size: int, tied: bool) -> Operator:
        """The loss keeps its softmax in fp32."""
        table = vocab_size * self.hidden
        norm = self._norm(self.hidden)
        return Operator(
            Weights(tensor=0 if tied else table, replicated=norm),
            activated=norm + (0 if tied else table),
            flops=2 * table,
            kept_bytes=self.kept(outer=2 * self.hidden)
            + 4 * self.inner_tokens * vocab_size / self.tp,
        )

    # Operators of a layer. --------------------------------------------------------------------

    def _attention(self) -> dict[str, Operator]:
        config = self.config
        if isinstance(config, MLATransformerConfig):
            projections = self._latent_projections(config)
        else:
            projections = self._projections()
        context = self.heads * projections.value_width
        to_qkv = Weights(
            tensor=projections.split + projections.split_biases,
            replicated=projections.duplicated + projections.norms + self._norm(self.hidden),
        )
        back = Weights(
            tensor=context * self.hidden,
            replicated=self.hidden if config.add_bias_linear else 0,
        )
        queries = self.heads * projections.key_width
        return {
            "qkv": Operator(
                to_qkv,
                activated=to_qkv.total,
                flops=2 * (projections.split + projections.duplicated),
                kept_bytes=self.kept(outer=self._normed_input() + projections.latents),
            ),
            "core_attention": Operator(
                Weights(),
                activated=0,
                # Half of the scores is masked: s/2 keys for the average query.
                flops=(queries + context) * self.seq_length,
                kept_bytes=self.kept(inner=queries + projections.keys_and_values)
                + self._score_matrix(),
            ),
            "projection": Operator(
                back,
                activated=back.total,
                flops=2 * context * self.hidden,
                kept_bytes=self.kept(inner=context) + self._dropout_mask(),
            ),
        }

    def _projections(self) -> "_Projections":
        """To queries, keys and values, with or without groups."""
        config, width = self.config, self.config.kv_channels
        gate = self.heads if config.attention_output_gate else 0
        columns = (self.heads + gate + 2 * self.groups) * width
        # The local attention repeats keys and values for every head of a group.
        pairs = self.heads if config.transformer_impl == "local" else self.groups
        return _Projections(
            split=self.hidden * columns,
            split_biases=columns if config.add_bias_linear or config.add_qkv_bias else 0,
            norms=2 * self._norm(width) if config.qk_layernorm else 0,
            key_width=width,
            value_width=width,
            keys_and_values=2 * pairs * width,
        )

    def _latent_projections(self, config: MLATransformerConfig) -> "_Projections":
        """To queries, keys and values through latents."""
        key_width = config.qk_head_dim + config.qk_pos_emb_head_dim
        down = self.hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
        up = config.kv_lora_rank * self.heads * (config.qk_head_dim + config.v_head_dim)
        ranks = config.kv_lora_rank
        if config.q_lora_rank is None:
            up += self.hidden * self.heads * key_width
        else:
            down += self.hidden * config.q_lora_rank
            up += config.q_lora_rank * self.heads * key_width
            ranks += config.q_lora_rank
        # Transformer Engine's spec repeats the down projections, the local spec splits them.
        split = config.transformer_impl == "local"
        return _Projections(
            split=up + (down if split else 0),
            duplicated=0 if split else down,
            norms=self._norm(ranks) if config.qk_layernorm else 0,
            key_width=key_width,
            value_width=config.v_head_dim,
            keys_and_values=self.heads * (key_width + config.v_head_dim),
            latents=config.qk_pos_emb_head_dim + ranks * (2 if config.qk_layernorm else 1),
        )

    def _dense_mlp(self) -> Operator:
        width = self.config.ffn_hidden_size
        matrices = self._mlp_matrices(width)
        biased = self.config.add_bias_linear
        weights = Weights(
            tensor=matrices + (self.up * width if biased else 0),
            replicated=self._norm(self.hidden) + (self.hidden if biased else 0),
        )
        inner = 0 if self._recomputes("mlp") else self._kept_in_mlp(width)
        kept = self.kept(inner=inner, outer=self._normed_input())
        return Operator(weights, weights.total, 2 * matrices, kept + self._dropout_mask())

    def _router(self, first: bool) -> Operator:
        """Reads z. A tap is kept by the main branch, its normed copy z by the router. Without a
        shortcut the router reads the MoE layer's own normed input. A second gate reads what a
        shared expert would, which is counted there."""
        config = with_columns(self.config, sum(self.scmoe.at_home.values()))
        router = ROUTERS[self.scmoe.scmoe_router]
        gating = GATINGS[self.scmoe.scmoe_dual_gating]
        gate = router.parameters(config, self.scmoe, first)
        matrix = gate + gating.weights(config)
        norm = self._norm(self.hidden)
        own_norm = not self.scmoe.has_shortcut or self.scmoe.own_norm
        weights = Weights(replicated=matrix + (norm if own_norm else 0))
        assert config.num_moe_experts is not None
        scores = 4 * gating.gates * config.num_moe_experts * self.outer_tokens  # fp32
        if not self.scmoe.enabled and self._recomputes("moe"):
            scores = 0
        kept = self.kept(outer=self.hidden if self.scmoe.has_shortcut else self._normed_input())
        kept += self.kept(outer=router.kept(config))
        return Operator(weights, weights.total, 2 * gating.gates * gate, kept + scores)

    def _experts(self) -> Operator:
        """Those at home too, which are on every rank and compute all tokens."""
        config, at_home = self.config, self.scmoe.at_home
        experts, width = config.num_moe_experts, config.moe_ffn_hidden_size
        assert experts is not None and width is not None
        one = self._mlp_matrices(width)
        # Expert tensor parallel ranks gather their rows and split the width.
        row = self.hidden * (config.expert_tensor_parallel_size or 1)
        kept = row + self._kept_in_mlp(width, routed=True)
        if self._recomputes("moe"):
            # A unit repeats the experts only, from their rows; the host the exchanges too.
            kept = row if self.scmoe.enabled else 0
        # Of K rows of a token, those of experts at home are not sent.
        router = ROUTERS[self.scmoe.scmoe_router]
        share = router.routed_share(config, sum(at_home.values()), self.scmoe)
        rows = config.moe_router_topk * share * GATINGS[self.scmoe.scmoe_dual_gating].gates
        capacity = config.moe_expert_capacity_factor
        filled = capacity if capacity and config.moe_pad_expert_input_to_capacity else 1
        home = [(AT_HOME[kind], number) for kind, number in at_home.items()]
        own = sum(number * kind.weights(config) for kind, number in home)
        return Operator(
            Weights(expert=experts * one, replicated=own),
            activated=int(rows * one) + own,
            flops=int(2 * rows * one) + sum(number * kind.flops(config) for kind, number in home),
            kept_bytes=self.kept(
                outer=float(rows) * filled * kept
                + sum(number * kind.kept(config) for kind, number in home)
            ),
        )

    def _shared_expert(self) -> Operator:
        """Reads x, through the MoE layer's own norm, which without a shortcut the router counts.
        With two gates there is none, and the second gate reads x."""
        width = self.config.moe_shared_expert_intermediate_size or 0
        matrices = self._mlp_matrices(width)
        norm = self._norm(self.hidden) if self.scmoe.has_shortcut else 0
        recomputed = self._recomputes("shared_experts") or self._recomputes("moe")
        # A unit without a shortcut evaluates the norm for the router, and again for this.
        again = self.hidden if self.scmoe.enabled and width else 0
        kept = self.kept(
            inner=0 if recomputed else self._kept_in_mlp(width),
            outer=self._normed_input() if self.scmoe.has_shortcut else again,
        )
        weights = Weights(tensor=matrices, replicated=norm)
        return Operator(weights, weights.total, 2 * matrices, kept)

    def _merge(self) -> Operator:
        """A gate keeps what it multiplies, the post-norm what it normalises."""
        config, scmoe = self.config, self.scmoe
        combine = COMBINES[scmoe.scmoe_combine] if scmoe.enabled else of_host(config)
        post_norm = scmoe.enabled and scmoe.scmoe_post_norm
        weights = Weights(
            replicated=combine.weights(config) + (self._norm(self.hidden) if post_norm else 0)
        )
        recomputed = combine.host_gate and (
            self._recomputes("shared_experts") or self._recomputes("moe")
        )
        kept = (0 if recomputed else combine.kept(config)) + post_norm * self.hidden
        return Operator(
            weights,
            weights.total,
            combine.flops(config),
            self.kept(outer=kept) + self._dropout_mask(),
        )

    # Pieces. ----------------------------------------------------------------------------------

    def _norm(self, width: int) -> int:
        return self.norm_weights * width

    def _normed_input(self) -> int:
        """Kept elements of one token: a norm's input and its output."""
        return (1 if self._recomputes("layernorm") else 2) * self.hidden

    def _recomputes(self, module: str) -> bool:
        config = self.config
        return config.recompute_granularity == "selective" and module in config.recompute_modules

    def _mlp_matrices(self, width: int) -> int:
        return (self.up + 1) * self.hidden * width

    def _kept_in_mlp(self, width: int, routed: bool = False) -> int:
        """Elements of one token: the activation's input and output. Without --bias-swiglu-fusion
        a gated unit keeps both factors too, and an expert its output before the router's weight."""
        if self.config.gated_linear_unit and self.config.bias_activation_fusion:
            return 3 * width
        return (5 if self.config.gated_linear_unit else 2) * width + (width if routed else 0)

    def _score_matrix(self) -> float:
        """Bytes of the s x s matrices that the local attention keeps; Transformer Engine's fused
        kernels keep none."""
        config = self.config
        if config.transformer_impl != "local" or self._recomputes("core_attn"):
            return 0
        in_fp32 = config.attention_softmax_in_fp32 and not config.masked_softmax_fusion
        softmax = 4 if in_fp32 else self.bytes
        kept = softmax
        if config.attention_dropout > 0:
            kept += 1 + self.bytes  # the mask, and what is left
        elif softmax != self.bytes:
            kept += self.bytes
        return kept * self.heads / self.tp * self.seq_length * self.inner_tokens

    def _dropout_mask(self) -> float:
        """One byte for each element of a residual branch."""
        return self.hidden * self.outer_tokens if self.config.hidden_dropout > 0 else 0

    def kept(self, inner: float = 0, outer: float = 0) -> float:
        """Bytes of so many elements per token: `inner` are split over tensor parallel ranks,
        `outer` lie between the tensor parallel layers."""
        return self.bytes * (inner / self.tp * self.inner_tokens + outer * self.outer_tokens)
