"""How often a token is sent: rows of an all-to-all by --scmoe-dispatch-copies.

Where nothing else is known every set of K experts is as likely as any other:

    distinct groups of a token = G (1 - C(E - E/G, K) / C(E, K))

for G ranks or nodes of equal numbers of experts. Counts of a run (--collaboration, made by
`tools/c2r.py profile`) say what its router chose, and --scmoe-expert-placement where experts lie.

Shapes: E experts
"""

from argparse import Namespace
from dataclasses import dataclass
from math import exp, lgamma
from statistics import fmean

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.c2r import collaboration, placement
from megatron_scmoe.model.routing import ROUTERS


@dataclass(frozen=True)
class TokenRows:
    """Rows of a token, mean."""

    experts: float
    ranks: float
    """Expert parallel ranks with experts of it."""
    nodes: float
    """Nodes with experts of it."""
    ranks_per_node: int
    """Of the expert parallel group."""
    counted: bool = False
    """Whether a run counted them; else sets of experts are taken to be equally likely."""


def copies_of(args: Namespace, config: TransformerConfig, topk: int) -> TokenRows:
    """What a token of the model has.

    Args:
        topk: K; what was counted is used for the model's own alone.

    Raises:
        ValueError: the counts are of another model, or do not tell; a file is damaged.
    """
    at_home = sum(args.scmoe_experts_at_home.values())
    share = float(ROUTERS[args.scmoe_router].routed_share(config, at_home, args))
    experts, ranks = config.num_moe_experts, config.expert_model_parallel_size
    assert experts is not None
    # Expert tensor parallel ranks lie side by side.
    local = (args.scmoe_ranks_per_node or 1) // config.expert_tensor_parallel_size
    local = max(1, min(ranks, local))
    nodes = max(ranks // local, 1)
    # The planner's option; the doctor asks for a run, which has none.
    counted = getattr(args, "collaboration", None) is not None
    if counted and topk == config.moe_router_topk:
        return _counted(args, config, ranks, local, topk * share)
    return TokenRows(
        topk * share,
        expected(ranks, experts, topk * share),
        expected(nodes, experts, topk * share),
        local,
    )


def expected(groups: int, experts: int, chosen: float) -> float:
    """Distinct groups among chosen experts, all sets equally likely; between whole numbers of them
    by the gamma function."""
    rest = experts - experts // groups
    if chosen > rest:
        return float(groups)
    none = lgamma(rest + 1) - lgamma(rest - chosen + 1)
    return groups * (1 - exp(none - lgamma(experts + 1) + lgamma(experts - chosen + 1)))


def _counted(
    args: Namespace, config: TransformerConfig, ranks: int, ranks_per_node: int, chosen: float
) -> TokenRows:
    counts = collaboration.read(args.collaboration)
    if counts.experts != config.num_moe_experts:
        raise ValueError(
            f"{args.collaboration} counts {counts.experts} experts, and --num-experts is "
            f"{config.num_moe_experts}: profile this model."
        )
    placed = None
    if (path := getattr(args, "scmoe_expert_placement", None)) is not None:
        found = placement.read(path)
        # Of other numbers of ranks, which the planner compares, there is no placement.
        if found.experts == counts.experts and found.ranks == ranks:
            placed = found

    def mean(groups: int) -> float:
        return fmean(
            layer.distinct(placement.groups_of(counts.experts, groups, number, placed))
            for number, layer in counts.layers.items()
        )

    nodes = max(ranks // ranks_per_node, 1)
    return TokenRows(chosen, mean(ranks), mean(nodes), ranks_per_node, counted=True)
