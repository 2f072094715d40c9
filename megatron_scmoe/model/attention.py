"""Core attention of the local spec that also serves multi-latent attention."""

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig


class LatentDotProductAttention(DotProductAttention):
    """Attention whose values have a width of their own.

    Differs from megatron.core.transformer.dot_product_attention.DotProductAttention, which the
    host's local spec gives to multi-latent attention although its constructor does not take the
    widths of keys and values (multi_latent_attention.py:207): there every width is `kv_channels`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the value's width per head.

        The key's is not needed: the host passes the softmax scale that it implies. The host's
        attention builds its core twice, and the first time without widths.
        """
        super().__init__(config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
