"""Run a test function on gloo ranks of this machine."""

import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_scmoe import start

start.replace_host_symbols()

import torch
import torch.multiprocessing as mp
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async

from tests.limits import COLLECTIVE_S, JOB_S

# Ranks are forked from a server that has imported this once, instead of importing it again each.
# The entry script first: it replaces symbols of the host before the host is imported.
multiprocessing.set_forkserver_preload(
    [
        "pretrain_gpt_scmoe",
        "tests.models",
        "tests.distributed_utils",
        "megatron.core.tokenizers.text",  # what every run imports late
        "torch._dynamo",
        "tests.forkserver",  # last: what it keeps from being collected is there
    ]
)


def initialize(rank: int, world_size: int, store: Path, **parallel_sizes: int) -> None:
    """Join the job and build Megatron's process groups, seeded as its training loop does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    parallel_state.initialize_model_parallel(**parallel_sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    # Tests save in their own process: none has to be started, which would import everything, to
    # carry the results of another that writes.
    filesystem_async._results_queue = queue.Queue()


def finalize() -> None:
    """Leave the job."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, **parallel_sizes: int
) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh job.

    Args:
        function: a module-level function; what it takes and returns must be picklable.
        parallel_sizes: arguments of Megatron's initialize_model_parallel.

    Returns:
        What each rank returned, by rank.

    Raises:
        Exception: the first rank's failure, with its traceback.
        TimeoutError: the job took longer than JOB_S; no rank is left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        # By file: the start method would pass tensors as file descriptors, a few hundred at most.
        torch.save(args, Path(folder) / "args.pt")
        job = mp.start_processes(
            _rank,
            args=(world_size, Path(folder), function, parallel_sizes),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        try:
            deadline = time.monotonic() + JOB_S
            while not job.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} on {world_size} ranks: {JOB_S} s")
        finally:
            for process in job.processes:
                process.kill()
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _rank(
    rank: int,
    world_size: int,
    folder: Path,
    function: Callable[..., Any],
    parallel_sizes: dict[str, int],
) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    initialize(rank, world_size, folder / "store", **parallel_sizes)
    args = torch.load(folder / "args.pt", weights_only=False)
    torch.save(function(*args), folder / f"{rank}.pt")
    finalize()
