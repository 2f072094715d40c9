"""Run any torchrun program on the two hosts of overlap_cluster, one rank each.

    python -m tools.benchmarks.on_two_hosts --mbit 300 -- -m tools.benchmarks.paper_shapes ...

What stands behind `--` is torchrun's: a script or `-m module`, and its options.
"""

import argparse
import sys

from tools.benchmarks.job import start_node
from tools.benchmarks.network import MTU, exit_code, two_hosts


def main(argv: list[str] | None = None) -> int:
    """The largest exit code of the two nodes."""
    parser = argparse.ArgumentParser(
        prog="on_two_hosts", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--mbit", type=float, metavar="MBIT", help="rate of each direction; default: no limit"
    )
    parser.add_argument(
        "--mtu", type=int, default=MTU, metavar="BYTES", help="bytes of the largest frame"
    )
    parser.add_argument("script", nargs="+", help="behind --: what torchrun starts")
    args = parser.parse_args(argv)
    if args.mbit is not None and args.mbit <= 0:
        parser.error(f"--mbit {args.mbit} is not positive.")

    def run() -> int:
        with two_hosts(args.mtu) as hosts:
            hosts.limit(None if args.mbit is None else args.mbit * 1e6)
            nodes = [start_node(hosts, host, args.script, None) for host in (0, 1)]
            return max(node.wait() for node in nodes)

    return exit_code("on_two_hosts", run)


if __name__ == "__main__":
    sys.exit(main())
