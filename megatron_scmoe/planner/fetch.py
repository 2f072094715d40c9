"""What fetching offloaded experts should cost in one MoE layer, before anything runs.

Assumed: routing is uniform, dense work takes its FLOPs over what products reach, and what a layer
keeps of its experts, `slots` of E, is as likely to be asked for as any other.

    experts that T tokens need = E (1 - (1 - K / E)^T)
"""

from argparse import Namespace
from typing import NamedTuple

from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.overlap.schedule import window
from megatron_scmoe.planner.copies import copies_of
from megatron_scmoe.planner.size import model_size
from megatron_scmoe.planner.times import step_flops


class FetchTimes(NamedTuple):
    """Seconds of one MoE layer in one pass."""

    window: float
    """Dense work between the gate and the experts, at the last slot."""
    transfer: float
    """Of the experts that are missing."""


def fetch_times(
    args: Namespace,
    model: ScMoEModelConfig,
    tokens: int,
    keys: int,
    flops_per_second: float,
    expert_seconds: float,
    slots: int = 0,
) -> FetchTimes:
    """A pass of `tokens` tokens on a rank that has all experts.

    Args:
        args: validated.
        keys: that a token attends to, mean.
        flops_per_second: what products of so many rows reach.
        expert_seconds: that an expert travels.
        slots: experts of the layer that are kept between passes.
    """
    config = model.transformer
    # Of a causal sequence a token attends to one half.
    flops = step_flops(model_size(model, 2 * keys, 1))
    dense = sum(flops.get(step, 0) for step in window(args.scmoe_shortcut_position))
    experts = config.num_moe_experts
    assert experts is not None
    chosen = copies_of(args, config, config.moe_router_topk).experts
    needed = experts * (1 - (1 - chosen / experts) ** tokens)
    missing = needed * (1 - slots / experts)
    return FetchTimes(dense * tokens / flops_per_second, missing * expert_seconds)
