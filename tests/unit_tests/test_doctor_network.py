"""Which network NCCL and gloo would take, with injected adapters, interfaces and variables."""

import resource
import socket
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_scmoe.run.doctor import gpu, network
from megatron_scmoe.run.doctor.findings import Finding, RankOfHost
from megatron_scmoe.run.doctor.nodes import Node, judge

VARIABLES = (
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA"),
    *("NCCL_NET", "NCCL_NET_PLUGIN", "RDMAV_FORK_SAFE", "IBV_FORK_SAFE"),
)


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of two, with a GPU, lo, docker0 and eth0 of 25 Gb/s, and no adapter."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(gpu, "here", lambda: True)
    monkeypatch.setattr(network, "INTERFACES", tmp_path / "net")
    monkeypatch.setattr(network, "INFINIBAND", tmp_path / "infiniband")
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    for name, speed in (("lo", None), ("docker0", "10000"), ("eth0", "25000")):
        (tmp_path / "net" / name).mkdir(parents=True)
        if speed:
            (tmp_path / "net" / name / "speed").write_text(f"{speed}\n")
    return tmp_path


def add_port(node: Path, name: str, state: str = "4: ACTIVE") -> None:
    folder = node / "infiniband" / name / "ports" / "1"
    folder.mkdir(parents=True)
    (folder / "state").write_text(f"{state}\n")
    (folder / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (folder / "link_layer").write_text("InfiniBand\n")


def found(check: object, args: Namespace | None = None) -> list[Finding]:
    return list(check(args))  # type: ignore[operator]


def one(check: object, args: Namespace | None = None) -> Finding:
    (finding,) = found(check, args)
    return finding


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", "mlx5_0 mlx5_1 mlx5_10"),
        ("mlx5_1", "mlx5_1 mlx5_10"),
        ("=mlx5_1", "mlx5_1"),
        ("mlx5_0:1,mlx5_10", "mlx5_0 mlx5_10"),
        ("^mlx5_1", "mlx5_0"),
        ("^=mlx5_1", "mlx5_0 mlx5_10"),
    ],
)
def test_names_are_read_as_nccl_reads_them(wanted: str, expected: str) -> None:
    assert network.selected(("mlx5_0", "mlx5_1", "mlx5_10"), wanted) == set(expected.split())


def test_one_node_has_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert found(network.check_addresses) + found(network.check_nccl) == []


def test_without_adapters_nccl_takes_sockets() -> None:
    finding = one(network.check_nccl)
    assert finding.severity == "warning"
    assert "no active port" in finding.seen and "sockets on eth0 (25 Gb/s)" in finding.seen


def test_adapters_are_counted_by_what_works(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_port(node, "mlx5_0")
    add_port(node, "mlx5_1")
    add_port(node, "mlx5_2", "1: DOWN")
    finding = one(network.check_nccl)
    assert finding.severity == "ok"
    assert finding.seen == (
        "NCCL would use 2 ports, 400 Gb/sec (4X NDR) InfiniBand: mlx5_0, mlx5_1"
    )
    monkeypatch.setenv("NCCL_IB_HCA", "^mlx5_0")
    assert one(network.check_nccl).seen.endswith("1 port, 400 Gb/sec (4X NDR) InfiniBand: mlx5_1")
    monkeypatch.setenv("NCCL_IB_HCA", "=mlx5_2")
    assert "NCCL_IB_HCA==mlx5_2 is none of 2 ports" in one(network.check_nccl).seen


def test_what_is_switched_off_or_limited_is_said(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_port(node, "mlx5_0")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    _, limited = found(network.check_nccl)
    assert limited.severity == "warning" and "only 64 KiB may be locked" in limited.seen
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert one(network.check_nccl).seen.startswith("NCCL_IB_DISABLE=1 leaves 1 port")
    monkeypatch.setenv("NCCL_NET_PLUGIN", "aws-ofi")
    assert one(network.check_nccl) == Finding("ok", "NCCL is told to use aws-ofi")


def test_an_interface_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth")
    nccl, _ = found(network.check_nccl)
    gloo = one(network.check_addresses)
    assert nccl.severity == gloo.severity == "error"  # gloo takes whole names only
    assert "it has docker0, eth0, lo" in gloo.line
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert one(network.check_addresses).severity == "ok"


def test_a_host_that_finds_itself_on_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(network.check_addresses) == []
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    finding = one(network.check_addresses)
    assert finding.severity == "warning" and "node7 is 127.0.1.1 to itself" in finding.seen


@pytest.mark.parametrize(
    ("release", "expected"), [("4.18.0-553", "warning"), ("5.12.0", "ok"), ("6.8.0-45", "ok")]
)
def test_forked_data_workers_beside_rdma(
    node: Path, monkeypatch: pytest.MonkeyPatch, release: str, expected: str
) -> None:
    monkeypatch.setattr(network.platform, "release", lambda: release)
    assert found(network.check_data_workers, Namespace(num_workers=2)) == []
    add_port(node, "mlx5_0")
    assert found(network.check_data_workers, Namespace(num_workers=0)) == []
    finding = one(network.check_data_workers, Namespace(num_workers=2))
    assert finding.severity == expected and "RDMAV_FORK_SAFE=1" in finding.remedy + finding.seen
    monkeypatch.setenv("RDMAV_FORK_SAFE", "1")
    assert found(network.check_data_workers, Namespace(num_workers=2)) == []


@pytest.mark.parametrize(
    ("backend", "ranks", "tokens", "expected"),
    [
        ("deepep", 8, 64, "DeepEP is made for more than 8"),
        ("deepep", 16, 64, None),
        ("hybridep", 16, 63, "odd number of tokens"),
    ],
)
def test_dispatchers_where_they_are_known_to_be_worse(
    backend: str, ranks: int, tokens: int, expected: str | None
) -> None:
    args = Namespace(
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend=backend,
        expert_model_parallel_size=ranks,
        seq_length=tokens,
        micro_batch_size=1,
    )
    warnings = [f.seen for f in found(network.check_dispatcher, args) if f.severity == "warning"]
    assert len(warnings) == (expected is not None)
    assert expected is None or expected in warnings[0]
    args.moe_token_dispatcher_type = "alltoall"
    assert found(network.check_dispatcher, args) == []


def test_nodes_are_compared_by_host() -> None:
    same = [
        Node(RankOfHost(rank, "ab"[rank // 2]), "torch 2.11", 100.0 + rank) for rank in range(4)
    ]
    assert list(judge(same[:2])) == []
    assert list(judge(same)) == [Finding("ok", "2 nodes, clocks at most 2.0 s apart")]
    other = same[2]._replace(versions="torch 2.10", clock=131.5)
    versions, clocks = judge([*same[:2], other])
    assert versions.severity == clocks.severity == "warning"
    assert versions.seen == ("the nodes run different versions, a: torch 2.11; b: torch 2.10")
    assert clocks.seen.startswith("the clock of b is 31.5 s ahead of that of a")
