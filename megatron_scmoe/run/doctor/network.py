"""What can be said of a node's network before anything is sent: which way NCCL and gloo would take.

Read from /sys and the environment, so that it needs no GPU and no collective. Only of a job on
several nodes: in one node neither is used.
"""

import os
import platform
import re
import resource
import socket
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_scmoe.run.doctor import gpu
from megatron_scmoe.run.doctor.findings import Finding
from megatron_scmoe.run.shared_folder import has_several_nodes

INTERFACES = Path("/sys/class/net")
INFINIBAND = Path("/sys/class/infiniband")
# Those that NCCL takes only if there is nothing else.
LAST = re.compile("lo|docker|veth|virbr")
LARGEST_NODE = 8  # ranks; NVIDIA/Megatron-LM#1456
COPIES_PINNED_PAGES = (5, 12)  # Linux from which a fork is safe beside RDMA, as rdma-core relies on


class Port(NamedTuple):
    """One port of an adapter for InfiniBand or RoCE."""

    name: str
    active: bool
    rate: str
    """As the driver says it: '400 Gb/sec (4X NDR)'."""
    layer: str


def check_addresses(args: Namespace | None) -> Iterator[Finding]:
    """gloo, which also carries what NCCL's ranks agree on, takes the address of the host's name."""
    if not has_several_nodes():
        return
    host, chosen = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        yield _interface("GLOO_SOCKET_IFNAME", chosen, {chosen} & set(_names(INTERFACES)))
        return
    remedy = "set GLOO_SOCKET_IFNAME to the interface of the network between the nodes"
    try:
        address = socket.gethostbyname(host)
    except OSError:
        yield Finding("warning", f"the name of this host, {host}, has no address here", remedy)
        return
    if address.startswith("127."):
        yield Finding(
            "warning",
            f"{host} is {address} to itself, where other nodes do not find it",
            f"{remedy}, or mend /etc/hosts",
        )


def check_nccl(args: Namespace | None) -> Iterator[Finding]:
    """InfiniBand or RoCE if it is there, else sockets, which are many times slower, silently."""
    if not (has_several_nodes() and gpu.here()):
        return
    if (sockets := os.environ.get("NCCL_SOCKET_IFNAME")) is not None:
        yield _interface("NCCL_SOCKET_IFNAME", sockets, selected(_names(INTERFACES), sockets))
    if plugin := os.environ.get("NCCL_NET_PLUGIN") or os.environ.get("NCCL_NET"):
        yield Finding("ok", f"NCCL is told to use {plugin}")
        return
    ports = [port for port in infiniband_ports() if port.active]
    if ports and os.environ.get("NCCL_IB_DISABLE") == "1":
        yield Finding(
            "warning",
            f"NCCL_IB_DISABLE=1 leaves {_in_words(ports)} unused",
            "unset it unless that is meant",
        )
        return
    wanted = os.environ.get("NCCL_IB_HCA", "")
    names = selected({port.name for port in ports}, wanted)
    used = [port for port in ports if port.name in names]
    if not used:
        why = f"NCCL_IB_HCA={wanted} is none of {_in_words(ports)}" if ports else ""
        yield Finding(
            "warning",
            f"{why or 'no active port for InfiniBand or RoCE'}: NCCL would use sockets "
            f"on {', '.join(_socket_interfaces(sockets or '')) or 'no interface'}",
            "look at ibstat, and at the devices that this container was given",
        )
        return
    yield Finding("ok", f"NCCL would use {_in_words(used)}")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY:
        yield Finding(
            "warning",
            f"only {limit // 1024} KiB may be locked in memory, and RDMA locks its buffers",
            "start the container with --ulimit memlock=-1, or ask for it in limits.conf",
        )


