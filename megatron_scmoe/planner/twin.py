"""What a shortcut does to the model of a command line: its size before and after the one flag."""

import copy
from argparse import Namespace
from typing import NamedTuple

from megatron_scmoe.arguments import model_config_from_args
from megatron_scmoe.planner.size import ModelSize, model_size

# Of what a shortcut implies, what has a size.
SHARED_EXPERT = {"moe_shared_expert_intermediate_size", "moe_shared_expert_gate"}
UNCHANGED = 0.005
"""Below this share nobody has to be told."""


class Twin(NamedTuple):
    """The model of a command line without a shortcut, and with it."""

    before: ModelSize
    after: ModelSize


def twin(args: Namespace) -> Twin | None:
    """Both sizes; None without a shortcut.

    Args:
        args: validated, with what a shortcut implies (`apply_scmoe_defaults`).

    Raises:
        ValueError: a model that is not counted.
    """
    if args.scmoe_shortcut_position == "none":
        return None
    sizes = (
        model_size(model_config_from_args(each), args.seq_length, args.micro_batch_size)
        for each in (without_shortcut(args), args)
    )
    return Twin(*sizes)


def without_shortcut(args: Namespace) -> Namespace:
    """The options of the model without its shortcut and the shared expert that this implied."""
    stock = copy.copy(args)
    stock.scmoe_shortcut_position = stock.scmoe_dual_gating = "none"
    for dest in SHARED_EXPERT & args.scmoe_implied.keys():
        setattr(stock, dest, args.scmoe_implied[dest])
    stock.scmoe_combine = "cg1" if stock.moe_shared_expert_gate else "add"
    return stock


def what_the_flag_changes(args: Namespace) -> list[str]:
    """One or two lines: sizes and FLOPs before and after, and what would keep them equal.

    Args:
        args: as for `twin`.
    """
    try:
        both = twin(args)
    except ValueError:
        return []  # the memory report says what is not counted
    if both is None:
        return []
    before, after = both
    ratio = after.model_flops / before.model_flops
    lines = [
        f"--scmoe-shortcut-position {args.scmoe_shortcut_position}: "
        f"{_parameters(after)} and {ratio:.2f} x the FLOPs; without it {_parameters(before)}"
    ]
    if abs(ratio - 1) > UNCHANGED and "moe_shared_expert_intermediate_size" in args.scmoe_implied:
        lines.append(f"  the shared expert is new; {_equal(args)}")
    if args.scmoe_dual_gating != "none":
        lines.append("  two gates of one expert each have the FLOPs of --moe-router-topk 2")
    return lines


def _parameters(size: ModelSize) -> str:
    return f"{_short(size.parameters)} parameters, {_short(size.activated_parameters)} activated"


def _short(number: int) -> str:
    for power, letter in ((1e9, "B"), (1e6, "M")):
        if number >= power:
            return f"{number / power:.3g} {letter}"
    return str(number)


def _equal(args: Namespace) -> str:
    """The options with which the shared expert takes the place of one routed expert a token."""
    width = args.moe_ffn_hidden_size or args.ffn_hidden_size
    if args.moe_router_topk == 1:
        return "it stands beside top-1, as in the paper, which compares with top-2"
    return (
        f"the same FLOPs as before: --moe-router-topk {args.moe_router_topk - 1} "
        f"--moe-shared-expert-intermediate-size {width}"
    )
