"""Process groups of programs that build layers: one rank alone, or those of torchrun."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_scmoe import say
from megatron_scmoe.host.cpu import no_cuda_device
from tools.benchmarks.provenance import module


def seed(number: int = 1234) -> None:
    """The same weights, inputs and forced routing again."""
    torch.manual_seed(number)
    tensor_parallel.model_parallel_cuda_manual_seed(number, force_reset_rng=True)


@contextmanager
def one_rank() -> Iterator[None]:
    """This process alone."""
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    with (
        tempfile.TemporaryDirectory() as folder,
        _joined(rank=0, world_size=1, init_method=f"file://{folder}/store"),
    ):
        seed()
        yield


@contextmanager
def launched_ranks(num_experts: int) -> Iterator[None]:
    """All ranks of a job, over which the experts are spread; each draws weights of its own.

    Exit code 2, and one line, if torchrun has not started them or the experts do not divide.
    """
    if "WORLD_SIZE" not in os.environ:
        say.leave(f"start it with torchrun --nproc-per-node 2 -m {module()}", say.EXIT_CODE)
    ranks = int(os.environ["WORLD_SIZE"])
    if num_experts % ranks:
        say.leave(f"{num_experts} experts cannot be spread over {ranks} ranks.", say.EXIT_CODE)
    if not no_cuda_device():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _joined(expert_ranks=ranks):
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield


@contextmanager
def _joined(expert_ranks: int = 1, **options: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo" if no_cuda_device() else "nccl", **options)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_ranks)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
