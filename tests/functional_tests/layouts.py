"""Every layout computes what one process computes, and goes on from every other's checkpoint.

    python -m tests.functional_tests.layouts train         the first table of docs/verification.md
    python -m tests.functional_tests.layouts checkpoints   the second one

Both run the entry script on real text (the license, a token per byte) with forked gloo ranks and
print a table in Markdown; exit code 1 if a row is outside the tolerance. Some minutes on two cores.
"""

import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.functional_tests.forked import launch_forked
from tests.functional_tests.launch import read_scalars
from tests.functional_tests.text import write_text

TOLERANCE = 1e-5  # relative, in float32
BF16_TOLERANCE = 2e-2
POSITIONS = ("pos1", "pos2", "pos3")
CURVES = ("lm loss", "grad-norm")

# Adam divides by the root of the second moment: with its default epsilon a gradient that is
# rounding noise makes a full step, in a direction that depends on the order of a sum.
MODEL = (
    "--num-layers 8 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 "
    "--seq-length 32 --max-position-embeddings 32 --global-batch-size 16 --lr 2e-3 "
    "--lr-decay-style constant --adam-eps 1e-5 --log-interval 1 --eval-interval 1000 "
    "--eval-iters 0 --num-workers 0 --tokenizer-type NullTokenizer --vocab-size 256 "
    "--make-vocab-size-divisible-by 32 --seed 1 --split 100,0,0 --num-experts 8 "
    "--moe-layer-freq ([0,1]*4) --moe-ffn-hidden-size 48 --moe-router-topk 2 "
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none"
)
# The bias is a buffer that follows the tokens of all ranks.
EXPERT_BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
MOEPP = (
    "--scmoe-num-zero-experts 1 --scmoe-num-copy-experts 1 --scmoe-num-constant-experts 2 "
    "--moe-router-pre-softmax"
)
# With the loss's coefficient 0: the loss of a micro-batch is not that of its parts.
GATED = (
    f"{MOEPP} --scmoe-router heterogeneous --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 0 --scmoe-gating-residual --scmoe-gate-layers 2"
)
# LongCat-Flash's MoE: the bias moves visibly and less and less.
LONGCAT = (
    "--scmoe-router longcat --scmoe-num-copy-experts 4 --scmoe-routed-topk 1.5 "
    "--moe-router-bias-update-rate 0.1 --scmoe-bias-decay linear --scmoe-scaled-experts routed "
    "--moe-router-topk-scaling-factor 2 --scmoe-combine add --scmoe-shortcut-norm shared "
    "--moe-shared-expert-intermediate-size 96"
)
DGMOE = "--scmoe-dual-gating separate --moe-router-topk 1 --moe-router-pre-softmax"
DISTRIBUTED = "--use-distributed-optimizer"
OVERLAPPED = f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
ONCE = "--scmoe-dispatch-copies rank"
ALL_GATHER = "--moe-token-dispatcher-type allgather"


@dataclass(frozen=True)
class Layout:
    """How many ranks, and the options that say how they share the work."""

    name: str
    ranks: int
    options: str
    variant: str = ""
    """Options of another model (or precision), whose single process is the reference."""

    @property
    def tolerance(self) -> float:
        return BF16_TOLERANCE if "--bf16" in self.variant else TOLERANCE


