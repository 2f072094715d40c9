"""The last step of an image's build: does the image have what a run needs, and still its torch?

python docker/import_check.py --torch torch==2.11.0
"""

import argparse
import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

# Those without which some command of this package stops.
NEEDED = ("torch", "megatron-core", "megatron-scmoe", "numpy", "tokenizers", "tensorboard")
MODULES = ("pretrain_gpt_scmoe", "megatron.core.datasets.helpers_cpp", "psutil", "zstandard")
# Those that make a run faster where there is a GPU.
FASTER = {"transformer-engine": "transformer_engine.pytorch", "apex": "apex", "deep_ep": "deep_ep"}


def defects(expected_torch: str) -> list[str]:
    """One line for each thing that is wrong."""
    found = []
    for name in NEEDED:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    for module in MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:
            found.append(f"import {module}: {type(error).__name__}: {error}")
    has = f"torch=={version('torch')}"
    # A version of the registry has no local part, `+cu130`, that one of an image may have.
    if expected_torch not in (has, has.split("+")[0]):
        found.append(f"{has} has taken the place of {expected_torch}")
    for name, module in FASTER.items():
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} is not there, and not needed")
            continue
        try:
            importlib.import_module(module)
        except Exception as error:
            found.append(f"{name} is installed and does not import: {error}")
    return found


def main() -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--torch", required=True, metavar="TORCH", help="the torch that must be there: torch==X"
    )
    found = defects(parser.parse_args().torch)
    print(*(f"error: {line}" for line in found), sep="\n", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
