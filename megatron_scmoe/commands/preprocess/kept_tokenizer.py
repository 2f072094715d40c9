"""A tokenizer as Megatron loaded it once, kept so that later runs start without Megatron.

Importing Megatron's tokenizers, and PyTorch with them, takes several seconds, and all they do for
these tokenizers is to set up a backend: Hugging Face's `tokenizers.Tokenizer`, or SentencePiece's
processor. The first run keeps that backend, after it has given Megatron's ids for the stress text,
in $XDG_CACHE_HOME (or ~/.cache)/megatron_scmoe/tokenizers, under a name made of the contents of the
tokenizer's files, the options and the versions of all that took part. A change of any is another
name; a kept file that is damaged, or a folder that cannot be written, is as if there were none.
"""

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scmoe.commands.preprocess.proof import stress_texts
from megatron_scmoe.words import installed, read_json, write_whole

_VERSIONS = ("megatron-core", "transformers", "tokenizers", "sentencepiece")
# Options that change ids; the paths are left out, the files' contents are in the name.
_OPTIONS = (
    "tokenizer_type",
    "special_tokens",
    "tokenizer_sentencepiece_legacy",
    "tokenizer_sentencepiece_ignore_extra_whitespaces",
    "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens",
)


@dataclass(frozen=True)
class KeptTokenizer:
    """What preprocessing needs of one of Megatron's tokenizers.

    backend: a `tokenizers.Tokenizer` or a `sentencepiece.SentencePieceProcessor`.
    eod: the end-of-document id, or None.
    """

    backend: Any
    tokenize: Callable[[str], list[int]]
    detokenize: Callable[[list[int]], str]
    vocab_size: int
    eod: int | None


def end_of_document(tokenizer: Any) -> int | None:
    """The id that ends a document, if the tokenizer has one; kept, or built by Megatron."""
    try:
        return tokenizer.eod
    except (AttributeError, NotImplementedError, TypeError):
        return None


def backend_of(tokenizer: Any) -> Any:
    """The backend that alone decides a tokenizer's ids; None if there is none.

    Args:
        tokenizer: kept, or built by Megatron.
    """
    if isinstance(tokenizer, KeptTokenizer):
        return tokenizer.backend
    library: Any = getattr(tokenizer, "_tokenizer", None)
    backend: Any = getattr(library, "tokenizer", None)
    if hasattr(backend, "backend_tokenizer"):
        return backend.backend_tokenizer if library.include_special_tokens else None
    if hasattr(backend, "serialized_model_proto"):
        altered = library.removed_extra_spaces and not library.ignore_extra_whitespaces
        return None if library.legacy or altered else backend
    return None


def find(args: argparse.Namespace, fingerprint: str | None) -> KeptTokenizer | None:
    """The tokenizer of the options, if it was kept.

    fingerprint: of the tokenizer's files; None if they are not all on this machine.
    """
    if not _can_be_kept(args, fingerprint):
        return None
    try:
        kept = read_json(_path(args, fingerprint))
        if kept.pop("sha256") != _digest(kept):
            return None
        return _restore(args, **kept)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None


def keep(args: argparse.Namespace, fingerprint: str | None, tokenizer: Any) -> None:
    """Keep a tokenizer that Megatron has built, if its backend alone gives the same ids."""
    backend = backend_of(tokenizer)
    if backend is None or not _can_be_kept(args, fingerprint):
        return
    to_str = getattr(backend, "to_str", None)
    kept: dict[str, Any] = {
        "backend": to_str() if to_str else None,
        "vocab_size": tokenizer.vocab_size,
        "eod": end_of_document(tokenizer),
    }
    with contextlib.suppress(OSError, ValueError):
        restored = _restore(args, **kept)
        if all(restored.tokenize(text) == tokenizer.tokenize(text) for text in stress_texts()):
            path = _path(args, fingerprint)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(kept | {"sha256": _digest(kept)}))


def _can_be_kept(args: argparse.Namespace, fingerprint: str | None) -> bool:
    """Whether options and files say all: no hub, no code, no class named in a metadata file."""
    return (
        fingerprint is not None
        and not args.trust_remote_code
        and not args.metadata_path
        and not args.vocab_file
        and not args.merge_file
        and bool(args.tokenizer_model)
    )


def _restore(
    args: argparse.Namespace, backend: str | None, vocab_size: int, eod: int | None
) -> KeptTokenizer:
    if backend is None:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer_model)
        ids, text = processor.encode_as_ids, processor.decode_ids
        return KeptTokenizer(processor, ids, text, vocab_size, eod)
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(backend)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(str(error)) from error
    return KeptTokenizer(
        tokenizer,
        lambda text: tokenizer.encode(text).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        vocab_size,
        eod,
    )


def _path(args: argparse.Namespace, fingerprint: str | None) -> Path:
    config = Path(args.tokenizer_model, "config.json")  # transformers may take the class from it
    name = _digest(
        {
            "files": fingerprint,
            "config": config.read_text() if config.is_file() else None,
            "options": {option: getattr(args, option) for option in _OPTIONS},
            "versions": {package: installed(package) for package in _VERSIONS},
        }
    )
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "megatron_scmoe", "tokenizers", f"{name}.json")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
