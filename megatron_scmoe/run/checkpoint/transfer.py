"""Start from the weights of a related model: what is taken, what is new, what is left.

With --finetune (or --pretrained-checkpoint) the checkpoint may be one of the matching baseline
(top-K with a shared expert, stock Megatron), or of a ScMoE model with another gate or norm. What
only our model has keeps its initial value; nothing else may be missing. Without it too, a norm is
found under either of its names: a baseline that came from elsewhere has one of them; and the
partners of a file (--scmoe-c2r-lists) stand in place of the checkpoint's.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

from megatron_scmoe.model import names
from megatron_scmoe.model.routing.partners import BUFFER as PARTNERS
from megatron_scmoe.run.checkpoint.contents import iteration_folder
from megatron_scmoe.run.checkpoint.errors import CheckpointError
from megatron_scmoe.run.checkpoint.unpickle import read_metadata

SHARED_EXPERT = "mlp.shared_experts."  # a baseline may have none

# What is no weight of the model.
OTHER_STATE = ("optimizer.", "rng_state", "rerun_state", "common_state", "chained_")


def loading_related(load: Callable[..., Any]) -> Callable[..., Any]:
    """`_load_global_dist_base_checkpoint` that finds norms under either name, leaves partners that
    are given, and with --finetune what is new as it was initialised."""

    def replacement(
        load_dir: str,
        args: Namespace,
        rank0: bool,
        sharded_state_dict: Any,
        iteration: int,
        release: bool,
        **groups: Any,
    ) -> Any:
        load_it = partial(load, load_dir, args, rank0, sharded_state_dict, iteration, release)
        if rank0:
            return load_it(**groups)
        folder = Path(load_dir)
        checkpoint = folder / "release" if release else iteration_folder(folder, iteration)
        on_disk = {
            name.split("/shard_")[0] for name in read_metadata(checkpoint).state_dict_metadata
        }
        _rename(sharded_state_dict, on_disk)  # of the optimizer's state too
        on_disk = {name for name in on_disk if not name.startswith(OTHER_STATE)}
        chunks = [key for key in sharded_state_dict if str(key).startswith("model")]

        def is_kept(entry: ShardedBase) -> bool:
            if args.scmoe_c2r_lists is not None and entry.key.endswith(PARTNERS):
                return True
            return args.finetune and entry.key not in on_disk

        kept = {chunk: _keep(sharded_state_dict[chunk], is_kept) for chunk in chunks}
        if args.finetune:
            taken = {
                entry.key
                for chunk in chunks
                for entry in nested_values(sharded_state_dict[chunk])
                if isinstance(entry, ShardedBase)
            }
            new = {entry.key for entries in kept.values() for entry in entries.values()}
            _report(checkpoint, on_disk, taken, new)
        state_dict, *rest = load_it(**groups)
        for chunk, entries in kept.items():
            state_dict[chunk] |= {name: entry.data for name, entry in entries.items()}
        return state_dict, *rest

    return replacement


def _rename(entries: dict[str, Any], on_disk: set[str]) -> None:
    """Ask for what has another name on disk under that."""
    for entry in nested_values(entries):
        if not isinstance(entry, ShardedBase) or entry.key in on_disk:
            continue
        for pair in names.LOCAL_NAMES.items():  # the checkpoint may have either
            for here, there in (pair, pair[::-1]):
                other = entry.key.replace(here, there)
                entry.key = other if other in on_disk else entry.key


def _keep(
    entries: dict[str, Any], is_kept: Callable[[ShardedBase], bool]
) -> dict[str, ShardedBase]:
    """Take what keeps its value out of a model's request."""
    names_kept = [
        name for name, entry in entries.items() if isinstance(entry, ShardedBase) and is_kept(entry)
    ]
    return {name: entries.pop(name) for name in names_kept}


def _report(checkpoint: Path, on_disk: set[str], taken: set[str], new: set[str]) -> None:
    """Say from one rank what happens to every tensor.

    Raises:
        CheckpointError: the checkpoint lacks more than what only our models have.
    """
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, (taken, new))
    taken = set().union(*(part for part, _ in everywhere))
    new = set().union(*(part for _, part in everywhere))
    ours = {*names.added()}
    if not any(SHARED_EXPERT in key for key in on_disk):
        ours.add(SHARED_EXPERT)
    unknown = sorted(key for key in new if not any(known in key for known in ours))
    if unknown:
        raise CheckpointError(
            f"{checkpoint} lacks {len(unknown)} tensors of this model, the first is {unknown[0]}: "
            "it is a checkpoint of another model."
        )
    if torch.distributed.get_rank() != 0:
        return
    left = sorted(on_disk - taken)
    print(f"--finetune: {len(taken)} tensors taken from {checkpoint}")
    print(f"--finetune: {len(new)} new, as initialised: {', '.join(sorted(new)) or 'none'}")
    print(f"--finetune: {len(left)} left in the checkpoint: {', '.join(left) or 'none'}")
