"""Which experts are chosen together, and what to make of it: C2R (arXiv:2504.01337).

    python tools/c2r.py profile --load CHECKPOINTS --text book.txt --output counts.json
    python tools/c2r.py report --matrix counts.json [--ranks 4 | --placement place.json]
    python tools/c2r.py lists --matrix counts.json --output lists.json
    python tools/c2r.py place --matrix counts.json --ranks 8 --ranks-per-node 4 --output place.json

`profile` runs a checkpoint over text; its options are in profile_experts.py. `report` prints how
the experts of every layer keep together and how many ranks a token needs. `lists` writes what
--scmoe-c2r-lists of a run reads, `place` what --scmoe-expert-placement reads. docs/c2r.md leads
through the whole.

Exit codes: 0 done; 2 options or files are wrong, in one line.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import numpy as np

from megatron_scmoe import recipe, say
from megatron_scmoe.c2r import collaboration, lists, placement
from megatron_scmoe.c2r.closeness import closeness
from megatron_scmoe.c2r.collaboration import Collaboration
from megatron_scmoe.c2r.heat_map import heat_map
from megatron_scmoe.c2r.place import MAX_IMBALANCE, Chosen, place
from megatron_scmoe.c2r.placement import Copies, Placement, contiguous
from megatron_scmoe.checks.before_torch import refuse_typed
from megatron_scmoe.commands import profile_options
from megatron_scmoe.words import numbers, percent, table, write_whole

SHOWN_RANKS = 8


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    say.one_line_interrupts()
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["profile"]:
        return profile(words[1:])
    try:
        args = parse_args(argv)
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)
    except (ValueError, OSError, ImportError) as error:
        say.say(say.one_line(error))
        return 2
    return 0


def profile(words: list[str]) -> int:
    """The verb that takes Megatron's options, and seconds to import it."""
    with say.user_errors():
        own = profile_options.add_profile_args, profile_options.add_megatrons
        refuse_typed(recipe.expand(words), profile_options.ASKED, *own)
    from megatron_scmoe.commands import profile_experts

    sys.argv[1:] = words
    return profile_experts.main()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: it cannot be read.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, run, text, options in VERBS:
        verb = verbs.add_parser(name, help=text)
        verb.set_defaults(run=run)
        options(verb)
        say.one_line_usage_errors(verb)
    verbs.add_parser("profile", help="Count over text with a checkpoint's model.", add_help=False)
    say.one_line_usage_errors(parser)
    return parser.parse_args(argv)


def offer_matrix(parser: argparse.ArgumentParser) -> None:
    """--matrix, which most verbs read."""
    parser.add_argument(
        "--matrix",
        type=Path,
        required=True,
        metavar="FILE",
        help="Counts of `profile` or of a run with --scmoe-collaboration-dir.",
    )


def offer_ranks(parser: argparse.ArgumentParser, required: bool) -> None:
    """--ranks and --ranks-per-node."""
    parser.add_argument(
        "--ranks", type=int, required=required, metavar="EP", help="Expert-parallel ranks."
    )
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="Of them on one node; default: all."
    )


def check_ranks(args: argparse.Namespace, experts: int) -> None:
    """Refuse ranks that the experts cannot be divided among.

    Raises:
        ValueError: one line.
    """
    if args.ranks < 1 or experts % args.ranks:
        raise ValueError(f"--ranks {args.ranks} does not divide the {experts} experts of --matrix.")
    per_node = args.ranks_per_node
    if per_node is not None and (per_node < 1 or args.ranks % per_node):
        raise ValueError(f"--ranks-per-node {per_node} does not divide --ranks {args.ranks}.")


def offer_lists(parser: argparse.ArgumentParser) -> None:
    """Of `lists`."""
    offer_matrix(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="Lists of partners, as JSON."
    )


def write_lists(args: argparse.Namespace) -> None:
    """The verb `lists`."""
    found = lists.lists_of(collaboration.read(args.matrix))
    lists.write(args.output, found)
    print(f"partners of {found.experts} experts in layer {numbers([*found.layers])}: {args.output}")


