"""One forward pass over whole sequences, at any layout."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.utils import InferenceMode
from torch import Tensor
from torch.nn import Module


def forward(model: Module, tokens: Tensor, last_only: bool = False) -> Tensor | None:
    """Logits behind every token, [b, s, v], on the last pipeline stage.

    Args:
        model: this rank's stage.
        tokens: [b, s].
        last_only: the logits behind the last token alone, [b, 1, v].
    """
    batch, length = tokens.shape
    context = StaticInferenceContext(batch, length)
    context.config.materialize_only_last_token_logits = last_only
    wrapper = GPTInferenceWrapper(model, context)
    wrapper.prep_model_for_inference()
    device = torch.cuda.current_device()
    mask = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    positions = torch.arange(length, device=device).expand(batch, length)
    with InferenceMode.active(), torch.inference_mode():
        return wrapper.run_one_forward_step(
            {
                "tokens": tokens.to(device),
                "position_ids": positions,
                "attention_mask": mask[None, None],
            }
        )
