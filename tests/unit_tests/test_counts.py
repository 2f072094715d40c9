"""Parameters, FLOPs and kept activations against the built model: its module tree, the matrix
products that it executes, and the tensors that autograd keeps."""

import math
from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from torch.utils.flop_counter import FlopCounterMode

from megatron_scmoe.model import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.model_size import ModelSize, Operator, model_size
from tests.models import Case

pytestmark = pytest.mark.usefixtures("single_rank")

VOCAB, SEQUENCE, BATCH = 48, 16, 2
TOKENS = SEQUENCE * BATCH

LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "kv_lora_rank": 10,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
    "rope_type": "rope",
}
PLAIN_MLP = {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}

CASES = {
    **{
        f"{position}-{combine}": Case(
            {"scmoe_shortcut_position": position, "scmoe_combine": combine}, {"moe_router_topk": k}
        )
        for k, position in enumerate(("pos1", "pos2", "pos3"), start=1)
        for combine in ("add", "cg1", "cg2")
    },
    **{
        f"{position}-shared-post": Case(
            {
                "scmoe_shortcut_position": position,
                "scmoe_shortcut_norm": "shared",
                "scmoe_post_norm": True,
            }
        )
        for position in ("pos1", "pos2", "pos3")
    },
    "pos1-every-layer": Case({"scmoe_shortcut_position": "pos1"}, moe_frequency=1, num_layers=3),
    "pos2-every-fourth": Case(moe_frequency=4, num_layers=8),
    "pos3-mixed-pattern": Case(
        {"scmoe_shortcut_position": "pos3"}, {"moe_layer_freq": [0, 1, 0, 0, 1]}, num_layers=5
    ),
    "pos2-plain-mlp": Case(host=PLAIN_MLP),
    "pos2-layernorm": Case({"scmoe_post_norm": True}, {"normalization": "LayerNorm"}),
    "pos2-geglu": Case(host={"activation_func": quick_gelu, "bias_activation_fusion": False}),
    "pos2-no-gqa": Case(host={"num_query_groups": None}),
    "pos2-qkv-bias": Case(host={"add_qkv_bias": True, "kv_channels": 6, "qk_layernorm": True}),
    "pos2-output-gate": Case(host={"attention_output_gate": True}),
    "pos2-latent": Case(host=LATENT),
    "pos3-latent-q": Case(
        {"scmoe_shortcut_position": "pos3"}, LATENT | {"q_lora_rank": 7, "qk_layernorm": True}
    ),
    "none-shared-expert": Case({"scmoe_shortcut_position": "none"}),
    "none-no-gate": Case({"scmoe_shortcut_position": "none", "scmoe_combine": "add"}),
    "none-no-shared-expert": Case(
        {"scmoe_shortcut_position": "none", "scmoe_combine": "add"},
        {"moe_shared_expert_intermediate_size": None, "moe_router_topk": 3},
    ),
    "none-every-layer": Case({"scmoe_shortcut_position": "none"}, {"moe_layer_freq": 2}),
    "dense-with-biases": Case(
        {"scmoe_shortcut_position": "none", "scmoe_combine": "add"},
        PLAIN_MLP
        | {"num_moe_experts": None, "moe_layer_freq": 1, "add_bias_linear": True}
        | {"moe_shared_expert_intermediate_size": None, "moe_ffn_hidden_size": None},
    ),
}


