"""What is in Megatron's .bin and .idx files.

    python tools/inspect_data.py data/corpus_text_document [MORE ...] [--samples 3] [--checksum]
    python tools/inspect_data.py train_text_document --duplicates-of test_text_document

For each dataset, named without suffix as in --data-path: documents, sequences, tokens, type; how
long its sequences are; whether index, data and the manifest of tools/preprocess_data.py fit
together. --samples decodes documents, by the tokenizer that the manifest names or that the
tokenizer options do. --duplicates-of counts the documents that have the same ids as one of another
dataset, whose ends of documents must be marked in the same way.

Exit codes: 0 sound; 1 something does not fit together; 2 options or files are wrong.
"""

import argparse
import sys

import numpy as np

from megatron_scmoe import say
from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.commands.preprocess.dataset_reader import Dataset, digests
from megatron_scmoe.commands.preprocess.host_tokenizer import (
    TOKENIZER_TYPES,
    add_tokenizer_arguments,
    check_tokenizer_arguments,
    load_tokenizer,
)
from megatron_scmoe.words import percent, size, table

_BAR = 40  # characters of the longest
_SHOWN = 300  # characters of a sample
_SAMPLE_IDS = 400  # of a document that are decoded


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {number}")
    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        DataError: they cannot be read.
    """
    parser = say.OneLineParser(DataError, description="What is in Megatron's .bin and .idx files.")
    parser.add_argument("prefix", nargs="+", help="a dataset, without .bin and .idx")
    parser.add_argument(
        "--samples", type=_count, default=0, metavar="N", help="decode N documents of each"
    )
    parser.add_argument(
        "--checksum",
        action="store_true",
        help="read the data too: largest id and the manifest's sha256",
    )
    parser.add_argument(
        "--duplicates-of",
        metavar="PREFIX",
        help="count the documents that this dataset has too, and those that occur twice",
    )
    add_tokenizer_arguments(parser, required=False)
    return parser.parse_args(argv)


def describe(dataset: Dataset) -> str:
    """Counts, and a histogram of the lengths of sequences in powers of two."""
    lengths = dataset.lengths
    empty = int((np.diff(dataset.ends) == 0).sum())
    lines = [
        dataset.prefix,
        f"  {dataset.documents:,} documents ({empty:,} empty), {len(lengths):,} sequences, "
        f"{dataset.tokens:,} tokens, {dataset.dtype.name}, {size(dataset.bin_bytes)}",
    ]
    if len(lengths):
        lines.append(
            f"  tokens a sequence: {lengths.min():,} to {lengths.max():,}, median "
            f"{int(np.median(lengths)):,}, mean {lengths.mean(dtype=np.float64):,.1f}"
        )
        bits = np.frexp(np.maximum(lengths, 0).astype(np.float64))[1]
        counts = np.bincount(bits)
        rows = [
            (
                f"  {2 ** (bit - 1) if bit else 0:,} - {2**bit - 1:,}",
                f"{count:,}",
                "#" * round(_BAR * count / counts.max()),
            )
            for bit, count in enumerate(counts)
            if count
        ]
        lines.append(table(("  tokens", "sequences", ""), rows, words=(2,)))
    return "\n".join(lines)


def samples(dataset: Dataset, args: argparse.Namespace) -> str:
    """Some documents, evenly spread, as text.

    Raises:
        DataError: nothing names the tokenizer, or it does not decode a document.
    """
    tokenizer = load_tokenizer(_tokenizer_arguments(dataset, args))
    lines = []
    for number in sorted({i * dataset.documents // args.samples for i in range(args.samples)}):
        ids = dataset.document(number)
        try:
            text = tokenizer.detokenize(ids[:_SAMPLE_IDS].tolist())
        except Exception as error:  # each tokenizer library has its own; the cause is shown
            raise DataError(
                f"the tokenizer does not decode document {number} of {dataset.prefix}: "
                f"{type(error).__name__}: {error}"
            ) from error
        more = "..." if len(text) > _SHOWN or len(ids) > _SAMPLE_IDS else ""
        lines.append(f"  document {number:,}, {len(ids):,} tokens: {text[:_SHOWN]!r}{more}")
    return "\n".join(lines)


def _tokenizer_arguments(dataset: Dataset, args: argparse.Namespace) -> argparse.Namespace:
    """The options of the tokenizer, from the manifest where there are none.

    Raises:
        DataError: the manifest names no tokenizer.
    """
    options = argparse.Namespace(**vars(args), append_eod=False)
    if options.tokenizer_type is None:
        manifest = dataset.manifest() or {}
        kind, model = manifest.get("tokenizer_type"), manifest.get("tokenizer_model")
        if kind not in TOKENIZER_TYPES:
            raise DataError(
                f"--samples: {dataset.prefix}.json names no tokenizer; give --tokenizer-type and "
                "what it needs"
            )
        options.tokenizer_type = kind
        options.tokenizer_model = options.tokenizer_model or model
        if options.vocab_size is None and isinstance(manifest.get("vocab_size"), int):
            options.vocab_size = manifest["vocab_size"]
    check_tokenizer_arguments(options)
    return options


def duplicates(dataset: Dataset, other: Dataset) -> str:
    """How many documents the other dataset has too, and how many occur twice in this one."""
    own, others = digests(dataset), np.unique(digests(other))
    filled = np.diff(dataset.ends) > 0
    shared = np.isin(own, others) & filled
    ends = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])[dataset.ends]
    tokens = int(np.diff(ends)[shared].sum())
    again = int(filled.sum()) - len(np.unique(own[filled]))
    total = max(dataset.documents, 1)
    return (
        f"  {int(shared.sum()):,} documents ({percent(shared.sum() / total)}), {tokens:,} tokens, "
        f"are in {other.prefix} too\n"
        f"  {again:,} documents ({percent(again / total)}) repeat an earlier one"
    )


def main(argv: list[str] | None = None) -> int:
    """Print what is found and return the exit code."""
    say.one_line_interrupts()
    unsound = 0
    try:
        args = parse_arguments(argv)
        other = Dataset(args.duplicates_of) if args.duplicates_of else None
        if other and (fault := next(other.faults(False), None)):
            raise DataError(f"--duplicates-of {other.prefix}: {fault}")
        for prefix in args.prefix:
            dataset = Dataset(prefix)
            print(describe(dataset))
            faults = list(dataset.faults(args.checksum))
            for fault in faults:
                print(f"  UNSOUND: {fault}")
            unsound += bool(faults)
            if faults:
                continue
            manifest = "no manifest" if dataset.manifest() is None else "manifest"
            checked = ", every id and sha256" if args.checksum else ""
            print(f"  index, data and {manifest} fit together{checked}")
            if args.samples and dataset.documents:
                print(samples(dataset, args))
            if other:
                print(duplicates(dataset, other))
    except (DataError, OSError) as error:
        say.say(say.one_line(error))
        return 2
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main())
