"""The weights of one expert, whichever class holds them."""

from typing import Any

from torch import Tensor


def weights_of(experts: Any, index: int) -> list[Tensor]:
    """The weights of a local expert, in an order that is the same for all.

    Args:
        experts: the host's SequentialMLP or TEGroupedMLP, or GroupedExperts.
    """
    if hasattr(experts, "local_experts"):
        return [parameter.data for parameter in experts.local_experts[index].parameters()]
    linears = (experts.linear_fc1, experts.linear_fc2)
    if hasattr(linears[0], "weight0"):  # Transformer Engine's, a parameter for each expert
        return [
            parameter.data
            for linear in linears
            for name, parameter in linear.named_parameters()
            if name in (f"weight{index}", f"bias{index}")
        ]
    return [linear.weight.data[index] for linear in linears]
