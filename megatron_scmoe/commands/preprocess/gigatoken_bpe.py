"""BPE tokenizers by gigatoken, which encodes many times as fast as the libraries that define the
ids: byte-level ones of Hugging Face (GPT-2's, Llama 3's, Qwen's), Llama 2's way in either format.

Its merges are those of the reference, in the same order. What it is not asked for:

* Texts with a special token in them are left to the reference, unless it is a plain one of Hugging
  Face's (<|endoftext|>), which no normalization and no white space beside it concerns.
* Normalization of byte-level tokenizers (NFC) is the reference's own function: the two follow
  different versions of Unicode.
* Of equal scores SentencePiece merges the leftmost, gigatoken the token that it ranks first. The
  runs of spaces, of which Llama 2's have all one score, come out alike; other models are refused.

None of this is trusted: `prove` compares ids before the first document is written, and --verify
while the run goes on.

What gigatoken 0.10 remembers of words has no bound, so it begins anew when it has grown too much.
"""

import contextlib
import json
import re
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scmoe.commands.preprocess.kept_tokenizer import backend_of
from megatron_scmoe.commands.preprocess.proof import NotExactError

_SPACE = "\u2581"
_NOTHING = "\U0010ffff"  # no character, in any token
_FLAGS = ("lstrip", "rstrip", "single_word")
_ASCII_STAYS = ("NFC", "NFD", "NFKC", "NFKD")
_MANY = 1 << 24  # ids: as many places gigatoken takes
_HINT = 3  # characters
_REMEMBERED = 256e6  # bytes of memory, at most, for what was seen
_LOOK_EVERY = 1 << 22  # characters: a fortieth of a second, and at worst 55 MB


class GigatokenBPE:
    """A tokenizer's ids, by gigatoken.

    Args:
        make: a new `gigatoken.Tokenizer`.
        is_left: whether only the reference can encode a text.
        normalize: what the reference makes of a text first, if gigatoken does not; None if only the
            reference can encode it. Called for what is not ASCII.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        is_left: Callable[[str], bool],
        normalize: Callable[[str], str | None] | None = None,
    ) -> None:
        self._make, self._is_left, self._normalize = make, is_left, normalize
        self._bpe = make()
        self._unseen, self._memory = 0, resident_bytes()
        self._before = self._after = np.empty(0, np.int32)

    def encode(self, text: str) -> np.ndarray | None:
        """The ids of a text, int32; None if only the reference can tell."""
        if self._is_left(text):
            return None
        if self._normalize and not text.isascii():
            normalized = self._normalize(text)
            if normalized is None:
                return None
            text = normalized
        self._unseen += len(text)
        if self._unseen >= _LOOK_EVERY:
            self._forget()
        ids = self._bpe.encode(text).view(np.int32)
        if self._before.size or self._after.size:
            ids = np.concatenate([self._before, ids, self._after])
        return ids

    def _forget(self) -> None:
        """Begin anew if memory has grown too much."""
        self._unseen, now = 0, resident_bytes()
        self._memory = min(self._memory, now)  # a large text may have gone
        if now - self._memory > _REMEMBERED:
            self._bpe = self._make()
            self._memory = resident_bytes()

    def surround(self, reference: Callable[[str], list[int]]) -> "GigatokenBPE":
        """Put around every text what the reference puts there.

        Raises:
            NotExactError: it cannot be told which ids those are.
        """
        ids, around = self.encode("a"), reference("a")
        places = [
            place
            for place in range(len(around))
            if ids is not None and around[place : place + len(ids)] == ids.tolist()
        ]
        if ids is None or len(places) != 1:
            raise NotExactError("it does not encode the letter a once")
        self._before = np.array(around[: places[0]], np.int32)
        self._after = np.array(around[places[0] + len(ids) :], np.int32)
        return self


def resident_bytes() -> int:
    """Memory of this process; 0 where the kernel does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def find_engine(tokenizer: Any) -> GigatokenBPE:
    """The fast equal of a tokenizer, kept or built by Megatron; not yet proven.

    Raises:
        NotExactError: there is none; says why.
    """
    backend = backend_of(tokenizer)
    try:
        if hasattr(backend, "to_str"):
            return of_huggingface(backend).surround(tokenizer.tokenize)
        if hasattr(backend, "serialized_model_proto"):
            return of_sentencepiece(backend)
    except ImportError as error:
        raise NotExactError(
            f"{error.name} is not installed: pip install 'megatron-scmoe[data]'"
        ) from error
    except (KeyError, TypeError) as error:
        raise NotExactError(f"its model has a form unknown here ({error!r})") from error
    raise NotExactError("it is neither a fast tokenizer of Hugging Face nor SentencePiece's")


