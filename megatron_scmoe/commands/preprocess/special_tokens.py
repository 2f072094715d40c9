"""What both engines ask of a text: whether it contains a special token, and tiktoken's ranks."""

import array
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_HINT = 3  # characters
_LARGE_TEXT = 1 << 24  # characters from which Python's integers would need gigabytes


def finder(tokens: Iterable[str]) -> Callable[[str], bool]:
    """A function that says whether any of `tokens` is in a text.

    Llama 3 has 256, all of which an expression would try at each `<` of a page of HTML; so it is
    asked only about texts that have the beginning of a token, which is looked for much faster.
    """
    known = sorted(set(tokens))
    if not known:
        return lambda text: False
    beginnings = sorted({token[:_HINT] for token in known})
    search = re.compile("|".join(map(re.escape, known))).search
    return lambda text: any(start in text for start in beginnings) and bool(search(text))


def ranks_of(encoding: Any, text: str) -> np.ndarray:
    """The ranks of a text's tokens in a `tiktoken.Encoding`, uint32."""
    if len(text) >= _LARGE_TEXT:
        return encoding.encode_to_numpy(text, disallowed_special=())
    # Faster than numpy.array.
    return np.frombuffer(array.array("I", encoding.encode_ordinary(text)), np.uint32)
