"""A rank that tries each of gloo's collectives that the package and the host call, on one device.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... python -m tools.gpu_proof.gloo_collectives DEVICE

Prints a line of JSON: {name of the collective: null, or what went wrong}.
"""

import json
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=20)


def uneven_all_to_all(rank: int, n: int, device: str) -> bool:
    """Rank r sends p + 1 rows to rank p, each of them 10 r + p."""
    sent = torch.cat([torch.full((p + 1, 2), 10.0 * rank + p) for p in range(n)]).to(device)
    received = torch.empty(n * (rank + 1), 2, device=device)
    splits = [rank + 1] * n, [p + 1 for p in range(n)]
    dist.all_to_all_single(received, sent, *splits)
    expected = torch.cat([torch.full((rank + 1, 2), 10.0 * p + rank) for p in range(n)])
    return torch.equal(received.cpu(), expected)


def all_gather_into_tensor(rank: int, n: int, device: str) -> bool:
    gathered = torch.empty(2 * n, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((2,), float(rank), device=device))
    return torch.equal(gathered.cpu(), torch.arange(float(n)).repeat_interleave(2))


def all_reduce(rank: int, n: int, device: str) -> bool:
    value = torch.full((3,), float(rank), device=device)
    dist.all_reduce(value)
    return value.tolist() == [n * (n - 1) / 2] * 3


def broadcast(rank: int, n: int, device: str) -> bool:
    value = torch.full((3,), float(rank), device=device)
    dist.broadcast(value, src=n - 1)
    return value.tolist() == [n - 1.0] * 3


def reduce_scatter_tensor(rank: int, n: int, device: str) -> bool:
    part = torch.empty(2, device=device)
    dist.reduce_scatter_tensor(part, torch.arange(2.0 * n, device=device))
    return part.tolist() == [n * 2.0 * rank, n * (2.0 * rank + 1)]


def coalesced_all_reduce(rank: int, n: int, device: str) -> bool:
    """What Megatron's DDP calls."""
    values = [torch.full((3,), float(rank), device=device) for _ in range(2)]
    with dist._coalescing_manager(dist.group.WORLD):
        for value in values:
            dist.all_reduce(value)
    return all(value.tolist() == [n * (n - 1) / 2] * 3 for value in values)


COLLECTIVES: tuple[Callable[[int, int, str], bool], ...] = (
    uneven_all_to_all,
    all_gather_into_tensor,
    all_reduce,
    broadcast,
    reduce_scatter_tensor,
    coalesced_all_reduce,
)


def attempt(collective: Callable[[int, int, str], bool], device: str) -> str | None:
    """What is wrong with a collective here, in one line; None where it works."""
    try:
        right = collective(dist.get_rank(), dist.get_world_size(), device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None if right else "wrong values"


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=TIMEOUT)
    if sys.argv[1] != "cpu":
        torch.cuda.set_device(0)
    found = {collective.__name__: attempt(collective, sys.argv[1]) for collective in COLLECTIVES}
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()
