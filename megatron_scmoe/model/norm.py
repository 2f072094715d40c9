"""Layer norms of the local spec that also run under sequence parallelism."""

import torch
from megatron.core.transformer.torch_norm import LayerNormInterface
from megatron.core.transformer.transformer_config import TransformerConfig


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
        for option in (
            "layernorm_zero_centered_gamma",
            "persist_layer_norm",
            "memory_efficient_layer_norm",
        ):
            if getattr(config, option):
                raise ValueError(
                    f"{option} needs Transformer Engine or apex: torch's norms cannot do it."
                )
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in norms:
            raise ValueError(
                f"--normalization {config.normalization}: choose LayerNorm or RMSNorm."
            )
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
