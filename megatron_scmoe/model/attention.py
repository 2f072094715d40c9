"""Multi-latent attention: a core for the local spec, and LongCat-Flash's scales."""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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


def scale_latents(model: torch.nn.Module) -> None:
    """Multiply what every latent attention expands by sqrt(hidden size / rank of the latent).

    alpha_q of queries, alpha_kv of the part of keys and values that comes from the latent, so that
    their variance does not depend on the rank (LongCat-Flash, arXiv:2509.01322, section 2.3).
    """
    for attention in model.modules():
        if not isinstance(attention, MLASelfAttention):
            continue
        config = attention.config
        latents = [(attention.linear_kv_up_proj, config.kv_lora_rank)]
        if config.q_lora_rank is not None:
            latents.append((attention.linear_q_up_proj, config.q_lora_rank))
        for expansion, rank in latents:
            assert isinstance(expansion, torch.nn.Module)
            expansion.register_forward_hook(partial(_scaled, (config.hidden_size / rank) ** 0.5))


def _scaled(
    factor: float, module: torch.nn.Module, arguments: Any, output: tuple[Tensor, Any]
) -> tuple[Tensor, Any]:
    """A forward hook of the host's linear layers, which return a bias too."""
    return output[0] * factor, output[1]
