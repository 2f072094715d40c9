"""The list of tests/mutations.py does not rot: every mutation can still be made."""

import pytest

from tests.mutations import MUTATIONS, REPOSITORY, Mutation, times_found


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.old.strip())
def test_text_is_found_once(mutation: Mutation) -> None:
    found = times_found(mutation)
    assert found == 1, (
        f"{mutation.file} has {found} times, not once: {mutation.old!r}. The code was changed: "
        f"give tests/mutations.py a line of it that is as bad to lose, then run `python -m "
        f"tests.mutations {MUTATIONS.index(mutation) + 1}`."
    )
    for name in mutation.tests.split():
        assert not name.startswith("tests/") or (REPOSITORY / name).exists(), name


def test_they_are_many_and_spread() -> None:
    assert len(MUTATIONS) >= 25
    assert len({mutation.file for mutation in MUTATIONS}) >= 20
