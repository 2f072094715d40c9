"""Tokens one by one: a batch of prompts at once, keys and values kept by the host's contexts.

    [b, shortest prompt] --prefill--> logits --> [b, 1] --step--> logits --> [b, 1] ...

The host's static context has one length for all prompts of a batch. Up to the shortest prompt they
go through the model at once; then a token of each at a time, the prompt's own while it lasts, the
chosen one behind it. So no padding is ever computed, and a prompt gets the same tokens alone and in
a batch. The units run their schedule: the exchanges of a long prompt are hidden as in training.

Every data parallel rank has prompts of its own. Where ranks share experts, all of them take a step
when one of them does: those without a prompt left send a token that nobody reads.

Shapes: b prompts of this rank, v vocabulary
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.utils import InferenceMode
from torch import Tensor
from torch.nn import Module

from megatron_scmoe.inference.sampling import Sampler, Sampling

OnToken = Callable[[int, int], None]
"""Is told of every token when it is there: the prompt's number, and the token."""


@dataclass
class Continuation:
    """What was written behind a prompt, without the token that ends the document."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """Of each token, at temperature 1 among all."""


@dataclass
class Speed:
    """What has been computed, and in which time."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Where a text ends."""

    new_tokens: int
    """At the most, for each prompt."""
    vocabulary: int
    """Tokens that exist; the model's table has rows behind them, which were never trained."""
    end: int | None
    """The token that ends a document."""


def generate(
    model: Module,
    prompts: list[list[int]],
    sampling: Sampling,
    limits: Limits,
    batch_size: int,
    on_token: OnToken,
) -> tuple[list[Continuation], Speed]:
    """Continue prompts.

    Every rank calls it with all prompts.

    Args:
        model: this rank's stage.
        prompts: tokens, at least one each.
        batch_size: prompts of a rank that are computed together.
        on_token: called on every rank of the data parallel replica that has the prompt.

    Returns:
        what follows every prompt, on every rank; how long it took.
    """
    rank, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    speed = Speed()
    found: dict[int, Continuation] = {}
    # Prompts of about the same length share a batch.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for first in range(0, len(order), batch_size * replicas):
        numbers = order[first : first + batch_size * replicas][rank::replicas]
        batch = {number: prompts[number] for number in numbers}
        with InferenceMode.active(), torch.inference_mode():
            found |= _complete(model, batch, sampling, limits, on_token, speed)
    everywhere: list[Any] = [None] * replicas
    group = mpu.get_data_parallel_group()
    torch.distributed.all_gather_object(everywhere, (found, speed), group=group)
    found = {number: text for part, _ in everywhere for number, text in part.items()}
    return [found[number] for number in range(len(prompts))], _together([s for _, s in everywhere])


def _together(speeds: list[Speed]) -> Speed:
    """Of replicas that run at the same time."""
    return Speed(
        sum(speed.prefill_tokens for speed in speeds),
        max(speed.prefill_seconds for speed in speeds),
        sum(speed.decode_tokens for speed in speeds),
        max(speed.decode_seconds for speed in speeds),
    )


