"""Turn JSON lines into the .bin and .idx files that Megatron trains on.

    python tools/preprocess_data.py --input corpus.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/tokenizer --append-eod

For each key of --json-keys (default: text) this writes, beside each other,

    {prefix}_{key}_document.bin    token ids (`_sentence` instead with --split-sentences)
    {prefix}_{key}_document.idx    lengths and positions; --data-path wants the name without suffix
    {prefix}_{key}_document.json   manifest: tokenizer, counts, sizes, sha256; Megatron ignores it

Option names, file names and, with the same tokenizer, every byte of .bin and .idx are those of
Megatron-LM's tools/preprocess_data.py. Different on purpose:

* --workers defaults to every core, and changes nothing in the output.
* --partitions N writes documents in the order in which Megatron-LM's N partitions come out: those
  numbered 0, N, 2N, ..., then 1, N+1, ...; with --keep-sequential-samples in input order. Here all
  partitions are encoded at the same time by the one pool of --workers processes, so N need not
  divide --workers, makes nothing faster, and leaves no partition files behind.
* --split-sentences does in one run what takes Megatron-LM two, and downloads nothing.
* Several input files are read in the order given, those of a directory or glob by name.
* Blank lines are skipped. An unpaired surrogate escape, which stops Megatron-LM, becomes U+FFFD.
* A text must be a string; Megatron-LM's lists of sentences are refused.

Byte-level BPE tokenizers of Hugging Face (GPT-2's, Llama 3's, Qwen2's words) and SentencePiece's
BPE (Llama 2's, Mistral's) are encoded by tiktoken, several times as fast, once it has proven equal
to the tokenizer on a stress text and on the first documents; --verify goes on comparing while it
runs. The last line says what encoded. The first run with a tokenizer loads Megatron for it, later
ones start in a second or two (preprocess/kept_tokenizer.py).

The output appears when it is whole. An interrupted run leaves nothing; one that is killed outright
(SIGKILL) leaves a hidden folder `.{prefix}.*.tmp` beside the output, to be deleted by hand.

Exit codes: 0 done; 1 the machine failed (disk full, worker killed); 2 options or input are wrong;
130 and 143 stopped by SIGINT and SIGTERM.
"""

import argparse
import itertools
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import IO

from megatron_scmoe import __version__
from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.commands.preprocess.encoding import Encoder
from megatron_scmoe.commands.preprocess.engines import find_engine
from megatron_scmoe.commands.preprocess.host_tokenizer import (
    add_tokenizer_arguments,
    check_tokenizer_arguments,
    find_eod,
    fingerprint,
    load_tokenizer,
)
from megatron_scmoe.commands.preprocess.interrupt import Interrupted, InterruptGuard
from megatron_scmoe.commands.preprocess.json_lines import Batch, find_files, read_batches
from megatron_scmoe.commands.preprocess.proof import NotExactError, prove
from megatron_scmoe.commands.preprocess.sentences import check_nltk, load_splitter
from megatron_scmoe.commands.preprocess.work_folder import work_folder
from megatron_scmoe.commands.preprocess.worker_pool import WorkerDied, ordered_map
from megatron_scmoe.say import OneLineParser

