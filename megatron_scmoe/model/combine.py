"""How shared and routed outputs meet, arXiv:2404.05019, (14)-(17) and section 5.2.

    c_s * SE(x) + c_r * sum_i G(z)_i E_i(z)

Shapes: s sequence / TP, b batch, h hidden
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.variant import Variant


@dataclass(frozen=True)
class SharedOutput:
    """The shared expert's part of the sum, and the weight of the routed part."""

    output: Tensor
    """c_s * SE(x), [s, b, h]."""
    routed_weight: Tensor | None = None
    """c_r, [s, b, 1]; None for 1."""

    def merge(self, routed_output: Tensor) -> Tensor:
        """Sum of shared and routed parts, [s, b, h]."""
        if self.routed_weight is not None:
            routed_output = routed_output * self.routed_weight
        return routed_output + self.output


class Combine(Variant):
    """A value of --scmoe-combine."""

    host_gate: ClassVar[bool] = False
    """Whether it is the host's gate on the shared expert, --moe-shared-expert-gate: a part of the
    shared expert, recomputed with it, and switched on by this value."""
    refusals = (
        Refusal(
            lambda config, scmoe: config.moe_shared_expert_gate and vars(scmoe),
            "--moe-shared-expert-gate is --scmoe-combine cg1; drop it to use {scmoe_combine}",
        ),
    )

    @classmethod
    def build(cls, config: TransformerConfig) -> "Gate | None":
        """What is called with x, [s, b, h], and SE(x), [s, b, h]; None where nothing is added."""
        return None


class Gate(MegatronModule):
    """The gate that weighs both parts of the sum."""

    def forward(self, x: Tensor, shared_output: Tensor) -> SharedOutput:
        """x and SE(x), each [s, b, h]."""
        raise NotImplementedError


class Add(Combine):
    """Their sum (section 5.2)."""


class SigmoidGate(Combine):
    """A sigmoid gate on the shared expert, Megatron's --moe-shared-expert-gate (14), (15)."""

    names_on_disk = ("mlp.shared_experts.gate_weight",)
    host_gate = True
    refusals = (
        Refusal(
            lambda config, scmoe: not config.moe_shared_expert_gate,
            "--scmoe-combine cg1 is the host's gate",
            "add --moe-shared-expert-gate, or use --scmoe-combine add or cg2",
        ),
    )

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        return config.hidden_size

    @classmethod
    def kept(cls, config: TransformerConfig) -> int:
        return config.hidden_size


class SoftmaxGate(Combine):
    """A softmax gate on both (16), (17)."""

    names_on_disk = ("mlp.combine_gate.",)

    @classmethod
    def build(cls, config: TransformerConfig) -> "CombineGate":
        return CombineGate(config)

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        return 2 * config.hidden_size

    @classmethod
    def kept(cls, config: TransformerConfig) -> int:
        return 2 * config.hidden_size


class CombineGate(Gate):
    """CG-2: c = Softmax(W_CG x), one weight for the shared, one for the routed output. [(16)]"""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(
            torch.empty(2, config.hidden_size, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            config.init_method(self.weight)
        # Replicated over TP while x is split along the sequence: the host sums its gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, shared_output: Tensor) -> SharedOutput:
        weights = torch.softmax(torch.nn.functional.linear(x, self.weight), dim=-1)
        shared_weight, routed_weight = weights.split(1, dim=-1)
        return SharedOutput(shared_output * shared_weight, routed_weight)


COMBINES: dict[str, type[Combine]] = {"add": Add, "cg1": SigmoidGate, "cg2": SoftmaxGate}


def of_host(config: TransformerConfig) -> type[Combine]:
    """How stock Megatron, without a shortcut, combines shared and routed experts."""
    has_gate = config.moe_shared_expert_intermediate_size and config.moe_shared_expert_gate
    return SigmoidGate if has_gate else Add
