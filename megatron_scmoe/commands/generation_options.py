"""What tools/generate.py adds to Megatron's command line, and what of it is wrong in itself.

Imports no torch, which takes seconds.
"""

import argparse
from argparse import ArgumentParser

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.inference.cache_size import cache_size


def add_generation_args(parser: ArgumentParser) -> None:
    """What is to be written, and where experts lie meanwhile."""
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", nargs="+", metavar="TEXT", help="What to continue.")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='A prompt a line; {"prompt": TEXT} a line if it ends in .jsonl; - for standard input.',
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="For each prompt. Default: 64."
    )
    group.add_argument("--greedy", action="store_true", help="Always the likeliest token.")
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="Divides the logits. Default: 1.0.",
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="Of the K likeliest only.")
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="Of the likeliest that have the share P of the probability only.",
    )
    group.add_argument(
        "--scmoe-offload-experts",
        choices=("none", "cpu", "disk"),
        default="none",
        help="Where routed experts live that are not on the device: in pinned host memory, or in a "
        "file in TMPDIR that is gone when the program ends.",
    )
    group.add_argument(
        "--scmoe-expert-cache-size",
        type=cache_size,
        default="auto",
        metavar="N|BYTES|auto",
        help="What stays on the device of them: N experts a layer, bytes with a unit (2GiB), or "
        "what fits. Default: auto.",
    )
    group.add_argument("--json", action="store_true", help="A line of JSON for each prompt.")


def add_megatrons(parser: ArgumentParser) -> None:
    """What `ASKED` looks at beside them."""
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)


# Of what is typed, and of the whole command line; no row relies on another.
ASKED = (
    Refusal(
        lambda args: args.load is None,
        "A checkpoint is missing",
        "name the folder that a run has saved to with --load",
    ),
    Refusal(
        lambda args: args.prompt is not None and args.prompt_file is not None,
        "Prompts stand in --prompt and in --prompt-file",
        "drop one of them",
    ),
    Refusal(
        lambda args: args.max_new_tokens < 1,
        "--max-new-tokens {max_new_tokens} is not at least 1",
    ),
    Refusal(
        lambda args: args.temperature <= 0,
        "--temperature {temperature} is not above 0",
        "the likeliest token alone is --greedy",
    ),
    Refusal(lambda args: args.top_k < 0, "--top-k {top_k} is not at least 0"),
    Refusal(
        lambda args: args.top_p <= 0 or args.top_p > 1,
        "--top-p {top_p} is not above 0 and at most 1",
    ),
)
