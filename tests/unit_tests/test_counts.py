"""Parameters, FLOPs and kept activations against the built model: its module tree, the matrix
products that it executes, and the tensors that autograd keeps.

A table of models of every kind. Exact, but for kept activations: within 2 %, with the local spec.
"""

import functools
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from torch.utils.flop_counter import FlopCounterMode

from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.planner.memory import report_lines, reporting, training_from_args
from megatron_scmoe.planner.size import ModelSize, model_size
from tests.kept_bytes import KeptBytes
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
    **{
        f"{position}-two-gates-{gates}": Case(
            {
                "scmoe_shortcut_position": position,
                "scmoe_combine": "add",
                "scmoe_dual_gating": gates,
            }
        )
        for position, gates in (("pos1", "separate"), ("pos2", "shared"))
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
    "dense_layer.input_layernorm": "qkv",
    "dense_layer.pre_mlp_layernorm": "mlp",
    "shortcut_layernorm": "router",
    "post_layernorm": "merge",
    "current_router": "router",
    "combine_gate": "merge",
    "gate_weight": "merge",
    "shared_experts": "shared_expert",
    "mlp.experts": "experts",
    "router": "router",
    "linear_proj": "projection",
    "self_attention": "qkv",
    "input_layernorm": "qkv",
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
        gates = 2 if config.scmoe.dual_gating else 1
        idle *= config.num_moe_experts - gates * config.moe_router_topk
    assert size.activated_parameters == size.parameters - idle


@pytest.mark.parametrize(
    "options",
    [
        {"share_embeddings_and_output_weights": False},
        {"position_embedding_type": "learned_absolute"},
        {"should_pad_vocab": True, "make_vocab_size_divisible_by": 64},
    ],
    ids=["untied", "learned positions", "padded vocabulary"],
)
def test_parameters_of_embedding_and_output(options: dict[str, Any]) -> None:
    config = model_config(Case(), **options)
    counts = count_tree(build(config), Case())
    size = model_size(config, SEQUENCE, BATCH)
    assert by_operator(size, lambda operator: operator.weights.total) == counts


# FLOPs. ---------------------------------------------------------------------------------------


@functools.cache
def executed_flops(name: str) -> tuple[int, int]:
    """Of one forward and backward pass: the score matrices' products, and all others."""
    model = build(model_config(CASES[name]))
    with FlopCounterMode(display=False) as counter:
        loss(model).backward()
    counts = counter.get_flop_counts()["Global"]
    core = {op: flops for op, flops in counts.items() if "bmm" in str(op)}
    return sum(core.values()), sum(counts.values()) - sum(core.values())


def host_options(config: ScMoEModelConfig) -> Namespace:
    """The options that describe the model to the host."""
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
        "scmoe_dual_gating": config.scmoe.scmoe_dual_gating,
    }
    return Namespace(**args)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_matrix_products(name: str) -> None:
    """The local attention computes the whole score matrix; half of it is counted."""
    config = model_config(CASES[name])
    core, rest = executed_flops(name)
    size = model_size(config, SEQUENCE, BATCH)
    counted = by_operator(size, lambda operator: 3 * TOKENS * operator.flops)
    assert counted.pop("core_attention") == core / 2
    assert sum(counted.values()) == rest
    assert sum(counted.values()) + core / 2 == 3 * TOKENS * size.flops


@pytest.mark.parametrize("name", CASES)
def test_throughput_counts_all_but_routers_and_gates(name: str) -> None:
    """Megatron's convention, for the baseline and for units; for latent attention it adds one
    product for each element of the latent norms."""
    config = model_config(CASES[name])
    core, rest = executed_flops(name)
    size = model_size(config, SEQUENCE, BATCH)
    small = by_operator(size, lambda operator: operator.flops)
    small_flops = 3 * TOKENS * (small.get("router", 0) + small.get("merge", 0))
    latent_norms = 0
    if config.transformer.multi_latent_attention:
        ranks = config.kv_lora_rank + (config.q_lora_rank or 0)
        latent_norms = 6 * TOKENS * config.num_layers * ranks
    counted = training.num_floating_point_operations(host_options(config), BATCH)
    assert counted == core / 2 + rest - small_flops + latent_norms


# Activations. -----------------------------------------------------------------------------------

# Large enough for the indices of the routing, which are not counted, to be small. torch's RMSNorm
# is not fused on the CPU and keeps more.
WIDE = {
    "hidden_size": 128,
    "kv_channels": 32,
    "ffn_hidden_size": 192,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 160,
    "normalization": "LayerNorm",
    "bias_activation_fusion": True,
    "attention_softmax_in_fp32": True,
}
NONE = {"scmoe_shortcut_position": "none"}


