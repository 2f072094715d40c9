"""Whether a text contains a special token."""

import re
from collections.abc import Callable, Iterable

_HINT = 3  # characters


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