LAYOUTS = (
    Layout("DP 2", 2, ""),
    Layout("DP 4, distributed optimizer, overlapped", 4, OVERLAPPED),
    Layout("gradient accumulation over 8 micro-batches", 1, "--micro-batch-size 2"),
    Layout("EP 2", 2, EP2),
    Layout("EP 4, distributed optimizer", 4, f"--expert-model-parallel-size 4 {DISTRIBUTED}"),
    Layout("EP 8", 8, "--expert-model-parallel-size 8"),
    Layout("EP 2, expert DP 2, distributed optimizer, overlapped", 4, f"{EP2} {OVERLAPPED}"),
    Layout("TP 2, sequence parallel", 2, TP2),
    Layout("TP 2, expert TP 1, EP 2", 2, f"{TP2} --expert-tensor-parallel-size 1 {EP2}"),
    Layout("TP 2, expert TP 2, EP 2", 4, f"{TP2} --expert-tensor-parallel-size 2 {EP2}"),
    Layout("TP 1, expert TP 2, EP 2", 4, f"--expert-tensor-parallel-size 2 {EP2}"),
    Layout("EP 4, all-gather", 4, f"--expert-model-parallel-size 4 {ALL_GATHER}"),
    Layout(
        "TP 2, expert TP 2, EP 2, all-gather",
        4,
        f"{TP2} --expert-tensor-parallel-size 2 {EP2} {ALL_GATHER}",
    ),
    Layout("EP 2, 3 chunks", 2, f"{EP2} --scmoe-num-chunks 3"),
    Layout("EP 4, a row for each rank", 4, f"--expert-model-parallel-size 4 {ONCE}"),
    Layout(
        "TP 2, expert TP 2, EP 2, 3 chunks, a row for each rank",
        4,
        f"{TP2} --expert-tensor-parallel-size 2 {EP2} --scmoe-num-chunks 3 {ONCE}",
    ),
    Layout(
        "EP 4, a row for each node of 2 ranks",
        4,
        "--expert-model-parallel-size 4 --scmoe-dispatch-copies node --scmoe-ranks-per-node 2",
    ),
    Layout("PP 2", 2, PP2),
    Layout("PP 4", 4, "--pipeline-model-parallel-size 4"),
    Layout("PP 2, interleaved", 2, f"{PP2} --num-layers-per-virtual-pipeline-stage 2"),
    Layout(
        "PP 2, 2 + 6 layers",
        2,
        f"{PP2} --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 6",
    ),
    Layout(
        "PP 4 by --pipeline-model-parallel-layout",
        4,
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout E|tttt|tt|ttL",
    ),
    Layout("PP 2, EP 2", 4, f"{PP2} {EP2} {DISTRIBUTED}"),
    Layout(
        "PP 2, TP 2, expert TP 1, EP 2", 4, f"{PP2} {TP2} --expert-tensor-parallel-size 1 {EP2}"
    ),
    Layout("PP 2, EP 2, expert DP 2, overlapped", 8, f"{PP2} {EP2} {OVERLAPPED}"),
    Layout(
        "PP 2 interleaved, TP 2, EP 2, expert DP 2",
        8,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 2 {TP2} --expert-tensor-parallel-size 1 "
        f"{EP2} {OVERLAPPED}",
    ),
    Layout(
        "EP 2, full recomputation",
        2,
        f"{EP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    Layout(
        "PP 2, EP 2, block recomputation",
        4,
        f"{PP2} {EP2} --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 1",
    ),
    Layout(
        "EP 2, selective recomputation",
        2,
        f"{EP2} --recompute-granularity selective --recompute-modules core_attn moe mlp layernorm",
    ),
    Layout(
        "PP 2, EP 2, untied embeddings",
        4,
        f"{PP2} {EP2}",
        "--untie-embeddings-and-output-weights --seed 7",
    ),
    Layout("EP 2, expert bias", 2, EP2, EXPERT_BIAS),
    Layout(
        "MoE++, EP 2, 3 chunks, all-gather", 2, f"{EP2} {ALL_GATHER} --scmoe-num-chunks 3", MOEPP
    ),
    Layout(
        "MoE++, TP 2, expert TP 2, EP 2", 4, f"{TP2} --expert-tensor-parallel-size 2 {EP2}", GATED
    ),
    Layout(
        "MoE++, PP 2 interleaved, EP 2, full recomputation",
        4,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 2 {EP2} {OVERLAPPED} "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        MOEPP,
    ),
    Layout("LongCat-Flash, EP 4, expert DP 2", 8, "--expert-model-parallel-size 4", LONGCAT),
    Layout("LongCat-Flash, TP 2, EP 2", 2, f"{TP2} --expert-tensor-parallel-size 1 {EP2}", LONGCAT),
    Layout(
        "LongCat-Flash, PP 2 interleaved, EP 2, full recomputation",
        4,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 2 {EP2} {OVERLAPPED} "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        LONGCAT,
    ),
    Layout("DGMoE, EP 2, expert DP 2, overlapped", 4, f"{EP2} {OVERLAPPED}", DGMOE),
    Layout(
        "DGMoE, TP 2, expert TP 1, EP 2", 2, f"{TP2} --expert-tensor-parallel-size 1 {EP2}", DGMOE
    ),
    Layout(
        "DGMoE, TP 2, expert TP 2, EP 2, 3 chunks, all-gather",
        4,
        f"{TP2} --expert-tensor-parallel-size 2 {EP2} {ALL_GATHER} --scmoe-num-chunks 3",
        DGMOE,
    ),
    Layout(
        "DGMoE, PP 2 interleaved, EP 2, full recomputation",
        4,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 2 {EP2} {OVERLAPPED} "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        DGMOE,
    ),
    Layout(
        "DGMoE, gates of one weight, any experts, EP 2, selective recomputation",
        2,
        f"{EP2} --recompute-granularity selective --recompute-modules core_attn moe mlp layernorm",
        f"{DGMOE} --scmoe-dual-gating shared --no-scmoe-distinct-experts",
    ),
    Layout("PP 2, EP 2, bf16", 4, f"{PP2} {EP2} {DISTRIBUTED}", "--bf16"),
)

