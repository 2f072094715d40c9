"""The tokenizer of a checkpoint's record: its size, its special tokens, its files.

Only a folder on this machine is looked at; a name on a hub is the user's to download.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_scmoe.huggingface.tensor_names import Config

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def folder_of(record: dict[str, Any]) -> Path | None:
    """Where the record's tokenizer lies, if it is Hugging Face's and on this machine."""
    name = record["options"].get("tokenizer_model")
    if record["tokenizer"]["type"] != "HuggingFaceTokenizer" or not name:
        return None
    return Path(name) if Path(name).is_dir() else None


def complete(config: Config, record: dict[str, Any], folder: Path | None = None) -> Config:
    """The config with the tokenizer's size, where the record has none, and its special tokens.

    Args:
        folder: in place of the record's.

    Raises:
        ValueError: the tokenizer is damaged, or has tokens that the model does not have.
    """
    folder = folder or folder_of(record)
    tokens = _tokens(folder) if folder else {}
    config = {**config, **dict.fromkeys(IDS)}
    if tokens and record["tokenizer"]["vocab_size"] is None:
        config["vocab_size"] = _size(tokens)
        rows = record["padded_vocab_size"]
        if config["vocab_size"] > rows:
            raise ValueError(
                f"the tokenizer in {folder} has {config['vocab_size']} tokens, and the model's "
                f"vocabulary {rows} rows"
            )
    for field, token in _special(folder).items() if folder else ():
        config[field] = tokens.get(token)
    return config


def size_of(folder: Path) -> int:
    """Of the vocabulary that a folder's tokenizer.json wants; 0 without one.

    Raises:
        ValueError: it is damaged.
    """
    return _size(_tokens(folder))


def encode(folder: Path, text: str) -> list[int]:
    """The tokens of a text."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def copy(output: Path, record: dict[str, Any], folder: Path | None = None) -> list[str]:
    """Copy the files beside the weights.

    Returns:
        A line for the user if there are none.
    """
    folder = folder or folder_of(record)
    if folder is None:
        name = record["options"].get("tokenizer_model") or record["tokenizer"]["type"]
        return [f"no tokenizer beside the weights: {name} is no folder here; give --tokenizer DIR"]
    copy_files(folder, output)
    return []


def is_there(folder: Path) -> bool:
    """Whether a folder has a tokenizer of any kind."""
    return any((folder / name).is_file() for name in FILES)


def copy_files(folder: Path, output: Path) -> None:
    """Copy those of FILES that are there."""
    for name in FILES:
        if (folder / name).is_file():
            shutil.copy(folder / name, output / name)


def _tokens(folder: Path) -> dict[str, int]:
    """Every token of tokenizer.json and its number.

    Raises:
        ValueError: the file holds no tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library has no class for it
        raise ValueError(f"{path} is no tokenizer ({error})") from error


def _size(tokens: dict[str, int]) -> int:
    return max(tokens.values(), default=-1) + 1


def _special(folder: Path) -> dict[str, str]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
        found = {field: config.get(field.removesuffix("_id")) for field in IDS}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({error})") from error
    texts = {f: v.get("content") if isinstance(v, dict) else v for f, v in found.items()}
    return {field: text for field, text in texts.items() if isinstance(text, str)}
