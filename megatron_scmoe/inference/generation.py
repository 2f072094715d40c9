"""Tokens one by one: a batch of prompts at once, keys and values kept between them (kept.py).

    prompts --forward--> logits --choose--> tokens --advance, forward--> logits ...

A prompt gets the same tokens alone and in a batch. The units run their schedule: the exchanges of a
long prompt are hidden as in training.

Every data parallel rank has prompts of its own. Where ranks share experts, all of them take a step
when one of them does: those without a prompt left send a token that nobody reads.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.inference.utils import InferenceMode
from torch import Tensor
from torch.nn import Module

from megatron_scmoe.inference.kept import Keeps, StaticKept, idle
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
    keeps: Keeps = StaticKept,
) -> tuple[list[Continuation], Speed]:
    """Continue prompts.

    Every rank calls it with all prompts.

    Args:
        model: this rank's stage.
        prompts: tokens, at least one each.
        batch_size: prompts of a rank that are computed together.
        on_token: called on every rank of the data parallel replica that has the prompt.
        keeps: which of the host's contexts holds keys and values.

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
            found |= _complete(model, batch, sampling, limits, on_token, speed, keeps)
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
    keeps: Keeps,
) -> dict[int, Continuation]:
    """Continue the prompts of one batch, by their numbers; there may be none."""
    numbers = list(prompts)
    found = [Continuation() for _ in prompts]
    is_open = [True for _ in prompts]
    kept = keeps(model, list(prompts.values()), limits.new_tokens) if prompts else None
    sampler = Sampler(sampling, numbers)
    while _on_any_rank(any(is_open)):
        if kept is None or not any(is_open):
            idle(model)
            continue
        began = time.perf_counter()
        step = kept.forward()
        draws = [draw and is_open[row] for row, draw in zip(step.rows, step.draws, strict=True)]
        chosen = None
        if step.logits is not None:
            chosen = sampler.choose(step.logits[:, : limits.vocabulary], step.rows, draws)
        tokens, log_probs = _from_last_stage(chosen, len(step.rows))
        for row, draw, token, log_prob in zip(step.rows, draws, tokens, log_probs, strict=True):
            if draw and token == limits.end:
                is_open[row] = False
            elif draw:
                found[row].tokens.append(token)
                found[row].log_probs.append(log_prob)
                is_open[row] = len(found[row].tokens) < limits.new_tokens
                on_token(numbers[row], token)
        if any(is_open):
            kept.advance(tokens, is_open)
        if step.is_first:
            speed.prefill_tokens += step.tokens
            speed.prefill_seconds += time.perf_counter() - began
        else:
            speed.decode_tokens += sum(draws)
            speed.decode_seconds += time.perf_counter() - began
    return dict(zip(numbers, found, strict=True))


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
