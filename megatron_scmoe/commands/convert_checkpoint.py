"""A checkpoint to Hugging Face and back, without a GPU and without building the model.

    python tools/convert_checkpoint.py export --load CHECKPOINTS --output DIR
    python tools/convert_checkpoint.py import --input DIR --save CHECKPOINTS
    python tools/convert_checkpoint.py upcycle --input DENSE_DIR --save CHECKPOINTS
    python tools/convert_checkpoint.py verify --load CHECKPOINTS --input DIR
    python tools/convert_checkpoint.py inspect CHECKPOINTS_OR_DIR

What the model is says the checkpoint's record or the directory's config.json, never an option.
An export ends with the logits of both models on a paragraph of text. `verify` takes Megatron's
options too, such as a layout for its --ranks.
Exit codes: 0 done; 1 both models differ; 2 something is wrong, in one line, and nothing is left
behind. docs/huggingface.md has the names of all tensors.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_scmoe import say
from megatron_scmoe.huggingface.export import DTYPES, export
from megatron_scmoe.huggingface.inspect import inspect
from megatron_scmoe.huggingface.load import load
from megatron_scmoe.huggingface.safetensors_files import SHARD_BYTES
from megatron_scmoe.huggingface.upcycle import Upcycling, upcycle
from megatron_scmoe.huggingface.verify import compare_logits, compare_tensors, why_not


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it is Megatron's.

    Raises:
        ValueError: it cannot be read.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    to = verbs.add_parser("export", help="Write a checkpoint as a Hugging Face directory.")
    back = verbs.add_parser("import", help="Write such a directory as a checkpoint.")
    more = verbs.add_parser("upcycle", help="Start a ScMoE model from a dense Llama directory.")
    same = verbs.add_parser("verify", help="Compare a checkpoint with a directory.")
    look = verbs.add_parser("inspect", help="Say what a checkpoint or a directory is.")
    for verb in (to, same):
        verb.add_argument(
            "--load",
            type=Path,
            required=True,
            metavar="CHECKPOINTS",
            help="Folder of all iterations.",
        )
    for verb in (to, same, look):
        verb.add_argument(
            "--ckpt-step", type=int, metavar="N", help="Iteration; by default the newest."
        )
    for verb in (back, more, same):
        verb.add_argument(
            "--input", type=Path, required=True, metavar="DIR", help="Hugging Face directory."
        )
    to.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="New Hugging Face directory."
    )
    to.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="Where the record's is not on this machine."
    )
    to.add_argument(
        "--max-shard-gb",
        type=above_0(float),
        metavar="GB",
        default=SHARD_BYTES / 1e9,
        help="Largest file. Default: 5.",
    )
    to.add_argument(
        "--target",
        choices=("scmoe", "longcat_flash"),
        default="scmoe",
        help="Our modelling code beside the weights, or the model that serving programs have.",
    )
    to.add_argument(
        "--zero-expert-rows",
        action="store_true",
        help="Of longcat_flash: what transformers 5.23 wants for experts without weights.",
    )
    to.add_argument("--no-verify", action="store_true", help="Do not compare logits at the end.")
    same.add_argument(
        "--text", type=Path, metavar="FILE", help="For logits and perplexity; a paragraph without."
    )
    same.add_argument(
        "--ranks", type=above_0(int), default=1, metavar="N", help="Processes of Megatron's model."
    )
    for verb in (back, more):
        verb.add_argument(
            "--save",
            type=Path,
            required=True,
            metavar="CHECKPOINTS",
            help="New folder of checkpoints.",
        )
    more.add_argument(
        "--position", choices=("pos1", "pos2", "pos3"), default="pos2", help="Default: pos2."
    )
    for option, default, text in (
        ("--num-experts", 8, "Routed experts."),
        ("--topk", 1, "Of them, for each token."),
        ("--granularity", 1, "How many times smaller than the MLP an expert is."),
    ):
        more.add_argument(
            option,
            type=above_0(int),
            default=default,
            metavar="N",
            help=f"{text} Default: {default}.",
        )
    for verb in (to, back, more):
        verb.add_argument(
            "--dtype", choices=sorted(DTYPES), help="Of all but the router; by default as it is."
        )
    look.add_argument("path", type=Path, help="Folder of checkpoints, or Hugging Face directory.")
    look.add_argument("--tensors", action="store_true", help="Also every tensor by both names.")
    for each in (parser, to, back, more, same, look):
        say.one_line_usage_errors(each)
    args, others = parser.parse_known_args(argv)
    if others and args.verb != "verify":
        raise ValueError(f"{args.verb} has no option {others[0]}")
    return args, others


def above_0(kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type."""

    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return convert


def run_export(args: argparse.Namespace) -> int:
    """Export, and compare the logits if both models can be computed here."""
    export(
        args.load,
        args.output,
        args.ckpt_step,
        dtype=args.dtype,
        tokenizer_folder=args.tokenizer,
        shard_bytes=round(args.max_shard_gb * 1e9),
        target=args.target,
        zero_expert_rows=args.zero_expert_rows,
    )
    if args.no_verify:
        return 0
    reason = why_not(args.load, args.ckpt_step)
    if reason is not None:
        print(f"the logits were not compared: {reason}")
        return 0
    return run_logits(args.load, args.output, args.ckpt_step)


def run_logits(load: Path, folder: Path, step: int | None, **others: Any) -> int:
    """Print what both models say, and return the exit code, which bf16 does not decide."""
    found = compare_logits(load, folder, step, **others)
    print(found.text())
    print(compare_logits(load, folder, step, dtype="bf16", **others).text())
    if found.same or found.rounded:
        return 0
    say.say(f"{folder} is another model than {load}")
    return 1


def main(argv: list[str] | None = None) -> int:
    """Do what the verb says and return the exit code."""
    say.one_line_interrupts()
    with say.user_errors():
        args, others = parse_args(argv)
        if importlib.util.find_spec("safetensors") is None:
            raise ValueError("safetensors is not installed: pip install 'megatron-scmoe[hf]'")
        if args.verb == "export":
            return run_export(args)
        if args.verb == "import":
            load(args.input, args.save, args.dtype)
        elif args.verb == "upcycle":
            plan = Upcycling(args.position, args.num_experts, args.topk, args.granularity)
            upcycle(args.input, args.save, plan, args.dtype)
            if why_not(args.save) is None:
                return run_logits(args.save, args.input, None)
        elif args.verb == "inspect":
            print(inspect(args.path, args.ckpt_step, args.tensors))
        elif difference := compare_tensors(args.load, args.input, args.ckpt_step):
            say.say(difference)
            return 1
        else:
            more = {"text": args.text, "ranks": args.ranks, "options": others}
            return run_logits(args.load, args.input, args.ckpt_step, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
