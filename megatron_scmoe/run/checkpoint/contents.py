"""Which checkpoints are in a folder, whether they are whole, and which one is the next to load.

Reads files, never loads tensors.
"""

import io
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

from megatron_scmoe.run.checkpoint.unpickle import UntrustedError, read_metadata
from megatron_scmoe.words import read_json, write_whole

TRACKER = "latest_checkpointed_iteration.txt"
DISTRIBUTED = "metadata.json"  # the host writes it last, into every distributed checkpoint


def own_folders(args: Namespace) -> list[Path]:
    """The folders that a run saves to, and nobody else."""
    folders = (Path(args.save) if args.save else None, non_persistent_folder(args))
    return [folder.resolve() for folder in folders if folder is not None]


def non_persistent_folder(args: Namespace) -> Path | None:
    """Where --non-persistent-ckpt-type global saves to, None without it.

    The host's manager of local ones looks after folders of its own.
    """
    if args.non_persistent_ckpt_type != "global" or not args.save:
        return None
    # The converter looks at checkpoints without the host, whose import takes seconds.
    from megatron.training.checkpointing import _NON_PERSISTENT_CKPT_SUBDIR

    chosen = args.non_persistent_global_ckpt_dir
    return Path(chosen or Path(args.save, _NON_PERSISTENT_CKPT_SUBDIR))


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where the tensors of an iteration lie."""
    return folder / f"iter_{iteration:07d}"


def saved_iterations(folder: Path) -> list[int]:
    """Every iteration with a folder of its own, whole or not, oldest first."""
    names = (path.name.removeprefix("iter_") for path in folder.glob("iter_*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def newest_complete(folder: Path, before: int | None = None) -> int | None:
    """The newest iteration that is whole, of those before `before` if given."""
    for iteration in reversed(saved_iterations(folder)):
        if before is not None and iteration >= before:
            continue
        if not defects(iteration_folder(folder, iteration)):
            return iteration
    return None


def defects(checkpoint: Path) -> list[str]:
    """What a distributed checkpoint lacks, a phrase each; empty if every byte is there.

    Sizes are compared with what the metadata promises. Bytes that changed in place are seen with
    the host's --verify-integrity only.
    """
    if not (checkpoint / DISTRIBUTED).exists():
        return [f"{checkpoint / DISTRIBUTED} is missing"]
    if not (checkpoint / ".metadata").exists():
        return [f"{checkpoint / '.metadata'} is missing"]
    try:
        read_json(checkpoint / DISTRIBUTED)
    except ValueError as error:
        return [f"{checkpoint / DISTRIBUTED} is corrupt ({error})"]
    try:
        stored = list(read_metadata(checkpoint).storage_data.values())
    except UntrustedError as error:
        return [f"{checkpoint / '.metadata'} {error}"]
    except pickle.UnpicklingError as error:
        return [f"{checkpoint / '.metadata'} is corrupt ({error})"]
    sizes: dict[str, int] = {}
    for item in stored:
        end = item.offset + item.length
        sizes[item.relative_path] = max(end, sizes.get(item.relative_path, 0))
    found = []
    for name, size in sorted(sizes.items()):
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size < size:
            found.append(f"{path} has {path.stat().st_size} of its {size} bytes")
    return found


def corrupt_files(checkpoint: Path) -> list[Path]:
    """Files with a tensor whose bytes are not those written.

    Every tensor is a zip archive with checksums of its own. Reads the whole checkpoint: for the
    search after a failed load.
    """
    corrupt = set()
    for item in read_metadata(checkpoint).storage_data.values():
        path = checkpoint / item.relative_path
        with path.open("rb") as file:
            file.seek(item.offset)
            archive = io.BytesIO(file.read(item.length))
        try:
            if zipfile.ZipFile(archive).testzip() is not None:
                corrupt.add(path)
        except Exception:  # zipfile stumbles over damage in any way there is
            corrupt.add(path)
    return sorted(corrupt)


def tracked_iteration(folder: Path) -> int | str | None:
    """What the tracker file names: an iteration, "release", or None without such a file.

    Raises:
        ValueError: the file names nothing; a killed save may have left it empty.
    """
    path = folder / TRACKER
    if not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    text = path.read_bytes().decode(errors="replace").strip()
    if text == "release":
        return text
    if not (text.isdecimal() and len(text) < 19):
        raise ValueError(f"{path} holds {text!r:.40} and no iteration")
    return int(text)


def readable_tracker(folder: Path) -> int | str | None:
    """The same, and None for a file that names nothing."""
    try:
        return tracked_iteration(folder)
    except ValueError:
        return None


def whole(folder: Path, iteration: int) -> bool:
    """Whether an iteration can be loaded.

    The host's other formats have no metadata to compare with: there the tracker, which is written
    last, has to name it.
    """
    checkpoint = iteration_folder(folder, iteration)
    if (checkpoint / DISTRIBUTED).exists():
        return not defects(checkpoint)
    return checkpoint.is_dir() and readable_tracker(folder) == iteration


def write_tracker(folder: Path, iteration: int) -> None:
    """Name the iteration that the next run loads, whole or not at all."""
    write_whole(folder / TRACKER, str(iteration))
