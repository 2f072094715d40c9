"""The modelling code for Hugging Face: equal to the equations in float64 and to the host's layers.

Weights go by the table of names below, which is written by hand and shares no code with the
converter.
"""

import ast
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers import modeling_flash_attention_utils as flash

from megatron_scmoe.huggingface import configuration_scmoe, modeling_scmoe
from megatron_scmoe.huggingface.configuration_scmoe import ScMoEConfig
from megatron_scmoe.huggingface.modeling_scmoe import (
    ScMoEForCausalLM,
    ScMoEModel,
    ScMoESparseMoeBlock,
    ScMoETopKRouter,
    load_balancing_loss,
)
from megatron_scmoe.model.attention import scale_latents
from tests import reference
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block

VOCABULARY = 96
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "rope_interleaved": True,
    "qk_layernorm": True,
}
MOEPP = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}
GPT2 = {
    "position_embedding": "learned",
    "norm": "layernorm",
    "gated_linear_unit": False,
    "hidden_act": "gelu",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "combine": "cg2",
}
BIASED = {"scoring_func": "sigmoid", "norm_topk_prob": True, "expert_bias": True}
MODELS = {
    "gqa": {},
    "latent": {**LATENT, **MOEPP, **BIASED, "shortcut_position": "pos3", "shortcut_norm": "shared"},
    "gpt2": GPT2,
    "stock": {"shortcut_position": "none", "shared_expert_intermediate_size": 0},
    "residual": {**MOEPP, "gating_residual": True, "gate_layers": 2, "renormalise": True},
    "dual": {
        "num_experts_per_tok": 1,
        "dual_gating": "separate",
        "shared_expert_intermediate_size": 0,
    },
}


def model(**fields: Any) -> ScMoEForCausalLM:
    torch.manual_seed(0)
    made = ScMoEForCausalLM(ScMoEConfig(**{**TINY, **fields})).eval()
    for name, tensor in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor)
    for name, tensor in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(tensor, std=0.1)
    return made


def tokens(seed: int = 0, batch: int = 2, length: int = 8) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=random)


# Weights by the names of the layers' own, as in tests/reference.py. -----------------------------

NAMES = {
    "pre_mlp_layernorm": "post_attention_layernorm",
    "shortcut_layernorm": "mlp.shortcut_layernorm",
    "post_layernorm": "mlp.post_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.router.": "mlp.gate.",
    "mlp.current_router.weight": "mlp.current_gate.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
    "mlp.at_home.constant": "mlp.zero_computation.constant",
}
LATENT_NAMES = {"self_attention.q_layernorm": "self_attn.q_a_layernorm"}


def of_layer(layer: dict[str, Tensor], config: ScMoEConfig, number: int) -> dict[str, Tensor]:
    """One attention layer's parameters, or their gradients, under ScMoEModel's names."""
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, value in layer.items():
        if name.startswith("self_attention.linear_qkv."):
            kind, size = name.rpartition(".")[2], config.head_dim
            groups = value.unflatten(0, (config.num_key_value_heads, -1, size))
            for letter, rows in zip(
                "qkv", groups.split((groups.shape[1] - 2, 1, 1), 1), strict=True
            ):
                found[f"self_attn.{letter}_proj.{kind}"] = rows.flatten(0, 2)
        elif ".local_experts." in name:
            _, _, end = name.split(".local_experts.")[1].partition(".")
            experts.setdefault(end, []).append(value)
        elif ".linear_fc" in name:
            where, _, end = name.replace("shared_experts", "shared_expert").rpartition(".linear_fc")
            _, kind = end.split(".")
            if end.startswith("2"):
                found[f"{where}.down_proj.{kind}"] = value
            elif config.gated_linear_unit:
                for part, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                    found[f"{where}.{part}_proj.{kind}"] = rows
            else:
                found[f"{where}.up_proj.{kind}"] = value
        else:
            names = NAMES if config.kv_lora_rank is None else {**NAMES, **LATENT_NAMES}
            old = next((old for old in names if name.startswith(old)), None)
            found[name if old is None else name.replace(old, names[old])] = value
    for end, values in experts.items():
        projection, kind = end.split(".")
        new = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}[projection]
        found[f"mlp.experts.{new}" + ("_bias" if kind == "bias" else "")] = torch.stack(values)
    return {f"layers.{number}.{name}": value for name, value in found.items()}


