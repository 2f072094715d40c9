"""The files of --scmoe-collaboration-dir: iter_0000100.json, at every save and at the end."""

from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

from megatron_scmoe.c2r import collaboration
from megatron_scmoe.overlap.measure.chosen_together import of_run


def write_counts(args: Namespace, iteration: int) -> None:
    """Write what was chosen since the last time, from the first rank; every rank has to call.

    What cannot be written is a warning: the counts are not what the run is for.
    """
    collector = of_run()
    counts = None if collector is None else collector.gather()
    if counts is None or not any(layer.tokens for layer in counts.layers.values()):
        return
    counts.provenance = {
        "run": "training",
        "until iteration": iteration,
        "data": list(map(str, args.data_path or [])),
        "checkpoints": args.save,
        "version": version("megatron-scmoe"),
    }
    path = Path(args.scmoe_collaboration_dir, f"iter_{iteration:07d}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        collaboration.write(path, counts)
    except OSError as error:
        print(f"warning: counts of experts are not written: {error}", flush=True)
