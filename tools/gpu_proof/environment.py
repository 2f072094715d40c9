"""Make a virtual environment that sees torch, what torch needs, and nothing else that is installed.

    python3 tools/gpu_proof/environment.py ENV [WHEELS]

Run by the Python that has torch. Whatever else lies beside torch there, another NumPy or packages
that megatron-core would import if it found them, stays out of sight: what runs in ENV is what the
tests ran. The wheels are installed into it. Standard library only.
"""

import re
import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

CUDA_PACKAGES = ("nvidia-", "cuda-")
"""Some of them torch requires by way of an extra."""


def site_packages(environment: Path) -> Path:
    """Where a virtual environment of this Python has its packages."""
    return environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


def needed_by(name: str) -> set[str]:
    """It and what it requires, as far as it is installed."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = _normal(waiting.pop())
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += [
                re.split(r"[^\w.-]", text)[0] for text in requires if "extra ==" not in text
            ]
    return found


def torch_packages() -> set[str]:
    """Torch, what it needs, and CUDA's libraries."""
    installed = {_normal(package.name) for package in metadata.distributions()}
    return needed_by("torch") | {name for name in installed if name.startswith(CUDA_PACKAGES)}


def link(names: Iterable[str], folder: Path) -> None:
    """Link every file of installed packages into a site-packages folder."""
    for name in names:
        package = metadata.distribution(name)
        for file in package.files or ():
            source = Path(str(package.locate_file(file)))
            if ".." in file.parts or not source.exists():
                continue
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source.resolve())


def make(environment: Path, wheels: Iterable[Path] = (), names: Iterable[str] = ()) -> Path:
    """Make it; returns its Python.

    Args:
        wheels: to install into it.
        names: of installed packages that it sees beside torch's.
    """
    venv.create(environment, with_pip=False, symlinks=True)
    folder = site_packages(environment)
    link({*torch_packages(), *names}, folder)
    files = [str(wheel) for wheel in wheels]
    if files:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--no-compile", "--target", str(folder), *files], check=True)
    return environment / "bin" / "python"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(environment: str, bundle: str | None = None) -> int:
    """Exit code 2, and one line, if this Python is not the one that has torch."""
    if not needed_by("torch"):
        version = ".".join(map(str, sys.version_info[:3]))
        print(
            f"error: {sys.executable}, Python {version}, has no torch: "
            "put the python3 that has it first in PATH.",
            file=sys.stderr,
        )
        return 2
    print(make(Path(environment), sorted(Path(bundle).glob("*.whl")) if bundle else ()))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
