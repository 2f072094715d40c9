"""What the planner says of every recipe: the table of README.md.

    python examples/recipes/plan.py

H100 with InfiniBand, operators at 40 % of the peak and all-to-all at 60 % of the bandwidth, which
are assumptions: nothing here was measured.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

from megatron_scmoe import say, start

start.replace_host_symbols()

from megatron_scmoe.planner.plan import make_plan
from megatron_scmoe.planner.plan_arguments import parse_command_line, source_from_args
from megatron_scmoe.planner.plan_text import as_json
from megatron_scmoe.recipe import load
from megatron_scmoe.words import markdown_table

FOLDER = Path(__file__).parent
CLUSTER = (
    "--cluster-preset=h100-infiniband",
    "--cluster-flops-efficiency=0.4",
    "--cluster-bandwidth-efficiency=0.6",
)
GIB = 2**30
HEADER = (
    "recipe",
    "position",
    "parameters",
    "layout",
    "memory of a GPU",
    "hidden",
    "a pair of layers over the baseline's",
)


def names() -> list[str]:
    return sorted(file.parent.name for file in FOLDER.glob("*/scmoe.yaml"))


def plan(file: Path, *options: str) -> dict[str, Any]:
    """The planner's numbers of a file of options, on the nodes that it names.

    Raises:
        ValueError, AssertionError: the planner refuses it.
    """
    nodes = ["--cluster-nodes", load(file)["NODES"]]
    sys.argv[1:] = ["--config", str(file), *CLUSTER, *nodes, *options]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's, about training
        args, config, notes = parse_command_line()
        source = source_from_args(args)
        chosen = make_plan(args, config, source)
    return {
        **as_json(args, config.transformer, source, chosen, notes),
        "position": args.scmoe_shortcut_position,
        "stock_seconds": chosen.typed,
    }


def row(name: str) -> list[str]:
    """One line of the table."""
    file = FOLDER / name / "scmoe.yaml"
    scmoe = plan(file)
    position = scmoe["position"]
    # Of the baseline only the time of its stock layers counts, which no position changes.
    baseline = plan(FOLDER / name / "baseline.yaml", f"--scmoe-shortcut-position={position}")
    predictions = [found for found in scmoe["predictions"] if found["position"] == position]
    best = next(prediction for prediction in predictions if prediction["best"])
    layout = scmoe["layout"]
    nodes = load(file)["NODES"]
    return [
        f"[{name}]({name}/scmoe.yaml)",
        position,
        f"{scmoe['parameters'] / 1e9:.1f} B",
        f"{nodes} x 8, EP {layout['EP']}, PP {layout['PP']}",
        f"{scmoe['memory']['total'] / GIB:.0f} GiB",
        f"{best['hidden_share']:.0%}",
        f"{baseline['stock_seconds'] / best['seconds']:.2f}x",
    ]


if __name__ == "__main__":
    with say.user_errors():
        print(*markdown_table(HEADER, map(row, names())), sep="\n")