def of_units(units: list[dict[str, Tensor]], config: ScMoEConfig) -> dict[str, Tensor]:
    """Units of one or two attention layers under ScMoEModel's names."""
    found: dict[str, Tensor] = {}
    number = 0
    for unit in units:
        halves: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, value in unit.items():
            halves[not name.startswith("dense_layer.")][name.removeprefix("dense_layer.")] = value
        for half in filter(None, halves):
            found |= of_layer(half, config, number)
            number += 1
    return found


# The equations. ---------------------------------------------------------------------------------

SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_topk": 2}
EQUATIONS: dict[str, dict[str, Any]] = {
    "pos1": {"position": "pos1", "combine": "cg1", "shortcut_norm": "own"},
    "pos1 everywhere": {"position": "pos1", "combine": "cg2", "shortcut_norm": "shared"},
    "pos2": {"combine": "cg1", "shortcut_norm": "own", "moe_router_topk": 1},
    "pos2 shared": {"combine": "add", "shortcut_norm": "shared", "post_norm": True},
    "pos3": {"position": "pos3", "combine": "cg2", "shortcut_norm": "own"},
    "pos3 shared": {"position": "pos3", "shortcut_norm": "shared", "moe_router_pre_softmax": False},
    "gelu": {"activation": "gelu", "normalization": "LayerNorm", "post_norm": True},
    "sigmoid": {**SIGMOID, "moe_router_topk_scaling_factor": 2.5, "rotary_percent": 0.5},
    "no positions": {"rotary_base": None, "num_query_groups": 4},
    "dual": {"dual_gating": "shared"},
    "dual, separate": {"dual_gating": "separate", "position": "pos3", "shortcut_norm": "shared"},
    "dual, not distinct": {"dual_gating": "shared", "position": "pos1", "distinct_experts": False},
}


def configs(case: str) -> tuple[reference.ReferenceConfig, ScMoEConfig, bool]:
    equations = {"moe_router_topk": 2, "rotary_base": 10000.0, **EQUATIONS[case]}
    dual = equations.get("dual_gating", "none")
    if dual != "none":
        equations["moe_router_topk"] = 1
    wanted = reference.ReferenceConfig(
        hidden_size=16,
        num_attention_heads=4,
        kv_channels=4,
        ffn_hidden_size=24,
        num_moe_experts=4,
        moe_ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=20 if dual == "none" else None,
        rotary_dtype=torch.float32,
        **{"num_query_groups": 2, **equations},
    )
    pairs = case != "pos1 everywhere"
    found = ScMoEConfig(
        **{
            **TINY,
            "num_key_value_heads": wanted.num_query_groups,
            "num_experts_per_tok": wanted.moe_router_topk,
            "shared_expert_intermediate_size": wanted.moe_shared_expert_intermediate_size or 0,
            "dual_gating": dual,
            "distinct_experts": wanted.distinct_experts,
            "moe_layers": None if pairs else [0, 1],
            "num_hidden_layers": 4 if pairs else 2,
            "shortcut_position": wanted.position,
            "combine": wanted.combine,
            "shortcut_norm": wanted.shortcut_norm,
            "post_norm": wanted.post_norm,
            "scoring_func": wanted.moe_router_score_function,
            "pre_softmax": wanted.moe_router_pre_softmax,
            "norm_topk_prob": wanted.moe_router_score_function == "sigmoid",
            "expert_bias": wanted.moe_router_score_function == "sigmoid",
            "routed_scaling_factor": wanted.moe_router_topk_scaling_factor or 1.0,
            "gated_linear_unit": wanted.activation == "swiglu",
            "hidden_act": "silu" if wanted.activation == "swiglu" else "gelu",
            "norm": wanted.normalization.lower(),
            "position_embedding": "none" if wanted.rotary_base is None else "rope",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": wanted.rotary_percent,
            },
        }
    )
    return wanted, found, pairs


