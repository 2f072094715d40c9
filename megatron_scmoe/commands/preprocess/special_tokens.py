"""What both engines ask of a text: whether it contains a special token, and tiktoken's ranks."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_HINT = 3  # characters
_SPECIAL = "\U0010ffff" * 2  # in no text; in one it would be taken for ordinary characters


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


def make_encoding(words: str, ranks: dict[bytes, int]) -> Any:
    """The `tiktoken.Encoding` of these tokens, for `ranks_of`.

    Args:
        words: the expression that cuts a text.
    """
    import tiktoken

    # Without any special token tiktoken looks for one, which is empty, at every letter.
    return tiktoken.Encoding(
        "fast", pat_str=words, mergeable_ranks=ranks, special_tokens={_SPECIAL: len(ranks)}
    )


def ranks_of(encoding: Any, text: str) -> np.ndarray:
    """The ranks of a text's tokens in an encoding of `make_encoding`, uint32."""
    return encoding.encode_to_numpy(text, disallowed_special=())
