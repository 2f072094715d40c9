"""What an engine that stands in a tokenizer's place must show before it is trusted."""

import functools
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

CLASSES = (r"\p{L}", r"\p{N}", r"\s")
_PLANES = 4  # of the 17: the later ones have no letters, numbers or spaces


class NotExactError(ValueError):
    """gigatoken cannot stand for a tokenizer; says why, as the end of a sentence about it."""


class Engine(Protocol):
    """A tokenizer's ids, faster."""

    def encode(self, text: str) -> np.ndarray | None:
        """The ids of a text, int32; None if only the tokenizer can tell."""


def prove(engine: Engine, reference: Callable[[str], list[int]], texts: Iterable[str]) -> None:
    """Compare the ids of the stress text and of `texts`.

    Raises:
        NotExactError: they differ; names the first text that does.
    """
    for text in (*stress_texts(), *texts):
        ids = engine.encode(text) if text else None
        if ids is not None and not np.array_equal(ids, reference(text)):
            raise NotExactError(f"gigatoken encodes {text[:60]!r}... differently")


def stress_texts() -> Iterator[str]:
    """What tokenizers differ on: the ends of Unicode's classes in every surrounding, white space,
    digits, contractions, long words, all the rest of Unicode."""
    edges = {
        chr(code)
        for name in CLASSES
        for first, last in ranges(name)
        for code in (first - 1, first, last, last + 1)
        if code >= 0 and not 0xD800 <= code < 0xE000
    }
    edges |= _where_categories_change()
    edges |= set(map(chr, range(0x250))) | set("\u017f\u212a\ufb06\u2581")
    lines = (f"a{c}b 1{c}2 {c}\n{c}{c}.{c} '{c} {c}  \t{c}\r\n\r\n{c}" for c in sorted(edges))
    yield from map("".join, itertools.batched(lines, 16))
    for plane in range(17):
        yield "".join(chr(c) for c in range(plane << 16, (plane << 16) + 0x400))
        yield "".join(chr(c) for c in range((plane << 16) + 0xFC00, (plane << 16) + 0x10000))
    for count in (1, 2, 3, 4, 7, 8, 9, 31, 255, 1000):
        for unit in (" ", "\n", "\t", "\r\n", " \n", "\u3000", "a", "ab", "7", ".", "=", "é", "你"):
            yield unit * count
            yield f"x{unit * count}y"
    yield from (f"x{' ' * count}y" for count in range(70))
    yield "I'll we've IT'S they'RE 'S'T'D 'x '' don't'll \u2019s"
    yield "e\u0301 \u1e9b\u0323 \u212b \uac00\u1100\u1161 \U0001f468\u200d\U0001f469"


def _where_categories_change() -> set[str]:
    """The first and the last of neighbours of one category, by Python's Unicode: expressions of
    words also tell letters by case, accents and signs."""
    codes = [chr(code) for code in range(_PLANES << 16) if not 0xD800 <= code < 0xE000]
    return {
        char
        for pair in itertools.pairwise(codes)
        if unicodedata.category(pair[0]) != unicodedata.category(pair[1])
        for char in pair
    }


@functools.cache
def ranges(name: str) -> list[tuple[int, int]]:
    """The code points of a class in the tokenizers' library: first and last of each range."""
    from tokenizers import Regex, normalizers

    codes = (*range(1, 0xD800), *range(0xE000, _PLANES << 16))
    only = normalizers.Replace(Regex(f"[^{name}]+"), "\0")  # several times as fast as splitting
    runs = only.normalize_str("".join(map(chr, codes))).split("\0")
    return [(ord(run[0]), ord(run[-1])) for run in runs if run]
