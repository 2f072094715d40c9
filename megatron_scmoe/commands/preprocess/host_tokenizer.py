"""Which tokenizer: Megatron's own options, the tokenizer they name, and a fingerprint of it.

The options are Megatron's, spelled and defaulted as in its training command line (a test compares
them), and the tokenizer is built by Megatron's own build_tokenizer, so that training and
preprocessing give the same ids. They are repeated here because asking Megatron for them imports
all of megatron.training. Left out are tokenizers that do not read plain text (multimodal, SFT).
"""

import argparse
import contextlib
import hashlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_scmoe.commands.preprocess import DataError, kept_tokenizer

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
VOCAB_FILE_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer")
MODEL_TYPES = ("HuggingFaceTokenizer", "TikTokenizer", *SENTENCEPIECE_TYPES)
TOKENIZER_TYPES = (*MODEL_TYPES, *VOCAB_FILE_TYPES, "NullTokenizer")

# What a Hugging Face folder's tokenizer is made of; the weights beside it do not count.
_FOLDER_PATTERNS = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*token*.py")


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add Megatron's tokenizer options, as far as they decide the ids of a text."""
    group = parser.add_argument_group("tokenizer, as in Megatron-LM")
    group.add_argument(
        "--tokenizer-type",
        required=required,
        choices=TOKENIZER_TYPES,
        help="Megatron's name of the kind",
    )
    group.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="file of a SentencePiece or tiktoken model; folder or hub name for Hugging Face",
    )
    group.add_argument(
        "--vocab-file", metavar="FILE", help="vocabulary file (GPT2BPETokenizer, Bert...)"
    )
    group.add_argument("--merge-file", metavar="FILE", help="BPE merges file (GPT2BPETokenizer)")
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="number of ids (NullTokenizer, TikTokenizer)"
    )
    group.add_argument(
        "--tokenizer-metadata", dest="metadata_path", metavar="FILE", help="JSON file"
    )
    group.add_argument(
        "--tokenizer-special-tokens",
        dest="special_tokens",
        nargs="+",
        metavar="TOKEN",
        help="tokens that are never split (TikTokenizer, SentencePiece)",
    )
    group.add_argument(
        "--tiktoken-pattern", choices=("v1", "v2"), help="how TikTokenizer splits a text"
    )
    group.add_argument(
        "--tiktoken-num-special-tokens",
        type=int,
        default=1000,
        metavar="N",
        help="ids in front of TikTokenizer's vocabulary (default: 1000)",
    )
    group.add_argument(
        "--tokenizer-sentencepiece-legacy",
        action="store_true",
        help="SentencePiece as before its fix for special tokens",
    )
    group.add_argument(
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
        "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
        dest="tokenizer_sentencepiece_ignore_extra_whitespaces",
        action="store_false",
        help="SentencePiece keeps white space as it is",
    )
    for option, text in (
        ("--tokenizer-hf-no-use-fast", "Hugging Face's tokenizer in Python instead of Rust"),
        (
            "--tokenizer-hf-no-include-special-tokens",
            "Hugging Face adds no tokens at the ends of a text",
        ),
        ("--trust-remote-code", "run the code that a Hugging Face tokenizer brings"),
    ):
        group.add_argument(option, action="store_true", help=text)
    group.add_argument(
        "--null-tokenizer-eod-id",
        type=int,
        metavar="ID",
        help="end of document (NullTokenizer; default: behind all other ids)",
    )
    group.add_argument(
        "--null-tokenizer-pad-id",
        type=int,
        default=-1,
        metavar="ID",
        help="padding (NullTokenizer; default: none, -1)",
    )


def check_tokenizer_arguments(args: argparse.Namespace) -> None:
    """Find the mistakes that can be seen without importing anything.

    Raises:
        DataError: a mistake.
    """
    kind = args.tokenizer_type
    if kind == "NullTokenizer" and (args.vocab_size is None or args.vocab_size < 1):
        raise DataError("--tokenizer-type NullTokenizer needs --vocab-size, at least 1")
    if kind in MODEL_TYPES and not args.tokenizer_model:
        raise DataError(f"--tokenizer-type {kind} needs --tokenizer-model")
    if kind in (*SENTENCEPIECE_TYPES, "TikTokenizer") and not os.path.isfile(args.tokenizer_model):
        raise DataError(f"--tokenizer-model {args.tokenizer_model}: no such file")
    if kind == "HuggingFaceTokenizer" and _is_missing_path(args.tokenizer_model):
        raise DataError(f"--tokenizer-model {args.tokenizer_model}: no such folder")
    if kind in SENTENCEPIECE_TYPES and importlib.util.find_spec("sentencepiece") is None:
        raise DataError(f"--tokenizer-type {kind} needs sentencepiece: pip install sentencepiece")
    for option in ("vocab_file", "merge_file", "metadata_path"):
        path = getattr(args, option)
        if path is not None and not os.path.isfile(path):
            name = {"metadata_path": "--tokenizer-metadata"}.get(option, "--" + option)
            raise DataError(f"{name.replace('_', '-')} {path}: no such file")


def _is_missing_path(name: str) -> bool:
    """Whether `name` is no folder and cannot be a hub name, `model` or `owner/model`, either."""
    return not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1)


def load_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer for the options, kept from an earlier run or built by Megatron.

    Raises:
        DataError: they name none that loads.
    """
    # Read when transformers and tokenizers are imported: no advice on stderr, and no threads in
    # a process that is about to fork.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    files = fingerprint(args)
    tokenizer = kept_tokenizer.find(args, files)
    if tokenizer is None:
        tokenizer = _build_tokenizer(args)
        kept_tokenizer.keep(args, files, tokenizer)
    if args.append_eod:
        find_eod(tokenizer)
    return tokenizer


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Imports without their warnings: Megatron's and PyTorch's modules remark on stderr that a
    machine has no GPU and no Transformer Engine, which preprocessing does not need."""

    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _build_tokenizer(args: argparse.Namespace) -> Any:
    with quiet_imports():
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        # What build_tokenizer also reads, and what does not change ids.
        options = argparse.Namespace(**vars(args), chat_template=None, pad_vocab_size=False)
        try:
            tokenizer = build_tokenizer(options)
            _ = tokenizer.vocab_size
        except Exception as error:  # each tokenizer library has its own; the cause is shown
            raise DataError(
                f"cannot load --tokenizer-type {args.tokenizer_type}"
                f" --tokenizer-model {args.tokenizer_model}: {type(error).__name__}: {error}"
            ) from error
    return tokenizer


def find_eod(tokenizer: Any) -> int:
    """The end-of-document id.

    Raises:
        DataError: the tokenizer has none.
    """
    eod = kept_tokenizer.end_of_document(tokenizer)
    if eod is None or eod < 0:
        raise DataError(
            "--append-eod: this tokenizer has no end-of-document token; give it an eos_token, or "
            "leave --append-eod out"
        )
    return eod


def fingerprint(args: argparse.Namespace) -> str | None:
    """sha256 over names and contents of the tokenizer's local files; None if it has none."""
    paths = [Path(path) for path in (args.vocab_file, args.merge_file) if path]
    if args.tokenizer_model and os.path.isfile(args.tokenizer_model):
        paths.append(Path(args.tokenizer_model))
    elif args.tokenizer_model and os.path.isdir(args.tokenizer_model):
        folder = Path(args.tokenizer_model)
        paths += sorted({path for pattern in _FOLDER_PATTERNS for path in folder.glob(pattern)})
    if not paths:
        return None
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()
