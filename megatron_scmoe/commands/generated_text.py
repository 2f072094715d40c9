"""From prompts to text: what tools/generate.py does once its options are read."""

import json
import sys
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stdout
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from megatron_scmoe import say
from megatron_scmoe.arguments import add_scmoe_args, parse
from megatron_scmoe.checks import generation
from megatron_scmoe.checks.refusal import refuse
from megatron_scmoe.commands.generation_options import ASKED, add_generation_args
from megatron_scmoe.commands.preprocess.kept_tokenizer import end_of_document
from megatron_scmoe.inference.generation import Continuation, Limits, Speed, generate
from megatron_scmoe.inference.kept import DynamicKept, Keeps, StaticKept
from megatron_scmoe.inference.model import begin, join_and_load, prepare_generation
from megatron_scmoe.inference.offload import fetch_line, offload_of, plan_offload
from megatron_scmoe.inference.sampling import Sampling
from megatron_scmoe.run.checkpoint.errors import CheckpointError
from megatron_scmoe.run.watch import watched_ranks

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def add_options(parser: ArgumentParser) -> ArgumentParser:
    """Those of the entry script, and what is to be written."""
    add_scmoe_args(parser)
    add_generation_args(parser)
    return parser


def write_text() -> int:
    """Generate what the command line asks for, and return the exit code."""
    begin()
    with say.user_errors():
        args = parse(add_options)
        refuse(ASKED + generation.TYPED, args)
        texts = read_prompts(args) if args.rank == 0 else []
        with redirect_stdout(StringIO()):
            config, tokenizer = prepare_generation(
                args, offloads=args.scmoe_offload_experts != "none"
            )
        prompts = [tokens_of(tokenizer, text) for text in texts]
        longest = max(map(len, prompts), default=0)
        refuse(generation.ADOPTED, args, longest)
        plan = plan_offload(args, config, longest + args.max_new_tokens)
        config.scmoe.scmoe_offload = offload_of(plan)
        if plan is not None and args.rank == 0:
            print(plan.line(), file=sys.stderr)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    with watched_ranks(timeout, (CheckpointError,)) as store:
        model = join_and_load(config, store)
        everywhere = [prompts]
        torch.distributed.broadcast_object_list(everywhere)
        writer = TextWriter(args, tokenizer, texts)
        found, speed = generate(
            model,
            everywhere[0],
            Sampling(args.greedy, args.temperature, args.top_k, args.top_p, args.seed),
            Limits(args.max_new_tokens, tokenizer.vocab_size, end_of_document(tokenizer)),
            args.inference_max_requests,
            writer.take,
            keeps_of(args),
        )
        if args.rank == 0:
            writer.finish(found)
            print(speed_line(speed), file=sys.stderr)
            if plan is not None:
                print(fetch_line(model, plan), file=sys.stderr)
    torch.distributed.destroy_process_group()
    return 0


def keeps_of(args: Namespace) -> Keeps:
    """Which of the host's contexts holds keys and values."""
    if not args.inference_dynamic_batching:
        return StaticKept
    return partial(
        DynamicKept,
        buffer_gb=args.inference_dynamic_batching_buffer_size_gb,
        block_size=args.inference_dynamic_batching_block_size,
    )


def read_prompts(args: Namespace) -> list[str]:
    """The prompts of the command line, of a file, or of standard input.

    Raises:
        ValueError: there are none, or the file cannot be read.
    """
    if args.prompt is not None:
        return args.prompt
    name = args.prompt_file or "-"
    source = "Standard input" if name == "-" else f"--prompt-file {name}"
    if args.prompt_file is None and sys.stdin.isatty():
        raise ValueError("A prompt is missing: add --prompt, or --prompt-file.")
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = content.decode().splitlines()
    except OSError as error:
        raise ValueError(f"{source}: {say.one_line(error)}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 (byte {error.start}).") from error
    if not lines:
        raise ValueError(f"{source} is empty: write a prompt a line.")
    if name.endswith(".jsonl"):
        return [_prompt_of(line, f"{name}, line {n}") for n, line in enumerate(lines, 1)]
    return lines


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{where}: write {{"prompt": TEXT}}.') from error
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: the prompt is a {type(prompt).__name__} and no text.")
    return prompt


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt; of an empty one that which ends a document: a new one begins.

    Raises:
        ValueError: the tokenizer cannot read it.
    """
    try:
        tokens = list(tokenizer.tokenize(text)) if text else []
    except ValueError as error:
        raise ValueError(
            f"The tokenizer cannot read the prompt {text!r:.60}: {say.one_line(error)}."
        ) from error
    end = end_of_document(tokenizer)
    if not tokens and end is not None:
        tokens = [end]
    if not tokens:
        raise ValueError("A prompt is empty, and the tokenizer has no token that ends a document.")
    if wrong := [token for token in tokens if not 0 <= token < tokenizer.vocab_size]:
        raise ValueError(
            f"The prompt {text!r:.60} has token {wrong[0]}, the tokenizer {tokenizer.vocab_size}."
        )
    return tokens


class TextWriter:
    """What is generated on its way to standard output, on the first rank.

    One prompt is written token by token, several when all are there.
    """

    def __init__(self, args: Namespace, tokenizer: Any, prompts: list[str]) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._as_json = args.json
        self._streams = len(prompts) == 1 and not args.json
        self._tokens: list[int] = []
        self._written = ""
        if self._streams:
            print(prompts[0], end="", flush=True)

    def take(self, number: int, token: int) -> None:
        """The next token of a prompt."""
        if not self._streams:
            return
        self._tokens.append(token)
        text = self._tokenizer.detokenize(self._tokens)
        if text.endswith(REPLACEMENT):
            return  # a character whose other bytes are still to come
        print(text[len(self._written) :], end="", flush=True)
        self._written = text

    def finish(self, found: list[Continuation]) -> None:
        """All there is, once it is there."""
        texts = [self._tokenizer.detokenize(each.tokens) for each in found]
        if self._streams:
            return print(texts[0][len(self._written) :], flush=True)
        for number, (prompt, text) in enumerate(zip(self._prompts, texts, strict=True)):
            if self._as_json:
                print(json.dumps({"prompt": prompt, "text": text} | vars(found[number])))
            else:
                print(f"--- {number + 1}\n{prompt}{text}")


def speed_line(speed: Speed) -> str:
    """Tokens/s of both phases, over all ranks."""
    phases = (
        ("prefill", speed.prefill_tokens, speed.prefill_seconds),
        ("decode", speed.decode_tokens, speed.decode_seconds),
    )
    return "; ".join(
        f"{name} {tokens} tokens, {tokens / seconds if seconds else 0:,.1f} tokens/s"
        for name, tokens, seconds in phases
    )