SKIPPED_SHOWN = 10
SAMPLE_CHARS = 1 << 16  # of each document of the sample on which a fast engine is proven


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, importing nothing large.

    Raises:
        DataError: they cannot work.
    """
    parser = OneLineParser(
        DataError,
        description="JSON lines to Megatron's .bin and .idx, byte for byte as Megatron-LM's tool.",
        epilog="Nothing appears under a final name before it is whole. "
        "Exit codes: 1 machine, 2 options or input, 130 and 143 stopped.",
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSON lines, plain, .gz, .zst or .xz: files, directories (their *.jsonl and *.json, "
        "plain or packed), or globs; UTF-8, one object a line",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="values of a line to encode, each into files of its own (default: text)",
    )
    group.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="a line that is not a document stops the run (default), or is left out and reported",
    )
    add_tokenizer_arguments(parser)
    group = parser.add_argument_group("documents")
    group.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document id"
    )
    group.add_argument(
        "--split-sentences", action="store_true", help="one sequence a sentence, through nltk"
    )
    group.add_argument(
        "--keep-newlines",
        action="store_true",
        help="with --split-sentences: keep the white space after a sentence",
    )
    group.add_argument(
        "--lang",
        default="english",
        metavar="LANGUAGE",
        help="of --split-sentences (default: english)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-prefix",
        required=True,
        metavar="PATH",
        help="path without suffix; its folder is created if missing",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace existing output; without it a run refuses to start if there is any",
    )
    group = parser.add_argument_group("running")
    group.add_argument(
        "--workers",
        type=_count,
        default=_cores(),
        metavar="N",
        help="encoding processes (default: every core, %(default)s here); the output does not "
        "depend on it",
    )
    group.add_argument(
        "--partitions",
        type=_count,
        default=1,
        metavar="N",
        help="order documents as Megatron-LM's N partitions do (0, N, 2N, ..., 1, N+1, ...); "
        "independent of --workers, which serve all partitions at once",
    )
    group.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="with --partitions: keep the order of the input",
    )
    group.add_argument(
        "--engine",
        choices=("auto", "reference"),
        default="auto",
        help="auto: tiktoken encodes for the tokenizers that it reproduces exactly, the tokenizer "
        "itself the others, and the run says which; reference: always the tokenizer itself",
    )
    group.add_argument(
        "--verify",
        type=int,
        choices=range(1001),
        default=1,
        metavar="N",
        help="of 1000 documents that tiktoken has encoded, let the tokenizer encode N again, drawn "
        "at random; a difference stops the run (default: 1)",
    )
    group.add_argument(
        "--log-interval",
        type=_count,
        default=1000,
        metavar="N",
        help="documents between progress reports where stderr is not a terminal (default: 1000)",
    )
    args = parser.parse_args(argv)
    if args.keep_newlines and not args.split_sentences:
        raise DataError("--keep-newlines needs --split-sentences")
    if args.split_sentences:
        check_nltk()
    for key in args.json_keys:
        if "/" in key or "\0" in key or not key:
            raise DataError(f"--json-keys {key!r}: cannot be part of a file name")
        if args.json_keys.count(key) > 1:
            raise DataError(f"--json-keys names {key!r} twice")
    check_tokenizer_arguments(args)
    return args


def output_names(args: argparse.Namespace) -> dict[str, str]:
    """For each key the name of its files, without suffix and folder."""
    level = "sentence" if args.split_sentences else "document"
    return {key: f"{Path(args.output_prefix).name}_{key}_{level}" for key in args.json_keys}


def check_output(args: argparse.Namespace) -> None:
    """Look whether the output can be written.

    Raises:
        DataError: it cannot or, without --overwrite, it exists.
    """
    if not args.output_prefix:
        raise DataError("--output-prefix '' is empty: give the beginning of a file name")
    if os.path.isdir(args.output_prefix) or args.output_prefix.endswith(("/", ".")):
        raise DataError(
            f"--output-prefix {args.output_prefix}: is a folder; add the beginning of a file name"
        )
    folder = Path(args.output_prefix).parent
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    if not existing.is_dir():
        raise DataError(f"--output-prefix {args.output_prefix}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DataError(f"--output-prefix {args.output_prefix}: {existing} is not writable")
    for name in output_names(args).values():
        for suffix in (".bin", ".idx", ".json"):
            path = folder / (name + suffix)
            if path.is_dir():
                raise DataError(f"{path} is a folder; choose another --output-prefix")
            if path.exists() and not args.overwrite:
                raise DataError(f"{path} exists; use --overwrite or another --output-prefix")


class Progress:
    """Documents, documents/s and MB/s of JSON: a bar on a terminal, else a line now and then."""

    def __init__(self, disk_bytes: int, log_interval: int, stream: IO[str]) -> None:
        from tqdm import tqdm

        self._start = time.monotonic()
        self._log_interval = self._next_log = log_interval
        self._stream = stream
        self.documents = self.text_bytes = 0
        tqdm.monitor_interval = 0  # no thread in a process that forks
        self._bar = tqdm(
            total=disk_bytes or None,
            unit="B",
            unit_scale=True,
            disable=not stream.isatty(),
            file=stream,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def add(self, documents: int, text_bytes: int, disk_bytes: int) -> None:
        self.documents += documents
        self.text_bytes += text_bytes
        self._bar.set_postfix_str(str(self), refresh=False)
        self._bar.update(disk_bytes)
        if self._bar.disable and self.documents >= self._next_log:
            print(f"Processed {self}", file=self._stream, flush=True)
            self._next_log = (self.documents // self._log_interval + 1) * self._log_interval

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return (
            f"{self.documents} documents ({self.documents / seconds:.1f} docs/s, "
            f"{self.text_bytes / seconds / 1e6:.2f} MB/s)"
        )


def preprocess(args: argparse.Namespace, files: list[Path], guard: InterruptGuard) -> None:
    """Encode `files` and publish the output; say on stderr what was done.

    Raises:
        DataError: the input is wrong.
        WorkerDied: a worker was killed.
        OSError: the disk failed.
    """
    from megatron_scmoe.commands.preprocess.dataset_writer import OutputFolder, optimal_dtype

    for file in files:
        if file.is_fifo():
            _say(f"{file} is a pipe: it is waited for, and read until its writer closes it")
    tokenizer = load_tokenizer(args)
    batches_of_lines = read_batches(files)
    encoder = Encoder(
        tokenizer,
        args.json_keys,
        optimal_dtype(tokenizer.vocab_size),
        eod=find_eod(tokenizer) if args.append_eod else None,
        split=load_splitter(args.lang, args.keep_newlines) if args.split_sentences else None,
        verify=args.verify,
    )
    first = list(itertools.islice(batches_of_lines, 1))
    slow_because = _choose_engine(args, encoder, first)
    partitions = 1 if args.keep_sequential_samples else args.partitions
    bad_lines = repaired = 0
    with (
        work_folder(Path(args.output_prefix)) as folder,
        OutputFolder(Path(args.output_prefix), folder) as output,
        closing(
            ordered_map(encoder, itertools.chain(first, batches_of_lines), args.workers)
        ) as batches,
        Progress(sum(file.stat().st_size for file in files), args.log_interval, sys.stderr) as bar,
    ):
        writers = {
            key: output.create(name, encoder.dtype, partitions)
            for key, name in output_names(args).items()
        }
        for batch in batches:
            guard.check()
            for bad in batch.bad_lines:
                if args.on_error == "fail":
                    raise DataError(f"{bad} (--on-error skip leaves such lines out)")
                bad_lines += 1
                if bad_lines <= SKIPPED_SHOWN:
                    _say(f"skipped {bad}")
            for key, writer in writers.items():
                writer.add(batch.tokens[key], batch.lengths[key], batch.sequences[key])
            repaired += batch.repaired
            bar.add(batch.documents, batch.text_bytes, batch.disk_bytes)

        if bad_lines:
            _say(f"skipped {bad_lines} lines in all")
        if repaired:
            _say(f"replaced {repaired} unpaired surrogates by U+FFFD")
        if not bar.documents:
            raise DataError(f"no documents in --input {' '.join(args.input)}: nothing to write")
        for key, writer in writers.items():
            if not writer.tokens:
                raise DataError(f"every {key!r} is empty: nothing to write")
            writer.finish(_description(args, key, tokenizer.vocab_size, bad_lines, repaired))
        with guard.shielded():
            output.publish()
        total = ", ".join(f"{writer.tokens} tokens of {key}" for key, writer in writers.items())
        empty = ", ".join(
            f"{writer.empty_documents} with empty {key}"
            for key, writer in writers.items()
            if writer.empty_documents
        )
    by = f"by the tokenizer itself: {slow_because}" if slow_because else "by tiktoken"
    _say(f"wrote {bar}{', ' + empty if empty else ''}: {total}, encoded {by}")


def _choose_engine(args: argparse.Namespace, encoder: Encoder, first: list[Batch]) -> str | None:
    """Gives the encoder a fast engine if one is equal on the stress text and on the first batch;
    else says why not."""
    if args.engine == "reference":
        return "--engine reference"
    try:
        engine = find_engine(encoder.tokenizer)
        texts = [text[:SAMPLE_CHARS] for batch in first for text in encoder.texts(batch)]
        prove(engine, encoder.tokenizer.tokenize, texts)
    except NotExactError as error:
        if args.tokenizer_type == "HuggingFaceTokenizer":
            _say(f"encoding is several times slower than with tiktoken: {error}")
        return str(error)
    encoder.engine = engine
    return None


def _description(
    args: argparse.Namespace, key: str, vocab_size: int, skipped: int, repaired: int
) -> dict[str, object]:
    """What the manifest says beside the counts; the same for any number of workers."""
    return {
        "format": 1,
        "megatron_scmoe": __version__,
        "key": key,
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_model": args.tokenizer_model,
        "tokenizer_sha256": fingerprint(args),
        "vocab_size": vocab_size,
        "append_eod": args.append_eod,
        "split_sentences": args.split_sentences,
        "skipped_lines": skipped,
        "replaced_surrogates": repaired,
    }


def _say(message: str) -> None:
    """One line on stderr, whatever the message holds (a terminal's bar is wiped first)."""
    line = " ".join(message.split())
    if len(line) > 500:
        line = line[:500] + "..."
    wipe = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{wipe}{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    try:
        with InterruptGuard() as guard:
            args = parse_arguments(argv)
            check_output(args)
            preprocess(args, find_files(args.input), guard)
        return 0
    except DataError as error:
        _say(f"error: {error}")
        return 2
    except WorkerDied as error:
        _say(f"error: {error}; nothing was written")
        return 1
    except OSError as error:
        _say(f"error: {error}; nothing was written")
        return 1
    except MemoryError:
        _say("error: out of memory; use fewer --workers; nothing was written")
        return 1
    except Interrupted as interrupted:
        _say(f"stopped by {interrupted}; nothing was written")
        return 128 + interrupted.signum


if __name__ == "__main__":
    sys.exit(main())
