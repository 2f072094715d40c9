"""LongCat-Flash: a bias that selects, its control, the loss of groups, and the whole layer.

The equations of arXiv:2509.01322 as loops over tokens in float64, output and every gradient; the
layer against the modules of `transformers`, in float32.
"""

from fractions import Fraction
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from transformers.models.longcat_flash import modeling_longcat_flash as hf

from megatron_scmoe.model.attention import scale_latents
from megatron_scmoe.model.routing import ROUTERS
from megatron_scmoe.model.routing.longcat import update_biases
from megatron_scmoe.run.router_bias import DECAYS
from tests.models import SEQUENCE, Case, run_block
from tests.unit_tests.test_variants import (
    EXPERTS,
    HIDDEN,
    MOE,
    K,
    assert_close,
    by_stages,
    gradients,
    hidden_states,
    toy_block,
)

IDENTITY = 2
COLUMNS = EXPERTS + IDENTITY
FACTOR = 2.0  # exact in the router's float32
LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}


def case(position: str = "pos2", host: dict[str, Any] | None = None, **scmoe: Any) -> Case:
    return Case(
        scmoe={
            "scmoe_shortcut_position": position,
            "scmoe_combine": "add",
            "scmoe_shortcut_norm": "shared",
            "scmoe_router": "longcat",
            "scmoe_experts_at_home": {"copy": IDENTITY},
            **scmoe,
        },
        host={"moe_router_topk": K, "moe_router_topk_scaling_factor": FACTOR, **(host or {})},
    )


def scores_of(moe: Any, token: Tensor) -> Tensor:
    logits = moe.router.weight.double() @ token
    return logits.softmax(-1, dtype=torch.float32).double()


def chosen(moe: Any, token: Tensor) -> list[int]:
    """The K largest of score and bias."""
    return (scores_of(moe, token) + moe.router.expert_bias).topk(K).indices.tolist()


def routed(moe: Any, z: Tensor, scaled: str) -> Tensor:
    """sum_i g_i E_i(z) (1), token by token, E_i(z) = z at home."""
    rows = []
    for token in z.flatten(0, 1):
        row, scores = torch.zeros_like(token), scores_of(moe, token)
        for expert in chosen(moe, token):
            factor = FACTOR if expert < EXPERTS or scaled == "all" else 1.0
            output = token
            if expert < EXPERTS:
                output = moe.experts.local_experts[expert](token[None, None])[0][0, 0]
            row = row + factor * scores[expert] * output
        rows.append(row)
    return torch.stack(rows).view_as(z)


ROUTINGS = {
    "balanced": [0.0] * COLUMNS,
    "skewed": [0.4, 0, 0, 0, 0.3, 0],
    "an expert without tokens": [0, -2.0, 0, 0, 0, 0],
    "no routed expert": [-2.0] * EXPERTS + [0.0] * IDENTITY,
    "all to one": [2.0, -2, -2, -2, 1, -2],
}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("scaled", ["all", "routed"])
def test_equals_the_equations(scaled: str, routing: str) -> None:
    for chunks, host in ((1, {}), (3, MOE)):
        options = {"scmoe_scaled_experts": scaled, "scmoe_num_chunks": chunks}
        moe: Any = toy_block(case(host=host, **options)).layers[0].mlp
        moe.router.expert_bias.copy_(torch.tensor(ROUTINGS[routing]))
        x, z = hidden_states(), hidden_states()
        rows = set(moe.choose_experts(z, None).routing_map.sum(dim=1).tolist())
        assert rows == {"no routed expert": {0}, "all to one": {1}}.get(routing, rows)
        found = gradients(moe, by_stages(moe, x, z), x, z)
        wanted = gradients(moe, moe.shared_experts_compute(x) + routed(moe, z, scaled), x, z)
        assert_close(found, wanted)


@pytest.mark.usefixtures("single_rank")
def test_the_bias_moves_by_what_is_missing() -> None:
    """(2), over the micro-batches of a step; the share of experts at home follows."""
    wanted = 1.25
    moe: Any = toy_block(case(scmoe_routed_topk=wanted)).layers[0].mlp
    before = torch.tensor(ROUTINGS["skewed"])
    moe.router.expert_bias.copy_(before)
    counts, micro_batches = torch.zeros(COLUMNS), (hidden_states(), -hidden_states())
    for z in micro_batches:
        moe.router(z)
        for token in z.flatten(0, 1):
            counts[chosen(moe, token)] += 1
        with torch.no_grad():
            moe.router(z)  # evaluation does not count
    update_biases([moe], rate=0.1)
    missing = wanted / K / EXPERTS - counts / counts.sum()
    missing[EXPERTS:] = 0
    torch.testing.assert_close(moe.router.expert_bias, before + 0.1 * missing)
    update_biases([moe.eval()], rate=0.1)
    torch.testing.assert_close(moe.router.expert_bias, before + 0.1 * missing)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("wanted", [0.5, 1.0, 1.75])
