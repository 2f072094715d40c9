"""What the runs of examples/c2r/run.sh came to: validation loss and copies of a token, by T.

    python examples/c2r/compare.py RUN_DIR [--json FILE]

Copies are the different ranks among a token's experts, over held-out text: experts in order, at the
placement that was made from the counts before any list, and at one that is made from the run's own.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_scmoe.c2r import collaboration, placement
from megatron_scmoe.c2r.closeness import groups_in_order
from megatron_scmoe.c2r.place import Chosen, place
from megatron_scmoe.c2r.placement import rank_of
from megatron_scmoe.words import markdown_table, write_whole


def validation_loss(log: str) -> float:
    """Of the last evaluation.

    Raises:
        ValueError: there is none.
    """
    found = re.findall(r"validation loss at .*?lm loss value: ([0-9.E+-]+)", log)
    if not found:
        raise ValueError("the log has no validation loss")
    return float(found[-1])


def row(folder: Path, placed: placement.Placement) -> dict[str, float]:
    """Of one run."""
    counts = collaboration.read(folder / "counts.json")
    of_layers = [
        (
            layer.distinct(groups_in_order(counts.experts, placed.ranks)),
            layer.distinct(placed.rank_of(number)),
            layer.distinct(rank_of(place(Chosen.of_counts(layer), placed.ranks, placed.ranks))),
            layer.chosen.max() / layer.chosen.mean(),
        )
        for number, layer in counts.layers.items()
    ]
    in_order, before, anew, load = np.mean(of_layers, axis=0)
    return {
        "validation loss": validation_loss((folder / "log.txt").read_text()),
        "copies, experts in order": float(in_order),
        "copies, placed": float(before),
        "copies, placed anew": float(anew),
        "busiest expert / mean": float(load),
    }


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="of examples/c2r/run.sh")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    args = parser.parse_args()
    placed = placement.read(args.run_dir / "placement.json")
    folders = [
        args.run_dir / "base",
        *(path.parent for path in args.run_dir.glob("t*/counts.json")),
    ]
    folders.sort(key=lambda folder: int(folder.name.removeprefix("t").replace("base", "0")))
    rows = {folder.name: row(folder, placed) for folder in folders}
    header = ["run", *next(iter(rows.values()))]
    cells = [[name, *(f"{value:.3f}" for value in of.values())] for name, of in rows.items()]
    print(f"\n{placed.experts} experts on {placed.ranks} ranks\n")
    print(*markdown_table(header, cells), sep="\n")
    if args.json:
        write_whole(args.json, json.dumps({"ranks": placed.ranks, "runs": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
