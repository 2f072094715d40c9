"""--scmoe-combine tanh."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.model.combine import COMBINES, Combine, Gate, SharedOutput


class TanhGate(Combine):
    """A tanh gate on the routed experts: c_s = 1, c_r = 1 + tanh(w x)."""

    names_on_disk = ("mlp.combine_gate.",)
    refusals = (
        *Combine.refusals,
        Refusal(
            lambda config, scmoe: scmoe.scmoe_post_norm,
            "--scmoe-combine tanh does not work with --scmoe-post-norm",
            "drop one of them",
        ),
    )

    @classmethod
    def build(cls, config: TransformerConfig) -> "TanhGateModule":
        return TanhGateModule(config)

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        return config.hidden_size

    @classmethod
    def kept(cls, config: TransformerConfig) -> int:
        return config.hidden_size


class TanhGateModule(Gate):
    """`combine_gate` of the MoE layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype)
        )
        config.init_method(self.weight)
        # The same on all tensor parallel ranks, which see different tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, shared_output: Tensor) -> SharedOutput:
        gate = torch.nn.functional.linear(x, self.weight)
        return SharedOutput(shared_output, 1 + gate.tanh())


COMBINES["tanh"] = TanhGate
