"""Experts that lie on other ranks than in their order (--scmoe-expert-placement, c2r/placement.py).

Routers, losses, statistics and checkpoints know experts by their own numbers. Where the tokens
depart, the columns of the routing are put in the order in which the experts lie
(`Routing.in_order`); here their weights get their own numbers on disk and, before the first
iteration, the initial values that they have without a placement.

Shapes: N routed experts, e of them on this rank
"""

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor
from torch.distributed import ProcessGroup


def with_own_numbers(
    state_dict: ShardedStateDict, prefix: str, axis: int, order: list[int]
) -> ShardedStateDict:
    """What the host's experts put on disk by their places, by their own numbers.

    Args:
        prefix: of the experts in the state dict.
        axis: of the experts in their tensors on disk.
        order: the expert in every place, [N].
    """
    renumber = partial(_renumbered, axis, order)
    return {
        name: dict_list_map_outplace(renumber, entry) if name.startswith(prefix) else entry
        for name, entry in state_dict.items()
    }


def _renumbered(axis: int, order: list[int], entry: Any) -> Any:
    if isinstance(entry, ShardedTensorFactory):
        # It also builds the optimizer's state of the weight.
        build = entry.build_fn

        def build_renumbered(*arguments: Any) -> Any:
            return dict_list_map_outplace(partial(_renumbered, axis, order), build(*arguments))

        entry.build_fn = build_renumbered
    elif isinstance(entry, ShardedTensor | ShardedObject):
        offset = list(entry.global_offset)
        offset[axis] = order[offset[axis]]
        entry.global_offset = tuple(offset)
    return entry


@torch.no_grad()
def deal_out(weights: list[list[Tensor]], order: list[int], group: ProcessGroup) -> None:
    """Give every expert the initial weights that it has where experts lie in their order: a rank
    has made those of as many others, from its own random numbers.

    Args:
        weights: of every place on this rank, in one order, [e][...]; changed in place.
        order: the expert in every place, [N].
        group: ranks that share the experts.
    """
    each, ranks, rank = len(weights), group.size(), group.rank()
    made = range(rank * each, (rank + 1) * each)  # places, and numbers of the experts made here
    place_of = {expert: place for place, expert in enumerate(order)}
    # What is sent lies in the order of its new places, which a receiver knows too.
    sent = sorted(made, key=place_of.__getitem__)
    received = sorted(made, key=lambda place: (order[place] // each, place))
    input_splits, output_splits = [0] * ranks, [0] * ranks
    for expert in sent:
        input_splits[place_of[expert] // each] += 1
    for place in received:
        output_splits[order[place] // each] += 1
    device = torch.cuda.current_device()
    for tensors in zip(*weights, strict=True):
        own = torch.stack([tensors[expert - made.start] for expert in sent]).to(device)
        here = torch.empty_like(own)
        torch.distributed.all_to_all_single(here, own, output_splits, input_splits, group)
        for place, weight in zip(received, here, strict=True):
            tensors[place - made.start].copy_(weight)
