"""Byte-level BPE by tiktoken, for Hugging Face tokenizers that it reproduces exactly.

tiktoken encodes several times as fast as the library that defines the ids, and knows less: an
expression that cuts a text into words, and a rank for each token. Exact is a matter of four things:

* Words. Only expressions of WORDS are taken, and their classes are spelled out from the reference's
  own tables, because the two libraries follow different versions of Unicode.
* Merges. tiktoken merges any two neighbours whose union is a token, the reference only the pairs
  of its list. They agree if the reference encodes every token's own bytes as that token, and ranks
  follow the list: where two neighbours cover a token exactly, no merge has crossed its ends, so
  what was merged within is what is merged within it alone, whose last pair is the list's.
* Normalization is left to the reference's own function.
* Texts with an added token in them (<|endoftext|>), or with white space that overflows tiktoken's
  stack, are left to the reference.

None of this is trusted: `prove` compares ids before the first document is written, and
--verify while the run goes on.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

# What users call "GPT-2 style" and so on, as it stands in tokenizer.json.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)
WORDS = (GPT2, LLAMA3, QWEN2)

_CLASSES = (r"\p{L}", r"\p{N}", r"\s")
_PLANES = 4  # of the 17: the later ones have no letters, numbers or spaces
_STACK = (
    50_000  # characters of white space in a row; tiktoken 0.14 aborts somewhere below a million
)
_LONG_WHITE_SPACE = re.compile(rf"\s{{{_STACK}}}")
_LARGE_TEXT = 1 << 24  # characters from which Python's integers would need gigabytes


class NotExactError(ValueError):
    """tiktoken cannot stand for a tokenizer; says why, as the end of a sentence about it."""


class ByteLevelBPE:
    """A Hugging Face tokenizer's ids, by tiktoken.

    Args:
        backend: the `tokenizers.Tokenizer` to reproduce.
        reference: text to ids, with the ids that are put around every text.

    Raises:
        NotExactError: it cannot be reproduced.
    """

    def __init__(self, backend: Any, reference: Callable[[str], list[int]]) -> None:
        import tiktoken
        from tokenizers.normalizers import NFC

        state = json.loads(backend.to_str())
        if state["truncation"] or state["padding"]:
            raise NotExactError("it truncates or pads")
        words = _words(state["pre_tokenizer"])
        normalizer = state["normalizer"]
        if normalizer not in (None, {"type": "NFC"}):
            raise NotExactError(f"its normalizer is {normalizer['type']}")
        self._normalize = NFC().normalize_str if normalizer else None
        added = [token["content"] for token in state["added_tokens"]]
        ranks, ids = _ranks(state["model"], added)
        self._ids = np.array(ids, np.int64)
        if normalizer:
            added += [NFC().normalize_str(token) for token in added]
        self._added = re.compile("|".join(map(re.escape, sorted(set(added))))) if added else None
        self._bpe = tiktoken.Encoding(
            "byte-level", pat_str=_spell_out(words), mergeable_ranks=ranks, special_tokens={}
        )
        self._before = self._after = self._ids[:0]
        letter, around = self.encode("a"), reference("a")
        if letter is None or list(letter) != [i for i in around if i == letter[0]]:
            raise NotExactError("it does not encode the letter a once")
        place = around.index(letter[0])
        self._before = np.array(around[:place], np.int64)
        self._after = np.array(around[place + 1 :], np.int64)

    def encode(self, text: str) -> np.ndarray | None:
        """The ids of a text, int64; None if only the reference can tell."""
        if self._added and self._added.search(text):
            return None
        if self._normalize and not text.isascii():
            text = self._normalize(text)
            if self._added and self._added.search(text):
                return None
        if len(text) >= _STACK and _LONG_WHITE_SPACE.search(text):
            return None
        if len(text) >= _LARGE_TEXT:
            ranks = self._bpe.encode_to_numpy(text, disallowed_special=())
        else:
            ranks = np.array(self._bpe.encode_ordinary(text), np.uint32)
        ids = self._ids[ranks]
        if self._before.size or self._after.size:
            ids = np.concatenate([self._before, ids, self._after])
        return ids


def find_byte_level_bpe(tokenizer: Any) -> ByteLevelBPE:
    """The fast equal of a tokenizer built by Megatron.

    Raises:
        NotExactError: there is none; says why.
    """
    transformers_tokenizer = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    backend = getattr(transformers_tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise NotExactError("it is not one of Hugging Face's fast tokenizers")
    try:
        engine = ByteLevelBPE(backend, tokenizer.tokenize)
    except ImportError as error:
        raise NotExactError(f"{error.name} is not installed") from error
    except (KeyError, TypeError) as error:
        raise NotExactError(f"its tokenizer.json has a form unknown here ({error!r})") from error
    return engine


def prove(
    engine: ByteLevelBPE, reference: Callable[[str], list[int]], texts: Iterable[str]
) -> None:
    """Compares the ids of the stress text and of `texts`.

    Raises:
        NotExactError: they differ; names the first text that does.
    """
    for text in (*stress_texts(), *texts):
        ids = engine.encode(text) if text else None
        if ids is not None and not np.array_equal(ids, reference(text)):
            raise NotExactError(f"tiktoken encodes {text[:60]!r}... differently")


def stress_texts() -> Iterator[str]:
    """What tokenizers differ on: the ends of Unicode's classes in every surrounding, white space,
    digits, contractions, long words, all the rest of Unicode."""
    edges = {
        chr(code)
        for name in _CLASSES
        for first, last in _ranges(name)
        for code in (first - 1, first, last, last + 1)
        if code >= 0 and not 0xD800 <= code < 0xE000
    }
    # A line each, so that a difference is shown where it is.
    for c in sorted(edges | set(map(chr, range(0x250))) | set("\u017f\u212a\ufb06")):
        yield f"a{c}b 1{c}2 {c}\n{c}{c}.{c} '{c} {c}  \t{c}\r\n\r\n{c}"
    for plane in range(17):
        yield "".join(chr(c) for c in range(plane << 16, (plane << 16) + 0x400))
        yield "".join(chr(c) for c in range((plane << 16) + 0xFC00, (plane << 16) + 0x10000))
    for count in (1, 2, 3, 4, 7, 8, 9, 31, 255, 1000):
        for unit in (" ", "\n", "\t", "\r\n", " \n", "\u3000", "a", "ab", "7", ".", "=", "é", "你"):
            yield unit * count
            yield f"x{unit * count}y"
    yield "I'll we've IT'S they'RE 'S'T'D 'x '' don't'll \u2019s"
    yield "e\u0301 \u1e9b\u0323 \u212b \uac00\u1100\u1161 \U0001f468\u200d\U0001f469"


def _words(pre_tokenizer: dict[str, Any] | None) -> str:
    """The expression of WORDS that a tokenizer.json's pre-tokenizer is."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": words},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if words in WORDS:
            return words
    raise NotExactError("its pre-tokenizer is not GPT-2's, Llama 3's or Qwen2's")


