"""What the selected tests of a module are about."""

from typing import Any

import pytest


def asked_for(request: pytest.FixtureRequest, *names: str) -> list[Any]:
    """What the tests of a module that will run are about, so that its fixture computes no more.

    Args:
        names: parameters of tests.

    Returns:
        values of the one parameter, or tuples of values of several, in the order of the tests.
    """
    found = {}
    for item in request.session.items:
        params = (
            item.callspec.params
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else {}
        )
        if item.path == request.path and params.keys() >= set(names):
            found[tuple(params[name] for name in names)] = None
    return [key if len(names) > 1 else key[0] for key in found]
