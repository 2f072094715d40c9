"""What the routers have chosen in an iteration, layer by layer: log line, TensorBoard, W&B.

    moe/tokens-per-expert-min, -mean, -max
                           tokens of a routed expert in the iteration
    moe/load-violation     max / mean - 1
    moe/slots-of-KIND      share of all slots that experts at home of a kind got
    moe/routed-per-token, moe/routed-per-token-spread
                           routed experts of a token, mean and standard deviation
    moe/ranks-per-token, moe/nodes-per-token
                           expert parallel ranks, and nodes, that have experts of a token
    moe/copies-per-token   rows that an all-to-all makes of a token, those for this rank too: one
                           of the above, --scmoe-dispatch-copies says which
    moe/dropped            share of the top-k slots that went to nobody, for lack of capacity
    moe/router-entropy     of a token's scores, in nats, mean; ln(experts) if it prefers none
    moe/bias-range         largest - smallest bias that selects experts, where there is one

Each is the mean over the layers; with Megatron's --moe-per-layer-logging `NAME_layer_3` is layer 3.
Counted where gradients are, so that evaluation and recomputed passes do not count twice.

Shapes: T tokens, E routed experts, H experts at home, L attention layers, n expert parallel ranks
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Beside the slots of every expert: what a layer has counted, in the order of its row.
SUMS = (
    "tokens",
    "slots",
    "squares",
    "entropy",
    "scored",
    "visited ranks",
    "visited nodes",
    "bias",
    "ranks",
)

# What there is a copy for, by --scmoe-dispatch-copies.
COPIED_FOR = {"expert": "routed", "rank": "ranks", "node": "nodes"}


class Choices:
    """Counts of one layer since the last `take`, on its device: nothing waits for them."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def _add(self, name: str, found: Tensor) -> None:
        before = self._found.get(name)
        self._found[name] = found if before is None else before + found

    def add(self, routing_map: Tensor, at_home: Tensor | None, slots: int) -> None:
        """Count one pass of one gate.

        Args:
            routing_map: [T, E], bool.
            at_home: the same of experts at home, [T, H]; None without such experts.
            slots: K, what a token may have.
        """
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            per_token = routing_map.sum(dim=1).double()
            chosen = routing_map if at_home is None else torch.cat([routing_map, at_home], dim=1)
            tokens = len(routing_map)
            sums = torch.stack(
                [
                    torch.full_like(per_token[0], tokens),
                    torch.full_like(per_token[0], tokens * slots),
                    per_token.square().sum(),
                ]
            )
            self._add("counts", chosen.sum(dim=0))
            self._add("sums", sums)

    def visited(self, routing_map: Tensor, nodes: Sequence[int]) -> None:
        """Count where the tokens of one pass of one gate are sent.

        Args:
            routing_map: [T, E], bool, experts in the order in which they lie on the ranks.
            nodes: of every expert parallel rank, [n].
        """
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            ranks = routing_map.unflatten(1, (len(nodes), -1)).any(dim=2)
            of_nodes = [
                ranks[:, [rank for rank, other in enumerate(nodes) if other == node]].any(dim=1)
                for node in dict.fromkeys(nodes)
            ]
            found = torch.stack([ranks.sum(), torch.stack(of_nodes).sum()])
            self._add("visits", found.double())

    def watching(self, routing: Callable[..., Any]) -> Callable[..., Any]:
        """A router's `routing`, of which the entropy of the scores is taken.

        Args:
            routing: takes logits, [s, b, E + H].
        """

        def watched(logits: Tensor, *others: Any, **named: Any) -> Any:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    scores = logits.flatten(0, -2).float().log_softmax(dim=-1)
                    each = -(scores.exp() * scores).sum(dim=-1).double()
                    found = torch.stack([each.sum(), torch.full_like(each[0], len(each))])
                    self._add("entropy", found)
            return routing(logits, *others, **named)

        return watched

    def take(self, bias: Tensor | None) -> Tensor | None:
        """The row of this rank, [E + H + len(SUMS)]; None if nothing was counted.

        Args:
            bias: what selects experts, [E + H].
        """
        found, self._found = self._found, {}
        if "sums" not in found:
            return None
        sums = found["sums"]
        nothing = sums.new_zeros(2)
        entropy, visits = found.get("entropy", nothing), found.get("visits", nothing)
        range_of_bias = sums.new_zeros(()) if bias is None else (bias.max() - bias.min()).double()
        own = torch.stack([range_of_bias, torch.ones_like(range_of_bias)])
        return torch.cat([found["counts"].double(), sums, entropy, visits, own])


def statistics(row: Sequence[float], kinds: Mapping[str, int], biased: bool) -> dict[str, float]:
    """By name, of one layer.

    Args:
        row: see `Choices.take`, summed over ranks.
        kinds: numbers of the experts at home, in the order of their columns.
        biased: whether a bias selects.
    """
    counts, sums = row[: -len(SUMS)], dict(zip(SUMS, row[-len(SUMS) :], strict=True))
    experts = len(counts) - sum(kinds.values())
    routed, tokens = counts[:experts], sums["tokens"]
    mean = sum(routed) / experts
    per_token = sum(routed) / tokens
    variance = max(sums["squares"] / tokens - per_token**2, 0.0)
    found = {
        "tokens-per-expert-min": min(routed),
        "tokens-per-expert-mean": mean,
        "tokens-per-expert-max": max(routed),
        "load-violation": max(routed) / mean - 1 if mean else 0.0,
        "routed-per-token": per_token,
        "routed-per-token-spread": math.sqrt(variance),
        "dropped": 1 - sum(counts) / sums["slots"],
    }
    if sums["visited ranks"]:
        found["ranks-per-token"] = sums["visited ranks"] / tokens
        found["nodes-per-token"] = sums["visited nodes"] / tokens
    begin = experts
    for kind, number in kinds.items():
        found[f"slots-of-{kind}"] = sum(counts[begin : begin + number]) / sums["slots"]
        begin += number
    if sums["scored"]:
        found["router-entropy"] = sums["entropy"] / sums["scored"]
    if biased:
        found["bias-range"] = sums["bias"] / sums["ranks"]
    return found


def over_layers(layers: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Means of every name over the layers that have it."""
    names = dict.fromkeys(name for of_layer in layers.values() for name in of_layer)
    values = {name: [of[name] for of in layers.values() if name in of] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def copies_per_token(means: Mapping[str, float], copies: str) -> float | None:
    """Rows that an all-to-all makes of a token; None where nothing was counted.

    Args:
        copies: --scmoe-dispatch-copies.
    """
    return means.get(f"{COPIED_FOR[copies]}-per-token")


def in_words(means: Mapping[str, float]) -> str:
    """The console's part: what is not the same in every run."""
    words = ""
    at_home = sum(value for name, value in means.items() if name.startswith("slots-of-"))
    if at_home:
        words += f" routed per token: {means['routed-per-token']:.2f} |"
        words += f" slots at home: {at_home:.1%} |"
    if means.get("dropped", 0) > 0:
        words += f" dropped: {means['dropped']:.1%} |"
    return words
