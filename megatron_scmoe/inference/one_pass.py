"""One forward pass over whole sequences, at any layout."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from torch import Tensor
from torch.nn import Module

from megatron_scmoe.inference.kept import causal, wrapped


def forward(model: Module, tokens: Tensor, last_only: bool = False) -> Tensor | None:
    """Logits behind every token, [b, s, v], on the last pipeline stage.

    Args:
        model: this rank's stage.
        tokens: [b, s].
        last_only: the logits behind the last token alone, [b, 1, v].
    """
    context = StaticInferenceContext(*tokens.shape)
    context.config.materialize_only_last_token_logits = last_only
    with InferenceMode.active(), torch.inference_mode():
        return causal(wrapped(model, context), tokens.to(torch.cuda.current_device()), 0)
