"""Run the entry script on forked ranks: what torchrun does, without importing everything again.

For programs and tests that need many runs. The ranks are forked from a server that has imported
the entry script; everything else is as under torchrun on one node.
"""

import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests import distributed_utils  # the server's preloaded modules
from tests.functional_tests.launch import SCRIPT, TIMEOUT_S, Run

assert distributed_utils  # imported for its effect

STOP_S = 10  # from the first failure of a rank until the others are killed


def launch_forked(
    options: list[str],
    nproc: int,
    folder: Path,
    largest_file: int | None = None,
    main: Callable[[], int | None] | None = None,
) -> Run:
    """Run the entry script on `nproc` ranks; their output goes through files in `folder`.

    Args:
        largest_file: bytes beyond which the kernel lets no file of a rank grow.
        main: a module-level function to call in place of the entry script's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"rank{rank}.txt" for rank in range(nproc)]
    ranks = start_ranks(options, outputs, largest_file, main=main)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while any(rank.exitcode is None for rank in ranks):
            if any(rank.exitcode for rank in ranks):
                deadline = min(deadline, time.monotonic() + STOP_S)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    codes = [rank.exitcode for rank in ranks if rank.exitcode]
    text = "".join(output.read_text(errors="replace") for output in outputs)
    return Run(codes[0] if codes else 0, text, "")


def start_ranks(
    options: list[str],
    outputs: list[Path],
    largest_file: int | None = None,
    prepare: Callable[[], None] | None = None,
    main: Callable[[], int | None] | None = None,
) -> list[multiprocessing.context.ForkServerProcess]:
    """Fork one rank for each output file and return without waiting.

    Args:
        prepare: called by every rank before it starts; a module-level function.
    """
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world_size = len(outputs)
    job = (world_size, port, options, largest_file, prepare, main)
    ranks = [
        context.Process(target=_run_rank, args=(rank, output, *job))
        for rank, output in enumerate(outputs)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _run_rank(
    rank: int,
    output: Path,
    world_size: int,
    port: int,
    options: list[str],
    largest_file: int | None,
    prepare: Callable[[], None] | None,
    main: Callable[[], int | None] | None,
) -> None:
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in values.items()}
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [SCRIPT, *options]
    import torch

    torch.set_num_threads(1)
    if main is None:
        from pretrain_gpt_scmoe import main
    if prepare is not None:
        prepare()
    sys.exit(main())