def recompute(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


KEPT = {
    "pos1-add": Case({"scmoe_shortcut_position": "pos1", "scmoe_combine": "add"}),
    "pos2-cg1": Case({"scmoe_shortcut_position": "pos2"}),
    "pos3-cg2": Case({"scmoe_shortcut_position": "pos3", "scmoe_combine": "cg2"}),
    "none": Case(NONE),
    "pos2-two-gates": Case(
        {"scmoe_dual_gating": "separate", "scmoe_combine": "add"},
        {"moe_shared_expert_intermediate_size": None},
    ),
    "pos2-shared-post-top2": Case(
        {"scmoe_shortcut_norm": "shared", "scmoe_post_norm": True}, {"moe_router_topk": 2}
    ),
    "pos2-no-overlap": Case({"scmoe_overlap": False}),
    "pos2-unfused": Case(host={"bias_activation_fusion": False}),
    "pos2-plain-mlp": Case(host=PLAIN_MLP | {"bias_activation_fusion": False}),
    "pos2-latent": Case(host=LATENT | {"q_lora_rank": 32, "qk_layernorm": True}),
    "pos2-bf16": Case(host={"bf16": True}),
    "pos2-capacity": Case(
        host={"moe_expert_capacity_factor": 1.5, "moe_pad_expert_input_to_capacity": True}
    ),
    "pos2-core-attention": Case(host=recompute("core_attn")),
    "pos2-mlp-moe": Case(host=recompute("mlp", "moe")),
    "none-mlp-moe": Case(NONE, recompute("mlp", "moe")),
    "pos2-shared-experts": Case(host=recompute("shared_experts")),
    "pos2-layernorm": Case(host=recompute("layernorm")),
}


def kept_bytes(case: Case) -> tuple[int, float]:
    """Measured and counted, of one micro-batch."""
    case = replace(case, host=WIDE | case.host)
    config = model_config(case, position_embedding_type="none")
    if case.host.get("bf16"):
        config.transformer.params_dtype = torch.bfloat16
    model = build(config).to(config.transformer.params_dtype)
    kept = KeptBytes([model])
    with kept.measure():
        output = loss(model)
    assert output.requires_grad
    size = model_size(config, SEQUENCE, BATCH)
    return kept.now, sum(operator.kept_bytes for _, operator in size.operators)


@pytest.mark.parametrize("name", KEPT)
def test_activations_are_what_autograd_keeps(name: str) -> None:
    measured, counted = kept_bytes(KEPT[name])
    assert counted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("name", ["pos2-cg1", "pos2-no-overlap"])
def test_shortcut_keeps_one_tensor_more(name: str) -> None:
    """The tap is kept by the main branch anyway; its normed copy is one [s, b, h] per unit, with
    the all-to-alls beside dense work or not."""
    units, fp32 = 2, 4
    more = kept_bytes(KEPT[name])[0] - kept_bytes(KEPT["none"])[0]
    indices = 0.05
    assert more / (units * fp32 * TOKENS * WIDE["hidden_size"]) == pytest.approx(1, rel=indices)


# What is not counted. ---------------------------------------------------------------------------

RUN = {
    "world_size": 8,
    "params_dtype": torch.bfloat16,
    "accumulate_allreduce_grads_in_fp32": True,
    "optimizer": "adam",
    "sgd_momentum": 0.9,
    "use_distributed_optimizer": True,
    "num_distributed_optimizer_instances": 2,
    "use_precision_aware_optimizer": False,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "fp8_param_gather": False,
    "gtp_weight_remat_size": 1,
}


@pytest.mark.parametrize(
    ("options", "bytes_per_parameter"),
    [
        ({}, (4, 12, 2)),
        ({"accumulate_allreduce_grads_in_fp32": False}, (2, 12, 2)),
        ({"params_dtype": torch.float32, "use_distributed_optimizer": False}, (4, 8, None)),
        ({"optimizer": "sgd"}, (4, 8, 2)),
        ({"optimizer": "sgd", "sgd_momentum": 0.0}, (4, 4, 2)),
    ],
)
def test_bytes_per_parameter(options: dict[str, Any], bytes_per_parameter: tuple) -> None:
    run = training_from_args(Namespace(**(RUN | options)), num_microbatches=4)
    found = (run.gradient_bytes, run.optimizer_bytes, run.optimizer_instances)
    assert found == bytes_per_parameter


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"optimizer": "muon"}, "--optimizer muon"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards"),
    ],
)
def test_other_state_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not counted"):
        training_from_args(Namespace(**(RUN | options)), num_microbatches=4)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"moe_latent_size": 8}, "latent MoE"),
        ({"softmax_type": "learnable"}, "a learned softmax offset"),
    ],
)
def test_other_parts_are_refused(host: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not counted"):
        model_size(model_config(Case(NONE, host)), SEQUENCE, BATCH)


def test_report_leaves_to_the_host_what_it_cannot_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = reporting(lambda args, num_microbatches, verbose: "the host's")
    assert report(Namespace()) == "the host's"  # a script without our options
    assert capsys.readouterr().out == ""
    config = model_config(Case(NONE, {"mtp_num_layers": 1}))
    monkeypatch.setattr("megatron_scmoe.planner.memory.model_config_from_args", lambda args: config)
    args = Namespace(scmoe_shortcut_position="none", seq_length=SEQUENCE, micro_batch_size=BATCH)
    assert report(args) == "the host's"
    assert capsys.readouterr().out == (
        "Theoretical memory as Megatron estimates it, unverified: multi-token prediction is not "
        "counted.\n"
    )


def test_throughput_leaves_the_options_alone() -> None:
    """The host writes num_query_groups into them."""
    config = model_config(CASES["pos2-no-gqa"])
    args = host_options(config)
    args.num_query_groups = 1
    training.num_floating_point_operations(args, BATCH)
    assert args.num_query_groups == 1


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ({"recompute_modules": ["core_attn"]}, "no communication buffers"),
        ({"recompute_modules": ["core_attn", "moe_act"]}, "recomputing moe_act is not counted"),
        ({"fp8": "hybrid"}, "because everything counts in the model's precision"),
        ({"transformer_impl": "transformer_engine"}, "not yet measured with Transformer Engine"),
    ],
)
def test_what_is_a_bound_or_unmeasured_says_so(options: dict[str, Any], remark: str) -> None:
    config = model_config(Case(host=recompute("core_attn")))
    for name, value in options.items():
        setattr(config.transformer, name, value)
    assert report_lines(model_size(config, SEQUENCE, BATCH), [])[-1].endswith(remark)
