"""Keys and values of a batch of prompts, in one of the host's contexts.

    forward  the next tokens of the batch through this rank's layers
    advance  is told what was chosen behind them

Static has one length for all prompts. Up to the shortest prompt they go through the model at once;
then a token of each at a time, the prompt's own while it lasts, the chosen one behind it. So no
padding is ever computed. Dynamic has blocks for every prompt: all are prefilled whole in one pass,
packed, and leave when they end. It needs the kernels of flash-attn, and pads its tokens to a
multiple of 64, which the experts compute as well.

Shapes: b rows, v vocabulary
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module

NEVER = -1  # a token that no model gives


class Decoded(NamedTuple):
    """What one pass has brought."""

    rows: list[int]
    """The prompt of each row."""
    draws: list[bool]
    """Whether the token behind it is the model's to choose."""
    logits: Tensor | None
    """[b, v], on the last pipeline stage."""
    tokens: int
    """Computed with in this pass, padding not counted."""
    is_first: bool


class StaticKept:
    """One length for all prompts.

    Args:
        prompts: their tokens; at least one prompt.
        new_tokens: at the most, for each.
    """

    def __init__(self, model: Module, prompts: list[list[int]], new_tokens: int) -> None:
        longest = max(map(len, prompts)) + new_tokens
        self._wrapper = wrapped(model, StaticInferenceContext(len(prompts), longest))
        self._prompts = prompts
        self._length = 0
        self._following = [prompt[: min(map(len, prompts))] for prompt in prompts]

    def forward(self) -> Decoded:
        """The next pass of this rank's layers."""
        tokens = torch.tensor(self._following, device=torch.cuda.current_device())
        is_first = self._length == 0
        logits = causal(self._wrapper, tokens, self._length)
        self._length += tokens.shape[1]
        self._wrapper.inference_context.enable_decode_mode()
        draws = [self._length >= len(prompt) for prompt in self._prompts]
        rows = list(range(len(self._prompts)))
        last = None if logits is None else logits[:, -1]
        return Decoded(rows, draws, last, tokens.numel(), is_first)

    def advance(self, tokens: list[int], is_open: list[bool]) -> None:
        """What follows the rows of the last pass.

        Args:
            tokens: chosen for each row.
            is_open: by prompt, whether it is to be continued.
        """
        self._following = [
            [prompt[self._length] if self._length < len(prompt) else token]
            for prompt, token in zip(self._prompts, tokens, strict=True)
        ]


class DynamicKept:
    """Blocks for every prompt.

    Args:
        prompts, new_tokens: as of StaticKept.
        block_size: tokens of a block.
    """

    def __init__(
        self,
        model: Module,
        prompts: list[list[int]],
        new_tokens: int,
        buffer_gb: float,
        block_size: int,
    ) -> None:
        longest = max(map(len, prompts)) + new_tokens
        config = InferenceConfig(
            block_size_tokens=block_size,
            buffer_size_gb=buffer_gb,
            # The host's kernels want a multiple of 4.
            max_requests=-(-len(prompts) // 4) * 4,
            max_sequence_length=longest,
        )
        self._context = DynamicInferenceContext(get_model_config(model), config)
        self._wrapper = wrapped(model, self._context)
        self._is_first = True
        self._rows: list[int] = []
        for number, prompt in enumerate(prompts):
            request = DynamicInferenceRequest(
                request_id=number,
                prompt_tokens=torch.tensor(prompt, device=torch.cuda.current_device()),
                sampling_params=SamplingParams(
                    num_tokens_to_generate=new_tokens, termination_id=NEVER
                ),
            )
            self._context.add_request(request)

    def forward(self) -> Decoded:
        context = self._context
        context.initialize_attention_state()
        tokens, positions = context.current_input_and_position_ids()
        logits = self._wrapper.run_one_forward_step(
            {"tokens": tokens, "position_ids": positions, "attention_mask": None}
        )
        active = slice(context.paused_request_count, context.total_request_count)
        self._rows = context.request_ids[active].tolist()
        count = len(self._rows)
        is_first, self._is_first = self._is_first, False
        last = None if logits is None else logits[0, :count]
        return Decoded(self._rows, [True] * count, last, context.active_token_count, is_first)

    def advance(self, tokens: list[int], is_open: list[bool]) -> None:
        stays = torch.tensor([is_open[row] for row in self._rows]).byte()
        self._context.update_requests(stays, torch.tensor(tokens))


Keeps = Callable[[Module, list[list[int]], int], StaticKept | DynamicKept]
"""Makes one, from the model, the prompts and the number of new tokens."""


def idle(model: Module) -> None:
    """Take part in an exchange of the ranks that have something to compute."""
    tokens = torch.zeros(1, 1, dtype=torch.long, device=torch.cuda.current_device())
    causal(wrapped(model, StaticInferenceContext(1, 1)), tokens, 0)


def wrapped(
    model: Module, context: StaticInferenceContext | DynamicInferenceContext
) -> GPTInferenceWrapper:
    """This rank's stage as the host's programs call it."""
    wrapper = GPTInferenceWrapper(model, context)
    wrapper.prep_model_for_inference()
    return wrapper


def causal(wrapper: GPTInferenceWrapper, tokens: Tensor, begin: int) -> Tensor | None:
    """Logits behind `tokens`, [b, new], whose first one has `begin` others before it."""
    new, end = tokens.shape[1], begin + tokens.shape[1]
    # True where masked. Kernels that know a causal mask do not look at it.
    mask = torch.ones(new, end, dtype=torch.bool, device=tokens.device).triu(begin + 1)
    positions = torch.arange(begin, end, device=tokens.device).expand_as(tokens)
    return wrapper.run_one_forward_step(
        {"tokens": tokens, "position_ids": positions, "attention_mask": mask[None, None]}
    )
