"""Count which experts of a checkpoint are chosen together: the verb `profile` of tools/c2r.py.

    python tools/c2r.py profile --load CHECKPOINTS --text book.txt --output counts.json
    torchrun --nproc-per-node 2 tools/c2r.py profile --load CHECKPOINTS --data-path PREFIX \\
        --output counts.safetensors --expert-model-parallel-size 2

Model and tokenizer are those of the checkpoint's record. The text is --text, files of text, a
document each, or of .jsonl with `text` in every line; or --data-path, what the run was trained on.
Its tokens are cut into sequences of the checkpoint's length. No token is dropped. Takes Megatron's
options of the layout, whatever layout the checkpoint was trained at.

Exit codes: 0 written; 1 the checkpoint cannot be read, or a rank is lost; 2 the options are wrong.

Shapes: b samples, s tokens of a sequence
"""

import sys

from megatron_scmoe import say, start

with say.user_errors():
    start.replace_host_symbols()

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from datetime import timedelta
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_scmoe.arguments import add_scmoe_args, parse
from megatron_scmoe.c2r import collaboration
from megatron_scmoe.c2r.heat_map import heat_map
from megatron_scmoe.checks.refusal import refuse
from megatron_scmoe.commands.c2r import report
from megatron_scmoe.commands.profile_options import ASKED, add_profile_args
from megatron_scmoe.inference.model import begin, join_and_load, prepare_generation
from megatron_scmoe.inference.one_pass import forward
from megatron_scmoe.overlap.measure.chosen_together import Collector
from megatron_scmoe.run.checkpoint.errors import CheckpointError
from megatron_scmoe.run.watch import watched_ranks
from megatron_scmoe.words import write_whole

PASS_TOKENS = 4096


def add_options(parser: ArgumentParser) -> ArgumentParser:
    """Those of the entry script, and these; an `extra_args_provider` of the host."""
    add_scmoe_args(parser)
    add_profile_args(parser)
    return parser


def main() -> int:
    """Count, write, print the report, and return the exit code."""
    begin()
    with say.user_errors():
        args = parse(add_options)
        refuse(ASKED, args)
        with redirect_stdout(StringIO()):
            config, tokenizer = prepare_generation(args)
        samples = cut(tokens_of(args, tokenizer), args.seq_length, args.tokens)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    with watched_ranks(timeout, (CheckpointError, OSError)) as store:
        model = join_and_load(config, store)
        counts = count(model, samples)
        if counts is not None:
            counts.provenance = {
                "run": "profile",
                "checkpoint": str(Path(args.load).absolute()),
                "iteration": args.ckpt_step,
                "data": args.text or args.data_path,
                "tokens": samples.numel(),
                "version": version("megatron-scmoe"),
            }
            collaboration.write(Path(args.output), counts)
            if args.picture:
                write_whole(Path(args.picture), heat_map(counts))
            print(report(counts, None, None))
    torch.distributed.destroy_process_group()
    return 0


def tokens_of(args: Namespace, tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of one document after the other.

    Raises:
        ValueError: a file cannot be read.
    """
    if args.data_path is not None:
        for name in args.data_path:
            if Path(f"{name}.idx").exists():  # a blend has weights between its names
                dataset = IndexedDataset(name)
                yield from (dataset[number].tolist() for number in range(len(dataset)))
        return
    for name in args.text:
        try:
            content = Path(name).read_bytes().decode()
            documents = [content]
            if name.endswith(".jsonl"):
                documents = [json.loads(line)["text"] for line in content.splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {name} is no UTF-8 (byte {error.start}).") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'--text {name}: write {{"text": TEXT}} in every line.') from error
        yield from (list(tokenizer.tokenize(document)) for document in documents)


def cut(documents: Iterator[list[int]], length: int, most: int) -> torch.Tensor:
    """Sequences of the documents' tokens, one behind the other, [b, s].

    Raises:
        ValueError: there are too few tokens for one.
    """
    tokens: list[int] = []
    for document in documents:
        tokens += document
        if len(tokens) >= most:
            break
    length = min(length, most)
    number = min(len(tokens), most) // length
    if number == 0:
        raise ValueError(
            f"The text has {len(tokens)} tokens, too few for a sequence of {length}: add text, or "
            "shorten --seq-length."
        )
    return torch.tensor(tokens[: number * length]).view(number, length)


def count(model: torch.nn.Module, samples: torch.Tensor) -> collaboration.Collaboration | None:
    """The counts of all ranks, on the first one.

    Data parallel ranks share the samples. Ranks make as many passes as each other: one without
    samples of its own repeats some, and does not count.

    Args:
        samples: [b, s].
    """
    is_counted = False
    collector = Collector([model], lambda: is_counted)
    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    batch = max(1, PASS_TOKENS // samples.shape[1])
    speaks = mpu.get_tensor_model_parallel_rank() == 0  # the others see the same tokens
    for at in range(0, len(samples), ranks * batch):
        own = samples[at : at + ranks * batch][rank * batch :][:batch]
        is_counted = speaks and len(own) > 0
        forward(model, own if len(own) else samples[:1], last_only=True)
    return collector.gather()


if __name__ == "__main__":
    sys.exit(main())