def _ranks(model: dict[str, Any], added: list[str]) -> tuple[dict[bytes, int], list[int]]:
    """The ranks of a BPE's tokens, bytes first, then in the order of its merges; each one's id."""
    from tokenizers import Tokenizer, models

    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        raise NotExactError("its model is not byte-level BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NotExactError("it marks the inner or the last part of a word")
    vocab = model["vocab"]
    if any(letter not in vocab for letter in _LETTERS):
        raise NotExactError("it has no token for some bytes")
    ranked = {letter: rank for rank, letter in enumerate(_LETTERS)}
    merges: list[tuple[str, str]] = []
    for pair in model["merges"]:  # two strings, or in older files one with a space
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        merges.append((left, right))
    last = ""
    for left, right in merges:
        token = left + right
        if token != last and ranked.setdefault(token, len(ranked)) != len(ranked) - 1:
            raise NotExactError(f"its merges reach the token {token!r} in two places")
        last = token
    if any(char not in _BYTES for token in ranked for char in token):
        raise NotExactError("it has merges of characters that are no bytes")
    if model.get("ignore_merges") and vocab.keys() - ranked.keys() - set(added):
        raise NotExactError("it has words that no merge makes")
    alone = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    for token, encoding in zip(ranked, alone.encode_batch_fast(list(ranked)), strict=True):
        if encoding.ids != [vocab[token]]:
            raise NotExactError(f"its merges do not make the token {token!r} of its bytes")
    names = {bytes(_BYTES[char] for char in token): rank for token, rank in ranked.items()}
    return names, [vocab[token] for token in ranked]


def _spell_out(words: str) -> str:
    """An expression with the reference's members in place of each class's name."""
    for name in _CLASSES:
        members = "".join(f"\\x{{{a:X}}}-\\x{{{b:X}}}" for a, b in _ranges(name))
        words = words.replace(name, f"[{members}]")
        if name == r"\s":
            words = words.replace(r"\S", f"[^{members}]")
    return words


@functools.cache
def _ranges(name: str) -> list[tuple[int, int]]:
    """The code points of a class in the reference's library: first and last of each range."""
    from tokenizers import Regex, pre_tokenizers

    rest = pre_tokenizers.Split(Regex(f"[^{name}]+"), "removed")
    return [(ord(run[0]), ord(run[-1])) for run, _ in rest.pre_tokenize_str(_every_character())]


def _every_character() -> str:
    codes = (*range(0xD800), *range(0xE000, _PLANES << 16))
    return "".join(map(chr, codes))


def _letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's
    bytes_to_unicode): itself where it has a picture, else the next one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b) if b in shown else chr(0x100 + hidden.index(b)) for b in range(256)]


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}
