"""When the biases of --scmoe-router longcat move: after the gradients of a step are complete."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_scmoe.host.replace import Replacement
from megatron_scmoe.model.routing.longcat import update_biases

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Factor of the rate, by the share of the run that is done; --scmoe-bias-decay."""


def moving_biases(host_reset: Callable[..., Any]) -> Callable[..., Any]:
    """`reset_model_temporary_tensors`, which ends a step's counts, and what is learnt from them."""

    def replacement(config: TransformerConfig, model: list[torch.nn.Module]) -> None:
        args = get_args()
        if getattr(args, "scmoe_router", None) == "longcat":
            done = min(args.curr_iteration / args.train_iters, 1.0)
            update_biases(
                model, config.moe_router_bias_update_rate * DECAYS[args.scmoe_bias_decay](done)
            )
        host_reset(config, model)

    return replacement


REPLACEMENTS = (
    Replacement(
        "megatron.core.distributed.finalize_model_grads.reset_model_temporary_tensors",
        "always",
        "core/distributed/finalize_model_grads.py:675",
        "no hook after a step: its expert bias moves by the sign, and with sigmoids alone",
        moving_biases,
    ),
)
