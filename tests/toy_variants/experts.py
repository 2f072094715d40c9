"""--scmoe-num-fixed-experts N."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.experts.at_home import AT_HOME, ExpertsAtHome


class FixedExperts(ExpertsAtHome):
    """Experts whose output is a learned vector, E_i(z) = v_i."""

    refusals = (
        *ExpertsAtHome.refusals,
        Refusal(
            lambda config, scmoe: config.moe_router_topk == 1,
            "--scmoe-num-fixed-experts does not work with --moe-router-topk 1",
            "raise it",
            "a token would have nothing else",
        ),
    )

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__(config, number)
        self.weight = torch.nn.Parameter(
            torch.empty(number, config.hidden_size, dtype=config.params_dtype)
        )
        config.init_method(self.weight)
        # The same on all tensor parallel ranks, which see different tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, probs: Tensor) -> Tensor:
        return probs.to(self.weight.dtype) @ self.weight

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        return config.hidden_size

    @classmethod
    def kept(cls, config: TransformerConfig) -> int:
        return 1  # the router's weight


AT_HOME["fixed"] = FixedExperts
