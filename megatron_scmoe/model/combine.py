"""How shared and routed outputs meet: c_s * SE(x) + c_r * sum_i G(z)_i E_i(z).

A value of --scmoe-combine is a class that says what it adds to the layer, to a checkpoint and to
the count of parameters and FLOPs. COMBINES has them all.

Shapes: s sequence / TP, b batch, h hidden
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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


class Combine:
    """A value of --scmoe-combine; the docstring's first line is its help text."""

    name_on_disk: ClassVar[str | None] = None
    """Its parameters, under the MoE layer's name; None if it has none."""
    host_gate: ClassVar[bool] = False
    """Whether it is the host's gate on the shared expert, --moe-shared-expert-gate."""

    @classmethod
    def build(cls, config: TransformerConfig) -> "Gate | None":
        """What is called with x, [s, b, h], and SE(x), [s, b, h]; None where nothing is added."""
        return None

    @classmethod
    def weights(cls, hidden_size: int) -> int:
        """Parameters of what `build` returns; each is used once a token, in one product and sum."""
        return 0


class Gate(MegatronModule):
    """Weighs both parts of the sum."""

    def forward(self, x: Tensor, shared_output: Tensor) -> SharedOutput:
        """x and SE(x), each [s, b, h]."""
        raise NotImplementedError


class Add(Combine):
    """c_s = c_r = 1 (section 5.2)"""


class SigmoidGate(Combine):
    """c_s = Sigmoid(w x), c_r = 1 (14), (15); Megatron's --moe-shared-expert-gate"""

    name_on_disk = "mlp.shared_experts.gate_weight"
    host_gate = True


class SoftmaxGate(Combine):
    """c_s, c_r = Softmax(W x) (16), (17)"""

    name_on_disk = "mlp.combine_gate."

    @classmethod
    def build(cls, config: TransformerConfig) -> "CombineGate":
        return CombineGate(config)

    @classmethod
    def weights(cls, hidden_size: int) -> int:
        return 2 * hidden_size


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
