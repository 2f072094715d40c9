"""Experts that are computed where their tokens are: no row of theirs is sent.

Such as the zero, copy and constant experts of MoE++ (arXiv:2410.07348). The router chooses among
them and the routed experts; their number is an option, --scmoe-num-KIND-experts, for every key of
AT_HOME.

Shapes: T tokens, h hidden, n experts of the kind
"""

from typing import ClassVar

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.variant import Variant


class ExpertsAtHome(Variant, MegatronModule):
    """All experts of one kind; `weights`, `flops` and `kept` are those of one expert.

    Parameters are the same on all ranks. Where tokens are split over tensor parallel ranks
    (`config.sequence_parallel`), a parameter has to say so by its attribute `sequence_parallel`.

    Args:
        number: n.
    """

    refusals: ClassVar[tuple[Refusal, ...]] = (
        Refusal(
            lambda config, scmoe: config.moe_pad_expert_input_to_capacity,
            "--moe-pad-expert-input-to-capacity does not work with experts at home",
            "drop it",
            "their tokens have no rows to pad",
        ),
        Refusal(
            lambda config, scmoe: config.moe_router_num_groups,
            "--moe-router-num-groups does not work with experts at home",
            "drop it",
            "they are on every rank and so in no group",
        ),
    )

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__(config)
        self.number = number

    def forward(self, tokens: Tensor, probs: Tensor) -> Tensor:
        """Their weighted sum for every token, [T, h].

        Of all tokens, because to pick those of one expert the host would have to wait for their
        number.

        Args:
            tokens: [T, h].
            probs: router weights, zero where not chosen, [T, n].
        """
        raise NotImplementedError


AT_HOME: dict[str, type[ExpertsAtHome]] = {}