def offer_report(parser: argparse.ArgumentParser) -> None:
    """Of `report`."""
    offer_matrix(parser)
    offer_ranks(parser, required=False)
    parser.add_argument(
        "--placement",
        type=Path,
        metavar="FILE",
        help="Where experts lie, made by `place`, on its ranks and nodes; default: in order.",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="Write a heat map of every layer, as SVG."
    )


def write_report(args: argparse.Namespace) -> None:
    """The verb `report`.

    Raises:
        ValueError: one line.
    """
    counts = collaboration.read(args.matrix)
    if args.ranks is not None:
        check_ranks(args, counts.experts)
    placed = None
    if args.placement is not None:
        placed = placement.read(args.placement)
        check_placement(args, placed, counts)
    if args.picture is not None:
        if args.picture.suffix != ".svg":
            raise ValueError(f"--picture {args.picture} is written as SVG: end its name with .svg.")
        write_whole(args.picture, heat_map(counts))
    if placed is None:
        print(report(counts, args.ranks, args.ranks_per_node))
    else:
        print(report(counts, placed.ranks, placed.ranks_per_node, placed))


def check_placement(args: argparse.Namespace, placed: Placement, counts: Collaboration) -> None:
    """Refuse a placement of another model, or ranks beside its own.

    Raises:
        ValueError: one line.
    """
    if args.ranks is not None or args.ranks_per_node is not None:
        raise ValueError("--placement has ranks and nodes: leave out --ranks and --ranks-per-node.")
    if placed.experts != counts.experts or placed.layers.keys() != counts.layers.keys():
        raise ValueError(
            f"--placement {args.placement} has {placed.experts} experts in layer "
            f"{numbers([*placed.layers])}, and --matrix {counts.experts} in layer "
            f"{numbers([*counts.layers])}: take that of the same model."
        )


def report(
    counts: Collaboration,
    ranks: int | None,
    ranks_per_node: int | None,
    placed: Placement | None = None,
) -> str:
    """A table with a line for every layer, and their means.

    Args:
        ranks: expert-parallel ranks; None for 2, 4 and 8 where they divide the experts.
        ranks_per_node: of them; None without nodes.
        placed: on as many ranks; None where experts lie in order.
    """
    numbers_of_ranks = [ranks] if ranks else [n for n in (2, 4, 8) if counts.experts % n == 0]
    groups = {f"ranks of {n}": n for n in numbers_of_ranks if n <= counts.experts}
    if ranks and ranks_per_node and ranks_per_node < ranks:
        groups[f"nodes of {ranks // ranks_per_node}"] = ranks // ranks_per_node
    header = ["layer", "tokens", "top 1", "top 2", "top 3", "entropy", "partners", "load", *groups]
    rows = []
    for number, layer in counts.layers.items():
        own = closeness(layer)
        distinct = [
            layer.distinct(placement.groups_of(counts.experts, n, number, placed))
            for n in groups.values()
        ]
        rows.append([*own.shares, own.entropy, own.partners, own.load, *distinct])
    lines = [
        [str(number), str(layer.tokens), *_cells(row)]
        for (number, layer), row in zip(counts.layers.items(), rows, strict=True)
    ]
    if len(rows) > 1:
        lines.append(["mean", "", *_cells(np.mean(rows, axis=0))])
    notes = (
        "top N: share of an expert's pairs with its N best partners. entropy: 1 where all partners "
        "are\nequally frequent. load: busiest expert / mean. ranks of N: different ranks that a "
        f"token's {counts.topk} experts\nlie on, N ranks, experts "
        f"{'in order' if placed is None else 'placed'}."
    )
    return f"{table(header, lines)}\n\n{notes}"


def _cells(row: "list[float] | np.ndarray") -> list[str]:
    shares, others = row[:3], row[3:]
    return [*(percent(share) for share in shares), *(f"{value:.3f}" for value in others)]


def offer_place(parser: argparse.ArgumentParser) -> None:
    """Of `place`."""
    offer_matrix(parser)
    offer_ranks(parser, required=True)
    parser.add_argument(
        "--max-imbalance",
        type=float,
        default=MAX_IMBALANCE,
        metavar="X",
        help="Rows of the busiest rank / mean that are allowed; default: %(default)s.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="The placement, as JSON."
    )


