"""Experts that are computed where their tokens are: no row of theirs is sent.

The zero, copy and constant experts of MoE++ (arXiv:2410.07348, (3)-(5)); LongCat-Flash's identity
experts (arXiv:2509.01322) are copy experts. The router chooses among them and the routed experts;
their number is an option, --scmoe-num-KIND-experts, for every key of AT_HOME.

Shapes: T tokens, h hidden, n experts of the kind
"""

from typing import ClassVar

import torch
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


class ZeroExperts(ExpertsAtHome):
    """Experts that add nothing, E_i(z) = 0: a slot that is saved (3)"""

    def forward(self, tokens: Tensor, probs: Tensor) -> Tensor:
        return torch.zeros_like(tokens)


class CopyExperts(ExpertsAtHome):
    """Experts that return their input, E_i(z) = z (4), the identity experts of LongCat-Flash"""

    def forward(self, tokens: Tensor, probs: Tensor) -> Tensor:
        return probs.sum(dim=1, keepdim=True) * tokens

    @classmethod
    def kept(cls, config: TransformerConfig) -> int:
        return 1  # the router's weight; the tokens are kept by others


class ConstantExperts(ExpertsAtHome):
    """Experts that mix their input with a vector of their own, E_i(z) = a_1 z + a_2 v_i (5)

    [a_1, a_2] = Softmax(W_i z), W_i in R^{2 x h}.
    """

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__(config, number)
        hidden, dtype = config.hidden_size, config.params_dtype
        self.mix_weight = torch.nn.Parameter(torch.empty(number, 2, hidden, dtype=dtype))
        self.vector = torch.nn.Parameter(torch.empty(number, hidden, dtype=dtype))
        config.init_method(self.mix_weight)
        torch.nn.init.normal_(self.vector)  # as the released code does
        for parameter in (self.mix_weight, self.vector):
            # The same on all tensor parallel ranks, which see different tokens.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, probs: Tensor) -> Tensor:
        mix = torch.einsum("th,nch->tnc", tokens, self.mix_weight).softmax(dim=-1)
        of_input, of_vector = (probs[..., None] * mix).unbind(dim=-1)  # [T, n]
        return of_input.sum(dim=1, keepdim=True) * tokens + of_vector.to(tokens.dtype) @ self.vector

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        return 3 * config.hidden_size

    @classmethod
    def kept(cls, config: TransformerConfig) -> int:
        return 7  # the router's weight, and two of the mix before and behind softmax and weight


AT_HOME: dict[str, type[ExpertsAtHome]] = {
    "zero": ZeroExperts,
    "copy": CopyExperts,
    "constant": ConstantExperts,
}
