"""Routed experts as grouped matrix products, without Transformer Engine.

    E_i(z) = W2_i act(W1_i z),  the local experts i in two products over stacked weights

What `--moe-grouped-gemm` selects with `--transformer-impl local`, in place of
megatron.core.transformer.moe.experts.SequentialMLP. The forward pass (activations, router weights,
recomputation) is the host's TEGroupedMLP, which needs nothing of Transformer Engine but its linear
layers; ours multiply with torch.nn.functional.grouped_mm. Initial weights, results and checkpoints
are those of SequentialMLP.

Shapes: h hidden, e local experts, R rows of all local experts, sorted by expert
"""

from argparse import Namespace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.moe.experts import (
    GroupedMLPSubmodules,
    SequentialMLP,
    TEGroupedMLP,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_scmoe.model import names

# (axis, rank, size) for every axis in front of a tensor's own.
ShardedOffsets = tuple[tuple[int, int, int], ...]


def uses_grouped_experts(config: TransformerConfig | Namespace) -> bool:
    """Whether `--moe-grouped-gemm` means the experts of this file.

    The host's local spec has no grouped experts and ignores the option. Experts with biases, which
    a shortcut refuses, stay the host's.
    """
    return (
        config.transformer_impl == "local"
        and config.moe_grouped_gemm
        and not config.add_bias_linear
    )


def why_no_grouped_mm(
    dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device
) -> str | None:
    """Why experts multiply in a loop here; None where grouped_mm does it.

    Args:
        sizes: input and output features of one expert's linear layers.
    """
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm, 2.10 has"
    if device.type == "cuda":
        # Everywhere else it is a loop of torch's, which waits for the GPU to read the offsets.
        if dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in (9, 10):
            return "grouped_mm has a kernel for bf16 on Hopper and Blackwell only"
    elif dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not multiply {dtype}"
    if any(size * dtype.itemsize % 16 for size in sizes):
        return f"grouped_mm wants rows of a multiple of 16 bytes: not {sizes} elements of {dtype}"
    return None


class GroupedMatmul(torch.autograd.Function):
    """Rows of expert i times its weight: [R, in], [e, out, in] -> [R, out]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, tokens_per_expert: list[int], use_grouped_mm: bool
    ) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.tokens_per_expert = tokens_per_expert
        # grouped_mm takes no tensor without rows, and of a single row "contiguous" says nothing
        # about the strides that it looks at.
        ctx.multiply = _grouped_mm if use_grouped_mm and rows.shape[0] > 1 else _loop
        return ctx.multiply(rows, weight.mT, tokens_per_expert)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = ctx.multiply(grad, weight, ctx.tokens_per_expert)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.multiply(grad.mT, rows, ctx.tokens_per_expert)
        return grad_rows, grad_weight, None, None


def _grouped_mm(left: Tensor, right: Tensor, splits: list[int]) -> Tensor:
    """[R, k], [e, k, n] -> [R, n], or [m, R], [R, n] -> [e, m, n]; `splits` of R over experts."""
    ends = torch.tensor(list(accumulate(splits)), dtype=torch.int32, pin_memory=left.is_cuda)
    ends = ends.to(left.device, non_blocking=True)
    output = torch.nn.functional.grouped_mm(left, right, offs=ends)
    if right.dim() == 2:
        # Of experts without rows Blackwell's kernel leaves what it finds (pytorch/pytorch#172439):
        # weight gradients of no token at all.
        for expert, rows in enumerate(splits):
            if rows == 0:
                output[expert].zero_()
    return output


def _loop(left: Tensor, right: Tensor, splits: list[int]) -> Tensor:
    """The same by one torch.mm for each expert."""
    if right.dim() == 3:
        output = left.new_empty(left.shape[0], right.shape[2])
        products = zip(left.split(splits), right, output.split(splits), strict=True)
    else:
        output = left.new_empty(len(splits), left.shape[0], right.shape[1])
        products = zip(left.split(splits, dim=1), right.split(splits), output, strict=True)
    for a, b, out in products:
        torch.mm(a, b, out=out)
    return output


class GroupedLinear(torch.nn.Module):
    """One linear layer of every local expert, weights stacked to [e, out, in].

    Args:
        num_experts: e.
        expert_linear: the host's linear layer of one expert, column or row parallel over the expert
            tensor parallel ranks. Its weight gives shape, type and device, and the attributes that
            the host's gradient reduction and optimizer read off a parameter.
    """

    def __init__(self, num_experts: int, expert_linear: torch.nn.Module) -> None:
        super().__init__()
        weight: Any = expert_linear.weight
        stacked: Any = torch.nn.Parameter(weight.new_empty(num_experts, *weight.shape))
        for name, value in vars(weight).items():
            setattr(stacked, name, value)
        stacked.partition_dim = weight.partition_dim + 1  # behind the dimension of experts
        self.weight = stacked

    @property
    def use_grouped_mm(self) -> bool:
        """Asked of the weight as it is now: the host moves and converts a module after it was
        built."""
        weight = self.weight
        return why_no_grouped_mm(weight.dtype, weight.shape[1:], weight.device) is None

    def forward(self, rows: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """[R, in] -> [R, out], and no bias."""
        output = GroupedMatmul.apply(rows, self.weight, tokens_per_expert, self.use_grouped_mm)
        return output, None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed, as in the host's local linear layers."""

    def get_extra_state(self) -> None:
        """Empty without FP8, but every linear layer of the host has one on disk."""

    def set_extra_state(self, state: Any) -> None:
        """Ignored."""


class GroupedExperts(TEGroupedMLP):
    """All local experts at once; takes SequentialMLP's place in a spec, with its arguments.

    Args:
        num_local_experts: e.
        submodules: linear layers of one expert. They are built expert by expert for their initial
            weights, so that a seed gives the same model as with SequentialMLP.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        def build_expert() -> MLP:
            return SequentialMLP(1, config, submodules, pg_collection).local_experts[0]

        expert = build_expert()
        super().__init__(
            num_local_experts,
            config,
            GroupedMLPSubmodules(
                linear_fc1=lambda *_, **__: GroupedLinear(num_local_experts, expert.linear_fc1),
                linear_fc2=lambda *_, **__: GroupedLinear(num_local_experts, expert.linear_fc2),
            ),
            pg_collection,
            name,
        )
        self.dp_group = pg_collection.expt_dp
        for index in range(num_local_experts):
            if index > 0:
                expert = build_expert()
            with torch.no_grad():
                self.linear_fc1.weight[index].copy_(expert.linear_fc1.weight)
                self.linear_fc2.weight[index].copy_(expert.linear_fc2.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: ShardedOffsets = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """What SequentialMLP puts on disk: for every expert tensors and objects of its own."""
        first = self.ep_group.rank() * self.num_local_experts
        num_experts = self.ep_group.size() * self.num_local_experts
        offsets = [
            (*sharded_offsets, (len(sharded_offsets), first + index, num_experts))
            for index in range(self.num_local_experts)
        ]
        tp_rank, dp_rank = self.tp_group.rank(), self.dp_group.rank()
        state_dict: ShardedStateDict = {}
        for name, tp_axis in (("linear_fc1", 0), ("linear_fc2", 1)):
            key = f"{prefix}{names.ROUTED_EXPERTS}{name}"
            is_glu = name == "linear_fc1" and self.config.gated_linear_unit
            state_dict[f"{prefix}{name}.weight"] = ShardedTensorFactory(
                f"{key}.weight",
                getattr(self, name).weight,
                partial(_split, offsets, tp_axis, self.tp_group, is_glu),
                _stack,
                replica_id=(0, 0, dp_rank),
            )
            state_dict[f"{prefix}{name}._extra_state"] = [
                make_sharded_object_for_checkpoint(
                    None, f"{key}._extra_state", expert_offsets, (0, tp_rank, dp_rank)
                )
                for expert_offsets in offsets
            ]
        return state_dict


def _split(
    offsets: list[ShardedOffsets],
    tp_axis: int,
    tp_group: torch.distributed.ProcessGroup,
    is_glu: bool,
    key: str,
    stacked: Tensor,
    replica_id: ReplicaId,
    flattened_range: None,
) -> list[list[ShardedTensor]]:
    """Each expert's tensors on disk: one, or gate and linear half of a gated unit.

    Args:
        offsets: where each local expert lies in the tensor of all layers and experts.
        tp_axis: the dimension of one expert's weight that expert tensor parallel ranks divide.
        key, stacked, replica_id, flattened_range: as the host calls it, for the weight and for
            optimizer states of its shape.
    """
    experts = []
    for weight, expert_offsets in zip(stacked, offsets, strict=True):
        tensor = make_tp_sharded_tensor_for_checkpoint(
            weight, key, tp_axis, replica_id, expert_offsets, tp_group=tp_group
        )
        if is_glu:
            experts.append(apply_swiglu_sharded_factory(tensor, expert_offsets).build())
        else:
            experts.append([tensor])
    return experts


@torch.no_grad()
def _stack(experts: list[list[Tensor]]) -> Tensor:
    """From the tensors of `_split`, loaded, to the stacked weight."""
    return torch.stack([torch.cat(parts) for parts in experts])
