"""The doctor's checks with injected conditions, and how it finds a slow rank."""

import itertools
import tomllib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_scmoe.host import version
from megatron_scmoe.run.doctor import gpu, links, machine
from megatron_scmoe.run.doctor.findings import Finding, RankOfHost, merge, name_ranks

REPOSITORY = Path(__file__).parents[2]


def only(check: machine.Check, args: Namespace | None = None) -> Finding:
    (finding,) = check(args)
    return finding


# Findings. --------------------------------------------------------------------------------------


def test_what_all_ranks_see_is_said_once() -> None:
    same, other = Finding("ok", "torch 2.11"), Finding("warning", "torch 2.10", "install one")
    places = [RankOfHost(0, "a"), RankOfHost(1, "a"), RankOfHost(2, "b"), RankOfHost(3, "b")]
    assert merge([(place, [same]) for place in places]) == [(same, "")]
    found = [(places[0], [same]), (places[1], [same]), *((place, [other]) for place in places[2:])]
    assert merge(found) == [(same, "a: ranks 0-1"), (other, "b: ranks 2-3")]
    assert other.line == "torch 2.10: install one"


def test_ranks_are_named_in_runs() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([7, 0, 1, 2, 5]) == "ranks 0-2, 5, 7"


# Links. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 10))
def test_everybody_meets_everybody_once(count: int) -> None:
    schedule = links.rounds(count)
    met = sorted(tuple(sorted(pair)) for pairs in schedule for pair in pairs)
    assert met == list(itertools.combinations(range(count), 2))
    for pairs in schedule:
        ranks = list(itertools.chain(*pairs))
        assert len(ranks) == len(set(ranks))


def test_blocks_have_three_ranks() -> None:
    assert links.blocks([(0, 1)]) == [(0, 1)]
    assert links.blocks([(0, 2), (1, 3)]) == [(0, 2, 1, 3)]
    assert links.blocks([(0, 1), (2, 3), (4, 5)]) == [(0, 1, 2, 3, 4, 5)]
    assert links.blocks([(0, 1, 2), (3, 4, 5)]) == [(0, 1, 2), (3, 4, 5)]


def exchanges(ranks: tuple[int, ...], slow: dict[int, float]) -> links.PairTimes:
    """A pair is as slow as its slower end."""
    return {
        pair: max(slow.get(rank, 1.0) for rank in pair) for pair in itertools.combinations(ranks, 2)
    }


@pytest.mark.parametrize("count", range(3, 9))
def test_the_slow_rank_is_found(count: int) -> None:
    ranks = tuple(range(10, 10 + count))
    for rank in ranks:
        assert links.slowest(exchanges(ranks, {rank: 5.0}), ranks) == (rank, 5.0)


def test_one_slow_link_blames_nobody() -> None:
    ranks = (0, 1, 2, 3)
    pairs = exchanges(ranks, {}) | {(1, 2): 9.0}
    found = links.slowest(pairs, ranks)
    assert found is not None and found.ratio == 1.0


def test_of_two_ranks_nobody_can_tell() -> None:
    assert links.slowest({(0, 1): 9.0}, (0, 1)) is None


def test_judgement_names_group_host_and_ratio() -> None:
    ranks = (0, 1, 2)
    measured = [links.MeasuredAllToAll(ranks, 1e-3, 2e-3)]
    hosts = {0: "a", 1: "a", 2: "b"}
    slow, _ = links.judge(measured, [exchanges(ranks, {2: 4.0})], hosts)
    assert slow.severity == "warning"
    assert "group 0, ranks 0-2: latency 1 ms, 1.05 GB/s" in slow.seen
    assert "slowest rank 2 on b, 4.00 x the median" in slow.seen
    even, _ = links.judge(measured, [exchanges(ranks, {2: 1.5})], hosts)
    assert even.severity == "ok"


def test_every_node_has_its_bandwidth() -> None:
    """Between nodes, beside the one inside; of two nodes nobody can say which one is slow."""
    mib, hosts = links.BYTES_PER_PEER, {0: "a", 1: "a", 2: "b", 3: "c"}
    pairs = {pair: mib / 1e9 for pair in itertools.combinations(hosts, 2)} | {(0, 1): mib / 4e9}
    (even,) = links.judge_nodes([pairs], hosts)
    assert even.line == "bandwidth of a rank to other nodes, GB/s: a 1 (4 inside), b 1, c 1"
    pairs |= {pair: mib / 0.2e9 for pair in pairs if 3 in pair}
    (slow,) = links.judge_nodes([pairs], hosts)
    assert slow.severity == "warning" and "c 0.2: look at the adapter" in slow.line
    assert "of c, 5.00 x slower than the median" in slow.line
    two = {rank: "a" if rank < 2 else "b" for rank in hosts}
    assert [finding.severity for finding in links.judge_nodes([pairs], two)] == ["ok"]
    assert links.judge_nodes([pairs], dict.fromkeys(hosts, "a")) == []


# The machine. -----------------------------------------------------------------------------------


def run_options(**changes: object) -> Namespace:
    """What the checks read of a command line."""
    values = dict(
        save=None, num_workers=2, micro_batch_size=2, seq_length=1024, no_save_optim=None,
        create_attention_mask_in_dataloader=False, params_dtype=torch.bfloat16,
        scmoe_shortcut_position="pos2", scmoe_overlap=True, expert_model_parallel_size=8,
        tensor_model_parallel_size=1, context_parallel_size=1, world_size=8,
    )  # fmt: skip
    return Namespace(**values | changes)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))


