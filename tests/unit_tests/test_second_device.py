"""A routed branch whose tensors are on another device than the CPU: torch's `lazy` stands for it.

Autograd checks there what it checks on a GPU: that a gradient is where its tensor is.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, group

from megatron_scmoe.overlap.branch import RoutedBranch
from megatron_scmoe.overlap.collectives import AllToAll


@pytest.fixture(scope="module")
def lazy() -> Iterator[str]:
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
    yield "lazy"


def backward(device: str, world: ProcessGroup, turned: bool) -> list[Tensor]:
    """Gradients through a branch of two chunks, with a map that has none and one tensor that
    nobody uses."""
    torch.manual_seed(0)
    rows, weights = (torch.randn(4, 3).to(device).requires_grad_() for _ in range(2))
    unused = torch.randn(4).to(device).requires_grad_()
    dense = torch.randn(4, 3).to(device).requires_grad_()
    branch = RoutedBranch()
    chunks = [rows * 2, rows * 3]
    legs = branch.depart([[chunk > 0, chunk, unused * 1] for chunk in chunks])
    assert branch._token is not None and branch._token.device == rows.device
    collective = AllToAll(world, [4], [4])
    for leg in legs:
        leg.send(collective)
    other = dense * 5
    if turned:
        (other,) = branch.turn((other,))
    for leg in legs:
        routing_map, received, _ = leg.receive()
        leg.send_back(collective, received * routing_map * weights)
    branch.wait()
    first, second = branch.arrive()
    (first * other + second).sum().backward()
    gradients = [rows.grad, weights.grad, dense.grad, unused.grad]
    assert all(x is not None and x.device == rows.device for x in gradients)
    return [gradient.cpu() for gradient in gradients]


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("turned", [True, False], ids=["turn in the middle", "turn at the end"])
def test_backward_runs_where_the_cargo_lives(lazy: str, turned: bool) -> None:
    there, here = (backward(device, group.WORLD, turned) for device in (lazy, "cpu"))
    for mine, theirs in zip(there, here, strict=True):
        assert torch.equal(mine, theirs)
