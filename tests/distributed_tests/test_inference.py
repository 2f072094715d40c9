"""Generation gives what the full forward pass gives, alone and in a batch.

Keys and values are kept for each attention layer, not for each block layer: the static context
gives the full forward pass, for a prompt and token by token; the dynamic one has one place for
every attention layer of a stage, at every position and split. Through checkpoints and layouts:
functional_tests/test_generate.py.
"""

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import StaticInferenceContext, dynamic_context
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import attention as host_attention
from megatron.core.transformer.attention import Attention
from torch import Tensor

from megatron_scmoe.inference.generation import Continuation, Limits, generate
from megatron_scmoe.inference.kept import DynamicKept
from megatron_scmoe.inference.sampling import Sampling
from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from tests.distributed_utils import run_distributed
from tests.models import Case

VOCABULARY, PROMPT, LENGTH, BATCH = 32, 6, 10, 2
NUM_LAYERS = 8
POSITIONS = ("none", "pos1", "pos2", "pos3")
STAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "one stage": (1, {}),
    "two stages": (2, {}),
    "first stage short": (2, {"num_layers_in_first_pipeline_stage": 2}),
    "by layout": (2, {"pipeline_model_parallel_layout": "Etttttt|ttL"}),
    "four stages": (4, {}),
}


def build_model(host: dict[str, Any], scmoe: dict[str, Any]) -> GPTModel:
    """This rank's stage, in evaluation mode."""
    case = Case(scmoe=scmoe, host=host, num_layers=NUM_LAYERS)
    config = ScMoEModelConfig(
        transformer=case.host_config(),
        scmoe=case.scmoe_config(),
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        position_embedding_type="rope",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = ScMoEModelBuilder(config).build_model(groups).to(case.host_config().params_dtype)
    return model.eval()


def places(position: str, stages: int, host: dict[str, Any]) -> tuple[int, list[int]]:
    """Attention layers that the context has room for, and the place that each of them asks for."""
    split = {"pipeline_model_parallel_size": stages, **host}
    model = build_model(split, {"scmoe_shortcut_position": position})
    with pytest.MonkeyPatch.context() as patch:
        # Its buffers are on the GPU.
        patch.setattr(DynamicInferenceContext, "initialize_all_tensors", lambda self: None)
        context = DynamicInferenceContext(
            model.config, InferenceConfig(max_sequence_length=64, buffer_size_gb=0.01)
        )
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    asked = (x.layer_number - x._get_pp_layer_offset_for_inference() for x in layers)
    return context.num_attention_layers, [context.layer_map[number - 1] for number in asked]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layout", STAGES)
def test_dynamic_context_has_a_place_for_every_attention_layer(position: str, layout: str) -> None:
    stages, host = STAGES[layout]
    sizes = {"pipeline_model_parallel_size": stages}
    ranks = run_distributed(places, stages, position, stages, host, **sizes)
    assert sum(room for room, _ in ranks) == NUM_LAYERS
    for room, asked in ranks:
        assert sorted(asked) == list(range(room))


@torch.no_grad()
def forward(model: GPTModel, tokens: Tensor, begin: int, context: Any = None) -> Tensor:
    """Logits of tokens from `begin` on, [b, s, v]."""
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(begin, length).expand(tokens.shape[0], -1)
    return model(
        tokens[:, begin:],
        positions,
        mask[:, :, begin:, :],
        inference_context=context,
        runtime_gather_output=True,
    )


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("position", POSITIONS)
def test_static_context_gives_the_full_forward_pass(position: str) -> None:
    """The prompt at once, then a token at a time."""
    model = build_model({}, {"scmoe_shortcut_position": position})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    context = StaticInferenceContext(BATCH, LENGTH)
    for end in range(PROMPT, LENGTH + 1):
        begin = 0 if end == PROMPT else end - 1
        cached = forward(model, tokens[:, :end], begin, context)
        context.sequence_len_offset = end
        context.enable_decode_mode()
        full = forward(model, tokens[:, :end], 0)
        assert (cached[:, -1] - full[:, -1]).abs().max() < 1e-6  # angles are float32
    assert sorted(context.key_value_memory_dict) == list(range(1, NUM_LAYERS + 1))


# What a model differs in: options of the host, and ours.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{position: ({}, {"scmoe_shortcut_position": position}) for position in POSITIONS},
    "latent": (
        {
            "multi_latent_attention": True,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_head_dim": 4,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 4,
            "num_query_groups": 4,
            "rope_type": "rope",
        },
        {"scmoe_shortcut_position": "pos2"},
    ),
    "experts at home": (
        {"moe_router_topk": 2},
        {"scmoe_shortcut_position": "pos3", "scmoe_experts_at_home": {"zero": 1, "constant": 1}},
    ),
    "gating residual": (
        {
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.01,
        },
        {
            "scmoe_shortcut_position": "pos2",
            "scmoe_experts_at_home": {"copy": 1},
            "scmoe_router": "heterogeneous",
            "scmoe_gating_residual": True,
        },
    ),
    "LongCat": (
        {"moe_router_topk": 2},
        {
            "scmoe_shortcut_position": "pos2",
            "scmoe_experts_at_home": {"copy": 2},
            "scmoe_router": "longcat",
            "scmoe_routed_topk": 1.5,
        },
    ),
    "two gates": (
        {"moe_shared_expert_intermediate_size": None},
        {
            "scmoe_shortcut_position": "pos2",
            "scmoe_dual_gating": "separate",
            "scmoe_combine": "add",
        },
    ),
    "chunks": ({}, {"scmoe_shortcut_position": "pos2", "scmoe_num_chunks": 2}),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8]]
