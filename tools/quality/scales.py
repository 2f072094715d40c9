"""How large everything is: model, text, runs. What two results must share to be compared."""

import shlex
from dataclasses import dataclass
from typing import Any

from tools.benchmarks.contenders import LOCAL


@dataclass(frozen=True)
class Scale:
    """Sizes of the model and of a run, for all contenders."""

    hidden_size: int
    ffn_hidden_size: int
    """Of a dense MLP, the shared and every routed expert."""
    num_layers: int
    num_attention_heads: int
    num_experts: int
    seq_length: int
    batch: int
    """Sequences of an iteration."""
    vocabulary: int
    megabytes: float
    """Of text, training and held-out together, at most."""
    iterations: int
    rate_iterations: int
    """Of the shorter runs that choose a learning rate."""
    eval_iterations: int
    """Batches of held-out text behind a run."""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """The learning rates that everybody may choose from."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of weights and data order."""
    seeds_of_others: int = 1
    """How many of them contenders have that are not the main ones."""
    rate_seed: int = 100
    jobs: int = 2
    """Runs at a time."""
    platform: tuple[str, ...] = ()
    """Options of the machine that it is meant for."""

    @property
    def tokens(self) -> int:
        """Of a run."""
        return self.iterations * self.batch * self.seq_length

    def seeds_of(self, main: bool) -> tuple[int, ...]:
        """Those of a contender."""
        return self.seeds if main else self.seeds[: self.seeds_of_others]

    @property
    def log_interval(self) -> int:
        return max(1, self.iterations // 40)

    def model_options(self) -> list[str]:
        """Model and optimizer, the same for all contenders."""
        return shlex.split(
            f"--num-layers {self.num_layers} --hidden-size {self.hidden_size} "
            f"--ffn-hidden-size {self.ffn_hidden_size} "
            f"--num-attention-heads {self.num_attention_heads} "
            f"--seq-length {self.seq_length} --max-position-embeddings {self.seq_length} "
            "--position-embedding-type rope --normalization RMSNorm --swiglu "
            "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
            f"--micro-batch-size {self.batch} --global-batch-size {self.batch} "
            "--weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0"
        ) + list(self.platform)

    def schedule(self, iterations: int, rate: float, seed: int, evaluation: int) -> list[str]:
        """Warm-up over a tenth, cosine down to a tenth; one evaluation, behind the last step."""
        return shlex.split(
            f"--train-iters {iterations} --lr {rate:g} --min-lr {rate / 10:g} "
            f"--lr-decay-style cosine --lr-warmup-iters {max(1, iterations // 10)} --seed {seed} "
            f"--eval-interval {iterations + 1} --eval-iters {evaluation} "
            f"--log-interval {self.log_interval}"
        )

    def as_json(self) -> dict[str, Any]:
        """What decides over a result; not how many runs there are, nor how many at a time."""
        kept = set(vars(self)) - {"jobs", "seeds", "seeds_of_others"}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name in kept
        }


SCALES = {
    # A test of the program.
    "smoke": Scale(
        hidden_size=32,
        ffn_hidden_size=32,
        num_layers=4,
        num_attention_heads=2,
        num_experts=8,
        seq_length=32,
        batch=8,
        vocabulary=512,
        megabytes=1.0,
        iterations=8,
        rate_iterations=2,
        eval_iterations=2,
        rates=(3e-3,),
        seeds=(1, 2),
    ),
    # Two cores: hours.
    "laptop": Scale(
        hidden_size=64,
        ffn_hidden_size=128,
        num_layers=4,
        num_attention_heads=4,
        num_experts=8,
        seq_length=128,
        batch=8,
        vocabulary=1024,
        megabytes=60,
        iterations=800,
        rate_iterations=120,
        eval_iterations=240,
        seeds_of_others=3,
    ),
    # One H100, by estimate: 350 M tokens of 111 MFLOP, forward and backward, are six minutes at a
    # tenth of its peak; 166 starts of 20 s, twelve at a time, four and a half beside. Never run.
    "gpu": Scale(
        hidden_size=384,
        ffn_hidden_size=768,
        num_layers=8,
        num_attention_heads=6,
        num_experts=8,
        seq_length=512,
        batch=32,
        vocabulary=4096,
        megabytes=60,
        iterations=320,
        rate_iterations=40,
        eval_iterations=14,
        rates=(5e-4, 1e-3, 2e-3),
        jobs=12,
        platform=("--bf16", *LOCAL),
    ),
}
