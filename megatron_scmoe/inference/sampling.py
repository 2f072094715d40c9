"""How the next token is chosen from the logits.

Every prompt draws from a generator of its own, on the host: the same seed gives the same text alone
and in a batch, at every layout and on every device that gives the same logits.
"""

from dataclasses import dataclass

import torch
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What the user chooses."""

    greedy: bool = False
    """The likeliest token; the rest is not looked at."""
    temperature: float = 1.0
    top_k: int = 0
    """Of the likeliest tokens only; 0 for all."""
    top_p: float = 0.0
    """Of the likeliest tokens that have this share of the probability only; 0 for all."""
    seed: int = 1234

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities of the tokens, [b, v] in float32, from their logits, [b, v]."""
        logits = logits.float()
        top_k = min(self.top_k, logits.shape[-1])
        # The host's filter takes one of the two; one behind the other is what both mean.
        logits = TorchSampling.filter_logits(logits, self.temperature, top_k, 0.0)
        if 0 < self.top_p < 1:
            logits = TorchSampling.filter_logits(logits, 1.0, 0, self.top_p)
        return logits.softmax(dim=-1)


class Sampler:
    """The choice of tokens for some prompts.

    Args:
        numbers: of the prompts, which with the seed make the generators.
    """

    def __init__(self, sampling: Sampling, numbers: list[int]) -> None:
        self._sampling = sampling
        seeds = [sampling.seed + number for number in numbers]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits: Tensor, rows: list[int], draws: list[bool]) -> tuple[Tensor, Tensor]:
        """The next token of each row, from logits, [b, v].

        Args:
            rows: the prompt of each row, by its place among those of this sampler.
            draws: whether it draws; the generators of others stay as they are, and what they get
                means nothing.

        Returns:
            tokens, and the logarithms of their probabilities at temperature 1 among all; both [b],
            on the host.
        """
        logits = logits.float().cpu()
        tokens = logits.argmax(dim=-1)
        if not self._sampling.greedy:
            probs = self._sampling.distribution(logits)
            for row, (prompt, draw) in enumerate(zip(rows, draws, strict=True)):
                if draw:
                    generator = self._generators[prompt]
                    tokens[row] = torch.multinomial(probs[row], 1, generator=generator)
        log_probs = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        return tokens, log_probs