NEW = 6
TOKENS = 24  # the others pad the vocabulary, and are never chosen


def quiet(_number: int, _token: int) -> None:
    """Nobody is told of tokens."""


def uncached(model: GPTModel, prompt: list[int]) -> Continuation:
    """The likeliest tokens, from a full forward pass for each of them."""
    found = Continuation()
    while len(found.tokens) < NEW:
        (logits,) = forward(model, torch.tensor([prompt + found.tokens]), 0)[:, -1, :TOKENS]
        log_probs = logits.float().log_softmax(-1)
        found.tokens.append(int(log_probs.argmax()))
        found.log_probs.append(float(log_probs.max()))
    return found


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("name", MODELS)
def test_cached_equals_uncached_and_batched_equals_single(name: str) -> None:
    model = build_model(*MODELS[name])
    limits = Limits(NEW, TOKENS, end=None)
    batched, speed = generate(model, PROMPTS, Sampling(greedy=True), limits, 2, quiet)
    for prompt, found in zip(PROMPTS, batched, strict=True):
        alone, _ = generate(model, [prompt], Sampling(greedy=True), limits, 8, quiet)
        expected = uncached(model, prompt)
        assert found.tokens == alone[0].tokens == expected.tokens
        for each in (found, alone[0]):
            assert each.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
    assert speed.prefill_tokens == 1 + 3 + 8 - 2 and speed.decode_tokens == 3 * NEW - 2


def shared_among_replicas() -> tuple[list[Continuation], list[int], int]:
    """What both replicas know, of which prompts this one was told, and how much both computed."""
    model = build_model(*MODELS["pos2"])
    told: list[int] = []
    limits = Limits(NEW, TOKENS, end=None)
    found, speed = generate(
        model, PROMPTS, Sampling(greedy=True), limits, 1, lambda number, _: told.append(number)
    )
    return found, told, speed.prefill_tokens


def test_replicas_share_the_prompts() -> None:
    """By length, in turns; there is no third prompt for the second."""
    (found, one, computed), (same, other, computed_there) = run_distributed(
        shared_among_replicas, 2
    )
    assert found == same and [len(each.tokens) for each in found] == [NEW] * 3
    assert one == [1] * NEW + [0] * NEW and other == [2] * NEW
    assert computed == computed_there == sum(map(len, PROMPTS))


