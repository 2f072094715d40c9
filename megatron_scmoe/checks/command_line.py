"""What a command line lacks or cannot mix, whatever the model: the host says it late, or never."""

from argparse import Namespace
from collections.abc import Callable

from megatron_scmoe.checks.refusal import Refusal
from megatron_scmoe.checks.shortcut import TRANSFORMER_ENGINE
from megatron_scmoe.model.experts.grouped import uses_grouped_experts

PARSED = (
    Refusal(
        lambda args: args.yaml_cfg is not None,
        "--yaml-cfg has no place for the --scmoe options",
        "use the command line",
    ),
)

# Once options of a checkpoint and of this machine are in their places.
COMPLETE = (
    TRANSFORMER_ENGINE,
    Refusal(
        lambda args: args.tokenizer_type == "NullTokenizer" and args.vocab_size is None,
        "--tokenizer-type NullTokenizer needs --vocab-size",
    ),
    Refusal(
        lambda args: (
            not args.skip_train and args.train_iters is None and args.train_samples is None
        ),
        "How long to train is missing",
        "add --train-iters or --train-samples",
    ),
    Refusal(
        lambda args: not args.skip_train and args.lr is None,
        "The learning rate is missing",
        "add --lr",
    ),
    Refusal(
        lambda args: (
            not args.skip_train and args.eval_interval is None and not args.full_validation
        ),
        "When to evaluate is missing",
        "add --eval-interval",
    ),
)


def _wants_matrices(option: str, is_set: Callable[[Namespace], bool]) -> Refusal:
    return Refusal(
        lambda args: uses_grouped_experts(args) and is_set(args),
        f"{option} wants every expert's weights as matrices of their own, and --moe-grouped-gemm "
        "with --transformer-impl local stacks them",
        "drop --moe-grouped-gemm",
    )


# What looks for every expert's own matrix, where their weights are stacked.
STACKED_EXPERTS = (
    _wants_matrices("--optimizer {optimizer}", lambda args: args.optimizer not in ("adam", "sgd")),
    _wants_matrices("--moe-use-upcycling", lambda args: args.moe_use_upcycling),
    _wants_matrices(
        "--ckpt-format {ckpt_format}",
        lambda args: args.ckpt_format != "torch_dist" and bool(args.save or args.load),
    ),
)
