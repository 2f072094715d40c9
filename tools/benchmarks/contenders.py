"""Who is compared, as a table: layers, and the Megatron command line that makes them.

All have the data, the sizes and the expert FLOPs of the group that they stand in:

    two experts a token      top2, shared, pos1, pos2, pos3
    three experts a token    top3, scmoe2

`top2`, `top3` and `shared` are stock Megatron (`--scmoe-shortcut-position none`; bit for bit:
tests/functional_tests/test_scmoe.py::test_none_is_stock_megatron).
"""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_scmoe.overlap.schedule import POSITIONS, window
from tools.benchmarks.real_text import VOCABULARY

# Layers of Megatron's own, without kernels of Transformer Engine and apex, which need a build.
LOCAL = shlex.split(
    "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-rope-fusion --no-persist-layer-norm"
)


def _size(default: int, what: str) -> Any:
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the model and of a step, for each of two ranks."""

    hidden_size: int = _size(256, "of the model")
    ffn_hidden_size: int = _size(1024, "of the dense MLP, the shared and every routed expert")
    num_attention_heads: int = _size(4, "of every layer")
    num_layers: int = _size(2, "attention layers, as on Megatron's command line")
    num_experts: int = _size(8, "routed experts of a layer, over both ranks")
    seq_length: int = _size(128, "tokens of a sample")
    micro_batch_size: int = _size(8, "samples of a micro-batch on each rank")
    num_micro_batches: int = _size(
        4, "of a step; the more, the less its gradients weigh, which cross the same link"
    )
    moe_every_layer: bool = _size(
        False, "LLaMA2-MoE's layout; by default every second layer, as in the paper's GPT models"
    )

    @property
    def moe_layer_freq(self) -> str:
        if self.moe_every_layer:
            return f"([1]*{self.num_layers})"
        return f"([0,1]*{self.num_layers // 2})"

    def options(self) -> list[str]:
        """The part of the command line that all contenders share."""
        return shlex.split(
            f"--num-layers {self.num_layers} --moe-layer-freq {self.moe_layer_freq} "
            f"--hidden-size {self.hidden_size} --ffn-hidden-size {self.ffn_hidden_size} "
            f"--num-attention-heads {self.num_attention_heads} --disable-bias-linear "
            f"--position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 "
            f"--seq-length {self.seq_length} --max-position-embeddings {self.seq_length} "
            f"--micro-batch-size {self.micro_batch_size} "
            f"--global-batch-size {2 * self.micro_batch_size * self.num_micro_batches} "
            f"--num-experts {self.num_experts} --moe-ffn-hidden-size {self.ffn_hidden_size} "
            "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
            # A few steps do not balance a router, and an exchange lasts while one rank waits for
            # the other.
            "--moe-router-force-load-balancing "
            # What a shortcut with top-1 needs; for all, so that all route in the same way.
            "--moe-router-pre-softmax "
            "--moe-token-dispatcher-type alltoall --expert-model-parallel-size 2 "
            "--lr 1e-3 --seed 1234"
        )

    def shared_expert(self) -> list[str]:
        """Stock Megatron's shared expert, with the gate that ScMoE has by default."""
        size = str(self.ffn_hidden_size)
        return ["--moe-shared-expert-intermediate-size", size, "--moe-shared-expert-gate"]


class MoELayers(Protocol):
    """Where a model has MoE layers."""

    @property
    def moe_every_layer(self) -> bool: ...


@dataclass(frozen=True)
class Contender:
    """One row of the comparison; its first fields are those of the planner's measured runs."""

    name: str
    position: str
    topk: int
    shared_expert: bool
    baseline: str = "top2"
    """Whose time it is compared with."""
    options: tuple[str, ...] = ()
    """More of the entry script's."""

    def command_line(self, sizes: Sizes) -> list[str]:
        """What distinguishes its run from those of the others."""
        own = ["--moe-router-topk", str(self.topk), "--scmoe-shortcut-position", self.position]
        return [*own, *(sizes.shared_expert() if self.shared_expert else ()), *self.options]

    def as_run(self, seconds: float) -> dict[str, Any]:
        """A row of `runs` in the planner's file, of a block that was built."""
        run: dict[str, Any] = {"position": self.position, "topk": self.topk, "seconds": seconds}
        if self.position == "none":
            return run | {"shared_expert": self.shared_expert}
        return run | {"slot": POSITIONS[self.position].default_slot, "overlap": True}


def contenders(layout: MoELayers) -> list[Contender]:
    """Two experts a token: everybody that this layout allows, baselines first."""
    return [
        Contender("top2", "none", 2, False),
        Contender("shared", "none", 1, True),
        *(Contender(position, position, 1, True) for position in positions_of(layout)),
    ]


def wider_contenders(layout: MoELayers) -> list[Contender]:
    """Three experts a token."""
    positions = positions_of(layout)
    last = "pos2" if "pos2" in positions else positions[0]
    return [
        Contender("top3", "none", 3, False, baseline="top3"),
        Contender("scmoe2", last, 2, True, baseline="top3"),
    ]


def positions_of(layout: MoELayers) -> tuple[str, ...]:
    """Shortcut positions that this layout allows; some need a dense layer in front."""
    return tuple(
        name for name, at in POSITIONS.items() if not (layout.moe_every_layer and at.is_pair)
    )


def fixed_slots(contender: Contender) -> list[Contender]:
    """A contender with a shortcut, once for every expert slot that its window allows."""
    return [
        replace(
            contender,
            name=f"{contender.name}/slot{slot}",
            options=(*contender.options, "--scmoe-expert-slot", str(slot)),
        )
        for slot in range(len(window(contender.position)) + 1)
    ]


def run_options(prefix: Path, cache: Path, iterations: int) -> list[str]:
    """Data, length and log of one run: a forward-only pass follows every training step."""
    return shlex.split(
        f"--data-path {prefix} --data-cache-path {cache} --split 95,5,0 --num-workers 0 "
        f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
        f"--make-vocab-size-divisible-by 64 --train-iters {iterations} --eval-interval 1 "
        f"--eval-iters 1 --log-interval 1 --timing-log-level 1 --logging-level 20"
    )
