"""Which engine can stand in a tokenizer's place."""

from typing import Any

from megatron_scmoe.commands.preprocess.byte_level_bpe import ByteLevelBPE
from megatron_scmoe.commands.preprocess.kept_tokenizer import backend_of
from megatron_scmoe.commands.preprocess.proof import Engine, NotExactError
from megatron_scmoe.commands.preprocess.sentencepiece_bpe import SentencePieceBPE


def find_engine(tokenizer: Any) -> Engine:
    """The fast equal of a tokenizer, kept or built by Megatron; not yet proven.

    Raises:
        NotExactError: there is none; says why.
    """
    backend = backend_of(tokenizer)
    try:
        if hasattr(backend, "to_str"):
            return ByteLevelBPE(backend, tokenizer.tokenize)
        if hasattr(backend, "serialized_model_proto"):
            return SentencePieceBPE(backend)
    except ImportError as error:
        raise NotExactError(f"{error.name} is not installed") from error
    except (KeyError, TypeError) as error:
        raise NotExactError(f"its model has a form unknown here ({error!r})") from error
    raise NotExactError("it is neither a fast tokenizer of Hugging Face nor SentencePiece's")
