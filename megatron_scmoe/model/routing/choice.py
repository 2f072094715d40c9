"""Which experts every token goes to.

Shapes: T tokens, E routed experts, H experts at home
"""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What a router has chosen."""

    probs: Tensor
    """Weights of the experts that tokens are sent to, zero where not routed, [T, E]."""
    routing_map: Tensor
    """[T, E], bool. A token may have any number of rows, none too."""
    at_home: Tensor | None = None
    """Weights of the experts that are computed where the token is, zero where not chosen:
    [T, H]."""
    at_home_map: Tensor | None = None
    """Which of those were chosen, [T, H], bool."""
    rows_per_token: int | None = None
    """The most rows that a token may have; None for K."""
    chosen: Tensor | None = None
    """Experts of every token before any was dropped, [T, K]; None where nobody asks for them."""
    logits: Tensor | None = None
    """What the next MoE layer's router reads, [s, b, E + H]; None if it reads nothing."""

    def in_order(self, order: Tensor | None) -> "Routing":
        """The same with the columns of routed experts as these lie on the ranks.

        Args:
            order: the expert in every place, [E]; None where they lie in their order.
        """
        if order is None:
            return self
        return replace(
            self,
            probs=self.probs.index_select(1, order),
            routing_map=self.routing_map.index_select(1, order),
        )

    @classmethod
    def of_columns(cls, probs: Tensor, routing_map: Tensor, num_experts: int) -> "Routing":
        """Tell the experts at home, which are the last columns, from the routed ones.

        Args:
            probs: [T, E + H].
            routing_map: [T, E + H], bool.
            num_experts: E.
        """
        if probs.shape[1] == num_experts:
            return cls(probs, routing_map)
        return cls(
            probs[:, :num_experts].contiguous(),
            routing_map[:, :num_experts].contiguous(),
            probs[:, num_experts:],
            routing_map[:, num_experts:],
        )
