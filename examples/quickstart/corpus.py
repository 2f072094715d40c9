"""A small real-text corpus that every machine with Python already has.

Documents, one JSON object `{"text": ..., "source": ...}` a line:

  library/...   whole modules of the running interpreter's standard library
  manual/...    the documentation strings of its C modules, as prose
  topics/...    the language reference sections behind `help("assert")`

Left out: installed packages, data tables (character maps and the like), files that describe
this machine rather than Python, and near duplicates of documents already taken. Library and
documentation come first; the standard library's own tests only fill up to --max-megabytes.

Held-out documents are drawn by a hash of their name, so the same Python version always gives
the same two files. A held-out document that shares text with the training set is left out, and
what overlap remains is measured and printed (see `shared_windows`).
"""

import argparse
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_scmoe.say import one_line, say
from megatron_scmoe.words import write_whole

WINDOW_CHARS = 200
"""Length of the text windows compared between the splits, white space collapsed."""
WINDOW_STRIDE = 20
"""Distance between the held-out windows that are looked up, in characters."""
MAX_SHARED_WINDOWS = 0.01
"""A held-out document sharing more of its windows with the training set is left out."""
SHINGLE_LINES = 3
"""Near duplicates are found by runs of this many consecutive lines."""
MAX_SHARED_SHINGLES = 0.5
"""A document with a larger share of runs already seen is a near duplicate."""
MAX_TABLE_SHARE = 0.4
"""A module with a larger share of its characters in table rows is data, not prose or code."""
MIN_CHARS = 400
"""Shorter documents (mostly empty __init__.py files) teach nothing."""
MAX_HELD_OUT_CHARS = 100_000
"""Longer documents always go to the training set: one giant would be half the held-out text."""

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
"""pydoc_data holds the topics, which are documents of their own."""
EXCLUDED_MODULES = re.compile(r"_sysconfig|sitecustomize|usercustomize|config-\d")
"""Files that hold this machine's paths and build flags."""
TEST_EXTENSIONS = re.compile(r"_?xx|_test|_ctypes_test")
"""C modules that exist to test the interpreter."""
TABLE_ROW = re.compile(
    r"""\s*[\[({]*\s*(?:[burf]{0,2}['"]|[-+]?\d|None\b)[^=]*(?:[,\])}]\s*(?:\#.*)?|\#.*)$""",
    re.IGNORECASE,
)
"""A line such as `'\\x41'  # LATIN ...`, `0x8a: 0x00e8,` or `("pattern", "text", SUCCEED),`."""


@dataclass(frozen=True)
class Document:
    """One text and the name it is sampled by."""

    source: str
    text: str


def normalise(text: str) -> str:
    """Collapse white space, so that re-indented or re-wrapped copies compare equal."""
    return " ".join(text.split())


def unit_hash(*parts: object) -> float:
    """A reproducible number in [0, 1) that depends on nothing but `parts`."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ---- documents ----------------------------------------------------------------------------------


def is_test(relative: Path) -> bool:
    """Whether a library file belongs to the standard library's own tests."""
    return any(part in {"tests", "idle_test"} or part.startswith("test") for part in relative.parts)


def is_table(text: str) -> bool:
    """Whether most of a module is rows of constants rather than code."""
    rows = sum(len(line) for line in text.splitlines() if TABLE_ROW.match(line))
    return rows > MAX_TABLE_SHARE * len(text)


def read_module(path: Path) -> str:
    """The source in its declared encoding; empty if it is undecodable (on purpose) or a table."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
    return "" if is_table(text) else text


def stdlib_paths(root: Path) -> list[Path]:
    """The .py files below `root` worth reading, relative to it, in a fixed order."""
    if not root.is_dir():
        raise ValueError(f"the standard library's sources are not at {root}")
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path
        for path in paths
        if not EXCLUDED_FOLDERS & set(path.parts)
        and not any(EXCLUDED_MODULES.match(part) for part in path.parts)
        and not (is_test(path) and any(part.endswith("data") for part in path.parts))
    )


def c_module_names() -> list[str]:
    """The standard library's modules without Python source, builtins first."""
    names = []
    for name in sorted(sys.stdlib_module_names - {"builtins"}):
        spec = importlib.util.find_spec(name)
        suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
        is_c = spec is not None and (spec.origin or "").endswith(("built-in", *suffixes))
        if is_c and not TEST_EXTENSIONS.match(name):
            names.append(name)
    return ["builtins", *names]