def test_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    batches = (
        3 * 2 * 2 * 2 * 1024 * 28 * 8
    )  # loaders, workers, ready batches, samples, bytes, ranks
    free(monkeypatch, batches)
    assert only(machine.check_shared_memory, run_options()).severity == "ok"
    free(monkeypatch, batches - 1)
    warning = only(machine.check_shared_memory, run_options())
    assert warning.severity == "warning"
    assert warning.remedy.endswith("or use --num-workers 0")
    assert only(machine.check_shared_memory, run_options(num_workers=0)).severity == "ok"
    mask = run_options(create_attention_mask_in_dataloader=True)
    free(monkeypatch, batches * 30)
    assert only(machine.check_shared_memory, mask).severity == "warning"
    monkeypatch.setattr(gpu, "here", lambda: True)
    free(monkeypatch, machine.NCCL_SHARED_MEMORY - 1)
    assert "--shm-size" in only(machine.check_shared_memory).remedy


def test_the_newest_checkpoint_is_the_measure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "iter_0000002"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(5000))
    monkeypatch.setattr(machine.contents, "newest_complete", lambda folder: 2)
    args = run_options(save=str(tmp_path))
    free(monkeypatch, 4999)
    warning = only(machine.check_disk, args)
    assert warning.severity == "warning" and "about 4.88 KiB" in warning.seen
    free(monkeypatch, 5000)
    assert only(machine.check_disk, args).severity == "ok"


def helpers(monkeypatch: pytest.MonkeyPatch, built: bool, tools: set[str], rank: int) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: built or None)
    monkeypatch.setattr(machine.shutil, "which", lambda tool: tool if tool in tools else None)
    monkeypatch.setenv("RANK", str(rank))


@pytest.mark.parametrize(
    ("makefile", "built", "tools", "rank", "severity", "expected"),
    [
        (False, True, set(), 0, "ok", "not needed"),
        (True, True, set(), 1, "ok", "not needed"),
        (True, True, {"make", "g++"}, 0, "ok", "compiled by make"),
        (True, True, {"g++"}, 0, "error", "there is no make:"),
        (True, False, set(), 0, "error", "no make and no g++"),
        (True, False, set(), 8, "warning", "run make -C"),
        (False, False, {"make", "g++"}, 0, "error", "reinstall megatron-core"),
    ],
)
def test_dataset_helpers(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    makefile: bool,
    built: bool,
    tools: set[str],
    rank: int,
    severity: str,
    expected: str,
) -> None:
    (tmp_path / "datasets").mkdir()
    if makefile:
        (tmp_path / "datasets" / "Makefile").write_text("")
    monkeypatch.setattr(machine, "megatron_core_folder", lambda: tmp_path)
    helpers(monkeypatch, built, tools, rank)
    finding = only(machine.check_dataset_helpers)
    assert finding.severity == severity
    assert expected in finding.line


def test_weights_beyond_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(machine, "_parameters", lambda args: 2.0**49)
    finding = only(machine.check_memory, run_options(world_size=1))
    assert finding.severity == "error" and "the weights alone take 1.02e+03 TiB of" in finding.line
    assert not list(machine.check_memory(run_options(world_size=2**20)))
    monkeypatch.setattr(gpu, "here", lambda: True)
    assert not list(machine.check_memory(run_options(world_size=1)))


def test_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_parameters", lambda args: 1)
    assert not list(machine.check_torch(None))
    monkeypatch.setattr(machine, "is_torch_min_version", lambda version: False)
    assert only(machine.check_torch).remedy == "install torch>=2.8.0"
    with pytest.raises(ValueError, match=r"install torch>=2\.8\.0"):
        machine.start_up(run_options())


def test_a_sound_machine_is_silent_at_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_parameters", lambda args: 1)
    assert machine.start_up(run_options(num_workers=0)) == []


def test_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(gpu.check_connections(run_options()))  # no device, no word
    monkeypatch.setattr(gpu, "here", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9)
    )
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert only(gpu.check_connections, run_options()).severity == "ok"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    warning = only(gpu.check_connections, run_options())
    assert (warning.severity, warning.remedy) == ("warning", "set it to 32 before the launch")
    demanded = only(gpu.check_connections, run_options(tensor_model_parallel_size=2))
    assert "--tensor-model-parallel-size 1" in demanded.remedy
    for change in (
        {"scmoe_shortcut_position": "none"},
        {"scmoe_overlap": False},
        {"expert_model_parallel_size": 1},
    ):
        assert only(gpu.check_connections, run_options(**change)).severity == "ok"


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "here", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert not list(gpu.check_device_of_rank(None))
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert "--nproc-per-node 4" in only(gpu.check_device_of_rank).remedy


# megatron-core. ---------------------------------------------------------------------------------


def test_supported_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"megatron-core[mlm]{version.SUPPORTED}" in project["dependencies"]


@pytest.mark.parametrize(
    ("installed", "supported"),
    [("0.19.1", False), ("0.19.2", True), ("0.19.3", True), ("0.20.0rc0", False)],
)
def test_other_megatron_core(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: str, supported: bool
) -> None:
    (tmp_path / "package_info.py").write_text(f"__version__ = '{installed}+abcdef0'")
    monkeypatch.setattr(version, "megatron_core_folder", lambda: tmp_path)
    if supported:
        version.check_megatron_core()
        return
    with pytest.raises(ImportError, match=f"megatron-core {installed} in {tmp_path}"):
        version.check_megatron_core()


def test_no_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'megatron-core"):
        version.check_megatron_core()