# Saved at each, loaded at each.
CHECKPOINT_LAYOUTS = {
    "1": Layout("1 rank", 1, ""),
    "DP4": Layout("DP 4", 4, "--overlap-grad-reduce --overlap-param-gather"),
    "EP2": Layout("EP 2", 2, EP2),
    "EP4xDP2": Layout("EP 4, expert DP 2", 8, "--expert-model-parallel-size 4"),
    "TP2xEP2": Layout("TP 2, EP 2", 2, f"{TP2} --expert-tensor-parallel-size 1 {EP2}"),
    "ETP2xEP2": Layout("expert TP 2, EP 2", 4, f"--expert-tensor-parallel-size 2 {EP2}"),
    "PP2": Layout("PP 2, 2 + 6 layers", 2, f"{PP2} --decoder-first-pipeline-num-layers 2"),
    "PP2xVPP2": Layout("PP 2, interleaved", 2, f"{PP2} --num-layers-per-virtual-pipeline-stage 2"),
    "PP2xEP2xDP2": Layout("PP 2, EP 2, expert DP 2", 8, f"{PP2} {EP2} --overlap-grad-reduce"),
}

Curves = dict[str, dict[int, float]]


class Runs:
    """Runs of the entry script under one folder.

    Args:
        steps: of a run that is compared; checkpoints are those of their middle.
    """

    def __init__(self, folder: Path, steps: int = 10) -> None:
        self.steps = steps
        self.folder = folder
        self._variants: dict[str, int] = {}
        self._references: dict[tuple[str, str], Curves] = {}
        write_text(folder)

    def train(self, layout: Layout, name: str, *options: str) -> Curves:
        """Curves of a run in full float32."""
        folder = self.folder / name
        arguments = [*shlex.split(MODEL), "--micro-batch-size", "2", "--data-path"]
        arguments += [str(self.folder / "license"), "--data-cache-path", str(self.folder / "cache")]
        arguments += ["--tensorboard-dir", str(folder), "--tensorboard-log-interval", "1"]
        arguments += shlex.split(f"{layout.options} {layout.variant}")
        run = launch_forked([*arguments, *options], layout.ranks, folder)
        if run.returncode != 0:
            raise RuntimeError(f"{name}: {run.returncode}\n{run.stdout[-3000:]}")
        return {tag: read_scalars(folder, tag) for tag in CURVES}

    def initial_checkpoint(self, variant: str) -> list[str]:
        """Options that start a run from one set of initial weights."""
        self._variants.setdefault(variant, len(self._variants))
        name = f"initial-{self._variants[variant]}"
        folder = self.folder / f"{name}-checkpoint"
        if not folder.exists():
            save = ["--train-iters", "1", "--save", str(folder), "--save-interval", "1"]
            one = Layout("1 rank", 1, "", variant)
            self.train(one, name, *save, "--no-save-optim", "--scmoe-shortcut-position", "pos2")
        return ["--load", str(folder), "--finetune"]

    def reference(self, variant: str, position: str, options: list[str]) -> Curves:
        """Curves of one process."""
        key = (variant, position)
        if key not in self._references:
            one = Layout("1 rank", 1, "--micro-batch-size 16", variant)
            name = f"reference {len(self._references)}"
            self._references[key] = self.train(one, name, *options)
        return self._references[key]


