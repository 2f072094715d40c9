"""Is this machine, and this layout on it, fit for a run?

    torchrun --nproc-per-node 8 tools/doctor.py <the options of pretrain_gpt_scmoe.py>
    python tools/doctor.py

With the command line of a run it checks the machine of every rank (versions, GPUs, NCCL,
Transformer Engine, apex, CUDA_DEVICE_MAX_CONNECTIONS, make, disk, shared memory), refuses what the
run would refuse, builds Megatron's process groups and measures every expert parallel group: latency
and bandwidth of a small all-to-all, and the slowest rank; between nodes also whether they share
--data-cache-path. Without options it looks at the machines,
and under torchrun at the exchange of all ranks. It trains nothing, and leaves nothing behind.

A collective that does not end gives up after --distributed-timeout-minutes, here 2 by default.

Exit codes: 0 no error; 1 something is wrong; 2 the options cannot be read.
"""

import logging
import sys

from megatron_scmoe import recipe, say
from megatron_scmoe.checks.before_torch import asks_for_help, refuse_words


def main() -> int:
    """Examine and return the exit code."""
    say.one_line_interrupts()
    words = sys.argv[1:]
    if asks_for_help(words):
        print(__doc__)
        return 0
    with say.user_errors():
        if words:
            refuse_words(recipe.expand(words))

    # These import torch, which takes seconds.
    from megatron_scmoe import start

    with say.user_errors():
        start.replace_host_symbols()
    from megatron_scmoe.commands.examination import examine

    logging.disable(logging.WARNING)  # what the host logs is not asked for
    return examine(has_options=bool(words))


if __name__ == "__main__":
    sys.exit(main())