def model_config(case: Case, **options: Any) -> ScMoEModelConfig:
    """The case as a language model on one rank, in fp32."""
    config = case.host_config()
    config.params_dtype = config.pipeline_dtype = torch.float32
    model = ScMoEModelConfig(
        transformer=config,
        vocab_size=VOCAB,
        seq_length=SEQUENCE,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    model.scmoe = case.scmoe_config()
    for name, value in options.items():
        setattr(model, name, value)
    return model


def build(model: ScMoEModelConfig) -> GPTModel:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ScMoEModelBuilder(model).build_model(groups, pre_process=True, post_process=True)


def loss(model: GPTModel) -> torch.Tensor:
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(tokens, positions, mask, labels=tokens).sum()


# Parameters. ----------------------------------------------------------------------------------

# Where a parameter of the tree belongs: the first name that occurs in it.
OPERATORS = {
    "dense_layer.input_layernorm": "attention",
    "dense_layer.pre_mlp_layernorm": "mlp",
    "shortcut_layernorm": "router",
    "post_layernorm": "merge",
    "combine_gate": "merge",
    "gate_weight": "merge",
    "shared_experts": "shared_expert",
    "mlp.experts": "experts",
    "router": "router",
    "self_attention": "attention",
    "input_layernorm": "attention",
    "output_layer": "output",
    "final_layernorm": "output",
    "embedding": "embedding",
    "mlp.linear": "mlp",
    "pre_mlp_layernorm": "before the MLP",
}


def count_tree(model: GPTModel, case: Case) -> dict[str, int]:
    """Elements of the parameters by operator."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        operator = next(part for key, part in OPERATORS.items() if key in name)
        if operator == "before the MLP":
            prefix = name.split("pre_mlp_layernorm")[0]
            is_moe = f"{prefix}mlp.router.weight" in dict(model.named_parameters())
            reader = "shared_expert" if case.scmoe_config().enabled else "router"
            operator = reader if is_moe else "mlp"
        counts[operator] = counts.get(operator, 0) + parameter.numel()
    return counts


def by_operator(size: ModelSize, count: Any) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, operator in size.operators:
        sums[name] = sums.get(name, 0) + count(operator)
    return {name: number for name, number in sums.items() if number}


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_module_tree(name: str) -> None:
    case = CASES[name]
    config = model_config(case)
    counts = count_tree(build(config), case)
    size = model_size(config, SEQUENCE, BATCH)
    assert by_operator(size, lambda operator: operator.weights.total) == counts
    assert size.parameters == sum(counts.values())
    idle = 0
    if "experts" in counts:
        idle = counts["experts"] // config.num_moe_experts
        idle *= config.num_moe_experts - config.moe_router_topk
    assert size.activated_parameters == size.parameters - idle


@pytest.mark.parametrize(
    "options",
    [
        {"share_embeddings_and_output_weights": False},
        {"position_embedding_type": "learned_absolute"},
    ],
    ids=["untied", "learned positions"],
)
def test_parameters_of_embedding_and_output(options: dict[str, Any]) -> None:
    config = model_config(Case(), **options)
    counts = count_tree(build(config), Case())
    size = model_size(config, SEQUENCE, BATCH)
    assert by_operator(size, lambda operator: operator.weights.total) == counts


# FLOPs. ---------------------------------------------------------------------------------------


def executed_flops(model: GPTModel) -> tuple[int, int]:
    """Of one forward and backward pass: the score matrices' products, and all others."""
    with FlopCounterMode(display=False) as counter:
        loss(model).backward()
    counts = counter.get_flop_counts()["Global"]
    core = {op: flops for op, flops in counts.items() if "bmm" in str(op)}
    return sum(core.values()), sum(counts.values()) - sum(core.values())


def host_flops(config: ScMoEModelConfig) -> float:
    """What the host counts for one batch, from the options that describe the model."""
    transformer = config.transformer
    args = {name: getattr(transformer, name) for name in vars(transformer)}
    args |= {
        "num_experts": transformer.num_moe_experts,
        "swiglu": transformer.activation_func is torch.nn.functional.silu,
        "quick_geglu": transformer.activation_func is quick_gelu,
        "group_query_attention": transformer.num_query_groups != transformer.num_attention_heads,
        "padded_vocab_size": VOCAB,
        "seq_length": SEQUENCE,
        "hybrid_layer_pattern": None,
    }
    return training.num_floating_point_operations(Namespace(**args), BATCH)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_matrix_products(name: str) -> None:
    """The local attention computes the whole score matrix; half of it is counted."""
    config = model_config(CASES[name])
    core, rest = executed_flops(build(config))
    assert 3 * TOKENS * model_size(config, SEQUENCE, BATCH).flops == core / 2 + rest


@pytest.mark.parametrize("name", CASES)
def test_throughput_counts_all_but_routers_and_gates(name: str) -> None:
    """Megatron's convention, for the baseline and for units; for latent attention it adds one
    product for each element of the latent norms."""
    config = model_config(CASES[name])
    core, rest = executed_flops(build(config))
    size = model_size(config, SEQUENCE, BATCH)
    small = by_operator(size, lambda operator: operator.flops)
    small_flops = 3 * TOKENS * (small.get("router", 0) + small.get("merge", 0))
    latent_norms = 0
    if config.transformer.multi_latent_attention:
        ranks = config.kv_lora_rank + (config.q_lora_rank or 0)
        latent_norms = 6 * TOKENS * config.num_layers * ranks
    assert host_flops(config) == core / 2 + rest - small_flops + latent_norms
