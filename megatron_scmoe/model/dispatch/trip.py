"""How tokens get to their experts and back, as trips that hand their state on.

    dispatcher.prepare([z]) -> [Trip]  cargo, collective -> (exchange) -> expert_input -> (experts)
                                       -> reply -> (exchange) -> restore

Differs from megatron.core.transformer.moe.token_dispatcher: a trip is one chunk of one micro-batch
and holds all its state, so that any number can be in flight; it says what is exchanged and leaves
the exchange itself to overlap/branch.py. Permutations are the host's.

Shapes: s sequence / TP, b batch, h hidden, T = s*b local tokens (of a chunk), E experts, e local
experts, K top-k, N rows sent (T*K without dropping), R rows for this rank's experts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.model.variant import Variant
from megatron_scmoe.overlap.collectives import Collective


@dataclass(frozen=True)
class Chunk:
    """A part of one micro-batch's tokens, to be sent to its experts."""

    hidden_states: Tensor
    """What the routed experts read, [T, h]."""
    probs: Tensor
    """Router weights, zero where not routed, [T, E]."""
    routing_map: Tensor
    """[T, E], bool."""
    rows_per_token: int | None = None
    """The most rows that a token may have; None for K."""


@dataclass(frozen=True)
class ExpertInput:
    """Rows of this rank's experts, sorted by expert."""

    hidden_states: Tensor
    """[R, h]."""
    probs: Tensor
    """Router weight of each row, [R]."""
    tokens_per_expert: Tensor
    """[e], on the CPU."""


class Trip(Protocol):
    """One chunk of tokens on the way to its experts and back."""

    @property
    def tokens_per_expert(self) -> Tensor | None:
        """[e], on the CPU, once `collective` is known; None if only the rows themselves tell."""

    def cargo(self) -> tuple[Tensor, ...]:
        """What is sent; call it once. Nothing else holds these tensors."""

    def collective(self) -> Collective:
        """How it is sent. May block the host until the numbers of rows are known."""

    def expert_input(self, received: list[Tensor]) -> ExpertInput:
        """What the exchange brought, as the experts want it."""

    def reply(self, expert_output: Tensor) -> tuple[Collective, Tensor]:
        """The exchange that brings weighted outputs, [R, h], back, and what it sends."""

    def restore(self, rows: Tensor) -> Tensor:
        """Sum over the K experts of each token, [T, h], from what came back."""


class Dispatcher(Variant):
    """One way of exchanging tokens, a value of --moe-token-dispatcher-type."""

    host_type: ClassVar[str] = "alltoall"
    """The host's value that stands for it where the host asks, which knows only its own."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, local_experts: slice
    ) -> None:
        self.config = config
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.tp_ep_group = pg_collection.tp_ep
        self.local_experts = local_experts

    @classmethod
    def build(cls, host: MoETokenDispatcher, ranks_per_node: int, *layer: Any) -> Self:
        """Make one for a layer.

        Args:
            host: the host's own.
            ranks_per_node: ranks of the job that share a node.
            layer: what the constructor takes; last the experts of this rank.
        """
        return cls(*layer)

    def prepare(self, chunks: list[Chunk], host_waited: Callable[[float], None]) -> Sequence[Trip]:
        """Begin a trip with each chunk, and ask for the numbers of rows of all.

        Args:
            host_waited: told the seconds for which the host stands still until it knows them.
        """
        raise NotImplementedError
