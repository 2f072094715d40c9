"""How fast tools/preprocess_data.py turns text into tokens, by tokenizer, engine and workers.

    python -m tools.benchmarks.preprocess_speed --megabytes 40 --workers 1 2 \\
        [--megatron-lm PATH/tools/preprocess_data.py]

The corpus is this Python's library and what is installed, one file a document; the tokenizers are
trained on a part of it. Each row is a run of the tool as a user starts it, net of the start-up: the
same run with one document, which this package's tool has done before with the tokenizer, so that it
has kept it. CPU seconds are those of all processes, so that they also mean something
on a machine that does other work, where the wall clock does not. Output of --megatron-lm, a copy
of Megatron-LM's tool, is compared byte for byte.
"""

import argparse
import filecmp
import itertools
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from tools.benchmarks.provenance import as_markdown, describe
from tools.benchmarks.real_text import REPOSITORY

TOOL = REPOSITORY / "tools" / "preprocess_data.py"
# How a text is cut into words, as it stands in their tokenizer.json.
EXPRESSIONS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    **{
        name: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for name, digits in (("llama3", "{1,3}"), ("qwen2", ""))
    },
}
TOKENIZERS = (*EXPRESSIONS, "llama2")
TRAINING_MEGABYTES = 2
NAME = "o_text_document"


def write_corpus(path: Path, megabytes: float) -> list[str]:
    """Write JSON lines, and return a sample to train tokenizers on."""
    sample: list[str] = []
    size = 0
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    with path.open("w") as stream:
        for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
            text = file.read_text(encoding="utf-8", errors="ignore")
            if size >= megabytes * 1e6:
                break
            size += len(text.encode())
            stream.write(json.dumps({"text": text}) + "\n")
            if size < TRAINING_MEGABYTES * 1e6:
                sample.append(text)
    return sample


def train_byte_level(folder: Path, sample: list[str], kind: str, vocab_size: int) -> list[str]:
    """Train a byte-level BPE with one of EXPRESSIONS, and return the tool's options."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    own = kind == "gpt2"  # its expression is the library's own
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    words = pre_tokenizers.Split(Regex(EXPRESSIONS[kind]), "isolated")
    tokenizer.pre_tokenizer = letters if own else pre_tokenizers.Sequence([words, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]


def train_sentencepiece(folder: Path, sample: list[str], vocab_size: int) -> list[str]:
    """Train a BPE in Llama 2's way: bytes for what is unknown, digits apart, white space kept and
    with tokens of its own."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(text.splitlines() for text in sample),
        model_prefix=str(folder),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{folder}.model"]


def environment(cache: Path) -> dict[str, str]:
    """Variables of a run that keeps its tokenizers in `cache`."""
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(REPOSITORY),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


def run(tool: Path, corpus: Path, output: Path, options: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    output.mkdir(exist_ok=True)
    command = [sys.executable, str(tool), "--input", str(corpus), *options]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [
            *command,
            "--output-prefix",
            str(output / "o"),
            "--append-eod",
            "--log-interval",
            "999999",
        ],
        check=True,
        capture_output=True,
        env=environment(output.parent / "cache"),
    )
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--megabytes", type=float, default=40, metavar="MB", help="of text (default: 40)")
    add(
        "--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of them to try"
    )
    add("--tokenizers", nargs="+", choices=TOKENIZERS, default=TOKENIZERS, help="kinds to try")
    add(
        "--vocab-size",
        type=int,
        default=4096,
        metavar="N",
        help="of the trained ones (default: 4096)",
    )
    add("--times", type=int, default=1, metavar="N", help="the corpus over and over (default: 1)")
    add("--megatron-lm", type=Path, metavar="FILE", help="its tools/preprocess_data.py, to compare")
    args = parser.parse_args()
    described = describe()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, one = folder / "corpus.jsonl", folder / "one.jsonl"
        sample = write_corpus(corpus, args.megabytes)
        corpus.write_text(corpus.read_text() * args.times)
        one.write_text(json.dumps({"text": sample[0][:1000]}) + "\n")
        megabytes = sum(len(json.loads(line)["text"].encode()) for line in corpus.open()) / 1e6
        tokenizers = {
            kind: train_byte_level(folder / kind, sample, kind, args.vocab_size)
            for kind in EXPRESSIONS
            if kind in args.tokenizers
        }
        if "llama2" in args.tokenizers:
            tokenizers["llama2"] = train_sentencepiece(folder / "llama2", sample, args.vocab_size)
        programs = {
            "gigatoken": (TOOL, ["--overwrite"]),
            "tokenizer": (TOOL, ["--overwrite", "--engine", "reference"]),
        }
        if args.megatron_lm:
            programs["Megatron-LM"] = (args.megatron_lm, [])
        print(as_markdown(described))
        print(
            f"\n{megabytes:.1f} MB of text, vocabularies of {args.vocab_size}. Net of start-up. "
            "All outputs of a tokenizer are the same bytes.\n\n"
            "| tokenizer | encoded by | workers | start-up, s (CPU s) | s (CPU s) | MB/s "
            "| MB a CPU s | tokens/s |\n|---|---|---|---|---|---|---|---|"
        )
        for tokenizer, options in tokenizers.items():
            first = None
            for workers, (program, (tool, more)) in itertools.product(
                args.workers, programs.items()
            ):
                output = folder / f"{tokenizer}_{program}"
                every = [*options, *more, "--workers", str(workers)]
                if tool == TOOL:
                    run(tool, one, output, every)
                start, start_cpu = run(tool, one, output, every)
                wall, cpu = run(tool, corpus, output, every)
                wall, cpu = wall - start, cpu - start_cpu
                size = (output / f"{NAME}.bin").stat().st_size
                tokens = size // np.dtype(np.uint16).itemsize
                for suffix in (".bin", ".idx"):
                    if first and not filecmp.cmp(
                        first / f"{NAME}{suffix}", output / f"{NAME}{suffix}", shallow=False
                    ):
                        raise SystemExit(f"{output} and {first}: {suffix} differ")
                first = first or output
                print(
                    f"| {tokenizer} | {program} | {workers} | {start:.1f} ({start_cpu:.1f}) "
                    f"| {wall:.1f} ({cpu:.1f}) | {megabytes / wall:.1f} | {megabytes / cpu:.1f} "
                    f"| {tokens / wall:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
