"""The page of a folder of results: who learns how well, beside what the papers say."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_scmoe.words import markdown_table, percent, read_json
from tools.quality.contenders import BY_NAME, CONTENDERS, QualityContender
from tools.quality.papers import ORDERINGS, Ordering
from tools.quality.runs import RunResult
from tools.quality.scales import Scale
from tools.quality.statistics import SIGNIFICANCE, PairedSeeds, spread

WORDS = {
    "better": "reproduced",
    "worse": "**not reproduced**",
    "no difference": "not distinguishable",
    "one seed": "one seed: not judged",
    "not run": "not run",
}


@dataclass
class Found:
    """What a folder holds."""

    runs: dict[str, dict[int, RunResult]] = field(default_factory=dict)
    """By contender and seed."""
    rates: dict[str, dict[float, RunResult]] = field(default_factory=dict)
    """The short runs that chose a rate, by contender and rate."""
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)

    def held_out(self, name: str) -> dict[int, float]:
        """Losses by seed."""
        return {seed: result.validation for seed, result in self.runs.get(name, {}).items()}

    def compared(self, one: str, other: str) -> PairedSeeds:
        return PairedSeeds.of(self.held_out(one), self.held_out(other))

    @property
    def results(self) -> list[RunResult]:
        return [result for some in self.runs.values() for result in some.values()]


def read(folder: Path) -> Found:
    """Everything that is there of contenders that there are.

    Raises:
        ValueError: a file is damaged; one line that names it.
    """
    found = Found()
    for path in sorted((folder / "runs").glob("*.json")):
        result = RunResult.read(path)
        if result.contender not in BY_NAME:
            continue
        if ".rate-" in path.name:
            found.rates.setdefault(result.contender, {})[result.rate] = result
        else:
            found.runs.setdefault(result.contender, {})[result.seed] = result
    for path in sorted((folder / "claims").glob("*.json")):
        found.claims[path.stem] = _read(path)
    if (folder / "sizes.json").exists():
        found.sizes = _read(folder / "sizes.json")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: remove it, and it is made again.") from error


def page(found: Found, scale: Scale, name: str, corpus: Mapping[str, Any]) -> str:
    """Markdown."""
    parts = [
        f"# Quality, scale `{name}`",
        "A test of the program: these numbers say nothing." if name == "smoke" else "",
        _head(found, scale, name, corpus),
        "## Contenders",
        "\n".join(contender_table(found, scale)),
        "## The papers' orderings",
        "\n".join(ordering_table(found)),
        _count(found),
        "## In passing",
        *in_passing(found),
        "## Learning rates",
        "\n".join(rate_table(found, scale)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Found, scale: Scale, name: str, corpus: Mapping[str, Any]) -> str:
    results = found.results
    if not results:
        return "Nothing has run."
    machines = {f"{r.machine['processor']}, {r.machine['cores']} cores" for r in results}
    commits = sorted({result.commit for result in results})
    runs = [(each, len(found.runs.get(each.name, {}))) for each in CONTENDERS]
    wanted = sum(len(scale.seeds_of(each.main)) for each in CONTENDERS)
    return "\n".join(
        (
            f"{sum(n for _, n in runs)} of {wanted} runs. {scale.num_layers} layers, hidden size "
            f"{scale.hidden_size}, {scale.num_experts} experts of {scale.ffn_hidden_size}, "
            f"sequences of {scale.seq_length}; {scale.tokens:,} tokens a run, {scale.iterations} "
            f"iterations of {scale.batch} sequences, less than an epoch of the text. Text: the "
            f"standard library of Python {corpus['python_version']} (PSF-2.0), "
            f"{corpus['train_bytes'] / 1e6:.1f} MB, and {corpus['valid_bytes'] / 1e6:.2f} MB held "
            f"out by document, byte-level BPE of {scale.vocabulary:,}; digest {results[0].digest}. "
            f"{'; '.join(sorted(machines))}; commit {', '.join(commits)}. Command:",
            "",
            "```",
            f"python -m tools.quality --scale {name} --output DIR",
            "```",
        )
    )


def contender_table(found: Found, scale: Scale) -> list[str]:
    """Rows in the order of the table of contenders."""
    header = ["contender", "held-out loss", "seeds", "FLOPs", "parameters", "against"]
    header += ["difference", "p", "verdict", "equal, beside tokens and order"]
    return markdown_table(header, (_row(found, each) for each in CONTENDERS))


def _row(found: Found, each: QualityContender) -> list[str]:
    losses = list(found.held_out(each.name).values())
    size = found.sizes.get(each.name)
    base = found.sizes.get("top2")
    compared = found.compared(each.name, each.against)
    itself = each.against == each.name
    return [
        each.title,
        _loss(losses),
        str(len(losses)),
        f"{size['flops'] / base['flops']:.2f}" if size and base else "",
        f"{size['parameters'] / 1e6:.2f} M" if size else "",
        "" if itself else BY_NAME[each.against].title,
        "" if itself or not compared.differences else f"{compared.mean:+.4f}",
        "" if itself or compared.p is None else f"{compared.p:.3f}",
        "" if itself else compared.verdict,
        each.equal,
    ]


def _loss(losses: list[float]) -> str:
    if not losses:
        return ""
    scatter = spread(losses)
    return f"{fmean(losses):.4f}" + ("" if scatter is None else f" ± {scatter:.4f}")


def ordering_table(found: Found) -> list[str]:
    """What a paper says is better than what, and what came out."""
    header = ["better in the paper", "than", "source", "printed", "difference here", "p", "here"]
    return markdown_table(header, (_ordering(found, each) for each in ORDERINGS))


def _ordering(found: Found, each: Ordering) -> list[str]:
    compared = found.compared(each.better, each.worse)
    return [
        BY_NAME[each.better].title,
        BY_NAME[each.worse].title,
        each.source,
        each.numbers,
        f"{compared.mean:+.4f}" if compared.differences else "",
        "" if compared.p is None else f"{compared.p:.3f}",
        WORDS[compared.verdict],
    ]


def _count(found: Found) -> str:
    verdicts = [found.compared(each.better, each.worse).verdict for each in ORDERINGS]
    counts = (f"{verdicts.count(verdict)} {word.strip('*')}" for verdict, word in WORDS.items())
    return (
        f"{len(verdicts)} orderings: {'; '.join(counts)}. Differences are in nats per token, below "
        "0 where the first is better here; p is of a paired test over seeds, and from "
        f"{SIGNIFICANCE} on there is no difference. Of many such tests one in twenty errs."
    )


def in_passing(found: Found) -> Iterable[str]:
    """What the papers claim beside their tables."""
    cosines = {
        name: claim["cosines"] for name, claim in found.claims.items() if claim.get("cosines")
    }
    if cosines:
        layers = max(map(len, cosines.values()))
        header = [
            "cosine of what a layer reads and what it hands on",
            *map(str, range(1, layers + 1)),
        ]
        yield "\n".join(
            markdown_table(
                header,
                (
                    [BY_NAME[name].title, *(f"{x:.3f}" for x in some)]
                    for name, some in cosines.items()
                ),
            )
        )
    agree = [
        [BY_NAME[name].title, percent(result.extras["gates agree"])]
        for name in ("dgmoe", "dgmoe-any")
        for seed, result in found.runs.get(name, {}).items()
        if seed == 1 and "gates agree" in result.extras
    ]
    if agree:
        header = ["", "tokens for which both gates rank one expert first, end of training"]
        yield "\n".join(markdown_table(header, agree))
    kinds = {name: claim["experts"] for name, claim in found.claims.items() if claim.get("experts")}
    for name, by_kind in kinds.items():
        if name.startswith("moepp"):
            rows = sorted(by_kind.items(), key=lambda item: -item[1][1])
            header = [f"{BY_NAME[name].title}: kind of token", "tokens", "FFN experts of a token"]
            yield "\n".join(
                markdown_table(header, ([kind, f"{n:,}", f"{x:.3f}"] for kind, (n, x) in rows))
            )


def rate_table(found: Found, scale: Scale) -> list[str]:
    """Held-out losses of the short runs; the chosen one is bold."""
    if not found.rates:
        return []
    header = [f"seed {scale.rate_seed}, {scale.rate_iterations} iterations"]
    header += [f"{rate:g}" for rate in scale.rates]
    rows = []
    for each in CONTENDERS:
        some = found.rates.get(each.name, {})
        if some:
            best = min(some, key=lambda rate: some[rate].validation)
            cells = (
                f"**{some[rate].validation:.4f}**"
                if rate == best
                else f"{some[rate].validation:.4f}"
                if rate in some
                else ""
                for rate in scale.rates
            )
            rows.append([each.title, *cells])
    return markdown_table(header, rows)
