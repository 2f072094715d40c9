"""Collect what travels with this project to a machine without a network.

    python -m tools.gpu_proof.bundle DIR [--transformer-engine FOLDER]

The target has Linux on x86-64, Python 3.12 and torch 2.11 with what torch needs. DIR receives the
wheels of everything else that the proof imports, and the commit. They are packed again with a
denser compression, which pip reads as well: 60 MiB, this project included, is what may travel.

FOLDER holds the wheels of Transformer Engine that no registry has: its library with the machine
code of one architecture, and its extension for torch 2.11 and CUDA 13.
"""

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tools.benchmarks.provenance import commit
from tools.benchmarks.real_text import REPOSITORY

LIMIT_BYTES = 60 * 2**20
COMMIT_FILE = "commit"

PACKAGES = ("megatron-core", "numpy", "packaging", "psutil", "pyyaml")
"""Imported by the entry script, its runs and the parts, beside torch and what torch needs."""
TRANSFORMER_ENGINE = (
    *("transformer-engine==2.20.2", "nvdlfw-inspect==0.2.2", "einops==0.8.2"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("onnxscript==0.7.2", "onnx==1.23.2", "onnx-ir==1.1.0", "ml-dtypes==0.6.0", "protobuf"),
)
"""Imported by transformer_engine.pytorch. Its wheel asks for nvidia-cudnn-frontend too, which only
kernels for Blackwell import."""
PLATFORMS = (
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_24",
    "manylinux_2_17",
    "manylinux2014",
)


class BundleError(Exception):
    """It cannot be collected, or is too large; the message is one line."""


def requirements(names: Iterable[str]) -> list[str]:
    """The names with the versions of constraints.txt, as far as these are there."""
    pinned = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        name, equal, version = line.partition("==")
        if equal:
            pinned[name.lower().replace("_", "-")] = version
    return [f"{name}=={pinned[name]}" if name in pinned else name for name in names]


def collect(folder: Path, transformer_engine: Path | None) -> list[Path]:
    """Download, copy and pack, and return the wheels in `folder`.

    Raises:
        BundleError: a package cannot be had.
    """
    names = PACKAGES + (TRANSFORMER_ENGINE if transformer_engine else ())
    platforms = [text for name in PLATFORMS for text in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *platforms]
    done = subprocess.run(
        [*command, "--dest", str(folder), *requirements(names)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise BundleError(f"pip download: {done.stderr.strip().splitlines()[-1]}")
    for wheel in folder.glob("*.whl"):
        pack(wheel, wheel)
    for wheel in transformer_engine.glob("*.whl") if transformer_engine else ():
        pack(wheel, folder / wheel.name)
    return sorted(folder.glob("*.whl"))


def pack(source: Path, target: Path) -> None:
    """Write the wheel with LZMA in place of deflate; its files and their modes stay the same."""
    packed = target.with_suffix(".packed")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            entry.compress_type = zipfile.ZIP_LZMA
            new.writestr(entry, content)
    packed.replace(target)


def project_bytes() -> int:
    """Of the tracked files."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    paths = (REPOSITORY / name for name in listed.stdout.split("\0") if name)
    return sum(path.lstat().st_size for path in paths)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bundle", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="receives the wheels; new or empty")
    parser.add_argument("--transformer-engine", type=Path, metavar="FOLDER", help="with its wheels")
    args = parser.parse_args()
    try:
        if args.folder.exists() and any(args.folder.iterdir()):
            raise BundleError(f"{args.folder} is not empty")
        engine = args.transformer_engine
        if engine and not any(engine.glob("transformer_engine_torch-*.whl")):
            raise BundleError(f"{engine} has no wheel of transformer_engine_torch")
        args.folder.mkdir(parents=True, exist_ok=True)
        sizes = {wheel.name: wheel.stat().st_size for wheel in collect(args.folder, engine)}
        (args.folder / COMMIT_FILE).write_text(commit() + "\n")
        sizes["this project"] = project_bytes()
        for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
            print(f"{size / 2**20:8.2f} MiB  {name}")
        whole = sum(sizes.values())
        print(f"{whole / 2**20:8.2f} MiB  together, of {LIMIT_BYTES / 2**20:.0f}")
        if whole > LIMIT_BYTES:
            raise BundleError("this is more than may travel")
    except BundleError as error:
        sys.exit(f"bundle: error: {error}")


if __name__ == "__main__":
    main()
