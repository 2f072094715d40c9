"""tools/doctor.py on gloo ranks, and what the entry script takes over from it.

A slow rank is named in its group, a missing and a hanging one too; exit codes; the short form at
start-up.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_scmoe.run.doctor import links, machine
from tests.limits import JOB_S

from .forked import launch_forked
from .launch import TINY_MODEL, TINY_MOE

OPTIONS = [*TINY_MODEL, *TINY_MOE, "--mock-data"]
SLOW_RANK = 2
DELAY_S = 0.05
SHORT_MINUTES = 0.15


def doctor() -> int:
    from megatron_scmoe.commands.doctor import main

    return main()


def doctor_of_a_slow_rank() -> int:
    """One rank starts every exchange late, as a starved process would."""
    import torch

    exchange = links.exchange_with

    def late(*args: object) -> None:
        if torch.distributed.get_rank() == SLOW_RANK:
            time.sleep(DELAY_S)
        exchange(*args)  # type: ignore[arg-type]

    links.exchange_with = late
    return doctor()


def doctor_of_a_hanging_rank() -> int:
    """One rank does not come back from an exchange; time is short."""
    import torch

    from megatron_scmoe.commands import doctor, examination

    exchange = links.exchange_with

    def hang(*args: object) -> None:
        if torch.distributed.get_rank() == 1:
            time.sleep(JOB_S)
        exchange(*args)  # type: ignore[arg-type]

    links.exchange_with = hang
    examination.TIMEOUT_MINUTES = SHORT_MINUTES  # type: ignore[assignment]
    return doctor.main()


def doctor_of_a_missing_rank() -> int:
    """One rank never starts. It keeps the job's store meanwhile, as torchrun's agent does."""
    import torch

    from megatron_scmoe.commands import doctor, examination

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if os.environ["RANK"] == "1":
        port = int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(
            "localhost", port, is_master=True, wait_for_workers=False
        )
        time.sleep(JOB_S)
        del store
    examination.TIMEOUT_MINUTES = SHORT_MINUTES  # type: ignore[assignment]
    return doctor.main()


def doctor_of_two_nodes() -> int:
    """Each rank on a node of its own, with other folders and an early clock on the second."""
    import socket
    import sys

    from megatron_scmoe.commands import doctor, examination

    os.environ["LOCAL_WORLD_SIZE"] = "1"
    if os.environ["RANK"] == "1":
        now = time.time
        socket.gethostname = lambda: "node1"
        examination.time.time = lambda: now() - 60  # type: ignore[assignment]
        sys.argv = [word.replace("of node 0", "of node 1") for word in sys.argv]
    return doctor.main()


def groups_of(text: str) -> list[tuple[str, str, float]]:
    """Ranks, slowest rank and its ratio of every group in a report."""
    lines = re.findall(
        r"expert parallel group \d+, ranks ([-\d, ]+): .* slowest rank (\d+) on \S+, ([\d.]+) x",
        text,
    )
    return [(ranks, rank, float(ratio)) for ranks, rank, ratio in lines]


@pytest.mark.parametrize("size", [2, 4])
def test_slow_rank_is_named(size: int, tmp_path: Path) -> None:
    options = [*OPTIONS, "--expert-model-parallel-size", str(size)]
    run = launch_forked(options, 4, tmp_path, main=doctor_of_a_slow_rank)
    assert run.returncode == 0, run.stdout
    groups = groups_of(run.stdout)
    assert [ranks for ranks, _, _ in groups] == (["0-1", "2-3"] if size == 2 else ["0-3"])
    ranks, slowest, ratio = groups[-1]
    assert slowest == str(SLOW_RANK)
    assert ratio > links.SLOW
    assert re.search(rf"warning  expert parallel group \d, ranks {ranks}", run.stdout)
    assert run.stdout.count("machine\n") == 1  # one rank speaks


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (doctor_of_a_missing_rank, r"error: rank 1 did not come within 0:00:09"),
        pytest.param(  # waits for half a minute
            doctor_of_a_hanging_rank,
            r"error: .*Ranks? 1 failed to pass monitoredBarrier",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_hang(main: Callable[[], int], expected: str, tmp_path: Path) -> None:
    """It ends, and the rank that does not answer is named."""
    run = launch_forked([*OPTIONS, "--expert-model-parallel-size", "2"], 2, tmp_path, main=main)
    assert run.returncode == 1, run.stdout
    assert re.search(expected, run.stdout), run.stdout


def test_what_nodes_do_not_share(tmp_path: Path) -> None:
    save = ["--save", str(tmp_path / "checkpoints of node 0"), "--save-interval", "6"]
    run = launch_forked([*OPTIONS, *save], 2, tmp_path, main=doctor_of_two_nodes)
    assert run.returncode == 1, run.stdout
    clock = r"warning  the clock of \S+ is ([\d.]+) s ahead of that of node1"
    (apart,) = re.findall(clock, run.stdout)
    assert float(apart) == pytest.approx(60, abs=10)
    assert "--save" in run.stdout and "is not the same folder everywhere" in run.stdout
    assert not list(tmp_path.glob("checkpoints*"))


def test_impossible_layout(tmp_path: Path) -> None:
    """The refusal is part of the report; nothing is measured."""
    run = launch_forked([*OPTIONS, "--expert-model-parallel-size", "4"], 2, tmp_path, main=doctor)
    assert run.returncode == 1, run.stdout
    assert "error    The number of ranks, 2, is no multiple of" in run.stdout
    assert "Traceback" not in run.stdout
    assert "links" not in run.stdout
    assert "1 errors" in run.stdout


def test_unknown_option(tmp_path: Path) -> None:
    run = launch_forked([*OPTIONS, "--no-such-option"], 1, tmp_path, main=doctor)
    assert run.returncode == 2
    assert "error: unrecognized arguments: --no-such-option" in run.stdout


def test_machine_alone(tmp_path: Path) -> None:
    run = launch_forked([], 1, tmp_path, main=doctor)
    assert run.returncode == 0, run.stdout
    assert "megatron-core 0.19.2" in run.stdout
    assert "layout" not in run.stdout


def test_start_up_warns_and_refuses(tmp_path: Path) -> None:
    """A folder that cannot be written ends the run; a disk that is too small is one line."""
    (tmp_path / "file").write_text("")
    save = ["--save", str(tmp_path / "file" / "checkpoints"), "--save-interval", "6"]
    run = launch_forked([*OPTIONS, *save], 1, tmp_path / "refused")
    assert run.returncode == 2, run.stdout
    assert "cannot be written: use another folder" in run.stdout

    save = ["--save", str(tmp_path / "checkpoints"), "--save-interval", "6"]
    run = launch_forked([*OPTIONS, *save], 1, tmp_path / "small", main=pretrain_on_a_full_disk)
    assert run.returncode == 0, run.stdout
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("warning: --save")]
    files = (tmp_path / "checkpoints" / "iter_0000006").rglob("*")
    size = sum(file.stat().st_size for file in files)
    estimate = float(re.search(r"about ([\d.]+) KiB", line).group(1)) * 2**10  # type: ignore
    # Metadata and the random state are a large part of a checkpoint as small as this.
    assert size / 3 < estimate < size


def pretrain_on_a_full_disk() -> None:
    from types import SimpleNamespace

    from pretrain_gpt_scmoe import main

    usage = machine.shutil.disk_usage
    machine.shutil.disk_usage = lambda path: (
        usage(path) if path == machine.SHARED_MEMORY else SimpleNamespace(free=0)
    )
    main()
