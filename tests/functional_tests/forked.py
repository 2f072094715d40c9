"""Run the entry script on forked ranks: what torchrun does, without importing everything again.

For programs and tests that need many runs. The ranks are forked from a server that has imported
the entry script; everything else is as under torchrun on one node.
"""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_scmoe import say
from megatron_scmoe.say import EXIT_CODE
from tests import distributed_utils  # the server's preloaded modules
from tests.functional_tests.launch import SCRIPT, Run, free_port
from tests.limits import JOB_S

assert distributed_utils  # imported for its effect

STOP_S = 10  # from the first failure of a rank until the others are killed
# The same where rank 0 has refused the options: it has said why, and torchrun ends the others,
# which wait for that.
REFUSED_S = 0.5

Hook = Callable[[], None]  # picklable


def launch_forked(
    options: list[str],
    nproc: int,
    folder: Path,
    largest_file: int | None = None,
    hook: Hook | None = None,
    main: Callable[[], int | None] | None = None,
) -> Run:
    """Run the entry script on `nproc` ranks; their output goes through files in `folder`.

    Args:
        largest_file: bytes beyond which the kernel lets no file of a rank grow.
        hook: called on every rank before the script runs, to look at it or to break it.
        main: a module-level function to call in place of the entry script's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"rank{rank}.txt" for rank in range(nproc)]
    ranks = start_ranks(options, outputs, largest_file, hook, main)
    try:
        deadline = time.monotonic() + JOB_S
        while any(rank.exitcode is None for rank in ranks):
            if any(rank.exitcode for rank in ranks):
                refused = ranks[0].exitcode == EXIT_CODE
                stop = REFUSED_S if refused else STOP_S
                deadline = min(deadline, time.monotonic() + stop)
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
    hook: Hook | None = None,
    main: Callable[[], int | None] | None = None,
) -> list[multiprocessing.context.ForkServerProcess]:
    """Fork one rank for each output file and return without waiting.

    Args:
        hook, main: as in `launch_forked`.
    """
    context = multiprocessing.get_context("forkserver")
    world_size = len(outputs)
    job = (world_size, free_port(), options, largest_file, hook, main)
    ranks = [
        context.Process(target=_run_rank, args=(rank, output, *job))
        for rank, output in enumerate(outputs)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def logits_main() -> int:
    """A `main`: the program of `verify` that computes Megatron's model."""
    from megatron_scmoe.huggingface import logits

    return logits.main()


def processes_of(output: Path) -> list[int]:
    """Processes that still hold the output of a rank: itself, or what it started."""
    found = []
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = {os.readlink(descriptor) for descriptor in descriptors.iterdir()}
        except OSError:  # not ours, or gone
            continue
        if str(output) in links:
            found.append(int(descriptors.parent.name))
    return found


def flush_curves() -> None:
    """A hook: every value is in the TensorBoard file before training goes on."""
    from torch.utils.tensorboard import SummaryWriter

    add_scalar = SummaryWriter.add_scalar

    def add_and_flush(self: SummaryWriter, *args: Any, **kwargs: Any) -> None:
        add_scalar(self, *args, **kwargs)
        self.flush()

    SummaryWriter.add_scalar = add_and_flush


def speak_at_once() -> None:
    """A hook: a rank that rank 0 leaves alone says why it ends without waiting for a launcher."""
    say.SECONDS_TO_SPEAK = 0


def _run_rank(
    rank: int,
    output: Path,
    world_size: int,
    port: int,
    options: list[str],
    largest_file: int | None,
    hook: Hook | None,
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
    if hook is not None:
        hook()
    sys.exit(main())