def write_place(args: argparse.Namespace) -> None:
    """The verb `place`.

    Raises:
        ValueError: one line.
    """
    counts = collaboration.read(args.matrix)
    check_ranks(args, counts.experts)
    if not args.max_imbalance >= 1:
        raise ValueError(f"--max-imbalance {args.max_imbalance} is not at least 1.")
    per_node = args.ranks_per_node or args.ranks
    layers = {
        number: place(Chosen.of_counts(layer), args.ranks, per_node, args.max_imbalance)
        for number, layer in counts.layers.items()
    }
    origin = {"matrix": str(args.matrix), "max_imbalance": args.max_imbalance}
    placed = Placement(counts.experts, args.ranks, per_node, layers, origin | counts.provenance)
    placement.write(args.output, placed)
    print(of_placement(counts, placed, args.max_imbalance))
    print(f"\n{args.output}")


def of_placement(counts: Collaboration, placed: Placement, max_imbalance: float) -> str:
    """A table with a line for every layer: copies and load, in order and placed."""
    in_order = replace(
        placed, layers=dict.fromkeys(placed.layers, contiguous(counts.experts, placed.ranks))
    )
    has_nodes = placed.ranks_per_node < placed.ranks
    header = ["layer", "copies, ranks", "placed", *["nodes", "placed"] * has_nodes]
    header += ["busiest rank", "placed", "load of ranks"]
    try:
        before, after = placement.copies(in_order, counts), placement.copies(placed, counts)
    except ValueError:
        before = after = dict.fromkeys(placed.layers, Copies(nan, nan))
    rows, shares = [], []
    for number in counts.layers:
        pairs = [*zip(before[number], after[number], strict=True)][: 1 + has_nodes]
        loads = [load_of_ranks(counts, one, number) for one in (in_order, placed)]
        rows.append([*(copies for pair in pairs for copies in pair), *(max(of) for of in loads)])
        shares.append(loads[1])
    lines = [
        [str(number), *(f"{value:.3f}" for value in row), _loads(of_ranks)]
        for number, row, of_ranks in zip(counts.layers, rows, shares, strict=True)
    ]
    means = [f"{value:.3f}" for value in np.mean(rows, axis=0)]
    lines.append(["mean", *means, _loads(np.mean(shares, axis=0))])
    notes = [
        f"Copies: different ranks, or nodes, of a token's {counts.topk} experts, in order and "
        "placed. Load: rows of a rank / mean.",
    ]
    if isnan(rows[0][0]):
        notes.append("nan: these counts are of pairs alone, and a token has more than two experts.")
    over = [
        number for number, of in zip(counts.layers, shares, strict=True) if max(of) > max_imbalance
    ]
    if over:
        notes.append(
            f"No placement with a busiest rank of at most {max_imbalance} was found for layer "
            f"{numbers(over)}."
        )
    return "\n".join([table(header, lines), "", *notes])


def load_of_ranks(counts: Collaboration, placed: Placement, layer: int) -> np.ndarray:
    """Rows of every rank / mean; 1 without any row."""
    rows = np.bincount(placed.rank_of(layer), counts.layers[layer].chosen)
    return rows / rows.mean() if rows.any() else np.ones(len(rows))


def _loads(of_ranks: np.ndarray) -> str:
    """Of every rank, or of many the least and the most."""
    if len(of_ranks) <= SHOWN_RANKS:
        return " ".join(f"{load:.2f}" for load in of_ranks)
    return f"{of_ranks.min():.2f} to {of_ranks.max():.2f}"


Verb = tuple[
    str,
    Callable[[argparse.Namespace], None],
    str,
    Callable[[argparse.ArgumentParser], None],
]
VERBS: tuple[Verb, ...] = (
    ("report", write_report, "Print how the experts keep together.", offer_report),
    ("place", write_place, "Write which rank every expert is to lie on.", offer_place),
    ("lists", write_lists, "Write the partners of every expert.", offer_lists),
)


if __name__ == "__main__":
    sys.exit(main())