def signature_of(member: object) -> str:
    """The call signature as C code declares it, empty where it does not.

    Not inspect.signature, which evaluates the defaults and so depends on the machine.
    """
    declared = getattr(member, "__text_signature__", None) or ""
    return re.sub(r"\$\w+(?:, /)?(?:, )?", "", declared)


def c_module_manual(name: str) -> str:
    """The documentation strings of a C module and its public functions, classes and methods."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(name)
    except ImportError:  # a system library is missing on this machine
        return ""

    def entries(owner: object, prefix: str, indent: str) -> Iterator[str]:
        for key, member in sorted(vars(owner).items()):
            described = inspect.isclass(member) or inspect.isroutine(member)
            if key.startswith("_") or not described or inspect.isfunction(member):
                continue
            # sys.excepthook and the like are there to be replaced, by a debugger for example.
            if key.endswith("hook"):
                continue
            # An exception re-exported from builtins is documented there.
            if inspect.isclass(member) and member.__module__ == "builtins" != name:
                continue
            if doc := inspect.getdoc(member):
                title = f"{indent}{prefix}{key}{signature_of(member)}"
                yield "\n".join([title, *(f"{indent}    {line}" for line in doc.splitlines())])
            if inspect.isclass(member):
                yield from entries(member, f"{key}.", indent + "    ")

    return "\n\n".join([f"Module {name}", inspect.getdoc(module) or "", *entries(module, "", "")])


def candidates(seed: int) -> Iterator[Document]:
    """Every document in sampling order, read only when asked for."""
    from pydoc_data.topics import topics  # type: ignore[import-not-found]

    root = Path(sysconfig.get_paths()["stdlib"])
    readers: dict[str, Callable[[], str]] = {}
    last = set()
    for path in stdlib_paths(root):
        source = f"library/{path.as_posix()}"
        readers[source] = lambda path=path: read_module(root / path)  # type: ignore[misc]
        if is_test(path):
            last.add(source)
    for name in c_module_names():
        readers[f"manual/{name}"] = lambda name=name: c_module_manual(name)  # type: ignore[misc]
    for name, text in topics.items():
        readers[f"topics/{name}"] = lambda text=text: text  # type: ignore[misc]
    for source in sorted(readers, key=lambda source: (source in last, unit_hash(seed, source))):
        yield Document(source, readers[source]())


# ---- duplicates and leakage ---------------------------------------------------------------------


def shingles(text: str) -> set[int]:
    """Hashes of every run of `SHINGLE_LINES` non-blank lines, indentation ignored."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    last = max(1, len(lines) - SHINGLE_LINES + 1)
    return {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(last)}


def without_duplicates(documents: Iterator[Document]) -> Iterator[Document]:
    """Drop short documents, exact copies and documents mostly made of runs already seen."""
    seen: set[int] = set()
    for document in documents:
        if len(normalise(document.text)) < MIN_CHARS:
            continue
        own = shingles(document.text)
        if len(own & seen) <= MAX_SHARED_SHINGLES * len(own):
            seen |= own
            yield document


def windows(text: str, stride: int) -> Iterator[str]:
    """Passages of `WINDOW_CHARS` characters, one every `stride` characters."""
    flat = normalise(text)
    return (flat[at : at + WINDOW_CHARS] for at in range(0, len(flat) - WINDOW_CHARS + 1, stride))


