"""Numbers that make no sense, whatever the rest: one table of ranges by dest.

Asked before the host, which takes most of them and fails later, on every rank, or trains on
nothing.
"""

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_scmoe.checks.refusal import Found, Refusal
from megatron_scmoe.words import flag


@dataclass(frozen=True)
class Range:
    """Which values of an option are numbers that something can be built from."""

    least: float
    most: float = math.inf
    open_least: bool = False
    """Without `least` itself."""
    open_most: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        return above and below

    def __str__(self) -> str:
        """Behind "is not"."""
        least, most = (
            f"{bound:g}" if bound < 1e5 else f"{bound:.0f}" for bound in (self.least, self.most)
        )
        if self.most == math.inf:
            return f"above {least}" if self.open_least else f"at least {least}"
        if self.open_least or self.open_most:
            lower = "above" if self.open_least else "at least"
            return f"{lower} {least} and {'below' if self.open_most else 'at most'} {most}"
        return f"from {least} to {most}"


POSITIVE = Range(0, open_least=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
PART = Range(0, 1, open_least=True)
DECAY = Range(0, 1, open_most=True)

# Beyond the last number of these nothing was ever trained: a digit too many, which would take all
# memory before anybody says so.
SIZES = {
    "num_layers": 10_000,
    "hidden_size": 1_000_000,
    "ffn_hidden_size": 10_000_000,
    "moe_ffn_hidden_size": 10_000_000,
    "moe_shared_expert_intermediate_size": 10_000_000,
    "num_attention_heads": 100_000,
    "num_query_groups": 100_000,
    "kv_channels": 100_000,
    "q_lora_rank": 1_000_000,
    "kv_lora_rank": 1_000_000,
    "qk_head_dim": 100_000,
    "v_head_dim": 100_000,
    "num_experts": 10_000,
    "moe_router_topk": 10_000,
    "seq_length": 100_000_000,
    "max_position_embeddings": 1_000_000_000,
    "vocab_size": 100_000_000,
    "padded_vocab_size": 100_000_000,
    "make_vocab_size_divisible_by": 10_000_000,
    "scmoe_num_chunks": 1_000,
    "micro_batch_size": 1_000_000,
    "global_batch_size": 100_000_000,
    "train_iters": 1_000_000_000,
    "scmoe_ranks_per_node": 1_000_000,
}
AT_LEAST_1 = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "scmoe_ranks_per_node",
    "num_distributed_optimizer_instances",
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "eval_micro_batch_size",
    "eval_global_batch_size",
    "train_samples",
    "lr_decay_iters",
    "lr_decay_samples",
    "log_interval",
    "tensorboard_log_interval",
    "tensorboard_queue_size",
    "log_memory_interval",
    "eval_interval",
    "save_interval",
    "save_retain_interval",
    "non_persistent_save_interval",
    "exit_interval",
    "exit_duration_in_mins",
    "recompute_num_layers",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "num_dataset_builder_threads",
    "rotary_base",
    "seed",
)
RANGES: dict[str, Range] = {
    **{dest: Range(1, most) for dest, most in SIZES.items()},
    **dict.fromkeys(AT_LEAST_1, Range(1)),
    "seed": Range(1, 2**32 - 1000),  # NumPy's; the host adds numbers of stages and ranks
    "qk_pos_emb_head_dim": Range(0, 100_000),
    "eval_iters": NOT_NEGATIVE,
    "num_workers": Range(0, 1_024),
    "ckpt_step": NOT_NEGATIVE,
    "lr": NOT_NEGATIVE,
    "min_lr": NOT_NEGATIVE,
    "decoupled_lr": NOT_NEGATIVE,
    "decoupled_min_lr": NOT_NEGATIVE,
    "lr_warmup_init": NOT_NEGATIVE,
    "lr_warmup_iters": NOT_NEGATIVE,
    "lr_warmup_samples": NOT_NEGATIVE,
    "lr_wsd_decay_iters": NOT_NEGATIVE,
    "lr_wsd_decay_samples": NOT_NEGATIVE,
    "lr_warmup_fraction": DECAY,
    "weight_decay": NOT_NEGATIVE,
    "start_weight_decay": NOT_NEGATIVE,
    "end_weight_decay": NOT_NEGATIVE,
    "clip_grad": NOT_NEGATIVE,
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_eps": NOT_NEGATIVE,
    "sgd_momentum": DECAY,
    "muon_momentum": DECAY,
    "lion_beta1": DECAY,
    "lion_beta2": DECAY,
    "hidden_dropout": SHARE,
    "attention_dropout": SHARE,
    "rotary_percent": PART,
    "layernorm_epsilon": POSITIVE,
    "init_method_std": NOT_NEGATIVE,
    "embedding_init_method_std": NOT_NEGATIVE,
    "distributed_timeout_minutes": POSITIVE,
    "distributed_timeout_seconds_after_init": POSITIVE,
    "loss_scale": POSITIVE,
    "initial_loss_scale": POSITIVE,
    "min_loss_scale": POSITIVE,
    "loss_scale_window": POSITIVE,
    "moe_aux_loss_coeff": NOT_NEGATIVE,
    "moe_z_loss_coeff": NOT_NEGATIVE,
    "moe_input_jitter_eps": Range(0, 1),
    "moe_router_bias_update_rate": NOT_NEGATIVE,
    "profile_step_start": NOT_NEGATIVE,
    "profile_step_end": NOT_NEGATIVE,
}


def out_of_range(args: Namespace, ranges: Mapping[str, Range] = RANGES) -> Iterator[str]:
    """A complaint about every number that is none, or that lies outside of its range."""
    for dest, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"{flag(dest)} {number} is no number to compute with"
            elif dest in ranges and isinstance(number, int | float) and number not in ranges[dest]:
                yield f"{flag(dest)} {number:g} is not {ranges[dest]}"


def numbers_in(ranges: Mapping[str, Range]) -> Refusal:
    """The row about all numbers that have a range."""

    def when(args: Namespace) -> Found:
        found = list(out_of_range(args, ranges))
        return bool(found) and {"all": "; ".join(found)}

    return Refusal(when, "{all}")


NUMBERS = (numbers_in(RANGES),)
