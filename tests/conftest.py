"""Fixtures of all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed_utils import finalize, initialize


@pytest.fixture(scope="session")
def single_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's process groups with one rank, in this process."""
    store: Path = tmp_path_factory.mktemp("rendezvous") / "store"
    initialize(0, 1, store)
    yield
    finalize()
