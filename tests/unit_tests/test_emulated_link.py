"""The emulated link: transfers last as long as their bytes, beside compute or instead of it."""

import time
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from torch import distributed

from megatron_scmoe.overlap import collectives
from megatron_scmoe.overlap.collectives import AllToAll, Transfer
from megatron_scmoe.overlap.recorder import Activity, UnitRecorder
from tools.benchmarks import one_device
from tools.benchmarks.emulated_link import Link, emulated_link

SECONDS = 0.2
TENSOR = torch.ones(10, 100)  # 4000 bytes, of which 3 in 4 leave


@pytest.fixture
def link() -> Link:
    return Link(bytes_per_s=3000 / SECONDS, ranks=4)


@pytest.fixture
def group(single_rank: None) -> distributed.ProcessGroup:
    return distributed.group.WORLD


def transfer(group: distributed.ProcessGroup, compute: float) -> tuple[float, float]:
    """Seconds in flight and blocked of an exchange beside `compute` seconds of work."""
    recorder = UnitRecorder()
    log = recorder, Activity("dispatch", "forward")
    flying = Transfer(AllToAll(group, [10], [10]), [TENSOR], log)
    time.sleep(compute)
    (received,) = flying.complete()
    assert torch.equal(received, TENSOR)
    (exchange,) = recorder.take().exchanges
    return exchange.end - exchange.begin, exchange.blocked


def test_an_exchange_is_in_flight_beside_compute(
    link: Link, group: distributed.ProcessGroup
) -> None:
    with emulated_link(link):
        in_flight, blocked = transfer(group, compute=0)
        assert in_flight >= SECONDS and blocked >= 0.25 * SECONDS  # a busy machine
        in_flight, blocked = transfer(group, compute=2 * SECONDS)
        assert in_flight == pytest.approx(SECONDS, rel=1e-6) and blocked == 0
    assert link.bytes == 6000 and link.seconds == pytest.approx(2 * SECONDS)


def test_one_transfer_after_the_other(link: Link, group: distributed.ProcessGroup) -> None:
    started = time.perf_counter()
    with emulated_link(link):
        both = [Transfer(AllToAll(group, [10], [10]), [TENSOR]) for _ in range(2)]
        for flying in both:
            flying.complete()
    assert time.perf_counter() - started >= 2 * SECONDS


def test_stock_all_to_all_blocks_forward_and_backward(
    link: Link, group: distributed.ProcessGroup
) -> None:
    tensor = TENSOR.clone().requires_grad_()
    started = time.perf_counter()
    with emulated_link(link):
        token_dispatcher.all_to_all(group, tensor).sum().backward()
    assert time.perf_counter() - started >= 2 * SECONDS
    assert torch.equal(tensor.grad, torch.ones_like(TENSOR))


def test_it_is_gone_behind_the_block(link: Link, group: distributed.ProcessGroup) -> None:
    ours, stock = (AllToAll.moves, collectives.launch), token_dispatcher.all_to_all
    with emulated_link(link):
        pass
    assert (AllToAll.moves, collectives.launch) == ours and token_dispatcher.all_to_all is stock


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--ranks 3", "8 experts are not two or more for each"),
        ("--ranks 8", "8 experts are not two or more for each"),
        ("--steps 0", "at least 1"),
        ("--shares 1.5", "between 0 and 1"),
    ],
)
def test_mistakes_are_one_line(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert one_device.main(options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("one_device: error: ") and said in line


def test_a_whole_report(single_rank: None, tmp_path: Path) -> None:
    sizes = "--seq-length 8 --steps 1 --repetitions 1 --shares 0.5"
    one_device.run(one_device.parse_args([*sizes.split(), "--output", str(tmp_path)]))
    report = (tmp_path / "one_device.md").read_text()
    assert report.count("bitwise equal") == 3 and "DIFFER" not in report
    for name in ("| top2 |", "| shared |", "| pos3, chosen |", "| pos3, best fixed |"):
        assert report.count(name) == 2  # with and without a limit
    assert "share 50%" in report and "grouped_mm" in report
