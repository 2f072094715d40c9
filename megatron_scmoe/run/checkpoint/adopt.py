"""The model and the tokenizer of a checkpoint, from its record, for a program that has no options
of its own for them."""

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from megatron_scmoe.run.checkpoint import contents
from megatron_scmoe.run.checkpoint.record import read_record

# What the tensors mean is the record's part "model"; these decide how they are computed with, and
# which tokens a text has.
COMPUTED_WITH = (
    "seq_length",
    "group_query_attention",
    "use_rotary_position_embeddings",
    "bf16",
    "fp16",
    "transformer_impl",
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "fp32_residual_connection",
    "moe_grouped_gemm",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "vocab_size",
    "vocab_file",
    "merge_file",
    "special_tokens",
)
PREFIXES = ("mup_", "yarn_", "tokenizer_", "tiktoken_", "null_tokenizer_")


def adopt_model(args: Namespace, typed: Iterable[str]) -> int:
    """Set the model and the tokenizer of the checkpoint that --load names.

    Args:
        args: parsed; changed in place.
        typed: dests that the user has given, which stay as they are.

    Returns:
        the iteration of the checkpoint.

    Raises:
        ValueError: there is no checkpoint, or it has no record.
    """
    folder = Path(args.load)
    try:
        iteration = args.ckpt_step or contents.tracked_iteration(folder)
    except ValueError as error:
        raise ValueError(f"--load {folder}: {error}; choose one with --ckpt-step.") from error
    if not isinstance(iteration, int):
        raise ValueError(f"--load {folder}: there is no checkpoint of a training run.")
    record = read_record(folder, iteration)
    if record is None:
        raise ValueError(
            f"--load {folder}: iteration {iteration} has no record, iter_{iteration:07d}.json, "
            "that says what its model is: only checkpoints of this package have one."
        )
    options = {
        name: value
        for name, value in record["options"].items()
        if name in COMPUTED_WITH or name.startswith(PREFIXES)
    }
    known = vars(args)
    for name, value in (record["model"] | options).items():
        if name in known and name not in typed:
            setattr(args, name, tuple(value) if name == "window_size" and value else value)
    if "padded_vocab_size" not in typed:
        args.padded_vocab_size = record.get("padded_vocab_size")
    args.ckpt_step = iteration
    return iteration
