"""The names of a run's files, as Megatron-LM's tool makes them."""

import argparse
import re
from pathlib import Path

from megatron_scmoe.commands.preprocess import DataError


def output_names(args: argparse.Namespace) -> dict[tuple[int, str], str]:
    """For each dataset, known by number of its input and key, its name without suffix and folder.

    Raises:
        DataError: two of several inputs have the same name.
    """
    level = "sentence" if args.split_sentences else "document"
    prefix = Path(args.output_prefix).name
    inputs = [prefix]
    if args.input_weights:
        stems = [re.sub(r"\W+", "_", Path(name).name.split(".")[0]) for name in args.input]
        inputs = [f"{prefix}_{stem}" for stem in stems]
        if len(set(inputs)) < len(inputs):
            raise DataError(
                f"--input-weights: the inputs' names {', '.join(stems)} are those of their "
                "datasets and must differ"
            )
    return {
        (number, key): f"{name}_{key}_{level}"
        for number, name in enumerate(inputs)
        for key in args.json_keys
    }


def blend_names(args: argparse.Namespace) -> dict[str, str]:
    """For each key the name of the file that lists weights and datasets, if there is one."""
    level = "sentence" if args.split_sentences else "document"
    prefix = Path(args.output_prefix).name
    keys = args.json_keys if args.input_weights else []
    return {key: f"{prefix}_{key}_{level}.blend" for key in keys}
