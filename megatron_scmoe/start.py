"""What every program does before it imports the host: replace the symbols that have to be.

`python -m megatron_scmoe.start` prints what is replaced, where and why.
"""

import os
import socket

from megatron_scmoe import host
from megatron_scmoe.host.replace import Replacement


def replace_host_symbols() -> list[Replacement]:
    """Replace what this machine needs, once per process, and return the rows applied.

    Call it before the first import from `megatron`: messages of that import are filtered too.

    Raises:
        ImportError: no megatron-core, or one of another minor version.
    """
    first = host.prepare()
    return first + host.replace_symbols(rows_of_others())


def one_rank_by_itself() -> None:
    """Let a program that no launcher started be the only rank of its job.

    The host reads these variables, which torchrun sets.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ |= {name: str(value) for name, value in alone.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def all_rows() -> tuple[Replacement, ...]:
    """Everything that may be replaced."""
    return (*host.TABLE, *rows_of_others())


def rows_of_others() -> tuple[Replacement, ...]:
    """Of the parts that import the host, which has to be prepared before."""
    from megatron_scmoe.planner import memory
    from megatron_scmoe.run import router_bias
    from megatron_scmoe.run.checkpoint import replacements

    return (*replacements.TABLE, *memory.REPLACEMENTS, *router_bias.REPLACEMENTS)


if __name__ == "__main__":
    replace_host_symbols()
    print(host.format_table(all_rows()))
