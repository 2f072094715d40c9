"""Fixtures of all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed_utils import finalize, initialize


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker run a module's tests, so that what they share is made once.

    Tests that measure time have a group of their own over modules: none runs beside another.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))


@pytest.fixture(scope="session")
def single_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's process groups with one rank, in this process."""
    store: Path = tmp_path_factory.mktemp("rendezvous") / "store"
    initialize(0, 1, store)
    yield
    finalize()
