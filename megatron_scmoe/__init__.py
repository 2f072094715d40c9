"""Shortcut-connected mixture of experts (ScMoE, arXiv:2404.05019) on NVIDIA Megatron-Core."""

__version__ = "0.1.0"