@pytest.mark.parametrize("case", EQUATIONS)
def test_equals_the_equations(case: str) -> None:
    """Output and every gradient, in float64."""
    equations, config, pairs = configs(case)
    shapes = reference.unit_shapes(equations, dense_half=pairs, expert_bias=config.expert_bias)
    units = [reference.random_parameters(shapes, seed) for seed in (1, 2)]
    last = reference.random_parameters(
        {"final_" + name: (16,) for name in ("layernorm.weight", "layernorm.bias")}, 3
    )
    if config.norm == "rmsnorm":
        del last["final_layernorm.bias"]
    random = torch.Generator().manual_seed(4)
    states, weight = torch.randn(2, SEQUENCE, BATCH, 16, dtype=torch.float64, generator=random)
    states.requires_grad_()
    wanted = reference.reference_block(units, states, equations, 2 if pairs else 1, last)
    leaves = [*units, last, {"states": states}]
    flat = {f"{i}.{name}": value for i, leaf in enumerate(leaves) for name, value in leaf.items()}
    gradients = reference.gradients((wanted * weight).sum(), flat)

    config._experts_implementation = "eager"  # grouped_mm knows no float64
    found_model = ScMoEModel(config).double()
    names = {name.replace("final_layernorm", "norm"): value for name, value in last.items()}
    missing, unknown = found_model.load_state_dict(
        {**of_units(units, config), **names}, strict=False
    )
    assert (missing, unknown) == (["embed_tokens.weight"], [])
    embeds = states.detach().transpose(0, 1).requires_grad_()
    found = found_model(inputs_embeds=embeds).last_hidden_state
    (found * weight.transpose(0, 1)).sum().backward()

    torch.testing.assert_close(found.transpose(0, 1), wanted, rtol=1e-10, atol=1e-10)
    by_unit: list[dict[str, Tensor]] = [{}, {}, {}, {}]
    for name, value in gradients.items():
        number, _, rest = name.partition(".")
        by_unit[int(number)][rest] = value
    assert embeds.grad is not None
    torch.testing.assert_close(
        embeds.grad.transpose(0, 1), by_unit[3]["states"], rtol=1e-10, atol=1e-10
    )
    expected = of_units(by_unit[:2], config)
    expected |= {name.replace("final_layernorm", "norm"): g for name, g in by_unit[2].items()}
    for name, parameter in found_model.named_parameters():
        if name != "embed_tokens.weight":
            assert parameter.grad is not None, name
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: n + m
            )