def shared_windows(train: list[Document], held_out: list[Document]) -> list[tuple[int, int]]:
    """For each held-out document: how many of its windows occur anywhere in train, of how many.

    Held-out windows are sampled; training windows are taken at every offset, so a shared
    passage of `WINDOW_CHARS + WINDOW_STRIDE` characters cannot be missed.
    """
    own = [list(windows(document.text, WINDOW_STRIDE)) for document in held_out]
    wanted = {window for listed in own for window in listed}
    found = {
        window for document in train for window in windows(document.text, 1) if window in wanted
    }
    return [(sum(window in found for window in listed), len(listed)) for listed in own]


# ---- the corpus ---------------------------------------------------------------------------------


def num_bytes(documents: list[Document]) -> int:
    """UTF-8 bytes of all texts."""
    return sum(len(document.text.encode()) for document in documents)


def build_corpus(
    max_bytes: int, valid_fraction: float, seed: int
) -> tuple[dict[str, list[Document]], dict[str, int | float | str]]:
    """Collect, deduplicate and split; `max_bytes` limits both splits together.

    Returns:
        The documents of train and valid, and what corpus.json records about them.

    Raises:
        ValueError: a split is empty.
    """
    train: list[Document] = []
    held_out: list[Document] = []
    total = 0
    for document in without_duplicates(candidates(seed)):
        total += len(document.text.encode())
        if total > max_bytes:
            break
        drawn = unit_hash(seed, "split", document.source) < valid_fraction
        is_held_out = drawn and len(document.text) <= MAX_HELD_OUT_CHARS
        (held_out if is_held_out else train).append(document)

    valid: list[Document] = []
    shared = sampled = 0
    for document, (hits, count) in zip(held_out, shared_windows(train, held_out), strict=True):
        if hits <= MAX_SHARED_WINDOWS * count:
            valid.append(document)
            shared, sampled = shared + hits, sampled + count
    if not train or not valid:
        raise ValueError(
            f"{len(train)} training and {len(valid)} held-out documents: "
            "raise --max-megabytes or change --valid-fraction"
        )
    return {"train": train, "valid": valid}, {
        "train_documents": len(train),
        "train_bytes": num_bytes(train),
        "valid_documents": len(valid),
        "valid_bytes": num_bytes(valid),
        "valid_documents_dropped_for_overlap": len(held_out) - len(valid),
        "valid_windows_in_train_share": shared / max(1, sampled),
        "window_chars": WINDOW_CHARS,
        "python_version": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> int:
    """Write train.jsonl, valid.jsonl and corpus.json, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    folder = "receives the .jsonl files"
    parser.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER", help=folder)
    for name, default, metavar, text in (
        ("--max-megabytes", 24.0, "MB", "train + valid, 10**6 B"),
        ("--valid-fraction", 0.05, "SHARE", "share of documents"),
        ("--seed", 1234, "N", "of the sampling and the split"),
    ):
        parser.add_argument(name, type=type(default), default=default, metavar=metavar, help=text)
    args = parser.parse_args(argv)
    try:
        if not 0 < args.valid_fraction < 1:
            raise ValueError(f"--valid-fraction {args.valid_fraction} is not between 0 and 1")
        splits, counts = build_corpus(int(args.max_megabytes * 1e6), args.valid_fraction, args.seed)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name, documents in splits.items():
            lines = (
                json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False)
                for document in documents
            )
            write_whole(args.output_dir / f"{name}.jsonl", "".join(line + "\n" for line in lines))
        write_whole(args.output_dir / "corpus.json", json.dumps(counts, indent=2) + "\n")
    except (OSError, ValueError) as error:
        say(one_line(error))
        return 2
    said = [
        f"{name} {len(documents)} documents, {num_bytes(documents) / 1e6:.2f} MB; "
        for name, documents in splits.items()
    ]
    print(
        f"corpus: {''.join(said)}{counts['valid_windows_in_train_share']:.3%} of the held-out "
        f"{WINDOW_CHARS}-character windows occur in train "
        f"({counts['valid_documents_dropped_for_overlap']} overlapping documents left out)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
