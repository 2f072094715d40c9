"""The router of C2R (arXiv:2504.01337): a token's experts are partners of its best one.

    i = argmax s, the others = the K - 1 best by s of the T best partners of i

s is what Megatron's router selects by: scores, logits where the softmax comes behind the
selection, with the expert bias where there is one. Weights are as without the rule, from the same
scores. The partners are a buffer, so that checkpoints carry them.

Shapes: T tokens, N experts
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.c2r import lists
from megatron_scmoe.c2r.lists import Lists
from megatron_scmoe.model.routing.losses import Best, RouterWithLosses, Selection

BUFFER = "mlp.router.partners"
"""The lists' name on disk, under that of the MoE layer."""


def read_lists(file: str) -> Lists:
    """The lists of --scmoe-c2r-lists, which every layer asks for.

    Raises:
        ValueError: it holds none.
        OSError: it cannot be read.
    """
    return _read(file, os.stat(file).st_mtime_ns)


@lru_cache(maxsize=1)
def _read(file: str, _changed: int) -> Lists:
    return lists.read(Path(file))


def moe_layers(config: TransformerConfig) -> list[int]:
    """Numbers of the attention layers with a MoE, from 1."""
    freq = config.moe_layer_freq
    if isinstance(freq, int):
        return [layer + 1 for layer in range(config.num_layers) if layer % freq == 0]
    return [layer for layer, has in enumerate(freq, 1) if has]


class CollaborationRouter(RouterWithLosses):
    """The host's router among the partners of every token's best expert.

    Its balancing losses count what the rule chooses.

    Args:
        top_t: T of the rule.
        given: the partners; None for those of the checkpoint that will be loaded.
    """

    partners: Tensor
    """Of every expert all others, best first, [N, N - 1]."""

    def __init__(self, *args: Any, top_t: int, given: Lists | None, **others: Any) -> None:
        super().__init__(*args, **others)
        experts = self.config.num_moe_experts
        assert experts is not None
        self._top_t = top_t
        self._given = given
        empty = torch.zeros(experts, experts - 1, dtype=torch.int64)
        self.register_buffer("partners", empty.to(torch.cuda.current_device()))
        self.router_replay: Any = Selection(self.among_partners)

    def set_layer_number(self, layer_number: int) -> None:
        """Take the number of the attention layer, and its partners if there are any."""
        super().set_layer_number(layer_number)
        if self._given is not None:
            self.partners.copy_(torch.from_numpy(self._given.layers[layer_number]))

    def among_partners(self, scores: Tensor, best: Best) -> tuple[Tensor, Tensor]:
        """Scores and experts, [T, K] each, from all scores, [T, N]."""
        return best(self.constrained(scores))

    def constrained(self, scores: Tensor) -> Tensor:
        """Scores, [T, N], which are -inf where a token may not go."""
        own = torch.eye(len(self.partners), dtype=torch.bool, device=scores.device)
        allowed = own.scatter(1, self.partners[:, : self._top_t], True)
        return scores.masked_fill(~allowed[scores.argmax(dim=1)], -torch.inf)

    def for_losses(self, scores: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """The map of the rule, of tokens that count."""
        chosen = self.constrained(scores.detach()).topk(self.topk, dim=1).indices
        of_rule = torch.zeros_like(routing_map).scatter(1, chosen, True)
        return scores, of_rule & routing_map.any(dim=1, keepdim=True)
