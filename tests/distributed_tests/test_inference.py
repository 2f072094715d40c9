"""Keys and values of inference are kept for each attention layer, not for each block layer.

The static context gives the full forward pass, for a prompt and token by token; the dynamic one has
one place for every attention layer of a stage, at every position and split.
"""

from typing import Any

import pytest
import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import Attention
from torch import Tensor

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


def build_model(position: str, stages: int, **host: Any) -> GPTModel:
    """This rank's stage, in evaluation mode."""
    case = Case(
        scmoe={"scmoe_shortcut_position": position},
        host={"pipeline_model_parallel_size": stages, **host},
        num_layers=NUM_LAYERS,
    )
    config = ScMoEModelConfig(
        transformer=case.host_config(),
        scmoe=case.scmoe_config(),
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        position_embedding_type="rope",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ScMoEModelBuilder(config).build_model(groups).double().eval()


def places(position: str, stages: int, host: dict[str, Any]) -> tuple[int, list[int]]:
    """Attention layers that the context has room for, and the place that each of them asks for."""
    model = build_model(position, stages, **host)
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
    model = build_model(position, 1)
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
