"""What memory tools/preprocess_data.py takes, and how long one huge document holds it up.

    python -m tools.benchmarks.preprocess_memory --megabytes 2000 [--document-megabytes 500]

The corpus is that of preprocess_speed, again and again until it is large enough; a byte-level BPE
with GPT-2's words and a SentencePiece BPE encode it. Memory is that of the tool and its workers
together, each page that they share counted once (PSS), looked at five times a second: the most
until 10 %, 50 % and 100 % of the time had passed. With --document-megabytes there are two runs
more: that one document alone, and the corpus with it in the middle. It stalls the others for no
more than its own time if the second takes no longer than corpus and document one after the other.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.benchmarks.preprocess_speed import (
    TOOL,
    environment,
    train_byte_level,
    train_sentencepiece,
    write_corpus,
)
from tools.benchmarks.provenance import as_markdown, describe

ONCE_MEGABYTES = 250  # of different text
SHARES = (0.1, 0.5, 1.0)
TOKENIZERS = ("gpt2", "llama2")


def write_large(path: Path, once: Path, megabytes: float, document_megabytes: float = 0) -> None:
    """Repeat the lines of `once`; in the middle one line with as much text as is wanted."""
    lines = once.read_bytes().splitlines(keepends=True)
    size, waiting = 0, document_megabytes > 0
    with path.open("wb") as stream:
        for line in itertools.cycle(lines):
            if waiting and size >= megabytes * 1e6 / 2:
                texts = (json.loads(line)["text"] for line in itertools.cycle(lines))
                stream.write(b'{"text": "')
                written, waiting = 0, False
                while written < document_megabytes * 1e6:
                    written += stream.write(json.dumps(next(texts))[1:-1].encode())
                stream.write(b'"}\n')
            if size >= megabytes * 1e6:
                return
            size += stream.write(line)


def watch(command: list[str], cache: Path) -> tuple[float, list[float]]:
    """Seconds of a run, and the most memory of its processes until each of SHARES, in MB."""
    seen: list[tuple[float, float]] = []
    start = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(cache)) as process:
        while process.poll() is None:
            seen.append((time.monotonic() - start, _memory(process.pid)))
            time.sleep(0.2)
        seconds = time.monotonic() - start
        if process.returncode:
            raise SystemExit(process.stderr.read().decode() if process.stderr else "no output")
    return seconds, [max(mb for at, mb in seen if at <= share * seconds) for share in SHARES]


def _memory(parent: int) -> float:
    """Of a process and its children, in MB."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    total = 0
    with contextlib.suppress(OSError, IndexError):  # one of them has just ended
        for pid in (parent, *map(int, children.read_text().split())):
            pages = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[1]
            total += int(pages.split()[0])
    return total / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--megabytes", type=float, default=2000, metavar="MB", help="of JSON (default: 2000)")
    add("--document-megabytes", type=float, default=0, metavar="MB", help="of one document more")
    add("--tokenizers", nargs="+", choices=TOKENIZERS, default=TOKENIZERS, help="kinds to try")
    add("--workers", type=int, default=2, metavar="N", help="encoding processes (default: 2)")
    args = parser.parse_args()
    print(as_markdown(describe()))
    print("\n| tokenizer | corpus | s | MB at 10 % | at 50 % | at the end |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = write_corpus(folder / "once.jsonl", ONCE_MEGABYTES)
        tokenizers = {
            "gpt2": train_byte_level(folder / "gpt2", sample, "gpt2", 4096),
            "llama2": train_sentencepiece(folder / "llama2", sample, 4096),
        }
        sizes = [(0.1, 0.0), (args.megabytes, 0.0)]  # the first one keeps the tokenizer
        if args.document_megabytes:
            sizes += [(0.0, args.document_megabytes), (args.megabytes, args.document_megabytes)]
        corpus = folder / "corpus.jsonl"
        for megabytes, document_megabytes in sizes:
            write_large(corpus, folder / "once.jsonl", megabytes, document_megabytes)
            for tokenizer in args.tokenizers:
                options = tokenizers[tokenizer]
                command = [sys.executable, str(TOOL), "--input", str(corpus), *options]
                command += ["--output-prefix", str(folder / "o"), "--overwrite", "--append-eod"]
                command += ["--workers", str(args.workers), "--log-interval", "99999999"]
                seconds, most = watch(command, folder / "cache")
                what = [f"{megabytes:g} MB"] * (megabytes > 0)
                what += [f"a document of {document_megabytes:g} MB"] * (document_megabytes > 0)
                numbers = " | ".join(f"{number:.0f}" for number in (seconds, *most))
                print(f"| {tokenizer} | {' and '.join(what)} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
