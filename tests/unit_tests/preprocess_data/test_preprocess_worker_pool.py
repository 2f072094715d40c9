"""The worker pool of preprocessing: order, errors, and workers that die at the worst moment."""

import multiprocessing
import os
import signal
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scmoe.commands.preprocess.worker_pool import ITEMS_PER_WORKER, WorkerDied, ordered_map


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=25), st.integers(1, 3))
def test_order_whatever_takes_long(delays, workers):
    def slow(item: tuple[int, int]) -> int:
        time.sleep(item[1] / 1000)
        return item[0]

    numbered = list(enumerate(delays))
    assert list(ordered_map(slow, numbered, workers)) == [number for number, _ in numbered]
    assert multiprocessing.active_children() == []


def test_items_are_taken_as_needed():
    taken = 0

    def items():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    with closing(ordered_map(abs, items(), 2)) as results:
        assert [next(results) for _ in range(20)] == list(range(1, 21))
        assert 20 <= taken <= 20 + ITEMS_PER_WORKER * 2
    assert multiprocessing.active_children() == []


def test_items_and_results_larger_than_a_pipe():
    items = [bytes([number]) * 3_000_000 for number in range(12)]
    assert list(ordered_map(lambda item: item[::-1] + b"!", items, 3)) == [
        item + b"!" for item in items
    ]


def test_error_of_the_function():
    def fail(number: int) -> int:
        if number == 5:
            raise LookupError("five")
        return number

    results = ordered_map(fail, range(100), 2)
    with pytest.raises(LookupError, match="five"):
        list(results)
    assert multiprocessing.active_children() == []


def test_error_of_the_input():
    def items():
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(ordered_map(abs, items(), 2))
    assert multiprocessing.active_children() == []


@pytest.mark.timeout(30)
def test_killed_while_working():
    def die(number: int) -> int:
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(WorkerDied):
        list(ordered_map(die, range(100), 2))
    assert multiprocessing.active_children() == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_while_sending_a_result(victim):
    """Half a result is in the pipe: neither more of it nor an end may be waited for for ever."""
    results = ordered_map(bytes, [1] + [3_000_000] * 50, 2)
    next(results)
    time.sleep(0.5)  # nobody receives now, so both workers stand in the middle of a result
    os.kill(multiprocessing.active_children()[victim].pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        list(results)
    assert multiprocessing.active_children() == []


@pytest.mark.timeout(30)
def test_stopped_while_workers_send():
    results = ordered_map(bytes, [1] + [3_000_000] * 50, 2)
    next(results)
    time.sleep(0.5)
    results.close()
    assert multiprocessing.active_children() == []


def test_no_more_processes_than_there_is_work_for() -> None:
    """In place of 500, each of which is forked and ended."""
    with closing(ordered_map(_process, range(3), 500)) as results:
        first = next(results)
        assert len(multiprocessing.active_children()) <= 3
        assert len({first, *results}) <= 3


def _process(_: int) -> int:
    return os.getpid()
