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
* Texts with an added token in them (<|endoftext|>) are left to the reference.

All three expressions end in `\\s+(?!\\S)|\\s+`: of white space before a word the last character is
left to the word. The look-ahead keeps tiktoken's library of expressions from its fast way, and its
slow one overflows the stack on a million spaces. So it is left out, and the place in front of that
last character is marked beforehand, by a character that is a word of its own and whose rank is
dropped.

None of this is trusted: `prove` compares ids before the first document is written, and
--verify while the run goes on.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_scmoe.commands.preprocess.proof import CLASSES, NotExactError, ranges
from megatron_scmoe.commands.preprocess.special_tokens import (
    finder,
    make_encoding,
    ranks_of,
)

_SPACE_BEFORE_A_WORD = r"|\s+(?!\S)"

# What users call "GPT-2 style" and so on, as it stands in tokenizer.json, and what the last white
# space before a word must be in order to be cut off: after `\s*[\r\n]+` a newline never is.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)
WORDS = {GPT2: "", LLAMA3: r"(?<![\r\n])", QWEN2: r"(?<![\r\n])"}

_MARK = "\U0010ffff"  # no character, in any text that means something


class ByteLevelBPE:
    """A Hugging Face tokenizer's ids, by tiktoken.

    Args:
        backend: the `tokenizers.Tokenizer` to reproduce.
        reference: text to ids, with the ids that are put around every text.

    Raises:
        NotExactError: it cannot be reproduced.
    """

    def __init__(self, backend: Any, reference: Callable[[str], list[int]]) -> None:
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
        self._ids = np.array(ids, np.int32)
        added.append(_MARK)
        if normalizer:
            added += [NFC().normalize_str(token) for token in added]
        self._has_special_token = finder(added)
        space = _members(r"\s")
        self._before_a_word = re.compile(
            rf"[{space}]{WORDS[words]}(?=[^{space}])(?<=[{space}][{space}])"
        )
        self._mark = len(ranks)
        self._bpe = make_encoding(_without_look_ahead(words), ranks | {_MARK.encode(): self._mark})
        self._before = self._after = self._ids[:0]
        letter, around = self.encode("a"), reference("a")
        if letter is None or list(letter) != [i for i in around if i == letter[0]]:
            raise NotExactError("it does not encode the letter a once")
        place = around.index(letter[0])
        self._before = np.array(around[:place], np.int32)
        self._after = np.array(around[place + 1 :], np.int32)

    def encode(self, text: str) -> np.ndarray | None:
        """The ids of a text, int32; None if only the reference can tell."""
        if self._has_special_token(text):
            return None
        if self._normalize and not text.isascii():
            text = self._normalize(text)
            if self._has_special_token(text):
                return None
        text = self._before_a_word.sub(rf"{_MARK}\g<0>", text)
        ranks = ranks_of(self._bpe, text)
        ids = self._ids[ranks[ranks != self._mark]]
        if self._before.size or self._after.size:
            ids = np.concatenate([self._before, ids, self._after])
        return ids


def _words(pre_tokenizer: dict[str, Any] | None) -> str:
    """The expression of WORDS that a tokenizer.json's pre-tokenizer is.

    Raises:
        NotExactError: it is none of them.
    """
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
    """The ranks of a BPE's tokens, bytes first, then in the order of its merges; each one's id.

    Raises:
        NotExactError: merges alone do not say what it does.
    """
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


def _without_look_ahead(words: str) -> str:
    """An expression of WORDS for marked texts, the reference's members in each class's place."""
    words = words.replace(_SPACE_BEFORE_A_WORD, "").replace("[^", f"[^{_MARK}")
    for name in CLASSES:
        words = words.replace(name, f"[{_members(name, 'x')}]")
    return f"{_MARK}|{words}"


def _members(name: str, escape: str = "U") -> str:
    """A class's members, as they stand in a set of Python's expressions or of Rust's."""
    form = "\\U{:08x}-\\U{:08x}" if escape == "U" else "\\x{{{:X}}}-\\x{{{:X}}}"
    return "".join(form.format(*bounds) for bounds in ranges(name))


def _letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's
    bytes_to_unicode): itself where it has a picture, else the next one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b) if b in shown else chr(0x100 + hidden.index(b)) for b in range(256)]


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}
