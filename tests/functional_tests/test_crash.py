"""The short form of `python -m tests.functional_tests.crash`."""

from pathlib import Path

from .crash import CrashTest


def test_killed_run_comes_back_bitwise(tmp_path: Path) -> None:
    """Two kills in the middle of a save, one of them asynchronous."""
    test = CrashTest(tmp_path, seed=0, iterations=15)
    assert test.run(kills=2), test.mismatches
    in_a_save = [what for what in test.fell if "in a save" in what]
    assert {what.split(",")[0] for what in in_a_save} == {"sync", "async"}
