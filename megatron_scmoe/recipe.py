"""Options from a file, `--config FILE`, in the form of Megatron-LM's functional tests.

    MODEL_ARGS:
      --num-layers: 24
      --swiglu: true                          # an option without a value
      --recompute-modules: [core_attn, mlp]   # one with several
      --data-path: ${DATA_PATH}/text_document # a variable of the environment

The file's options stand in front of the command line's, so that what is typed wins; of several
files the later one does. The host's own loader takes no part: it ignores the command line, and has
no place for the options of this package (training/yaml_arguments.py).
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml

CONFIG = "--config"
OPTIONS = "MODEL_ARGS"


def expand(
    argv: list[str], variables: Mapping[str, str] = os.environ, inside: tuple[Path, ...] = ()
) -> list[str]:
    """A command line in which every `--config FILE` has become the file's options.

    Args:
        variables: what ${NAME} in a file stands for.
        inside: the files that the command line stands in.

    Raises:
        ValueError: a file that cannot be read, in one line that names it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_config(parser)
    try:
        known, typed = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{CONFIG} names no file: write {CONFIG} FILE.") from error
    files: list[Path] = getattr(known, CONFIG.removeprefix("--"), [])
    beside = inside[-1].parent if inside else Path()
    found = (options(beside / file, OPTIONS, variables, inside) for file in files)
    return [*(word for words in found for word in words), *typed]


def add_config(parser: Any) -> None:
    """The option itself, of a parser or of a group of its options."""
    parser.add_argument(
        CONFIG,
        type=Path,
        action="append",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"Options from the {OPTIONS} of a YAML file. What is typed wins; of several files the "
        "later one.",
    )


def options(
    file: Path,
    key: str = OPTIONS,
    variables: Mapping[str, str] = os.environ,
    inside: tuple[Path, ...] = (),
) -> list[str]:
    """The options of a file, as on a command line; files beside it that it names are read too.

    Args:
        key: where in the file they stand.
        variables, inside: as in `expand`.

    Raises:
        ValueError: it is no such file, in one line that names it.
    """
    if file in inside:
        raise ValueError(f"{CONFIG} {file}: it names itself.")
    try:
        lines = load(file).get(key)
        if not isinstance(lines, dict):
            raise ValueError(f"it has no {key} with an option in each line.")
        found = [word for item in lines.items() for word in _words(*item, variables)]
    except OSError as error:
        raise ValueError(f"{CONFIG} {file}: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{CONFIG} {file}: {' '.join(str(error).split())}") from error
    return expand(found, variables, (*inside, file))


def load(file: Path) -> dict[str, Any]:
    """All of a file, every value as it is written.

    Raises:
        ValueError, yaml.YAMLError, OSError: it is no mapping, no YAML, not there.
    """
    # Values stay text: YAML would make `no` a boolean and 0:4 a number of base 60.
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if not isinstance(content, dict):
        raise ValueError("it is no mapping.")
    return content


def _words(option: str, value: Any, variables: Mapping[str, str]) -> list[str]:
    """One line of the file as words of a command line.

    Raises:
        ValueError: it is no option with a value, or names a variable that is not set.
    """
    if not option.startswith("--"):
        raise ValueError(f"{option} is no option, which begins with --.")
    if value == "true":
        return [option]
    if isinstance(value, str) and value not in ("", "false"):
        return [f"{option}={_filled(value, variables)}"]  # also a value that begins with -
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        # Megatron-LM separates by spaces: [a b].
        return [option, *(word for item in value for word in _filled(item, variables).split())]
    raise ValueError(
        f"{option} has the value {value!r}: write true for an option without a value, else a "
        "value or a list, or leave the line out."
    )


def _filled(text: str, variables: Mapping[str, str]) -> str:
    try:
        return Template(text).substitute(variables)
    except KeyError as error:
        raise ValueError(f"the variable {error.args[0]} is not set.") from error