def test_the_wanted_number_of_routed_experts_is_reached(wanted: float) -> None:
    """With nothing else that balances, and with balanced routed experts at the end."""
    moe: Any = toy_block(case(scmoe_routed_topk=wanted)).layers[0].mlp
    z = torch.randn(64, 8, HIDDEN, dtype=torch.float64, generator=torch.manual_seed(2))
    for step in range(400):
        moe.router(z)
        update_biases([moe], rate=0.5 * DECAYS["linear"](step / 400))
    rows = moe.choose_experts(z, None).routing_map.double()
    assert rows.sum(dim=1).mean().item() == pytest.approx(wanted, rel=0.02)
    assert rows.mean(dim=0).tolist() == pytest.approx([wanted / EXPERTS] * EXPERTS, rel=0.05)
    options = case(scmoe_routed_topk=wanted).scmoe_config()
    config = case().host_config()
    assert ROUTERS["longcat"].routed_share(config, IDENTITY, options) * K == wanted
    options.scmoe_routed_topk = None
    assert ROUTERS["longcat"].routed_share(config, IDENTITY, options) == Fraction(EXPERTS, COLUMNS)


def test_decays() -> None:
    ends = {name: (decay(0.0), decay(0.5), decay(1.0)) for name, decay in DECAYS.items()}
    assert ends.pop("constant") == (1, 1, 1)
    assert {name: pytest.approx(values) for name, values in ends.items()} == {
        "linear": (1, 0.5, 0),
        "cosine": (1, 0.5, 0),
    }
    assert set(DECAYS) == {"constant", *ends}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("groups", [1, 2])
def test_the_loss_is_that_of_groups(groups: int) -> None:
    """(3)-(5) and their gradient; a group at its wanted share weighs its mean score by 1."""
    wanted = 1.25
    block = toy_block(case(host=LOSS, scmoe_routed_topk=wanted, scmoe_balance_groups=groups))
    moe: Any = block.layers[0].mlp
    z = hidden_states()
    tracker = get_moe_metrics_tracker()
    tracker.clear()
    probs, _ = moe.route(z)
    (probs * 0).sum().backward()
    found = moe.router.weight.grad.clone()
    logged = tracker.metrics["load_balancing_loss"].values.sum()

    moe.router.weight.grad = None
    tokens = z.detach().flatten(0, 1)
    size = EXPERTS // groups
    members = [range(j * size, (j + 1) * size) for j in range(groups)]
    of_token = [chosen(moe, token) for token in tokens]
    loss: Any = 0.0
    for group, share in [
        *((m, wanted / groups) for m in members),
        (range(EXPERTS, COLUMNS), K - wanted),
    ]:
        count = sum(expert in group for experts in of_token for expert in experts)
        mean = sum(scores_of(moe, t)[list(group)].sum() for t in tokens) / len(tokens)
        loss = loss + count / (share * len(tokens)) * mean
    torch.testing.assert_close(logged.double(), loss.detach(), rtol=1e-6, atol=0)
    (LOSS["moe_aux_loss_coeff"] * loss).backward()
    torch.testing.assert_close(found, moe.router.weight.grad, rtol=1e-6, atol=1e-8)


# Without a shortcut. ----------------------------------------------------------------------------


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("shared_expert", [True, False])
@pytest.mark.parametrize("every_layer", [True, False])
def test_a_unit_without_a_shortcut_is_stock_megatrons_layer(
    every_layer: bool, shared_expert: bool
) -> None:
    """Where the bias is 0 and there is nothing at home: output and every gradient."""
    options = {"scmoe_shortcut_position": "none", "scmoe_experts_at_home": {}}
    block_case = case(**options)
    block_case.moe_frequency = 1 if every_layer else 2
    if not shared_expert:
        block_case.host["moe_shared_expert_intermediate_size"] = None
    block = toy_block(block_case)
    config, groups = block_case.host_config(), ProcessGroupCollection.use_mpu_process_groups()
    stock = TransformerBlock(
        config=config,
        spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        pg_collection=groups,
    ).double()
    parameters = dict(block.named_parameters())
    assert parameters.keys() == dict(stock.named_parameters()).keys()
    stock.load_state_dict(block.state_dict(), strict=False)
    found = []
    for model in (block, stock):
        x = hidden_states()
        output = run_block(model, x)
        output.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"output": output.detach(), "input": x.grad, **grads})
    assert_close(*found)


# The whole layer. -------------------------------------------------------------------------------

HEADS, NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 4, 8, 4, 6, 10, 6
LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": HEADS,
    "q_lora_rank": Q_RANK,
    "kv_lora_rank": KV_RANK,
    "qk_head_dim": NOPE,
    "qk_pos_emb_head_dim": ROPE,
    "v_head_dim": VALUE,
    "rope_type": "rope",
    "rotary_base": 10000,
    "qk_layernorm": True,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_dtype": "fp32",
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    # The latent norms of transformers have this one, whatever its rms_norm_eps is.
    "layernorm_epsilon": 1e-6,
}