def test_zero_computation_experts_equal_the_equations() -> None:
    """MoE++ (1), (3)-(5), token by token, with every kind chosen."""
    torch.manual_seed(1)
    config = ScMoEConfig(**{**TINY, **MOEPP, "shortcut_norm": "shared", "num_experts_per_tok": 3})
    block = ScMoESparseMoeBlock(config).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, z = torch.randn(2, BATCH, 5, 16, dtype=torch.float64)
    z.requires_grad_()
    config._experts_implementation = "eager"
    found = block(x, block.choose(x, z))

    chosen, rows = set(), []
    for token in z.flatten(0, 1):
        scores = (block.gate.weight @ token).softmax(-1)
        row = torch.zeros_like(token)
        for expert in scores.topk(3).indices.tolist():
            chosen.add(expert)
            if expert < 4:
                gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
                output = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            elif expert == 4:
                output = torch.zeros_like(token)
            elif expert == 5:
                output = token
            else:
                constant = block.zero_computation.constant
                mix = (constant.mix_weight[expert - 6] @ token).softmax(-1)
                output = mix[0] * token + mix[1] * constant.vector[expert - 6]
            row = row + scores[expert] * output
        rows.append(row)
    assert chosen == set(range(8))
    wanted = torch.stack(rows).view_as(z) + block.shared_expert(x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    leaves = [z, *block.parameters()]
    ours = torch.autograd.grad(found.square().sum(), leaves, materialize_grads=True)
    theirs = torch.autograd.grad(wanted.square().sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("score", ["softmax", "post", "sigmoid", "sqrtsoftplus", "groups"])
def test_the_router_equals_megatrons(score: str) -> None:
    torch.manual_seed(2)
    groups = {"n_group": 4, "topk_group": 2} if score == "groups" else {}
    function = {"post": "softmax", "groups": "sigmoid"}.get(score, score)
    config = ScMoEConfig(
        **{
            **TINY,
            **groups,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "scoring_func": function,
            "pre_softmax": score != "post",
            "norm_topk_prob": function != "softmax",
            "expert_bias": function != "softmax",
            "routed_scaling_factor": 1.5,
        }
    )
    router = ScMoETopKRouter(config)
    torch.nn.init.normal_(router.weight)
    bias = None
    if config.expert_bias:
        bias = torch.nn.init.normal_(router.e_score_correction_bias, std=0.3)
    logits, weights, experts = router(torch.randn(64, 16))
    wanted, _ = topk_routing_with_score_function(
        logits,
        4,
        use_pre_softmax=config.pre_softmax,
        num_groups=config.n_group,
        group_topk=config.topk_group,
        scaling_factor=1.5,
        score_function=function,
        expert_bias=bias,
    )
    assert torch.equal(torch.zeros_like(logits).scatter(1, experts, weights), wanted)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balancing_loss_is_megatrons(score: str) -> None:
    """Summed over layers, without padding; tau weighs zero-computation experts (MoE++, (7))."""
    equations = replace(
        configs("pos1")[0], moe_router_score_function=score, moe_router_topk=2, num_moe_experts=8
    )
    random = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(3, 2 * 5, 8, generator=random))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    kept = [logits[mask.flatten().bool()] for logits in layers]
    fields = {**TINY, **MOEPP, "scoring_func": score}
    routers = [ScMoETopKRouter(ScMoEConfig(**fields))] * 3
    wanted = sum(reference.load_balancing_loss(logits, equations, 1.0) for logits in kept)
    torch.testing.assert_close(load_balancing_loss(layers, routers, mask), wanted)

    routers = [ScMoETopKRouter(ScMoEConfig(**fields, router="heterogeneous"))] * 3
    wanted = torch.zeros(())
    for logits in kept:
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        scores = scores / scores.sum(-1, keepdim=True)
        shares = torch.zeros(8)
        for token in scores:
            shares[token.topk(2).indices] += 1 / (2 * len(scores))
        eta = torch.tensor([1.0] * 4 + [0.75] * 4)
        wanted = wanted + 8 * (eta * shares * scores.mean(0)).sum()
    torch.testing.assert_close(load_balancing_loss(layers, routers, mask), wanted)


def test_the_balancing_loss_of_longcat() -> None:
    """(3)-(5) of arXiv:2509.01322, by loops, with the selection that the bias moves."""
    longcat = {"router": "longcat", "expert_bias": True, "routed_topk": 1.5, "balance_groups": 2}
    router = ScMoETopKRouter(ScMoEConfig(**{**TINY, **longcat, "copy_experts": 2}))
    torch.manual_seed(0)
    logits, bias = torch.randn(10, 6), router.e_score_correction_bias.normal_(std=0.3)
    groups = [[0, 1], [2, 3], [4, 5]]
    scores = logits.softmax(-1)
    wanted = torch.zeros(())
    for group, share in zip(groups, (1.5 / 2, 1.5 / 2, 2 - 1.5), strict=True):
        selected = sum(
            expert in group for row in scores for expert in (row + bias).topk(2).indices.tolist()
        )
        mean_score = scores[:, group].sum(1).mean()
        wanted = wanted + selected / 10 / share * mean_score
    torch.testing.assert_close(load_balancing_loss([logits], [router]), wanted)


def test_the_balancing_losses_of_two_gates() -> None:
    """The second one counts what it selects among the experts that the first has left."""
    dual = {"num_experts_per_tok": 1, "shared_expert_intermediate_size": 0, "num_experts": 8}
    equations = replace(configs("dual")[0], num_moe_experts=8, moe_router_topk=1)
    gate = {"scoring_func": "sigmoid", "expert_bias": True, "dual_gating": "shared"}
    moe = ScMoESparseMoeBlock(ScMoEConfig(**{**TINY, **dual, **gate}))
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 10, 8, generator=random)
    bias = moe.gate.e_score_correction_bias.normal_(std=0.5, generator=random)
    equations = replace(equations, moe_router_score_function="sigmoid")
    wanted = torch.zeros(())
    for first, second in logits.split(2):
        taken = [[int(row.argmax())] for row in first.sigmoid() + bias]
        wanted = wanted + reference.load_balancing_loss(first, equations, 1.0)
        wanted = wanted + reference.load_balancing_loss(second, equations, 1.0, taken)
    found = load_balancing_loss(tuple(logits), [*moe.routers, *moe.routers])
    torch.testing.assert_close(found, wanted)


# The host's layers. -----------------------------------------------------------------------------

