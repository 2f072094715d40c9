"""Train a byte-level BPE tokenizer on a .jsonl file and save it for Megatron, offline.

Every byte is in the vocabulary, so any text round-trips exactly and there is no unknown token.
The folder holds the two files that `--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR`
reads; the end-of-document token is `<|endoftext|>`, id 0. `<|padding|>`, id 1, never occurs in
documents: Megatron's GPTDataset takes a tokenizer without a padding id at its word and would
pad with None (megatron/core/datasets/megatron_dataset.py:75, 0.19.2).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_scmoe.say import one_line, say
from megatron_scmoe.words import write_whole

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MIN_VOCAB_SIZE = 256 + 2
"""The 256 bytes and the two tokens above."""


def read_texts(path: Path) -> Iterator[str]:
    """The "text" of each line; raises ValueError naming the line that has none."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}:{number}: not a JSON object with a "text" string')
            yield text


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries, the the two special tokens included."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"--vocab-size {vocab_size} is below {MIN_VOCAB_SIZE}, one per byte + 2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output_dir: Path) -> None:
    """Write tokenizer.json and the few lines of configuration that transformers asks for."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        # Decoding must give back the text, not tidy its punctuation.
        "clean_up_tokenization_spaces": False,
        # Documents are packed into sequences later: no limit, and no warning, here.
        "model_max_length": 10**30,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(output_dir / name, content + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="FILE", help='.jsonl with a "text" per line')
    folder = "Megatron --tokenizer-model"
    add("--output-dir", type=Path, required=True, metavar="FOLDER", help=folder)
    entries = "entries, special tokens included"
    add("--vocab-size", type=int, default=4096, metavar="N", help=entries)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        tokenizer = train_tokenizer(read_texts(args.input), args.vocab_size)
        save_tokenizer(tokenizer, args.output_dir)
    except (OSError, ValueError) as error:
        say(one_line(error))
        return 2
    size = tokenizer.get_vocab_size()
    shortfall = "" if size == args.vocab_size else f" ({args.vocab_size} asked: too little text)"
    print(f"tokenizer: {size} entries{shortfall}, eod {END_OF_TEXT} = 0, in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
