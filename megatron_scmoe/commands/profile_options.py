"""What `tools/c2r.py profile` adds to Megatron's command line, and what of it is wrong in itself.

Imports no torch, which takes seconds.
"""

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_scmoe.checks.refusal import Found, Refusal

TOKENS = 204_800  # what C2R's published matrices were counted from


def add_profile_args(parser: ArgumentParser) -> None:
    """What is counted, and where it is written."""
    group = parser.add_argument_group("profile")
    group.add_argument("--text", nargs="+", metavar="FILE", help="Text, or .jsonl with `text`.")
    group.add_argument("--output", metavar="FILE", help=".json or .safetensors.")
    group.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"At most. Default: {TOKENS}."
    )
    group.add_argument("--picture", metavar="FILE", help="A heat map of every layer, as SVG.")


def add_megatrons(parser: ArgumentParser) -> None:
    """What `ASKED` looks at beside them."""
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--data-path", nargs="*", metavar="PREFIX", help=argparse.SUPPRESS)


def _ends_otherwise(dest: str, *endings: str) -> Callable[[Namespace], Found]:
    def when(args: Namespace) -> Found:
        name = getattr(args, dest)
        return bool(name) and Path(name).suffix not in endings

    return when


def _homeless(args: Namespace) -> Found:
    files = {dest: getattr(args, dest) for dest in ("output", "picture")}
    found = [
        f"--{dest} {name}"
        for dest, name in files.items()
        if name and not Path(name).absolute().parent.is_dir()
    ]
    return bool(found) and {"files": " and ".join(found)}


# Of what is typed, and of the whole command line; no row relies on another.
ASKED = (
    Refusal(lambda args: args.load is None, "profile runs a checkpoint", "add --load"),
    Refusal(
        lambda args: (args.text is None) == (args.data_path is None),
        "profile counts over one text",
        "add either --text or --data-path",
    ),
    Refusal(lambda args: args.tokens < 1, "--tokens {tokens} is not at least 1"),
    Refusal(lambda args: not args.output, "profile writes a file", "add --output"),
    Refusal(
        _ends_otherwise("output", ".json", ".safetensors"),
        "--output {output} ends neither in .json nor in .safetensors",
    ),
    Refusal(
        _ends_otherwise("picture", ".svg"),
        "--picture {picture} is written as SVG",
        "end its name with .svg",
    ),
    Refusal(_homeless, "{files}: there is no such folder", "make it"),
)
