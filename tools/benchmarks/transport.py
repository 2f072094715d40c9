"""What an all-to-all over gloo costs the core that computes beside it.

    python -m tools.benchmarks.on_two_hosts --mbit 300 -- -m tools.benchmarks.transport

One exchange at a time, alone and beside matrix products. A network card would take nothing from the
core; gloo's threads take CPU time, and the core once for every time that they wake up. CPU time and
wake-ups hardly depend on what else the machine does; wall-clock times do.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

HIDDEN = 256
MATRIX = 512
REPETITIONS = 12
DROPPED = 2


class ExchangeCost(NamedTuple):
    """One exchange; times in seconds."""

    in_flight: float
    compute_cpu: float
    """CPU time of the thread that computes."""
    transport_cpu: float
    """CPU time of all other threads."""
    wake_ups: float
    """How often one of them gave its core up and came back."""


def exchange(megabytes: float, compute: Callable[[], None]) -> ExchangeCost:
    """Send half of a buffer to the other rank while `compute` runs."""
    rows = torch.randn(int(megabytes * 2**20 / 4 / HIDDEN), HIDDEN)
    received = torch.empty_like(rows)
    dist.barrier()
    wake_ups, process, thread = _wake_ups(), time.process_time(), time.thread_time()
    started, completed = time.perf_counter(), []
    work = dist.all_to_all_single(received, rows, async_op=True)
    work.get_future().add_done_callback(lambda _: completed.append(time.perf_counter()))
    compute()
    work.wait()
    waited = time.perf_counter()
    compute_cpu = time.thread_time() - thread
    return ExchangeCost(
        in_flight=(completed[0] if completed else waited) - started,
        compute_cpu=compute_cpu,
        transport_cpu=time.process_time() - process - compute_cpu,
        wake_ups=_wake_ups() - wake_ups,
    )


def _wake_ups() -> int:
    """Voluntary context switches of all threads but the main one."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != os.getpid():
            lines = (task / "status").read_text().splitlines()
            total += sum(int(x.split()[1]) for x in lines if x.startswith("voluntary_ctxt"))
    return total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="transport", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--megabytes", type=float, default=4, metavar="MB", help="buffer; half of it travels"
    )
    parser.add_argument(
        "--products", type=int, default=60, metavar="N", help="beside each exchange"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    matrix = torch.randn(MATRIX, MATRIX)

    def compute() -> None:
        for _ in range(args.products):
            matrix @ matrix

    for name, beside in (("alone", lambda: None), ("beside compute", compute)):
        costs = [exchange(args.megabytes, beside) for _ in range(REPETITIONS)][DROPPED:]
        median = ExchangeCost(*(statistics.median(column) for column in zip(*costs, strict=True)))
        if dist.get_rank() == 0:
            print(
                f"{name}: in flight {median.in_flight * 1e3:.1f} ms, CPU of transport "
                f"{median.transport_cpu * 1e3:.1f} ms, of compute {median.compute_cpu * 1e3:.1f} "
                f"ms, wake-ups {median.wake_ups:.0f}",
                flush=True,
            )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
