"""What the runs of examples/c2r/run.sh came to: validation loss and copies of a token, by T.

    python examples/c2r/compare.py RUN_DIR [RUN_DIR ...] [--ranks 4 8] [--json FILE]

Copies are the different ranks among a token's experts, over held-out text: experts in order; placed
by what the model chose on the training text before it had any list; placed by the run's own counts,
which are those that it is judged by. Several RUN_DIR are seeds: means, and behind +- the standard
deviation over them; of the loss also its difference to that without a constraint, seed by seed.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_scmoe import say
from megatron_scmoe.c2r import collaboration
from megatron_scmoe.c2r.closeness import groups_in_order
from megatron_scmoe.c2r.place import Chosen, place
from megatron_scmoe.c2r.placement import rank_of
from megatron_scmoe.words import markdown_table, write_whole

LOSS = "validation loss"


def validation_loss(log: Path) -> float:
    """Of the last evaluation.

    Raises:
        ValueError: there is none.
    """
    found = re.findall(r"validation loss at .*?lm loss value: ([0-9.E+-]+)", log.read_text())
    if not found:
        raise ValueError(f"{log} has no validation loss")
    return float(found[-1])


def row(folder: Path, ranks: list[int]) -> dict[str, float]:
    """Of one run; copies are means over the layers.

    Raises:
        ValueError: it has no result, or the experts do not divide among the ranks.
    """
    before = collaboration.read(folder.parent / "matrix.json")
    counts = collaboration.read(folder / "counts.json")
    if uneven := [number for number in ranks if number < 1 or counts.experts % number]:
        raise ValueError(f"--ranks {uneven[0]} does not divide {counts.experts} experts")
    busiest = [layer.chosen.max() / layer.chosen.mean() for layer in counts.layers.values()]
    found = {
        LOSS: validation_loss(folder / "log.txt"),
        "busiest expert / mean": float(np.mean(busiest)),
    }
    for number in ranks:
        copies = [
            [
                layer.distinct(groups_in_order(counts.experts, number)),
                *(
                    layer.distinct(rank_of(place(Chosen.of_counts(of), number, number)))
                    for of in (before.layers[name], layer)
                ),
            ]
            for name, layer in counts.layers.items()
        ]
        names = (f"EP {number}, {where}" for where in ("in order", "placed", "placed anew"))
        found |= zip(names, np.mean(copies, axis=0).tolist(), strict=True)
    return found


def runs_of(folder: Path) -> list[str]:
    """Names, by T; the one without lists first, the one without a constraint last."""
    names = sorted(path.parent.name for path in folder.glob("t*/counts.json"))
    return ["base", *sorted(names, key=lambda name: int(name[1:]))]


def compare(folders: list[Path], ranks: list[int]) -> dict[str, dict[str, list[float]]]:
    """By run and column, a number for every seed.

    Raises:
        ValueError: the folders have different runs, or a run has no result.
    """
    names = runs_of(folders[0])
    for folder in folders[1:]:
        if runs_of(folder) != names:
            raise ValueError(f"{folder} has other runs than {folders[0]}: compare equal ones")
    found = {}
    for name in names:
        rows = [row(folder / name, ranks) for folder in folders]
        found[name] = {column: [of[column] for of in rows] for column in rows[0]}
    free = found[names[-1]][LOSS]
    for name in names[1:]:
        differences = np.subtract(found[name][LOSS], free).tolist()
        found[name] = {LOSS: found[name].pop(LOSS), "- free": differences} | found[name]
    return found


def cell(values: list[float] | None) -> str:
    """Mean and standard deviation."""
    if values is None:
        return ""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} +- {np.std(values, ddof=1):.3f}"


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="of examples/c2r/run.sh")
    add("--ranks", type=int, nargs="+", default=[4], metavar="EP", help="to count copies for")
    add("--json", type=Path, metavar="FILE", help="write the numbers of every seed here too")
    args = parser.parse_args()
    try:
        found = compare(args.run_dirs, args.ranks)
    except (OSError, ValueError) as error:
        say.say(say.one_line(error))
        return 2
    header = list(found[[*found][-1]])
    cells = [[name, *(cell(of.get(column)) for column in header)] for name, of in found.items()]
    print(*markdown_table(["run", *header], cells), sep="\n")
    if args.json:
        seeds = [folder.name for folder in args.run_dirs]
        write_whole(args.json, json.dumps({"seeds": seeds, "runs": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
