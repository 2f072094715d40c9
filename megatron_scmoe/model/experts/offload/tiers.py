"""Where experts live that are not on the device: in host memory, or in a file mapped into it."""

import tempfile
from collections.abc import Iterable
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

Tier = Literal["cpu", "disk"]


def move_home(parameters: Iterable[Any], tier: Tier) -> None:
    """Move parameters to a tier; they keep names and values and lose their gradients."""
    parameters = list(parameters)
    total = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    memory = None if tier == "cpu" else _mapped(total)
    offset = 0
    for parameter in parameters:
        parameter.requires_grad_(False)
        values = parameter.data
        if memory is None:
            # Pinned, so that a copy to the device does not keep the host waiting.
            parameter.data = values.cpu().pin_memory() if values.is_cuda else values
            continue
        size = parameter.numel() * parameter.element_size()
        home = memory[offset : offset + size].view(values.dtype).view(values.shape)
        parameter.data = home.copy_(values)
        offset += size


def _mapped(size: int) -> Tensor:
    """Bytes of a file that has no name any more: when the process ends, however it does, the file
    is gone.

    Raises:
        OSError: it cannot be made.
    """
    with tempfile.TemporaryFile(prefix="scmoe-experts-") as file:
        file.truncate(size)
        # The map outlives the descriptor.
        array = numpy.memmap(file, dtype=numpy.uint8, mode="r+", shape=(size,))
    return torch.from_numpy(array)