MEGATRON_LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 8,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "num_query_groups": 4,
}
# Options of the host, of ours, and fields of the model here.
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "latent": (
        {**MEGATRON_LATENT, "q_lora_rank": 12, "qk_layernorm": True, "rope_type": "rope"},
        {},
        {**LATENT, "num_key_value_heads": 4},
    ),
    "latent, YaRN, no query latent": (
        {
            **MEGATRON_LATENT,
            "q_lora_rank": None,
            "rotary_scaling_factor": 4,
            "original_max_position_embeddings": 4,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
        },
        {},
        {
            **LATENT,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "qk_layernorm": False,
            "softmax_scale": (0.1 * 0.4 * math.log(4) + 1) ** 2 / 8**0.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 4,
                "attention_factor": (0.07 * math.log(4) + 1) / (0.04 * math.log(4) + 1),
            },
        },
    ),
    "biases": (
        {
            "add_qkv_bias": True,
            "qk_layernorm": True,
            "gated_linear_unit": False,
            "activation_func": torch.nn.functional.gelu,
            "normalization": "LayerNorm",
        },
        {},
        {
            "attention_bias": True,
            "qk_layernorm": True,
            "gated_linear_unit": False,
            "hidden_act": "gelu",
            "norm": "layernorm",
        },
    ),
    "MoE++": (
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
        {
            "scmoe_router": "heterogeneous",
            "scmoe_experts_at_home": {"zero": 1, "copy": 1, "constant": 2},
            "scmoe_gating_residual": True,
            "scmoe_gate_layers": 2,
            "scmoe_renormalise": True,
            "scmoe_input_scale": 2.0,
        },
        {
            **MOEPP,
            "router": "heterogeneous",
            "gating_residual": True,
            "gate_layers": 2,
            "renormalise": True,
            "input_scale": 2.0,
        },
    ),
    "C2R": (
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {"scmoe_router": "c2r", "scmoe_c2r_top_t": 1},
        {"router": "c2r", "c2r_top_t": 1, "scoring_func": "sigmoid", "expert_bias": True}
        | {"norm_topk_prob": True},
    ),
    "longcat": (
        {
            **MEGATRON_LATENT,
            "q_lora_rank": 12,
            "qk_layernorm": True,
            "rope_type": "rope",
            "moe_router_topk_scaling_factor": 1.5,
        },
        {
            "scmoe_shortcut_norm": "shared",
            "scmoe_router": "longcat",
            "scmoe_experts_at_home": {"copy": 2},
            "scmoe_scaled_experts": "routed",
            "scmoe_mla_scale": True,
        },
        {
            **LATENT,
            "num_key_value_heads": 4,
            "shortcut_norm": "shared",
            "router": "longcat",
            "expert_bias": True,
            "copy_experts": 2,
            "routed_scaling_factor": 1.5,
            "scaled_experts": "routed",
            "mla_scale": True,
        },
    ),
}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("case", LAYERS)
def test_equals_the_hosts_layers(case: str) -> None:
    """What the equations leave out: latent attention, YaRN, QKV biases, norms of Q and K, MoE++'s
    and LongCat-Flash's routers."""
    host, scmoe, fields = LAYERS[case]
    block = build_block(
        Case(
            scmoe={"scmoe_combine": "add", **scmoe},
            host={**host, "moe_router_topk": 2, "moe_ffn_hidden_size": 16},
        )
    )
    if scmoe.get("scmoe_mla_scale"):
        scale_latents(block)
    torch.manual_seed(3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for layer in block.layers:
        if layer.mlp.router.expert_bias is not None:
            layer.mlp.router.expert_bias.normal_(std=0.3)
        if scmoe.get("scmoe_router") == "c2r":
            others = [[2, 3, 1], [3, 0, 2], [0, 1, 3], [1, 2, 0]]
            layer.mlp.router.partners.copy_(torch.tensor(others))
    states = torch.randn(SEQUENCE, BATCH, 16, dtype=torch.float64)
    wanted = run_block(block, states)

    config = ScMoEConfig(**{**TINY, **fields})
    config._experts_implementation = "eager"
    found = ScMoEModel(config).double()
    units: list[dict[str, Tensor]] = [{}, {}]
    names = {}
    for name, value in block.state_dict().items():
        if not isinstance(value, Tensor) or name.endswith("tokens_per_expert"):
            continue
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            units[int(number)][rest] = value
        else:
            names[name.replace("final_layernorm", "norm")] = value
    missing, unknown = found.load_state_dict({**of_units(units, config), **names}, strict=False)
    assert (missing, unknown) == (["embed_tokens.weight"], [])
    output = found(inputs_embeds=states.transpose(0, 1)).last_hidden_state
    # The host computes scores of the router and angles in float32.
    torch.testing.assert_close(output.transpose(0, 1), wanted, rtol=1e-5, atol=1e-5)


# transformers' own models. ----------------------------------------------------------------------


def test_a_stock_model_is_mixtral() -> None:
    """With Mixtral's weights under Mixtral's names."""
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    torch.manual_seed(0)
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            **sizes,
            num_hidden_layers=2,
            num_key_value_heads=2,
            intermediate_size=16,
            num_local_experts=4,
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).eval()
    stock = {"shortcut_position": "none", "shared_expert_intermediate_size": 0}
    layers = {"num_hidden_layers": 2, "moe_layers": [0, 1], "pre_softmax": False}
    made = model(**stock, **layers)
    made.load_state_dict(mixtral.state_dict())
    torch.testing.assert_close(made(tokens()).logits, mixtral(tokens()).logits)


