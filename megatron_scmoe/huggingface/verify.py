"""Is a Hugging Face directory the model of a checkpoint?

Tensor by tensor first, bit for bit in the directory's types, which needs neither side's model.
"""

from pathlib import Path
from typing import Any

import torch

from megatron_scmoe.huggingface import export, load


def compare_tensors(
    checkpoints: Path, folder: Path, step: int | None = None, say: Any = print
) -> str | None:
    """Compare every tensor of a checkpoint with the directory's.

    Returns:
        The first difference, in one line; None if there is none.

    Raises:
        ValueError: one of the two is not whole; one line.
    """
    source = export.open_checkpoint(checkpoints, step)
    directory = load.open_directory(folder)
    changed = sorted(
        name
        for name in source.config
        if name not in ("megatron", "dtype")
        and source.config[name] != directory.config.get(name, source.config[name])
    )
    if changed:
        name = changed[0]
        return (
            f"{folder} is another model than {source.reader.folder}: {name} is "
            f"{directory.config[name]} there and {source.config[name]} here"
        )
    located, _ = export.locate(source)
    count = 0
    load.locate(directory)
    with export.progress(len(located), "verify", " tensors") as bar:
        for tensor, place in located:
            whole = source.reader.read(place)
            for name, values in export.parts_of(tensor, whole, source.config, {}):
                where = directory.dialect.where(name, directory.config, directory.reader.names())
                there = load.read(directory.reader, where)
                if not torch.equal(values.to(there.dtype), there):
                    most = (values.float() - there.float()).abs().max().item()
                    return f"{name} differs by up to {most:.3g} ({tensor.megatron} in {place.key})"
                count += 1
            bar.update(1)
    say(f"{count} tensors of {folder} are those of iteration {source.iteration}, bit for bit")
    return None
