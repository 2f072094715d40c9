"""Layers of the proof: equal weights, outputs and gradients by name.

Shapes: s sequence, b batch, h hidden
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_te_version
from torch import Tensor
from torch.distributed import Work

from megatron_scmoe.model.builder import ShortcutBlock
from megatron_scmoe.overlap.collectives import AllToAll
from tools.benchmarks.contenders import Contender
from tools.benchmarks.paper_shapes import Inputs, Shape
from tools.benchmarks.process_groups import seed


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """The host's options for weights and activations of this type."""
    return {"bf16": dtype == torch.bfloat16, "params_dtype": dtype, "pipeline_dtype": dtype}


BFLOAT16 = precision(torch.bfloat16)
RANKS = 4
"""Expert parallel ranks that a lone one stands among: it has a quarter of the experts."""
TINY = Shape(32, 64, 2, 2, 8, False, False)
"""What a CPU rehearses with."""
# Name on disk, and where the tensor lies in that of all experts.
Place = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerPair:
    """A dense layer and a MoE layer with a shared expert, of any shape."""

    name: str
    position: str = "pos2"
    scmoe: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ScMoEConfig."""
    host: Mapping[str, Any] = field(default_factory=dict)
    """Of the host's config."""
    topk: int = 2

    @property
    def contender(self) -> Contender:
        return Contender(self.name, self.position, self.topk, shared_expert=True)


@cache
def missing_transformer_engine(device: torch.device) -> str | None:
    """What Transformer Engine's layers need and this machine has not.

    A build without this GPU's machine code can be imported: a layer must run.
    """
    if device.type == "cpu":
        return "CUDA"
    if not HAVE_TE:
        return "Transformer Engine"
    try:
        linear_error(device)
    except Exception as reason:
        said = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
        return f"a Transformer Engine that runs here, not {said}"
    return None


def linear_error(device: torch.device) -> float:
    """Of a linear layer of Transformer Engine, in bf16."""
    from transformer_engine.pytorch import Linear

    linear = Linear(64, 64, params_dtype=torch.bfloat16, device=device)
    rows = torch.randn(64, 64, dtype=torch.bfloat16, device=device)
    return error(linear(rows), torch.nn.functional.linear(rows, linear.weight, linear.bias))


def fastest(device: torch.device) -> dict[str, Any]:
    """The host's options for the fastest layers of this machine, ours and stock ones alike."""
    grouped = {**BFLOAT16, "moe_grouped_gemm": True}
    if missing_transformer_engine(device):
        return grouped
    return {**grouped, "transformer_impl": "transformer_engine", "moe_permute_fusion": True}


def describe_layers(device: torch.device) -> str:
    """What `fastest` is here."""
    if missing_transformer_engine(device):
        return "bf16, local spec, grouped experts"
    return f"bf16, Transformer Engine {get_te_version()}"


@contextmanager
def exchanges_to_itself(repetitions: int) -> Iterator[None]:
    """A lone rank's exchanges travel too: from its memory to its memory, by its own backend.

    Args:
        repetitions: how often each is sent, to make it last.
    """

    once = AllToAll.exchange

    def exchange(
        self: AllToAll, sent: list[Tensor], async_op: bool
    ) -> tuple[list[Tensor], list[Work | None]]:
        works: list[Work | None] = []
        for _ in range(repetitions):
            received, started = once(self, sent, async_op)
            works += started
        return received, works

    with (
        mock.patch.object(AllToAll, "moves", lambda _: True),
        mock.patch.object(AllToAll, "exchange", exchange),
    ):
        yield


# Weights. -----------------------------------------------------------------------------------------


def on_disk(module: Any) -> dict[Place, Tensor]:
    """Views of all parameters by their place on disk, the same for every implementation.

    Args:
        module: a block of the host's, or experts.
    """
    if hasattr(module, "layers"):
        module.__class__ = ShortcutBlock
    groups = ProcessGroupCollection.use_mpu_process_groups()
    state = module.sharded_state_dict(
        metadata={"dp_cp_group": groups.dp_cp, "singleton_local_shards": False}
    )
    apply_factories(state)
    return {
        (tensor.key, tensor.global_offset): tensor.data
        for tensor in nested_values(state)
        if isinstance(tensor, ShardedTensor)
    }


@torch.no_grad()
def copy_weights(source: Any, target: Any) -> None:
    """Give a module the weights of another implementation.

    Raises:
        ValueError: they have not the same parameters.
    """
    weights, own = on_disk(source), on_disk(target)
    if weights.keys() != own.keys():
        raise ValueError(f"other parameters: {sorted(weights.keys() ^ own.keys())[:4]}")
    for place, weight in weights.items():
        own[place].copy_(weight)


def gradients(module: Any) -> dict[str, Tensor]:
    """Of all parameters, by place on disk. The weights of the module are gone behind it."""
    for parameter in module.parameters():
        # A gradient that never came stands out.
        missing = torch.full_like(parameter, torch.nan)
        parameter.data = missing if parameter.grad is None else parameter.grad
    return {
        f"gradient of {key} {list(offset)}": gradient
        for (key, offset), gradient in on_disk(module).items()
    }


def outcome(block: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter, of one pass with the same routing.

    Args:
        block: of bf16 or float32; its weights are gone behind it.
    """
    seed()
    dtype = next(block.parameters()).dtype
    hidden_states = inputs.hidden_states.detach().to(dtype).requires_grad_()
    output = block(hidden_states=hidden_states, **inputs.attention)
    output.backward(inputs.grad.to(dtype))
    assert hidden_states.grad is not None
    return {
        "output": output.detach(),
        "gradient of the input": hidden_states.grad,
        **gradients(block),
    }


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; a NaN stays one."""
    difference = found.double() - expected.double()
    scale = expected.double().norm()
    return float(difference.norm() / scale) if scale > 0 else float(difference.norm())


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By name.

    Raises:
        ValueError: they have not the same names.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"other tensors: {sorted(found.keys() ^ expected.keys())[:4]}")
    return {name: error(found[name], expected[name]) for name in expected}


def largest(numbers: Iterable[float]) -> float:
    """NaN if one of them is."""
    return float(torch.tensor(list(numbers)).max())
