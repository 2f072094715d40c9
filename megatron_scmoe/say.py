"""User errors: one line from one rank, exit code 2, no traceback.

The host checks options with bare asserts and lets every rank print its own traceback. These
checks give the same answer on every rank, so rank 0 speaks and all ranks leave, before any process
group exists that could hang; what is wrong on one node only, its first rank says.
"""

import argparse
import functools
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from megatron_scmoe.words import flag

USER_ERRORS = (
    AssertionError,
    ImportError,
    NotImplementedError,
    OSError,
    ValueError,
    argparse.ArgumentTypeError,
)
EXIT_CODE = 2
SECONDS_TO_SPEAK = 20


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """Report the host's and our refusals raised inside the block as one line and exit.

    Wrap parsing, validation and building the configuration with it, where the host stumbles over
    values that it does not check, too. Of training wrap errors of our own only, with their kinds:
    for all others a traceback is the right answer.
    """
    try:
        yield
    except kinds as error:
        leave(one_line(error), EXIT_CODE)
    except Exception as error:
        if kinds is not USER_ERRORS or not _is_hosts(error):
            raise
        leave(f"Megatron cannot use these options: {_stumble(error)}", EXIT_CODE)


def _is_hosts(error: Exception) -> bool:
    """Whether the host's code raised it or called what did, and not ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        folders = Path(frame.filename).parts
        if "megatron_scmoe" in folders or Path(frame.filename).name == "pretrain_gpt_scmoe.py":
            return False
        if "megatron" in folders:
            return True
    return False


def _stumble(error: Exception) -> str:
    """The error, the host's line that raised it and the options that stand there."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if "megatron" in Path(frame.filename).parts][-1]
    names = dict.fromkeys(re.findall(r"(?:args|config|self)\.(\w+)", frame.line or ""))
    options = f"; check {', '.join(map(flag, names))}" if names else ""
    text = " ".join(str(error).split())
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__}: {text} in `{(frame.line or '').strip()}` ({where}){options}."


def leave(text: str, exit_code: int) -> NoReturn:
    """Say in one line why this rank ends, and end it."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank != 0:
        # The launcher ends all ranks when the first one leaves. A rank that is still alive after a
        # while has an error that rank 0 does not have, such as a file missing on its node; the
        # first rank of a node speaks for all.
        time.sleep(SECONDS_TO_SPEAK + local_rank)
    say(text)
    sys.exit(exit_code)


def say(message: str) -> None:
    """The one line for the user."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":  # python -m FOLDER
        program = program.parent
    print(f"{program.name}: error: {message}", file=sys.stderr, flush=True)


def one_line_interrupts() -> None:
    """Let Ctrl-C end a program with one line of its first rank, and the shell's exit code, 130."""
    hook = sys.excepthook

    def replacement(kind: type[BaseException], error: BaseException, *others: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            hook(kind, error, *others)
        elif int(os.environ.get("RANK", "0")) == 0:
            say("stopped by an interrupt.")

    sys.excepthook = replacement


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises what it refuses, without argparse's usage before it.

    Args:
        refused: the kind of error.
    """

    def __init__(self, refused: type[Exception], **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._refused = refused

    def error(self, message: str) -> NoReturn:
        raise self._refused(f"{message} (see --help)")


def one_line_usage_errors(parser: argparse.ArgumentParser) -> None:
    """Let the parser raise instead of printing the host's several hundred lines of usage."""

    def error(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = error  # type: ignore[method-assign]
    for action in parser._actions:
        # argparse expects few kinds of errors; some of the host's types evaluate what was typed.
        if inspect.isfunction(action.type):
            action.type = _raising_what_argparse_expects(action.type)


def _raising_what_argparse_expects(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(convert)
    def replacement(text: str) -> Any:
        try:
            return convert(text)
        except argparse.ArgumentTypeError:
            raise
        except Exception as error:
            raise argparse.ArgumentTypeError(f"{text} cannot be read: {one_line(error)}") from error

    return replacement


def printable_help(parser: argparse.ArgumentParser) -> None:
    """Let --help print: argparse formats help texts, and some of the host's have a bare percent
    sign."""
    for action in parser._actions:
        if action.help and action.help is not argparse.SUPPRESS:
            try:
                action.help % {**vars(action), "prog": parser.prog}
            except (KeyError, TypeError, ValueError):
                action.help = action.help.replace("%", "%%")


def one_line(error: BaseException) -> str:
    """The error's text on one line; for a bare assert of the host, its condition and the options
    that it speaks of."""
    text = " ".join(str(error).split())
    if text:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"({Path(frame.filename).name}:{frame.lineno})"
    condition = (frame.line or "").removeprefix("assert ").rstrip(" \\(,")
    names = dict.fromkeys(re.findall(r"args\.(\w+)", condition))
    if not names:
        return f"{type(error).__name__}: {frame.line} {where}"
    flags = ", ".join(map(flag, names))
    return f"Megatron requires `{condition}` {where}: check {flags}"
