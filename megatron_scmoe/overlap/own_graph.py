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


class _Outline(NamedTuple):
    """What is left of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Outline":
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


@dataclass
class _Gradients:
    """Gradients on their way in and out. The nodes of the graph hold this and not the graph itself,
    which holds them: a cycle through C++ would never be collected."""

    of_inputs: tuple[Tensor, ...] | None = None
    of_outputs: tuple[Tensor, ...] = ()


class OwnGraph:
    """From `enter` to `leave`, differentiated once by `backward`."""

    def __init__(self) -> None:
        self._gradients = _Gradients()
        self._inputs: list[_Outline] = []
        self._outputs: list[tuple[GradientEdge, _Outline]] = []

    def enter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same values, at the beginning of this graph; integers have no gradient."""
        floating = [x for x in tensors if x.is_floating_point()]
        self._inputs = [_Outline.of(x) for x in floating]
        anchor = floating[0].new_empty(0).requires_grad_()
        entered = iter(_Enter.apply(self._gradients, anchor, *floating))
        return [next(entered) if x.is_floating_point() else x for x in tensors]

    def leave(self, tensors: Sequence[Tensor]) -> None:
        """Backward will begin at these."""
        left = _Leave.apply(self._gradients, *tensors)
        self._outputs = [(get_gradient_edge(tensor), _Outline.of(tensor)) for tensor in left]

    def backward(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients of the floating-point tensors that entered, from those of what left.

        Args:
            grads: taken out of the list: each lives as long as an operation needs it.

        Raises:
            RuntimeError: it has run before and the graph is gone.
        """
        if not self._outputs:
            raise RuntimeError("the routed branch cannot run backward a second time")
        outputs, self._outputs = self._outputs, []
        self._gradients.of_outputs = tuple(grads)
        grads.clear()
        # Whoever calls autograd holds what it is given until the end: it is given nothing much.
        placeholders = [kind.zeros(()).expand(kind.shape) for _, kind in outputs]
        torch.autograd.backward([edge for edge, _ in outputs], placeholders)
        of_inputs, self._gradients.of_inputs = self._gradients.of_inputs, None
        if of_inputs is None:  # no operation leads from any input to an output
            return [kind.zeros(kind.shape) for kind in self._inputs]
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


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients: _Gradients, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *_placeholders: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.gradients.of_outputs = ctx.gradients.of_outputs, ()
        return None, *grads
