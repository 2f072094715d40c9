"""A piece of the autograd graph that is run backward by hand, and holds no more than it needs.

    entered = graph.enter(received)         the graph's inputs
    graph.leave([work(*entered)])           its outputs
    gradients = graph.backward(gradients)   of what left -> of what entered

Between the two passes it holds what the operations between inputs and outputs have saved. Leaves
would hold the inputs too, and a root the outputs: tensors as large as all rows of the experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge


class _Kind(NamedTuple):
    """What is left of an input."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Gradients:
    """Where the gradients of the inputs are put. The nodes of the graph hold this and not the graph
    itself, which holds them: a cycle through C++ would never be collected."""

    of_inputs: tuple[Tensor, ...] | None = None


class OwnGraph:
    """From `enter` to `leave`, differentiated once by `backward`."""

    def __init__(self) -> None:
        self._gradients = _Gradients()
        self._inputs: list[_Kind] = []
        self._outputs: list[GradientEdge] | None = None

    def enter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same values, at the beginning of this graph; integers have no gradient."""
        floating = [x for x in tensors if x.is_floating_point()]
        self._inputs = [_Kind(x.shape, x.dtype, x.device) for x in floating]
        anchor = floating[0].new_empty(0).requires_grad_()
        entered = iter(_Enter.apply(self._gradients, anchor, *floating))
        return [next(entered) if x.is_floating_point() else x for x in tensors]

    def leave(self, tensors: Sequence[Tensor]) -> None:
        """Backward will begin at these."""
        self._outputs = [get_gradient_edge(tensor) for tensor in tensors]

    def backward(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the floating-point tensors that entered, from those of what left.

        Raises:
            RuntimeError: it has run before and the graph is gone.
        """
        if self._outputs is None:
            raise RuntimeError("the routed branch cannot run backward a second time")
        outputs, self._outputs = self._outputs, None
        torch.autograd.backward(outputs, tuple(grads))
        of_inputs, self._gradients.of_inputs = self._gradients.of_inputs, None
        if of_inputs is None:  # no operation leads from any input to an output
            return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in self._inputs]
        return list(of_inputs)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients: _Gradients, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[None, ...]:
        ctx.gradients.of_inputs = grads
        return None, None, *(None for _ in grads)