def check_data_workers(args: Namespace | None) -> Iterator[Finding]:
    """Data workers are forked after the ranks have met, beside RDMA's locked pages."""
    if args is None or not args.num_workers or not has_several_nodes():
        return
    if not any(port.active for port in infiniband_ports()):
        return
    if {"RDMAV_FORK_SAFE", "IBV_FORK_SAFE"} & os.environ.keys():
        return
    release = platform.release()
    version = tuple(map(int, re.findall(r"\d+", release)[:2]))
    remedy = "set RDMAV_FORK_SAFE=1, or use --num-workers 0"
    if version < COPIES_PINNED_PAGES:
        yield Finding(
            "warning",
            f"data workers are forked beside RDMA, and Linux {release} does not copy its pages",
            remedy,
        )
    else:
        yield Finding("ok", f"data workers are forked beside RDMA; if they hang, {remedy}")


def check_dispatcher(args: Namespace | None) -> Iterator[Finding]:
    """Where the host's other dispatchers are known to be worse than all-to-all."""
    if args is None or args.moe_token_dispatcher_type != "flex":
        return
    backend, ranks = args.moe_flex_dispatcher_backend, args.expert_model_parallel_size
    if backend == "deepep" and ranks <= LARGEST_NODE:
        yield Finding(
            "warning",
            f"DeepEP is made for more than {LARGEST_NODE} expert parallel ranks, here are {ranks} "
            "(NVIDIA/Megatron-LM#1456)",
            "measure --moe-token-dispatcher-type alltoall beside it",
        )
    if backend == "hybridep":
        yield Finding(
            "ok",
            "HybridEP wants equal numbers of tokens on all ranks, which these batches have "
            "(NVIDIA-NeMo/Megatron-Bridge#5270)",
        )
    if backend == "hybridep" and args.seq_length * args.micro_batch_size % 2:
        yield Finding(
            "warning",
            "HybridEP's kernel hung with an odd number of tokens (deepseek-ai/DeepEP#561)",
            "use an even --seq-length or --micro-batch-size",
        )


def infiniband_ports() -> list[Port]:
    """Every port that this node, or its container, sees."""
    return [
        Port(
            name=folder.parent.parent.name,
            active="ACTIVE" in _read(folder / "state"),
            rate=_read(folder / "rate"),
            layer=_read(folder / "link_layer"),
        )
        for folder in sorted(INFINIBAND.glob("*/ports/*"))
    ]


def selected(names: Iterable[str], wanted: str) -> set[str]:
    """Those that NCCL takes of some names, as NCCL_SOCKET_IFNAME and NCCL_IB_HCA are written.

    'eth,ib' are beginnings, '=eth0,eth1' whole names; '^' in front takes all others. A port behind
    a colon is left out of account.
    """
    exclude, rest = wanted.startswith("^"), wanted.removeprefix("^")
    exact, rest = rest.startswith("="), rest.removeprefix("=")
    words = [word.split(":")[0] for word in rest.split(",") if word]
    if not words:
        return set(names)

    def named(name: str) -> bool:
        return name in words if exact else name.startswith(tuple(words))

    return {name for name in names if named(name) is not exclude}


def _interface(variable: str, value: str, found: set[str]) -> Finding:
    if found:
        return Finding("ok", f"{variable}={value}: {', '.join(sorted(found))}")
    there = ", ".join(_names(INTERFACES))
    return Finding("error", f"{variable}={value} is no interface of this node", f"it has {there}")


def _socket_interfaces(wanted: str) -> list[str]:
    """'eth0 (10 Gb/s)' of those that NCCL would take."""
    names = sorted(selected(_names(INTERFACES), wanted))
    names = [name for name in names if not LAST.match(name)] or names
    speeds = {name: _read(INTERFACES / name / "speed") for name in names}
    return [
        f"{name} ({int(speed) / 1000:g} Gb/s)" if speed.isdigit() else name
        for name, speed in speeds.items()
    ]


def _in_words(ports: list[Port]) -> str:
    """'8 ports, 400 Gb/sec (4X NDR) InfiniBand: mlx5_0, mlx5_1'."""
    kinds = sorted({f"{port.rate} {port.layer}" for port in ports})
    number = f"{len(ports)} port{'s' if len(ports) > 1 else ''}"
    return f"{number}, {' and '.join(kinds)}: {', '.join(port.name for port in ports)}"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # the speed of an interface that is down
        return ""


CHECKS = (check_addresses, check_nccl, check_data_workers, check_dispatcher)
