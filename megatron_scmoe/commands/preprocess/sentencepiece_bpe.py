"""SentencePiece's BPE (Llama 2, Mistral) by tiktoken, where it reproduces it exactly.

Both merge, again and again, the leftmost of the best two neighbours whose union is a token: the
best is the highest score here, the lowest rank there. What differs:

* Letters. SentencePiece begins with characters and makes bytes of those that it does not know,
  tiktoken begins with bytes. The lowest ranks put each known character together, byte by byte; a
  beginning that is left over, because its character is unknown, becomes its bytes' ids again.
* Words. SentencePiece has none, its text is one sequence. Where no token has a space behind
  something else, nothing is ever merged across the place in front of a space, so that is where
  tiktoken may cut.
* Runs of spaces. Llama 2's have the same, lowest score, so the leftmost is merged first and grows
  to the right. The longest having the lowest rank of them, tiktoken does the same.
* A space is U+2581 to SentencePiece, and one is put in front of the text.

As for byte-level BPE nothing of this is trusted (see `proof`).
"""

import re
from typing import Any

import numpy as np

from megatron_scmoe.commands.preprocess.proof import NotExactError
from megatron_scmoe.commands.preprocess.special_tokens import finder, ranks_of

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
        import tiktoken
        from sentencepiece import sentencepiece_model_pb2

        model: Any = sentencepiece_model_pb2
        model = model.ModelProto.FromString(processor.serialized_model_proto())
        _check(model)
        kinds = type(model).SentencePiece
        users = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
        self._has_special_token = finder(users)
        self._prefix = " " if model.normalizer_spec.add_dummy_prefix else ""
        byte_ids = {
            int(piece.piece[1:-1], 16): number
            for number, piece in enumerate(model.pieces)
            if piece.type == kinds.BYTE
        }
        tokens = {
            piece.piece.replace(_SPACE, " "): number
            for number, piece in enumerate(model.pieces)
            if piece.type == kinds.NORMAL
        }
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
        self._bpe = tiktoken.Encoding(
            "sentencepiece",
            pat_str=" *[^ ]+| +",
            mergeable_ranks={name: rank for rank, name in enumerate(names)},
            special_tokens={},
        )

    def encode(self, text: str) -> np.ndarray | None:
        """The ids of a text, int32; None if only the reference can tell."""
        if self._has_special_token(text):
            return None
        if not text:
            return np.empty(0, np.int32)
        text = self._prefix + text.replace(_SPACE, " ")
        ranks = ranks_of(self._bpe, text)
        if self._beginnings[ranks].any():
            ids = self._ids[ranks].ravel()
            return ids[ids != _NO_ID]
        return self._first_ids[ranks]


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
