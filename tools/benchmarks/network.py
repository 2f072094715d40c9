"""Two hosts on one machine: network namespaces, a veth pair between them, a rate limit on it.

A namespace has interfaces, addresses and TCP state of its own, so two processes in two of them talk
through the kernel's network stack as two hosts do. `tc`'s token bucket limits each direction.

Needs root and iproute2 (`ip`, `tc`), and `tbf` in the kernel. What it makes is removed when the
block ends, also on Ctrl-C and SIGTERM; what a killed run left behind, when the next one begins.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "scmoe0"
ADDRESSES = ("10.213.0.1", "10.213.0.2")
JOB_VARIABLE = "SCMOE_BENCHMARK_JOB"
"""In the environment of a job's processes: its number, by which they are found."""
_NAME = re.compile(r"scmoe-(\d+)-[01]")

# A whole message fits into the kernel's buffers, so that one system call hands it over and timer
# interrupts move it, as a network card would: a process that computes is not needed for it.
_SOCKET_BYTES = 64 << 20
_SYSCTL = {
    "net/ipv4/tcp_wmem": f"4096 {_SOCKET_BYTES} {_SOCKET_BYTES}",
    "net/ipv4/tcp_rmem": f"4096 {_SOCKET_BYTES} {_SOCKET_BYTES}",
    "net/ipv4/tcp_slow_start_after_idle": "0",
}
_QUEUE_BYTES = 256 << 20
# With Ethernet's 1500 bytes a rate-limited receiver is woken every few kilobytes, and the core that
# computes pays for it (docs/log.md). Large frames stand for a card that reports whole messages.
MTU = 65_000
# One frame, and what passes in the time that a timer may be late.
_MIN_BURST_BYTES = 66_000
_TIMER_S = 250e-6


class BenchmarkError(Exception):
    """A mistake on the command line, a machine that cannot do it, a run that failed."""


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Of a program on two hosts: what `run` returns; 2 and one line for what cannot be done."""
    try:
        return run()
    except (BenchmarkError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted, the hosts are removed", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class TwoHosts:
    """Namespaces of two hosts that are connected."""

    namespaces: tuple[str, str]

    def command(self, host: int, core: int, command: list[str]) -> list[str]:
        """`command` as a process of a host, confined to one core."""
        return ["ip", "netns", "exec", self.namespaces[host], "taskset", "-c", str(core), *command]

    def signal_job(self, job: int, number: signal.Signals) -> None:
        """Send a signal to all processes of a job, on both hosts at nearly the same time."""
        mark = f"{JOB_VARIABLE}={job}".encode()
        for pid in [pid for namespace in self.namespaces for pid in _pids(namespace)]:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if mark in _environment(pid).split(b"\0"):
                    os.kill(pid, number)

    def limit(self, bits_per_s: float | None) -> None:
        """Limit both directions, now; None takes the limit away."""
        for namespace in self.namespaces:
            qdisc = ["tc", "-n", namespace, "qdisc"]
            if bits_per_s is None:
                # Fails where there is no limit to remove.
                _run([*qdisc, "del", "dev", INTERFACE, "root"], check=False)
                continue
            burst = max(_MIN_BURST_BYTES, round(bits_per_s / 8 * _TIMER_S))
            tbf = ["tbf", "rate", f"{bits_per_s:.0f}bit", "burst", str(burst)]
            limit = ["limit", str(_QUEUE_BYTES)]
            _run([*qdisc, "replace", "dev", INTERFACE, "root", *tbf, *limit])


@contextmanager
def two_hosts(mtu: int = MTU) -> Iterator[TwoHosts]:
    """Make the two hosts, without a limit, and remove them with all their processes.

    Args:
        mtu: bytes of the largest frame.

    Raises:
        BenchmarkError: not root, no iproute2, or the kernel lacks namespaces, veth or tbf.
    """
    check_machine()
    remove_stale()
    hosts = TwoHosts((f"scmoe-{os.getpid()}-0", f"scmoe-{os.getpid()}-1"))
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _make(hosts, mtu)
        yield hosts
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for namespace in hosts.namespaces:
            _remove(namespace)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, previous)


def check_machine() -> None:
    """Refuse a machine on which the commands below cannot work.

    Raises:
        BenchmarkError: one line that says what to do.
    """
    if os.geteuid() != 0:
        raise BenchmarkError("network namespaces need root: run it as root, for example with sudo.")
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("taskset", "util-linux")):
        if shutil.which(program) is None:
            raise BenchmarkError(f"no `{program}`: install {package} (apt-get install {package}).")


def remove_stale() -> None:
    """Remove namespaces of runs that were killed."""
    names = _run(["ip", "netns", "list"]).split()
    for name in names:
        match = _NAME.fullmatch(name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _remove(name)


def _make(hosts: TwoHosts, mtu: int) -> None:
    first, second = hosts.namespaces
    for namespace in hosts.namespaces:
        _run(["ip", "netns", "add", namespace])
    pair = ["type", "veth", "peer", "name", INTERFACE, "netns", second]
    _run(["ip", "link", "add", INTERFACE, "netns", first, *pair])
    for namespace, address in zip(hosts.namespaces, ADDRESSES, strict=True):
        inside = ["ip", "-n", namespace]
        _run([*inside, "addr", "add", f"{address}/24", "dev", INTERFACE])
        _run([*inside, "link", "set", INTERFACE, "mtu", str(mtu)])
        for interface in ("lo", INTERFACE):
            _run([*inside, "link", "set", interface, "up"])
        settings = "; ".join(f"echo {value} > /proc/sys/{key}" for key, value in _SYSCTL.items())
        _run(["ip", "netns", "exec", namespace, "sh", "-ec", settings])
    hosts.limit(1e9)  # fails here, before any work, where the kernel has no tbf
    hosts.limit(None)


def _remove(namespace: str) -> None:
    _kill_processes(namespace)
    _run(["ip", "netns", "del", namespace], check=False)


def _kill_processes(namespace: str) -> None:
    # Again and again, because one that still ran may have started another.
    while pids := _pids(namespace):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _environment(pid: int) -> bytes:
    """A process's; while it replaces its program there is none for a moment."""
    for _ in range(100):
        if found := Path(f"/proc/{pid}/environ").read_bytes():
            return found
        time.sleep(0.001)
    return b""


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _run(["ip", "netns", "pids", namespace], check=False).split()]


def _run(command: list[str], check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        raise BenchmarkError(f"`{' '.join(command)}` failed: {reason}")
    return done.stdout