def _complete(
    model: Module,
    prompts: dict[int, list[int]],
    sampling: Sampling,
    limits: Limits,
    on_token: OnToken,
    speed: Speed,
) -> dict[int, Continuation]:
    """Continue the prompts of one batch, by their numbers; there may be none."""
    numbers, rows = list(prompts), list(prompts.values())
    lengths = [len(row) for row in rows]
    found = [Continuation() for _ in rows]
    is_open = [True for _ in rows]
    stage = _Stage(model, len(rows), max(lengths, default=0) + limits.new_tokens)
    sampler = Sampler(sampling, numbers)
    following = [row[: min(lengths)] for row in rows]
    while _on_any_rank(any(is_open)):
        if not any(is_open):
            stage.idle()
            continue
        began, is_prefill = time.perf_counter(), stage.length == 0
        logits = stage.forward(torch.tensor(following, device=torch.cuda.current_device()))
        draws = [open and stage.length >= own for open, own in zip(is_open, lengths, strict=True)]
        chosen = None if logits is None else sampler.choose(logits[:, : limits.vocabulary], draws)
        tokens, log_probs = _from_last_stage(chosen, len(rows))
        for row, token in enumerate(tokens):
            if draws[row] and token == limits.end:
                is_open[row] = False
            elif draws[row]:
                found[row].tokens.append(token)
                found[row].log_probs.append(log_probs[row])
                is_open[row] = len(found[row].tokens) < limits.new_tokens
                on_token(numbers[row], token)
        if is_prefill:
            speed.prefill_tokens += sum(map(len, following))
            speed.prefill_seconds += time.perf_counter() - began
        else:
            speed.decode_tokens += sum(draws)
            speed.decode_seconds += time.perf_counter() - began
        following = [
            [row[stage.length] if stage.length < len(row) else token]
            for row, token in zip(rows, tokens, strict=True)
        ]
    return dict(zip(numbers, found, strict=True))


class _Stage:
    """This rank's layers, and the keys and values of a batch.

    Args:
        batch: prompts.
        longest: tokens of a prompt and its continuation, at the most.
    """

    def __init__(self, model: Module, batch: int, longest: int) -> None:
        self.length = 0
        self._model = model
        self._wrapper = self._new_wrapper(batch, longest)

    def _new_wrapper(self, batch: int, longest: int) -> GPTInferenceWrapper:
        wrapper = GPTInferenceWrapper(self._model, StaticInferenceContext(batch, longest))
        wrapper.prep_model_for_inference()
        return wrapper

    def forward(self, tokens: Tensor) -> Tensor | None:
        """Logits behind the next tokens, [b, v], on the last pipeline stage.

        Args:
            tokens: [b, new]; behind the first call one of each prompt.
        """
        logits = _run(self._wrapper, tokens, self.length)
        self.length += tokens.shape[1]
        self._wrapper.inference_context.enable_decode_mode()
        return None if logits is None else logits[:, -1]

    def idle(self) -> None:
        """Take part in an exchange of the ranks that have something to compute."""
        tokens = torch.zeros(1, 1, dtype=torch.long, device=torch.cuda.current_device())
        _run(self._new_wrapper(1, 1), tokens, 0)


def _run(wrapper: GPTInferenceWrapper, tokens: Tensor, begin: int) -> Tensor | None:
    new, end = tokens.shape[1], begin + tokens.shape[1]
    # True where masked. Kernels that know a causal mask do not look at it.
    mask = torch.ones(new, end, dtype=torch.bool, device=tokens.device).triu(begin + 1)
    positions = torch.arange(begin, end, device=tokens.device).expand_as(tokens)
    return wrapper.run_one_forward_step(
        {"tokens": tokens, "position_ids": positions, "attention_mask": mask[None, None]}
    )


def _on_any_rank(busy: bool) -> bool:
    """Whether any rank that shares experts with this one has something to compute."""
    if mpu.get_expert_model_parallel_world_size() == 1 or mpu.get_data_parallel_world_size() == 1:
        return busy
    flag = torch.tensor(float(busy), device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _from_last_stage(
    chosen: tuple[Tensor, Tensor] | None, batch: int
) -> tuple[list[int], list[float]]:
    """The chosen tokens and their log-probabilities, on every stage of a pipeline."""
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        assert chosen is not None
        tokens, log_probs = chosen
        return tokens.tolist(), log_probs.tolist()
    # One message: float64 holds every token's number.
    device = torch.cuda.current_device()
    both = torch.zeros(2, batch, dtype=torch.float64, device=device)
    if chosen is not None:
        both.copy_(torch.stack([part.double() for part in chosen]))
    torch.distributed.broadcast(
        both,
        mpu.get_pipeline_model_parallel_last_rank(),
        group=mpu.get_pipeline_model_parallel_group(),
    )
    return both[0].long().tolist(), both[1].tolist()
