"""What lies beside a model's weights: its tokenizer, chat templates, how text is drawn.

Only a folder on this machine is looked at; a name on a hub is the user's to download. The files are
read as JSON: size and special tokens need no library.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_scmoe.huggingface.tensor_names import Config

FOLDER = "tokenizer"
"""Of an imported checkpoint, beside its iteration."""
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "tokenization_*.py",
)
"""Of a tokenizer, of any kind."""
BESIDE = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""What else transformers reads there."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def folder_of(record: dict[str, Any], load: Path) -> Path | None:
    """Where the record's tokenizer lies, if it is Hugging Face's and on this machine; else what an
    import has left beside its checkpoint.

    Args:
        load: the folder of all iterations.
    """
    name = record["options"].get("tokenizer_model")
    kind = record["tokenizer"]["type"]
    places = [Path(name)] if kind == "HuggingFaceTokenizer" and name else []
    places += [load / FOLDER] if kind in ("HuggingFaceTokenizer", "NullTokenizer") else []
    return next((place for place in places if place.is_dir()), None)


def complete(config: Config, record: dict[str, Any], folder: Path | None) -> Config:
    """The config with the tokenizer's size, where the record has none, and its special tokens.

    Args:
        folder: of the tokenizer, if there is one.

    Raises:
        ValueError: a file is damaged, or the tokenizer has tokens that the model does not have.
    """
    config = {**config, **dict.fromkeys(IDS)}
    if folder is None:
        return config
    tokens = check(folder)
    if tokens and record["tokenizer"]["vocab_size"] is None:
        config["vocab_size"] = _size(tokens)
        rows = record["padded_vocab_size"]
        if config["vocab_size"] > rows:
            raise ValueError(
                f"the tokenizer in {folder} has {config['vocab_size']} tokens, and the model's "
                f"vocabulary {rows} rows"
            )
    return config | _special(folder, tokens)


def check(folder: Path) -> dict[str, int]:
    """Read the files of a folder that are JSON.

    Returns:
        Every token of tokenizer.json and its number; none without that file.

    Raises:
        ValueError: one is damaged.
    """
    for path in found(folder):
        if path.suffix == ".json" and path.name != TOKENIZER:
            _json(path)
    return _tokens(folder / TOKENIZER)


def size_of(folder: Path) -> int:
    """Of the vocabulary that a folder's tokenizer.json wants; 0 without one.

    Raises:
        ValueError: a file beside it, or itself, is damaged.
    """
    return _size(check(folder))


def encode(folder: Path, text: str) -> list[int]:
    """The tokens of a text."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / TOKENIZER)).encode(text).ids


def is_there(folder: Path) -> bool:
    """Whether a folder has a tokenizer of any kind."""
    return any(True for _ in found(folder, FILES))


def found(folder: Path, names: tuple[str, ...] = FILES + BESIDE) -> Iterator[Path]:
    """Those of the files that a folder has."""
    for name in names:
        yield from (path for path in sorted(folder.glob(name)) if path.is_file())


def copy(folder: Path, output: Path) -> None:
    """Copy FILES and BESIDE, as far as they are there."""
    for path in found(folder):
        there = output / path.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)


def _tokens(path: Path) -> dict[str, int]:
    """Of a tokenizer.json; tokens may be added to those of its model.

    Raises:
        ValueError: the file holds no tokenizer.
    """
    if not path.is_file():
        return {}
    content = _json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram's: each with its score, in order
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {each["content"]: each["id"] for each in content.get("added_tokens") or ()}
        tokens: dict[str, int] = added | vocabulary
        if not all(type(number) is int and number >= 0 for number in tokens.values()):
            raise ValueError("a number of a token is none")
    except KeyError as error:
        raise ValueError(f"{path} is no tokenizer (it lacks {error.args[0]})") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer ({error})") from error
    return tokens


def _size(tokens: dict[str, int]) -> int:
    return max(tokens.values(), default=-1) + 1


def _special(folder: Path, tokens: dict[str, int]) -> Config:
    """The special tokens that tokenizer_config.json names."""
    path = folder / TOKENIZER_CONFIG
    names = _json(path) if path.is_file() else {}
    texts = {field: names.get(field.removesuffix("_id")) for field in IDS}
    texts = {f: v.get("content") if isinstance(v, dict) else v for f, v in texts.items()}
    return {
        field: tokens[text]
        for field, text in texts.items()
        if isinstance(text, str) and text in tokens
    }


def _json(path: Path) -> Config:
    """An object; a tokenizer's numbers may be too large to compute with (model_max_length)."""
    try:
        content = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} and no object")
    return content
