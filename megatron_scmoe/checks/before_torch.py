"""What the words of a command line show before torch is imported, which takes seconds on a rank.

The same rows are asked again of the parsed options; nothing is taken for wrong here that would be
right there.
"""

from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress

from megatron_scmoe.checks.ranges import NUMBERS, RANGES
from megatron_scmoe.checks.refusal import Refusal, refuse_all
from megatron_scmoe.words import flag

LENGTH = (
    Refusal(
        lambda args: (
            not args.skip_train and args.train_iters is None and args.train_samples is None
        ),
        "How long to train is missing",
        "add --train-iters or --train-samples",
    ),
    Refusal(
        lambda args: not args.skip_train and args.lr is None,
        "The learning rate is missing",
        "add --lr",
    ),
    Refusal(
        lambda args: (
            not args.skip_train and args.eval_interval is None and not args.full_validation
        ),
        "When to evaluate is missing",
        "add --eval-interval",
    ),
)
"""What a run has to be told that the host has no default for."""

NO_YAML = Refusal(
    lambda args: args.yaml_cfg is not None,
    "--yaml-cfg has no place for the --scmoe options",
    "use the command line",
)

HELP = ("-h", "--help", "--help-scmoe")
# Options are not the whole command line, or nothing is trained.
SAYS_MORE = (*HELP, "--use-checkpoint-args", "--yaml-cfg")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether nothing else is done."""
    return any(word in HELP for word in argv)


def refuse_words(argv: Sequence[str]) -> None:
    """Refuse numbers out of range and what is missing.

    Args:
        argv: the words behind the program.

    Raises:
        ValueError: all of it in one line.
    """
    flags = {word.split("=")[0] for word in argv}
    if not flags & set(SAYS_MORE):
        refuse_all(NUMBERS + LENGTH, typed_numbers(argv))


def refuse_typed(
    argv: Sequence[str], rows: tuple[Refusal, ...], *add: Callable[[ArgumentParser], object]
) -> None:
    """Refuse what a program's own options show, unless help is asked for.

    Args:
        argv: the words behind the program, files spelled out.
        rows: of a program's own; the numbers are asked for beside them.
        add: as of `typed_options`.

    Raises:
        ValueError: all of it in one line.
    """
    if not asks_for_help(argv):
        refuse_all(NUMBERS + rows, typed_options(argv, *add))


def typed_numbers(argv: Sequence[str]) -> Namespace:
    """The options of RANGES as far as they can be read, by dest, and the switches of LENGTH."""
    of_flag = {flag(dest): dest for dest in RANGES}
    typed = Namespace(train_iters=None, train_samples=None, lr=None, eval_interval=None)
    for at, word in enumerate(argv):
        name, given, text = word.partition("=")
        if name in of_flag:
            with suppress(IndexError, ValueError):
                number = float(text if given else argv[at + 1])
                setattr(typed, of_flag[name], int(number) if number.is_integer() else number)
    typed.skip_train, typed.full_validation = "--skip-train" in argv, "--full-validation" in argv
    return typed


def typed_options(argv: Sequence[str], *add: Callable[[ArgumentParser], object]) -> Namespace:
    """Some options and their defaults, and the numbers of RANGES beside them.

    Args:
        add: what adds the options to a parser.

    Raises:
        ValueError: one of them cannot be read.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for each in add:
        each(parser)
    try:
        args, _ = parser.parse_known_args(argv, namespace=typed_numbers(argv))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return args