def test_a_longcat_model_is_longcat_flash() -> None:
    """Its second MLP is the shared expert here, its router the MoE's in the layer behind."""
    sizes = {name: LATENT[name] for name in LATENT if name.endswith(("rank", "dim"))}
    sizes |= {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    torch.manual_seed(0)
    longcat = LongcatFlashForCausalLM(
        LongcatFlashConfig(
            **sizes,
            num_layers=2,
            ffn_hidden_size=24,
            expert_ffn_hidden_size=16,
            n_routed_experts=4,
            zero_expert_num=2,
            moe_topk=2,
            head_dim=4,
            routed_scaling_factor=1.5,
            rms_norm_eps=1e-6,
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).eval()
    for router in (layer.mlp.router for layer in longcat.model.layers):
        router.e_score_correction_bias.normal_(std=0.1)
    found: dict[str, Tensor] = {}
    for name, value in longcat.state_dict().items():
        names = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(?:([01])\.)?(.*)", name)
        if names is None:
            found[name] = value
            continue
        unit, module, half, rest = names.groups()
        if module == "mlps":
            module = ("mlp", "mlp.shared_expert")[int(half)]
        rest = rest.replace("router.classifier.", "gate.").replace("router.", "gate.")
        if rest == "experts.gate_up_proj":
            value = value[:4]  # behind them rows of zero experts, which nothing reads
        found[f"model.layers.{2 * int(unit) + int(half or 1)}.{module}.{rest}"] = value
    made = model(
        **LATENT,
        num_key_value_heads=4,
        shared_expert_intermediate_size=24,
        shortcut_norm="shared",
        router="longcat",
        expert_bias=True,
        copy_experts=2,
        routed_scaling_factor=1.5,
        mla_scale=True,
        rms_norm_eps=1e-6,
    )
    made.load_state_dict(found)
    torch.testing.assert_close(
        made(tokens()).logits, longcat(tokens()).logits, rtol=1e-4, atol=1e-4
    )


# What transformers does with a model. -----------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_cached_equals_uncached(kind: str) -> None:
    """A prompt, then several tokens, then one: the logits of the whole sequence."""
    made, ids = model(**MODELS[kind]), tokens()
    with torch.no_grad():
        wanted = made(ids).logits
        cache, found = None, []
        for part in ids.split((4, 3, 1), dim=1):
            output = made(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    assert len(cache) == TINY["num_hidden_layers"]
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_padded_batch_generates_what_its_rows_do(kind: str) -> None:
    made, long = model(**MODELS[kind]), tokens(batch=1)
    short = long[:, 3:]
    padded = torch.cat([long, torch.cat([torch.zeros_like(long[:, :3]), short], dim=1)])
    mask = (padded != 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    both = made.generate(padded, attention_mask=mask, **options)
    alone = [made.generate(row, **options)[:, row.shape[1] :] for row in (long, short)]
    assert torch.equal(both[:, 8:], torch.cat(alone))
    assert torch.equal(both, made.generate(padded, attention_mask=mask, use_cache=False, **options))
    fixed = {**options, "cache_implementation": "static"}
    assert torch.equal(both, made.generate(padded, attention_mask=mask, **fixed))
    torch.manual_seed(1)
    sampled = made.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=True, top_k=50)
    assert sampled.shape == both.shape and not torch.equal(sampled, both)


@pytest.mark.parametrize("kind", MODELS)
def test_a_directory_holds_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Loaded by the Auto classes with the code beside the weights; saved and loaded again."""
    made, ids = model(**MODELS[kind]), tokens()
    wanted = made(ids).logits
    made.save_pretrained(tmp_path / "1", max_shard_size="20KB")
    assert (tmp_path / "1" / "model.safetensors.index.json").exists()
    load = AutoModelForCausalLM.from_pretrained
    again = load(tmp_path / "1", trust_remote_code=True).eval()
    assert type(again).__module__.startswith("transformers_modules.")
    assert torch.equal(again(ids).logits, wanted)
    again.save_pretrained(tmp_path / "2")
    assert torch.equal(load(tmp_path / "2", trust_remote_code=True).eval()(ids).logits, wanted)
    saved = json.loads((tmp_path / "2" / "config.json").read_text())
    assert saved["auto_map"] == configuration_scmoe.AUTO_MAP
    decoder = AutoModel.from_pretrained(tmp_path / "2", trust_remote_code=True).eval()
    assert torch.equal(decoder(ids).last_hidden_state @ again.lm_head.weight.T, wanted)
    for dtype in (torch.bfloat16, torch.float16):
        half = load(tmp_path / "2", trust_remote_code=True, dtype=dtype)
        state = half.state_dict()
        in_float32 = [name for name, value in state.items() if value.dtype == torch.float32]
        assert in_float32 == [name for name in state if re.search(r"\.(current_)?gate\.", name)]
        assert half(ids).logits.dtype == dtype


def test_experts_on_disk_have_names_of_their_own(tmp_path: Path) -> None:
    for gated, projections in ((True, 3), (False, 2)):
        made = model(gated_linear_unit=gated, mlp_bias=True)
        made.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if ".mlp.experts." in name]  # noqa: SIM118
            assert len(names) == 2 * 4 * projections * 2
            up = file.get_tensor("model.layers.3.mlp.experts.2.up_proj.weight")
        assert torch.equal(up, made.model.layers[3].mlp.experts.gate_up_proj[2, -16:])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["gqa", "latent"])
def test_recomputed_gradients_are_the_same(kind: str, reentrant: bool) -> None:
    found = []
    for recomputed in (False, True):
        made, ids = model(**MODELS[kind]).train(), tokens()
        if recomputed:
            made.gradient_checkpointing_enable({"use_reentrant": reentrant})
        made(ids, labels=ids).loss.backward()
        found.append({name: weight.grad for name, weight in made.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("kind", MODELS)
def test_implementations_agree(kind: str) -> None:
    """Of attention, and of experts, with zero-computation experts and biases too."""
    made, ids = model(**MODELS[kind]), tokens()
    outputs = []
    for attention, experts in (
        ("eager", "eager"),
        ("sdpa", "grouped_mm"),
        ("sdpa", "batched_mm"),
    ):
        made.set_attn_implementation(attention)
        made.set_experts_implementation(experts)
        made.zero_grad()
        output = made(ids, labels=ids)
        output.loss.backward()
        outputs.append([output.logits, *(weight.grad for weight in made.parameters())])
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


def flash_kernel(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **_: Any) -> Tensor:
    """What FlashAttention computes, causal, [b, s, n, d]; it wants heads of one size."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    query, key, value = (heads.transpose(1, 2) for heads in (q, k, v))
    lengths = query.shape[2], key.shape[2]
    seen = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0])
    more = {"scale": softmax_scale, "enable_gqa": True}
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, **more)
    return found.transpose(1, 2)


