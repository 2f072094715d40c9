"""Layer norms of the local spec that also run under sequence parallelism."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import LNImpl
from megatron.core.transformer.torch_norm import LayerNormInterface, WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.checks.refusal import Refusal, refuse

NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def is_torchs(config: TransformerConfig) -> bool:
    """Whether the model's norms are torch's: apex is not here, or has no such norm."""
    uses_torch = LNImpl is WrappedTorchNorm or config.normalization == "RMSNorm"
    return config.transformer_impl == "local" and uses_torch


_TORCHS = "--transformer-impl local uses torch's norms"

# What torch's norms cannot do, by the config.
REFUSALS = (
    Refusal(
        lambda config: config.layernorm_zero_centered_gamma, _TORCHS, "drop --apply-layernorm-1p"
    ),
    Refusal(lambda config: config.persist_layer_norm, _TORCHS, "add --no-persist-layer-norm"),
    Refusal(
        lambda config: config.memory_efficient_layer_norm,
        _TORCHS,
        "drop --memory-efficient-layer-norm",
    ),
    Refusal(
        lambda config: config.normalization not in NORMS,
        "--normalization {normalization}",
        "choose LayerNorm or RMSNorm",
    ),
)


class SequenceParallelTorchNorm:
    """torch's LayerNorm or RMSNorm, as the config says.

    Differs from megatron.core.transformer.torch_norm.WrappedTorchNorm, which refuses sequence
    parallelism: each rank normalises its part of the sequence, [s / TP, b, h], and the parameters
    are marked so that the host sums their gradients over TP.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> LayerNormInterface:
        """Build the norm.

        Raises:
            ValueError: the config asks for something that torch's norms cannot do.
        """
        refuse(REFUSALS, config)
        norm = NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
