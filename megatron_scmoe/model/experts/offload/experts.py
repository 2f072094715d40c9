"""Routed experts of which a few are on the device, the others at home in a cheaper memory.

The paper's expert offloading [arXiv:2404.05019, A.3]: the gate reads the shortcut, so that experts
can be fetched exactly, without guessing, while the dense work of the window runs.

The weights at home are those of a class of the host (or of grouped.py), with its names, so that
checkpoints load into them; the slots on the device are modules of the same class with one expert
each, so that every expert is computed with as if all were there. For inference only.

Shapes: h hidden, e local experts, R rows of all local experts, sorted by expert
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from torch import Tensor

from megatron_scmoe.model.experts.offload.cache import ExpertCache
from megatron_scmoe.model.experts.offload.tiers import Tier, move_home
from megatron_scmoe.model.experts.weights import weights_of
from megatron_scmoe.overlap.streams import Flight, fetch


@dataclass(frozen=True)
class Offload:
    """How experts are kept."""

    tier: Tier
    slots: int
    """Experts of a layer that fit on the device."""
    early: bool = True
    """Fetch as soon as the gate has spoken; otherwise when the experts are due."""
    keeps: bool = True
    """Keep what was used while there is room."""


class OffloadedExperts:
    """What comes before a class of experts in the bases of another; see `offloaded`.

    Attributes:
        cache: which experts are in which slot.
    """

    resident: Any

    def __init__(self, num_local_experts: int, *args: Any, offload: Offload, **kwargs: Any) -> None:
        module: Any = self
        self.resident.__init__(module, num_local_experts, *args, **kwargs)
        move_home(module.parameters(), offload.tier)
        self.early = offload.early
        slots = min(offload.slots, num_local_experts)
        # Not among the modules: they hold no weights of their own.
        self._slots = [(self.resident(1, *args, **kwargs),) for _ in range(slots)]
        for (slot,) in self._slots:
            slot.requires_grad_(False).eval()
        self.cache = ExpertCache(slots, self._fetch, offload.keeps)

    def announce(self, tokens_per_expert: Tensor) -> None:
        """Rows will come for these experts, [e] on the CPU."""
        if self.early:
            self.cache.announce(tokens_per_expert.nonzero().flatten().tolist())

    def forward(
        self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """G(z)_i E_i(z) of every row, [R, h], and no bias.

        Args:
            rows: [R, h].
            tokens_per_expert: [e], on the CPU.
            probs: router weight of each row, [R].
        """
        counts = tokens_per_expert.tolist()
        due = [expert for expert, count in enumerate(counts) if count]
        if not due:
            return rows, None
        parts, weights = rows.split(counts), probs.split(counts)
        outputs: dict[int, Tensor] = {}
        for expert, slot in self.cache.take(due):
            one = tokens_per_expert[expert : expert + 1]
            output, bias = self._slots[slot][0](parts[expert], one, weights[expert])
            assert bias is None
            outputs[expert] = output
        return torch.cat([outputs[expert] for expert in due]), None

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> ShardedStateDict:
        """The resident class's, loaded in place: what the host puts together from the parts of a
        tensor would be all experts once more, in the memory that they do not fit into."""
        state_dict = self.resident.sharded_state_dict(self, *args, **kwargs)
        for entry in state_dict.values():
            if isinstance(entry, ShardedTensorFactory):
                # Its parts are views, which the loading has filled.
                entry.merge_fn = partial(_whole, entry.data)
        return state_dict

    def _fetch(self, expert: int, slot: int) -> Flight:
        return fetch(weights_of(self._slots[slot][0], 0), weights_of(self, expert))

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Nothing: the weights at home stay there when the model is moved to its device."""
        return self


def _whole(weights: Tensor, _parts: Any) -> Tensor:
    return weights


@cache
def offloaded(resident: type) -> type:
    """A class of experts, offloaded; its constructor takes an `offload` more.

    Args:
        resident: SequentialMLP or GroupedExperts.
    """
    return type(
        f"Offloaded{resident.__name__}", (OffloadedExperts, resident), {"resident": resident}
    )