def flash_kernel_of_samples(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **others: Any
) -> Tensor:
    """The same for samples one behind the other, [tokens, n, d]."""
    queries, *pairs = (
        tokens.split(ends.diff().tolist())
        for tokens, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    each = zip(queries, *pairs, strict=True)
    return torch.cat([flash_kernel(*(heads[None] for heads in one), **others)[0] for one in each])


@pytest.mark.parametrize("kind", MODELS)
def test_flash_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface, with left padding, its kernels replaced by torch's attention."""
    kernels = (flash_kernel, flash_kernel_of_samples, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda *_: (kernels, (known_options, None))
    )
    made, ids = model(**MODELS[kind]), tokens()
    ids[1, :3] = 0
    mask = (ids != 0).long()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = []
    for implementation in ("sdpa", "flash_attention_2"):
        made.config._attn_implementation_internal = implementation
        with torch.no_grad():
            logits = made(ids, attention_mask=mask).logits[mask.bool()]
        found.append((logits, made.generate(ids, attention_mask=mask, **options)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1][1], found[0][1])


def known_options(softmax_scale: float, **_: Any) -> dict[str, Any]:
    return {"softmax_scale": softmax_scale}


@pytest.mark.parametrize(
    ("kind", "gates"),
    [
        (MOEPP, ["gate"]),
        (MODELS["dual"] | {"dual_gating": "shared"}, ["gate", "gate"]),
        (MODELS["dual"], ["gate", "current_gate"]),
    ],
    ids=["MoE++", "one gate asked twice", "two gates"],
)
def test_router_logits_and_the_balancing_loss(kind: dict[str, Any], gates: list[str]) -> None:
    made, ids = model(router_aux_loss_coef=0.5, **kind), tokens()
    plain = made(ids, labels=ids)
    mask = torch.ones_like(ids)
    output = made(ids, labels=ids, attention_mask=mask, output_router_logits=True)
    experts = made.model.layers[1].mlp.gate.weight.shape[0]
    assert [logits.shape for logits in output.router_logits] == [(16, experts)] * 2 * len(gates)
    routers = [getattr(made.model.layers[layer].mlp, gate) for layer in (1, 3) for gate in gates]
    wanted = plain.loss + 0.5 * load_balancing_loss(output.router_logits, routers)
    torch.testing.assert_close(output.loss, wanted)
    assert made(ids, output_hidden_states=True).hidden_states[-1].shape == (2, 8, 16)
    made.set_attn_implementation("eager")
    assert len(made(ids, output_attentions=True).attentions) == TINY["num_hidden_layers"]


def test_the_router_stays_in_float32_under_autocast() -> None:
    made, ids = model(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        output = made(ids, output_router_logits=True)
    assert {logits.dtype for logits in output.router_logits} == {torch.float32}


def test_full_fine_tuning_with_the_trainer(tmp_path: Path) -> None:
    made, ids = model(router_aux_loss_coef=0.01, output_router_logits=True), tokens(batch=8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1
    )
    trainer = Trainer(model=made, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    trainer.save_model(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    assert torch.equal(again(ids).logits, made.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["gqa", "gpt2"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_the_trainer_resumes(kind: str, shard: str, tmp_path: Path) -> None:
    """It puts a checkpoint's tensors into the model by `load_state_dict`, experts too."""
    made, ids = model(**MODELS[kind]), tokens()
    made.save_pretrained(tmp_path / "checkpoint-1", max_shard_size=shard)
    other = model(**{**MODELS[kind], "initializer_range": 0.1})
    wanted = made(ids).logits
    assert not torch.allclose(other(ids).logits, wanted, atol=0.1)
    trainer = Trainer(model=other, args=TrainingArguments(str(tmp_path), use_cpu=True))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(other(ids).logits, wanted)


def test_experts_that_a_file_lacks_are_named() -> None:
    made = model()
    (name,) = [x for x in made.state_dict() if x.endswith("experts.down_proj")][:1]
    layer = name.removesuffix("down_proj")
    whole = dict(made.state_dict())
    into, out = whole.pop(f"{layer}gate_up_proj"), whole.pop(name)
    for expert, (both, down) in enumerate(zip(into, out, strict=True)):
        gate, up = both.chunk(2)
        values = {"gate": gate, "up": up, "down": down}
        whole |= {f"{layer}{expert}.{part}_proj.weight": value for part, value in values.items()}
    made.load_state_dict(dict(whole))
    lacking = {key: value for key, value in whole.items() if key != f"{layer}1.up_proj.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.up_proj\.weight"):
        made.load_state_dict(dict(lacking))
    made.load_state_dict(dict(lacking), strict=False)
    with pytest.raises(RuntimeError, match=r"1\.up_proj\.weight is \[1, "):
        made.load_state_dict(lacking | {f"{layer}1.up_proj.weight": up[:1]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*99\.up_proj\.weight"):
        made.load_state_dict(whole | {f"{layer}99.up_proj.weight": up})


def test_low_rank_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made, ids = model(), tokens()
    wanted = made(ids).logits
    adapters = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "up_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(made, adapters)
    torch.testing.assert_close(tuned(ids).logits, wanted)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
    changed = tuned(ids).logits
    assert not torch.allclose(changed, wanted, atol=1e-3)
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, changed)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, changed, rtol=1e-4, atol=1e-4)


def test_a_model_over_several_devices(tmp_path: Path) -> None:
    """Layers apart: what the routed experts read crosses from one to the next."""
    made, ids = model(**MODELS["latent"]), tokens()
    made.save_pretrained(tmp_path)
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    where |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where |= {"model.layers.2": "disk", "model.layers.3": "cpu"}
    apart = AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, device_map=where, offload_folder=str(tmp_path / "off")
    ).eval()
    torch.testing.assert_close(apart(ids).logits, made(ids).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"combine": "cg3"}, "combine is 'cg3', and this modeling_scmoe.py knows add, cg1, cg2"),
        ({"moe_layers": [1, 9]}, r"moe_layers \[1, 9\] are not all below num_hidden_layers 4"),
        ({"moe_layers": [1, 2]}, "layer 2 of moe_layers has no dense layer in front"),
        ({"combine": "cg1", "shared_expert_intermediate_size": 0}, "cg1 weighs a shared expert"),
        ({"expert_bias": True, "pre_softmax": False}, "set pre_softmax"),
        ({"kv_lora_rank": 8}, "wants qk_nope_head_dim, qk_rope_head_dim and v_head_dim"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScMoEConfig(**{**TINY, **fields})


def test_the_files_stand_alone() -> None:
    """They are copied beside the weights."""
    for module in (configuration_scmoe, modeling_scmoe):
        assert module.__file__ is not None
        imported = set()
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or "").split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
        own = {".configuration_scmoe"} if module is modeling_scmoe else set()
        libraries = {"packaging", "torch", "transformers"}
        assert imported - own - libraries <= {"collections", "re", "typing"}
