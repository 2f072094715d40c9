"""Turn text into the .bin and .idx files that Megatron trains on.

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

BPE tokenizers of Hugging Face (GPT-2's, Llama's, Qwen's) and SentencePiece's BPE (Llama 2's,
Mistral's) are encoded by gigatoken, where it is installed, many times as fast, once it has proven
equal to the tokenizer on a stress text and on the first documents; --verify goes on comparing
while it runs. The last line says what encoded. The first run with a tokenizer loads Megatron for
it, later ones start in a second or two (preprocess/kept_tokenizer.py).

The output appears when it is whole. An interrupted run leaves nothing; one that is killed outright
(SIGKILL) leaves a hidden folder `.{prefix}.*.tmp` beside the output, to be deleted by hand. With
--resume either leaves `.{prefix}.resume`, from which the same line goes on.

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
from typing import Any

from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.commands.preprocess.corpus import Batch, find_files, read_batches
from megatron_scmoe.commands.preprocess.dataset_writer import OutputFolder, optimal_dtype
from megatron_scmoe.commands.preprocess.encoding import Encoder
from megatron_scmoe.commands.preprocess.gigatoken_bpe import find_engine
from megatron_scmoe.commands.preprocess.host_tokenizer import (
    SENTENCEPIECE_TYPES,
    add_tokenizer_arguments,
    check_tokenizer_arguments,
    find_eod,
    fingerprint,
    load_tokenizer,
)
from megatron_scmoe.commands.preprocess.interrupt import Interrupted, InterruptGuard
from megatron_scmoe.commands.preprocess.job import PreprocessJob
from megatron_scmoe.commands.preprocess.output_names import blend_names, output_names
from megatron_scmoe.commands.preprocess.proof import NotExactError, prove
from megatron_scmoe.commands.preprocess.sentences import check_nltk, load_splitter
from megatron_scmoe.commands.preprocess.terminal import Progress, say
from megatron_scmoe.commands.preprocess.work_folder import work_folder
from megatron_scmoe.commands.preprocess.worker_pool import WorkerDied, ordered_map
from megatron_scmoe.say import OneLineParser

SECONDS_BETWEEN_RECORDS = 10  # of --resume; what a run has done since is done again
SAMPLE_CHARS = 1 << 16  # of each document of the sample on which a fast engine is proven


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _weight(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
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
        description="Text to Megatron's .bin and .idx, byte for byte as Megatron-LM's tool.",
        epilog="Nothing appears under a final name before it is whole. "
        "Exit codes: 1 machine, 2 options or input, 130 and 143 stopped.",
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSON lines, plain, .gz, .zst or .xz, one object a line; .parquet, a document a row; "
        ".txt, plain or packed, one document each: files, directories (their *.jsonl, *.json and "
        "*.parquet), or globs; UTF-8",
    )
    group.add_argument(
        "--input-weights",
        nargs="+",
        type=_weight,
        metavar="WEIGHT",
        help="one for each of --input, whose datasets are then written apart, with a .blend file "
        "of weights and names for Megatron's --data-args-path",
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
    for option, text in (
        ("--append-eod", "end each document with the end-of-document id"),
        ("--split-sentences", "one sequence a sentence, through nltk"),
        ("--keep-newlines", "with --split-sentences: keep the white space after a sentence"),
    ):
        group.add_argument(option, action="store_true", help=text)
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
    group.add_argument(
        "--resume",
        action="store_true",
        help="keep what an interrupted run has done, and go on from what an earlier one has kept; "
        "the output is that of a run without interruption",
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
        help="auto: gigatoken encodes for the tokenizers that it reproduces exactly, the tokenizer "
        "itself the others, and the run says which; reference: always the tokenizer itself",
    )
    group.add_argument(
        "--verify",
        type=int,
        choices=range(1001),
        default=1,
        metavar="N",
        help="of 1000 documents that gigatoken has encoded, let the tokenizer encode N again, "
        "drawn at random among those below 16 MiB; a difference stops the run (default: 1)",
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
    if args.input_weights and len(args.input_weights) != len(args.input):
        raise DataError(
            f"--input-weights has {len(args.input_weights)} numbers for {len(args.input)} inputs: "
            "give one each"
        )
    folder = str(Path(args.output_prefix).absolute())
    if args.input_weights and folder.split() != [folder]:
        raise DataError(
            f"--input-weights: Megatron reads names from a file of words, so {folder} may have "
            "no white space: choose another --output-prefix"
        )
    check_tokenizer_arguments(args)
    return args


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
    names = [
        name + end for name in output_names(args).values() for end in (".bin", ".idx", ".json")
    ]
    for name in (*names, *blend_names(args).values()):
        path = folder / name
        if path.is_dir():
            raise DataError(f"{path} is a folder; choose another --output-prefix")
        if path.exists() and not args.overwrite:
            raise DataError(f"{path} exists; use --overwrite or another --output-prefix")


def preprocess(args: argparse.Namespace, guard: InterruptGuard) -> None:
    """Encode the input and publish the output; say on stderr what was done.

    Raises:
        DataError: the input is wrong.
        WorkerDied: a worker was killed.
        OSError: the disk failed.
    """
    prefix = Path(args.output_prefix)
    files = find_files(args.input)
    for file in files:
        if file.is_fifo():
            say(f"{file} is a pipe: it is waited for, and read until its writer closes it")
    tokenizer = load_tokenizer(args)
    encoder = Encoder(
        tokenizer,
        args.json_keys,
        optimal_dtype(tokenizer.vocab_size),
        eod=find_eod(tokenizer) if args.append_eod else None,
        split=load_splitter(args.lang, args.keep_newlines) if args.split_sentences else None,
        verify=args.verify,
    )
    with (
        work_folder(prefix, args.resume, _run(args, files)) as folder,
        OutputFolder(prefix, folder.path) as output,
        Progress(sum(file.stat().st_size for file in files), args.log_interval, sys.stderr) as bar,
    ):
        job = PreprocessJob(args, encoder, output, bar, folder.progress)
        lines = read_batches(files, args.json_keys, job.place)
        first = list(itertools.islice(lines, 1))
        slow_because = _choose_engine(args, encoder, first)
        if folder.progress:
            say(f"goes on behind document {bar.documents}")
        with closing(ordered_map(encoder, itertools.chain(first, lines), args.workers)) as batches:
            recorded = time.monotonic()
            for batch in batches:
                guard.check()
                job.add(batch)
                if args.resume and time.monotonic() - recorded >= SECONDS_BETWEEN_RECORDS:
                    folder.record(job.progress())
                    recorded = time.monotonic()
        job.finish()
        with guard.shielded():
            output.publish()
        by = f"by the tokenizer itself: {slow_because}" if slow_because else "by gigatoken"
        say(f"wrote {bar}{job.summary()}, encoded {by}")


def _run(args: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """What must be the same in a run that goes on with --resume: whatever decides a byte."""
    run = {
        f"--{name.replace('_', '-')}": getattr(args, name)
        for name in (
            *("json_keys", "input_weights", "append_eod", "split_sentences", "keep_newlines"),
            *("lang", "partitions", "keep_sequential_samples", "tokenizer_type"),
            *("tokenizer_model", "vocab_size", "special_tokens"),
        )
    }
    run["tokenizer"] = fingerprint(args)
    run["--input"] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return run


def _choose_engine(args: argparse.Namespace, encoder: Encoder, first: list[Batch]) -> str | None:
    """Give the encoder a fast engine if one is equal on the stress text and on the first batch;
    else say why not."""
    if args.engine == "reference":
        return "--engine reference"
    try:
        engine = find_engine(encoder.tokenizer)
        texts = [text[:SAMPLE_CHARS] for batch in first for text in encoder.texts(batch)]
        prove(engine, encoder.tokenizer.tokenize, texts)
    except NotExactError as error:
        if args.tokenizer_type in ("HuggingFaceTokenizer", *SENTENCEPIECE_TYPES):
            say(f"encoding is many times slower than with gigatoken: {error}")
        return str(error)
    encoder.engine = engine
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    left = "nothing was written"
    try:
        with InterruptGuard() as guard:
            args = parse_arguments(argv)
            if args.resume:
                left += "; the same line goes on from what was kept"
            check_output(args)
            preprocess(args, guard)
        return 0
    except DataError as error:
        say(f"error: {error}")
        return 2
    except (WorkerDied, OSError) as error:
        say(f"error: {error}; {left}")
        return 1
    except MemoryError:
        say(f"error: out of memory; use fewer --workers; {left}")
        return 1
    except Interrupted as interrupted:
        say(f"stopped by {interrupted}; {left}")
        return 128 + interrupted.signum


if __name__ == "__main__":
    sys.exit(main())