@pytest.mark.usefixtures("single_rank")
def test_a_text_ends_with_its_document() -> None:
    """The others of the batch go on; the token itself is not part of the text."""
    model = build_model(*MODELS["pos2"])
    sampling = Sampling(seed=3)
    limits = Limits(NEW, VOCABULARY, end=None)
    whole, _ = generate(model, PROMPTS, sampling, limits, 8, quiet)
    end = whole[2].tokens[2]
    told: list[tuple[int, int]] = []
    cut, _ = generate(
        model,
        PROMPTS,
        sampling,
        Limits(NEW, VOCABULARY, end),
        8,
        lambda number, token: told.append((number, token)),
    )
    for number, (found, uncut) in enumerate(zip(cut, whole, strict=True)):
        stop = uncut.tokens.index(end) if end in uncut.tokens else NEW
        assert found.tokens == uncut.tokens[:stop] and len(found.log_probs) == stop
        assert [token for told_of, token in told if told_of == number] == found.tokens
    assert len(cut[2].tokens) <= 2 < max(len(found.tokens) for found in cut)


def paged_attention(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _longest_q: int,
    _longest_k: int,
    begins: Tensor,
    _begins_k: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    is_decode_only: bool,
    softmax_offset: Tensor | None = None,
) -> Tensor:
    """What flash-attn's kernel does, row by row: q [tokens, 1, n, d], k and v [block, slot, g, d].

    In decoding row r is token r.
    """
    assert softmax_offset is None
    output = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue  # padding
        first, last = (row, row + 1) if is_decode_only else begins[row : row + 2].tolist()
        own = [block for block in blocks[row].tolist() if block >= 0]
        repeats = q.shape[2] // k.shape[2]
        keys, values = (
            torch.cat([cache[block] for block in own])[:length].repeat_interleave(repeats, dim=1)
            for cache in (k, v)
        )
        scores = torch.einsum("qnd,knd->nqk", q[first:last, 0], keys)
        new = last - first
        future = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
        scores = scores * q.shape[-1] ** -0.5
        probs = scores.masked_fill(future, float("-inf")).softmax(-1)
        output[first:last, 0] = torch.einsum("nqk,knd->qnd", probs, values)
    return output


class Unpinned:
    """torch, which without a CUDA device pins no memory."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("empty", "empty_like", "full", "ones", "zeros"):
            return found
        return lambda *args, pin_memory=False, **kwargs: found(*args, **kwargs)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("none", "pos1") else ())
        for name in (*POSITIONS, "experts at home", "two gates")
    ],
)
def test_dynamic_context_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slow kernel in place of flash-attn's; all else is the host's own, in blocks of 4."""
    monkeypatch.setattr(dynamic_context, "torch", Unpinned())
    monkeypatch.setattr(dynamic_context, "triton_append_key_value_cache", None)
    monkeypatch.setattr(host_attention, "HAVE_FA3", True)
    # einops is not installed with the host.
    monkeypatch.setattr(host_attention, "rearrange", lambda tensor, _: tensor.flatten(2))
    monkeypatch.setattr(Attention, "flash_decode_and_prefill", paged_attention)
    model = build_model(*MODELS[name])
    limits = Limits(NEW, VOCABULARY, end=None)
    keeps = partial(DynamicKept, buffer_gb=0.05, block_size=4)
    for sampling in (Sampling(greedy=True), Sampling(seed=3)):
        expected, _ = generate(model, PROMPTS, sampling, limits, 8, quiet)
        found, speed = generate(model, PROMPTS, sampling, limits, 8, quiet, keeps)
        for each, same in zip(found, expected, strict=True):
            assert each.tokens == same.tokens
            assert each.log_probs == pytest.approx(same.log_probs, abs=1e-5)
        assert speed.prefill_tokens == sum(map(len, PROMPTS))
    # One of them ends before the others.
    limits = Limits(NEW, VOCABULARY, end=found[2].tokens[1])
    expected, _ = generate(model, PROMPTS, sampling, limits, 8, quiet)
    found, _ = generate(model, PROMPTS, sampling, limits, 8, quiet, keeps)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
