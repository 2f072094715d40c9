"""The short form of `python -m tests.functional_tests.crash`."""

from pathlib import Path

import pytest

from .crash import CrashTest


@pytest.mark.slow  # test_checkpoints.py kills a rank at the worst moment of a save
def test_killed_run_comes_back_bitwise(tmp_path: Path) -> None:
    """Two kills, one in a run that saves asynchronously. Where they fall depends on the machine;
    the long form counts it."""
    test = CrashTest(tmp_path, seed=0, iterations=15)
    assert test.run(kills=2), test.mismatches
    assert sum(test.fell.values()) >= 2
