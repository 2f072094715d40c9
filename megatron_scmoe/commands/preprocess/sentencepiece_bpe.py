"""SentencePiece's BPE (Llama 2, Mistral) by tiktoken, where it reproduces it exactly.

Both merge, again and again, the leftmost of the best two neighbours whose union is a token: the
best is the highest score here, the lowest rank there. What differs:

* Letters. SentencePiece begins with characters and makes bytes of those that it does not know,
  tiktoken begins with bytes. The lowest ranks put each known character together, byte by byte; a
  beginning that is left over, because its character is unknown, becomes its bytes' ids again.
* Words. SentencePiece has none, its text is one sequence. tiktoken may cut between two characters
  that stand beside each other in no token, for nothing is ever merged across that place: in front
  of a space, and mostly between letters, digits, signs and the ends of lines (see `_words`).
* Whole words. tiktoken takes a word that is a token as that, SentencePiece only what its merges
  make. Where two neighbours cover a token, no merge has crossed its ends, so a token that merges do
  not make of itself is made nowhere, and is left out.
* Runs of spaces. Llama 2's have the same, lowest score, so the leftmost is merged first and grows
  to the right. The longest having the lowest rank of them, tiktoken does the same.
* A space is U+2581 to SentencePiece, and one is put in front of the text.

As for byte-level BPE nothing of this is trusted (see `proof`).
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_scmoe.commands.preprocess.proof import NotExactError
from megatron_scmoe.commands.preprocess.special_tokens import (
    finder,
    make_encoding,
    ranks_of,
)

_SPACE = "\u2581"
_NO_ID = -1


class SentencePieceBPE:
    """A SentencePiece model's ids, by tiktoken.

    Args:
        processor: the `sentencepiece.SentencePieceProcessor` to reproduce.

    Raises:
        NotExactError: it cannot be reproduced.
        ImportError: protobuf, with which its model is read, is not installed.
    """

    def __init__(self, processor: Any) -> None:
        from sentencepiece import sentencepiece_model_pb2

        model: Any = sentencepiece_model_pb2
        model = model.ModelProto.FromString(processor.serialized_model_proto())
        _check(model)
        kinds = type(model).SentencePiece
        self._has_special_token = finder(
            piece.piece.replace(_SPACE, " ")
            for piece in model.pieces
            if piece.type == kinds.USER_DEFINED
        )
        self._prefix = " " if model.normalizer_spec.add_dummy_prefix else ""
        byte_ids = {
            int(piece.piece[1:-1], 16): number
            for number, piece in enumerate(model.pieces)
            if piece.type == kinds.BYTE
        }
        tokens = _made_by_merges(model)
        if " " not in tokens:
            raise NotExactError("it has no token for a space")
        if any(re.search("[^ ] ", token) for token in tokens):
            raise NotExactError("it has tokens with a space behind something else")
        characters = {token.encode() for token in tokens if len(token) == 1}
        merged = _by_rank(
            [(model.pieces[n].score, token) for token, n in tokens.items() if len(token) > 1]
        )
        beginnings = {c[:length] for c in characters for length in range(2, len(c))}
        single = [bytes([byte]) for byte in range(256)]
        whole = sorted(
            {c for c in characters if len(c) > 1} | beginnings, key=lambda c: (len(c), c)
        )
        names = single + whole + [token.encode() for token in merged]
        # Up to three ids for each rank, the rest of the row is empty.
        self._ids = np.full((len(names), 3), _NO_ID, np.int32)
        for rank, name in enumerate(names):
            known = name not in beginnings and (len(name) > 1 or name in characters)
            ids = [tokens[name.decode()]] if known else [byte_ids[byte] for byte in name]
            self._ids[rank, : len(ids)] = ids
        self._first_ids = self._ids[:, 0].copy()
        self._beginnings = np.array([name in beginnings for name in names])
        self._bpe = make_encoding(_words(tokens), {name: rank for rank, name in enumerate(names)})

    def encode(self, text: str) -> np.ndarray | None:
        """The ids of a text, int32; None if only the reference can tell."""
        if not text:
            return np.empty(0, np.int32)
        text = self._prefix + text.replace(_SPACE, " ")
        if self._has_special_token(text):
            return None
        ranks = ranks_of(self._bpe, text)
        if self._beginnings[ranks].any():
            ids = self._ids[ranks].ravel()
            return ids[ids != _NO_ID]
        return self._first_ids[ranks]


def _made_by_merges(model: Any) -> dict[str, int]:
    """The ids of the tokens that their own characters become, spaces written as such."""
    import sentencepiece

    alone = type(model)()
    alone.CopyFrom(model)
    alone.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=alone.SerializeToString())
    return {
        piece.piece.replace(_SPACE, " "): number
        for number, piece in enumerate(model.pieces)
        if piece.type == piece.NORMAL and processor.encode_as_ids(piece.piece) == [number]
    }


def _words(tokens: Iterable[str]) -> str:
    """An expression whose words no token leaves: spaces, and then characters of one group.

    Two characters are of one group if a chain of neighbours in tokens joins them; one that has no
    neighbour is a word of its own.
    """
    group: dict[str, str] = {}  # of each character with neighbours the next one of its chain

    def end_of_chain(char: str) -> str:
        while group.setdefault(char, char) != char:
            char = group[char]
        return char

    for token in tokens:
        for left, right in itertools.pairwise(token.lstrip(" ")):
            group[end_of_chain(left)] = end_of_chain(right)
    groups: dict[str, str] = {}
    for char in group:
        end = end_of_chain(char)
        groups[end] = groups.get(end, "") + rf"\x{{{ord(char):X}}}"
    spaces, last_spaces = (" *", " +") if any("  " in token for token in tokens) else (" ?", " ")
    words = [f"[{members}]+" for members in groups.values()] + ["[^ ]"]
    return "|".join([*(spaces + word for word in words), last_spaces])


def _by_rank(scores: list[tuple[float, str]]) -> list[str]:
    """Tokens of more than one character, the best first.

    Raises:
        NotExactError: two of them have the same score.
    """
    seen: dict[float, str] = {}
    lowest = min((score for score, _ in scores), default=0.0)
    for score, token in scores:
        other = seen.setdefault(score, token)
        if other != token and (score > lowest or (other + token).strip(" ")):
            raise NotExactError(f"its tokens {other!r} and {token!r} have the same score")
    return [token for _, token in sorted(scores, key=lambda pair: (-pair[0], -len(pair[1])))]


def _check(model: Any) -> None:
    kinds = type(model).SentencePiece
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise NotExactError("its SentencePiece model is not BPE")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise NotExactError("its SentencePiece model normalizes text")
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise NotExactError("its SentencePiece model treats spaces in its own way")
    kinds_used = [piece.type for piece in model.pieces]
    if not trainer.byte_fallback or kinds_used.count(kinds.BYTE) != 256:
        raise NotExactError("its SentencePiece model has no bytes for unknown characters")
    if kinds.UNUSED in kinds_used:
        raise NotExactError("its SentencePiece model has unused tokens")
