"""What routers read of ScMoEConfig."""

from collections.abc import Mapping
from typing import Literal, Protocol


class RouterOptions(Protocol):
    """Options of ours; see config.py."""

    scmoe_tau: float
    scmoe_gating_residual: bool
    scmoe_capacity_of: Literal["slots", "tokens"]
    scmoe_renormalise: bool
    scmoe_gate_layers: int
    scmoe_routed_topk: float | None
    scmoe_balance_groups: int | None
    scmoe_scaled_experts: Literal["all", "routed"]
    scmoe_c2r_lists: str | None
    scmoe_c2r_top_t: int | None

    @property
    def at_home(self) -> Mapping[str, int]:
        """Numbers of the kinds of experts at home, in the order of their columns."""