def of_huggingface(backend: Any) -> GigatokenBPE:
    """The fast equal of a `tokenizers.Tokenizer`, without the ids that it puts around a text.

    Raises:
        NotExactError: there is none.
        ImportError: gigatoken is not installed.
    """
    state = json.loads(backend.to_str())
    model, normalizer = state["model"], state["normalizer"]
    if state["truncation"] or state["padding"]:
        raise NotExactError("it truncates or pads")
    if model["type"] != "BPE" or model.get("dropout"):
        raise NotExactError("its model is not BPE, or drops merges at random")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NotExactError("it marks the inner or the last part of a word")
    if max(model["vocab"].values(), default=0) >= _MANY:
        raise NotExactError("its ids are too large")
    added, byte_level = state["added_tokens"], state["pre_tokenizer"] is not None
    tokens = [token["content"] for token in added]
    normalize: Callable[[str], str | None] | None = None
    if normalizer is None:
        plain = [token for token in added if not any(token[flag] for flag in _FLAGS)]
    elif byte_level and normalizer["type"] in _ASCII_STAYS:
        plain = [
            token for token in added if not any(token[flag] for flag in (*_FLAGS, "normalized"))
        ]
        normalize = _normalizer(backend.normalizer.normalize_str, tokens)
        state["normalizer"] = None
    elif byte_level:
        raise NotExactError(f"its normalizer is {normalizer['type']}")
    else:
        plain = []
        # A token that is normalized itself is looked for behind the text's normalization.
        tokens += [backend.normalizer.normalize_str(token) for token in tokens]
        tokens += [token.replace(" ", _SPACE) for token in tokens]
        tokens += [token.replace(_SPACE, " ").strip(" ") for token in tokens]
    state |= {"added_tokens": plain, "post_processor": None, "decoder": None}
    make = _maker("from_json", json.dumps(state))
    others = set(tokens) - {token["content"] for token in plain}
    return GigatokenBPE(make, finder(filter(None, others)), normalize)


def _normalizer(normalize: Callable[[str], str], tokens: list[str]) -> Callable[[str], str | None]:
    """`normalize`; None of a text with one of `tokens`, before or behind it."""
    has_token = finder([*tokens, *map(normalize, tokens)])

    def normalized(text: str) -> str | None:
        if has_token(text):
            return None
        text = normalize(text)
        return None if has_token(text) else text

    return normalized


def of_sentencepiece(processor: Any) -> GigatokenBPE:
    """The fast equal of a `sentencepiece.SentencePieceProcessor`.

    Raises:
        NotExactError: there is none.
        ImportError: gigatoken, or protobuf, with which its model is read, is not installed.
    """
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2
    model = model.ModelProto.FromString(processor.serialized_model_proto())
    _check_sentencepiece(model)
    kinds = type(model).SentencePiece
    tokens = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    # SentencePiece looks for them behind the space that it puts in front, and all are U+2581.
    tokens += [token.replace(_SPACE, " ").lstrip(" ") for token in tokens]
    for number, piece in enumerate(model.pieces):
        if piece.type in (kinds.CONTROL, kinds.USER_DEFINED):
            piece.piece, piece.type = f"{_NOTHING}{number}", kinds.UNUSED
    make = _maker("from_sentencepiece", model.SerializeToString())
    return GigatokenBPE(make, finder(filter(None, tokens)))


def _maker(form: str, content: str | bytes) -> Callable[[], Any]:
    """What makes `gigatoken.Tokenizer`s of a tokenizer's file.

    Raises:
        NotExactError: gigatoken does not know such a tokenizer.
    """
    import gigatoken

    def make() -> Any:
        try:
            return getattr(gigatoken.Tokenizer, form)(content)
        except (ValueError, RuntimeError) as error:
            why = str(error).partition("\n")[0][:80]
            raise NotExactError(f"gigatoken does not know it ({why})") from error

    return make


def _check_sentencepiece(model: Any) -> None:
    kinds = type(model).SentencePiece
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise NotExactError("its SentencePiece model is not BPE")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise NotExactError("its SentencePiece model normalizes text")
    if any(piece.type == kinds.UNUSED for piece in model.pieces):
        raise NotExactError("its SentencePiece model has unused tokens")
    scores: dict[float, str] = {}
    for piece in model.pieces:
        if piece.type == kinds.NORMAL and len(piece.piece) > 1:
            other = scores.setdefault(piece.score, piece.piece)
            if other != piece.piece and (other + piece.piece).strip(_SPACE):
                raise NotExactError(f"its tokens {other!r} and {piece.piece!r} have the same score")


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
