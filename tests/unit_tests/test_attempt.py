"""Ranks of one attempt agree on its store, whatever earlier attempts left in it."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from megatron_scmoe.run.watch.attempt import _number_for_others, store_of_this_attempt

TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The launcher's, which its ranks find by the environment."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def attempt(world_size: int) -> list[PrefixStore]:
    """The stores of all ranks."""
    stores: dict[int, PrefixStore] = {}

    def join(rank: int) -> None:
        stores[rank] = store_of_this_attempt(rank, world_size, TIMEOUT)

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(world_size))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [stores[rank] for rank in range(world_size)]


def test_restarted_ranks_find_nothing_of_the_attempt_before(store: TCPStore) -> None:
    for ranks, place in ((4, "first"), (2, "second"), (3, "third")):
        stores = attempt(ranks)
        assert not any(other.check(["address"]) for other in stores)
        stores[-1].set("address", place)
        assert [other.get("address").decode() for other in stores] == [place] * ranks


def test_attempt_that_ended_halfway_is_no_obstacle(store: TCPStore) -> None:
    store.set("question 1", "of a dead rank")
    store.add("attempts", 1)
    stores = attempt(2)
    stores[0].set("address", "here")
    assert stores[1].get("address") == b"here"


def test_missing_rank_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[1\] are not there after"):
        _number_for_others(HashStore(), 0, 2, timedelta(seconds=0.1))


def test_launcher_that_shares_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert store_of_this_attempt(0, 2, TIMEOUT) is None