def deviation(curves: Curves, reference: Curves) -> tuple[float, float]:
    """Largest relative difference of loss and of gradient norm, over all steps.

    Raises:
        RuntimeError: other steps than the reference.
    """
    found = []
    for tag in CURVES:
        if curves[tag].keys() != reference[tag].keys():
            raise RuntimeError(f"{tag}: steps {sorted(curves[tag])}, not {sorted(reference[tag])}")
        found.append(max(abs(curves[tag][i] / value - 1) for i, value in reference[tag].items()))
    return found[0], found[1]


def compare_layouts(
    runs: Runs, layouts: tuple[Layout, ...], positions: tuple[str, ...] = POSITIONS
) -> Iterator:
    """(layout, position, deviation of the loss, deviation of the gradient norm)."""
    for layout in layouts:
        for position in positions:
            options = ["--train-iters", str(runs.steps), "--scmoe-shortcut-position", position]
            options += runs.initial_checkpoint(layout.variant)
            reference = runs.reference(layout.variant, position, options)
            curves = runs.train(layout, f"{layout.name} {position}", *options)
            yield layout, position, *deviation(curves, reference)


def compare_checkpoints(runs: Runs, names: tuple[str, ...], variant: str = EXPERT_BIAS) -> Iterator:
    """(saved at, loaded at, deviation of loss, of gradient norm) of the steps after the load."""
    common = [*shlex.split(f"{variant} {DISTRIBUTED}"), "--train-iters", str(runs.steps)]
    common += ["--scmoe-shortcut-position", "pos2"]
    middle = runs.steps // 2
    for saved in names:
        folder = str(runs.folder / f"checkpoint-{saved}")
        save = ["--save", folder, "--save-interval", str(middle)]
        whole = runs.train(CHECKPOINT_LAYOUTS[saved], f"saved {saved}", *common, *save)
        rest = {tag: {i: v for i, v in whole[tag].items() if i > middle} for tag in CURVES}
        for loaded in names:
            load = ["--load", folder, "--ckpt-step", str(middle)]
            layout = CHECKPOINT_LAYOUTS[loaded]
            curves = runs.train(layout, f"{saved} to {loaded}", *common, *load)
            yield saved, loaded, *deviation(curves, rest)


def print_layouts(runs: Runs) -> bool:
    """The table of layouts; whether every row is within its tolerance."""
    print("| layout | ranks | " + " | ".join(f"{p}: loss, norm" for p in POSITIONS) + " |")
    print("|---|---|" + "---|" * len(POSITIONS))
    good = True
    cells: list[str] = []
    for layout, _, loss, norm in compare_layouts(runs, LAYOUTS, POSITIONS):
        cells.append(f"{loss:.1e}, {norm:.1e}")
        # In bf16 the norm follows single roundings.
        good &= (loss if "--bf16" in layout.variant else max(loss, norm)) <= layout.tolerance
        if len(cells) == len(POSITIONS):
            print(f"| {layout.name} | {layout.ranks} | {' | '.join(cells)} |", flush=True)
            cells.clear()
    return good


def print_checkpoints(runs: Runs) -> bool:
    """The table of saved against loaded; whether every cell is within the tolerance."""
    names = tuple(CHECKPOINT_LAYOUTS)
    print("| saved at, loaded at | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    good = True
    cells: list[str] = []
    for saved, _, loss, norm in compare_checkpoints(runs, names):
        cells.append("0" if loss == norm == 0 else f"{max(loss, norm):.1e}")
        good &= max(loss, norm) <= TOLERANCE
        if len(cells) == len(names):
            print(f"| {saved} | {' | '.join(cells)} |", flush=True)
            cells.clear()
    return good


if __name__ == "__main__":
    programs = {"train": print_layouts, "checkpoints": print_checkpoints}
    if len(sys.argv) != 2 or sys.argv[1] not in programs:
        sys.exit(f"usage: python -m tests.functional_tests.layouts {'|'.join(programs)}")
    with tempfile.TemporaryDirectory() as name:
        sys.exit(0 if programs[sys.argv[1]](Runs(Path(name))) else 1)
