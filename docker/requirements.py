"""Print what a pyproject.toml asks for, a line each, so that an image installs it in a layer of its
own, before the sources that change every day.

    python3 requirements.py PYPROJECT [EXTRA ...]
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The build system's, the project's and those of the extras.

    Raises:
        KeyError: there is no such extra.
    """
    content = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = content["project"]
    lines = [*content["build-system"]["requires"], *project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return lines


if __name__ == "__main__":
    print(*requirements(Path(sys.argv[1]), sys.argv[2:]), sep="\n")