def copied_into(layer: Any, unit: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Give the layer of `transformers` the unit's weights; pairs of parameters by their names."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def mlp(name: str, theirs: Any, ours: Any) -> None:
        gate, up = ours.linear_fc1.weight.chunk(2)
        for part, weight in (("gate_proj", gate), ("up_proj", up)):
            getattr(theirs, part).weight.data.copy_(weight)
        theirs.down_proj.weight.data.copy_(ours.linear_fc2.weight)
        pairs[f"{name}.down_proj"] = theirs.down_proj.weight, ours.linear_fc2.weight

    for number, ours in enumerate((unit.dense_layer, unit)):
        theirs, attention = layer.self_attn[number], ours.self_attention
        for name, parameter in {
            "q_a_proj": attention.linear_q_down_proj.weight,
            "q_a_layernorm": attention.q_layernorm.weight,
            "q_b_proj": attention.linear_q_up_proj.weight,
            "kv_a_proj_with_mqa": attention.linear_kv_down_proj.weight,
            "kv_a_layernorm": attention.kv_layernorm.weight,
            "kv_b_proj": attention.linear_kv_up_proj.weight,
            "o_proj": attention.linear_proj.weight,
        }.items():
            pairs[f"attention {number} {name}"] = getattr(theirs, name).weight, parameter
        pairs[f"input norm {number}"] = (
            layer.input_layernorm[number].weight,
            ours.input_layernorm.weight,
        )
        pairs[f"norm {number}"] = (
            layer.post_attention_layernorm[number].weight,
            ours.pre_mlp_layernorm.weight,
        )
    mlp("mlp 0", layer.mlps[0], unit.dense_layer.mlp)
    mlp("mlp 1", layer.mlps[1], unit.mlp.shared_experts)
    moe = unit.mlp
    for expert, ours in enumerate(moe.experts.local_experts):
        layer.mlp.experts.gate_up_proj.data[expert].copy_(ours.linear_fc1.weight)
        layer.mlp.experts.down_proj.data[expert].copy_(ours.linear_fc2.weight)
    pairs["router"] = layer.mlp.router.classifier.weight, moe.router.weight
    for theirs_, ours_ in pairs.values():
        theirs_.data.copy_(ours_)
    layer.mlp.router.e_score_correction_bias.copy_(moe.router.expert_bias)
    return pairs


def assert_near(name: str, found: Tensor | None, wanted: Tensor | None) -> None:
    """Within 1e-5 of the largest element, in float32."""
    assert found is not None and wanted is not None
    largest = wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * largest, msg=name)
    assert largest > 0


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("overlap", [True, False])
def test_a_unit_is_a_layer_of_transformers(overlap: bool) -> None:
    """Pos-2, add, shared norm, identity experts, latent attention with its scales: forward and
    every gradient."""
    block = toy_block(case(host=LATENT, scmoe_mla_scale=True, scmoe_overlap=overlap))
    scale_latents(block)
    block.final_layernorm = torch.nn.Identity()
    unit: Any = block.layers[0]
    block.layers = block.layers[:1]
    unit.mlp.router.expert_bias.copy_(0.1 * torch.randn(COLUMNS, generator=torch.manual_seed(4)))
    config = hf.LongcatFlashConfig(
        hidden_size=HIDDEN,
        num_layers=1,
        num_attention_heads=HEADS,
        ffn_hidden_size=24,
        expert_ffn_hidden_size=12,
        moe_topk=K,
        n_routed_experts=EXPERTS,
        zero_expert_num=IDENTITY,
        routed_scaling_factor=FACTOR,
        q_lora_rank=Q_RANK,
        kv_lora_rank=KV_RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        head_dim=ROPE,
        v_head_dim=VALUE,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    layer = hf.LongcatFlashDecoderLayer(config, 0)
    pairs = copied_into(layer, unit)

    ours = hidden_states().detach().float().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    output = run_block(block, ours)
    batched = theirs.transpose(0, 1).contiguous()
    positions = torch.arange(SEQUENCE)[None]
    mask = torch.full((SEQUENCE, SEQUENCE), float("-inf")).triu(1)[None, None]
    expected = layer(
        batched,
        attention_mask=mask,
        position_embeddings=hf.LongcatFlashRotaryEmbedding(config)(batched, positions),
    ).transpose(0, 1)
    assert_near("output", output, expected)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_near("input", ours.grad, theirs.grad)
    for name, (parameter, own) in pairs.items():
        assert_near(name, own.grad, parameter.grad)
    stacked = layer.mlp.experts
    for number, expert in enumerate(unit.mlp.experts.local_experts):
        fc1, fc2 = stacked.gate_up_proj.grad[number], stacked.down_proj.grad[number]
        assert_near(f"expert {number}", expert.linear_fc1.weight.grad, fc1)
        assert_near(f"expert {number}", expert.linear_fc2.weight.grad, fc2)
