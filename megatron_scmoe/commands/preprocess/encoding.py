"""One line of JSON to token ids, or the reason why not."""

import contextlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.commands.preprocess.corpus import Batch, Bookmark
from megatron_scmoe.commands.preprocess.proof import Engine

VERIFIED_BYTES = 1 << 24  # of a line; of half a gigabyte a tokenizer makes 22 GB
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class EncodedBatch:
    """The documents of a batch.

    tokens: for each key the ids of all documents, one after the other.
    lengths: for each key the number of ids of each sequence, int32.
    sequences: for each key the number of sequences of each document, int64; a document without ids
    has none.
    text_bytes: size of the lines, packed or not on disk; disk_bytes, end: as in Batch.
    repaired: number of unpaired surrogates that became U+FFFD.
    bad_lines: those that are no documents: where (lines count from 1) and why.
    """

    tokens: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    sequences: dict[str, np.ndarray]
    end: Bookmark
    documents: int = 0
    text_bytes: int = 0
    disk_bytes: int = 0
    repaired: int = 0
    bad_lines: list[str] = field(default_factory=list)


@dataclass
class Encoder:
    """Turn batches of lines into batches of ids; Megatron-LM's rules, ours only where it stops.

    Megatron-LM's: a document is one sequence, or with `split` one for each sentence that has ids;
    the end-of-document id goes to the last sequence, and an empty document gets none.
    Ours: blank lines are skipped; unpaired surrogates, which no tokenizer accepts, become U+FFFD;
    a text that is empty has no ids where the tokenizer cannot read it (NullTokenizer).

    Args:
        keys: the strings of the JSON object that are encoded; a line bad in one is bad in all.
        dtype: of the ids on disk.
        eod: id to append to documents, or None.
        split: text to sentences, or None.
        engine: encodes in the tokenizer's place the texts that it can, if there is one.
        verify: of 1000 documents how many, drawn at random, the tokenizer encodes again; of those
            below VERIFIED_BYTES.
    """

    tokenizer: Any
    keys: Sequence[str]
    dtype: type[np.number]
    eod: int | None = None
    split: Callable[[str], list[str]] | None = None
    engine: Engine | None = None
    verify: int = 0

    def __post_init__(self) -> None:
        try:
            self._empty: list[int] = list(self.tokenizer.tokenize(""))
        except ValueError:
            self._empty = []

    def __call__(self, batch: Batch) -> EncodedBatch:
        """Every document of a batch as ids, and what is wrong with its other lines."""
        ids: dict[str, list[np.ndarray]] = {key: [] for key in self.keys}
        lengths: dict[str, list[list[int]]] = {key: [] for key in self.keys}
        result = EncodedBatch({}, {}, {}, batch.end, disk_bytes=batch.disk_bytes)
        for number, line in enumerate(batch.lines, batch.first_line):
            result.text_bytes += len(line)
            if line.isspace() or not line:
                continue
            try:
                texts, repaired = self._parse(line)
                document = {key: self._encode(key, text) for key, text in texts.items()}
                if (
                    self.engine
                    and len(line) < VERIFIED_BYTES
                    and random.random() * 1000 < self.verify
                ):
                    self._compare(f"{batch.path}:{number}", texts)
            except _BadLineError as error:
                result.bad_lines.append(f"{batch.path}:{number}: {error}")
                continue
            for key, (tokens, parts) in document.items():
                ids[key].append(tokens)
                lengths[key].append(parts)
            result.documents += 1
            result.repaired += repaired
        nothing = np.empty(0, self.dtype)
        for key in self.keys:
            result.tokens[key] = np.concatenate([nothing, *ids[key]])
            result.lengths[key] = np.array([n for parts in lengths[key] for n in parts], np.int32)
            result.sequences[key] = np.array(list(map(len, lengths[key])), np.int64)
        return result

    def texts(self, batch: Batch) -> list[str]:
        """The texts of those lines that are documents."""
        found: list[str] = []
        for line in batch.lines:
            with contextlib.suppress(_BadLineError):
                found += self._parse(line)[0].values()
        return found

    def _parse(self, line: bytes) -> tuple[dict[str, str], int]:
        try:
            data = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _BadLineError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
        except json.JSONDecodeError as error:
            raise _BadLineError(f"not valid JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number or a nesting without measure
            raise _BadLineError(f"not usable JSON: {error}") from error
        if not isinstance(data, dict):
            raise _BadLineError(f"not a JSON object but {_json_type(data)}")
        texts, repaired = {}, 0
        for key in self.keys:
            if key not in data:
                present = ", ".join(repr(name) for name in list(data)[:8]) or "none"
                raise _BadLineError(f"no key {key!r} (--json-keys); the line has: {present}")
            text = data[key]
            if not isinstance(text, str):
                raise _BadLineError(f"the value of {key!r} is not a string but {_json_type(text)}")
            if b"\\u" in line:  # the only way for a surrogate to get through
                text, count = _LONE_SURROGATE.subn("\ufffd", text)
                repaired += count
            texts[key] = text
        return texts, repaired

    def _encode(self, key: str, text: str) -> tuple[np.ndarray, list[int]]:
        document: list[np.ndarray] = []
        try:
            for sequence in [text] if self.split is None else self.split(text):
                ids = self._ids(sequence)
                if len(ids) > 0:
                    document.append(ids)
        except Exception as error:  # each tokenizer library has its own; the cause is shown
            raise _BadLineError(
                f"the tokenizer refuses the value of {key!r}: {type(error).__name__}: {error}"
            ) from error
        lengths = [len(ids) for ids in document]
        if document and self.eod is not None:
            document.append(np.array([self.eod], np.int32))
            lengths[-1] += 1
        tokens = np.concatenate(document) if document else np.empty(0, np.int64)
        bounds = np.iinfo(np.dtype(self.dtype))
        if tokens.size and (tokens.min() < bounds.min or tokens.max() > bounds.max):
            outside = tokens[(tokens < bounds.min) | (tokens > bounds.max)]
            raise _BadLineError(
                f"{key!r} has the token id {outside[0]}, which {np.dtype(self.dtype)}, the type "
                "chosen for the vocabulary size, cannot hold"
            )
        return tokens.astype(self.dtype), lengths

    def _ids(self, text: str) -> np.ndarray:
        ids = self.engine.encode(text) if self.engine and text else None
        return self._reference(text) if ids is None else ids

    def _reference(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.tokenize(text) if text else self._empty, np.int64)

    def _compare(self, place: str, texts: dict[str, str]) -> None:
        for key, text in texts.items():
            for sequence in [text] if self.split is None else self.split(text):
                fast, reference = self._ids(sequence), self._reference(sequence)
                if not np.array_equal(fast, reference):
                    common = min(len(fast), len(reference))
                    different = np.flatnonzero(fast[:common] != reference[:common])
                    raise DataError(
                        f"{place}: the ids of {key!r} by gigatoken and by the tokenizer differ "
                        f"from number {different[0] if different.size else common} on; nothing was "
                        "written. --engine reference encodes with the tokenizer alone; please "
                        "report the line and the tokenizer"
                    )


class _BadLineError(ValueError):
    pass


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")
