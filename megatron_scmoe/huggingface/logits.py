"""The logits of a checkpoint's model in Megatron, for `verify`: a program of its own, any layout.

    python -m megatron_scmoe.huggingface.logits --load CHECKPOINTS --tokens FILE --logits FILE

The model is computed in fp32, whatever its weights are stored in, with those options of Megatron
that the command line adds.

Shapes: b samples, s tokens, v vocabulary with its padding
"""

import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO

from megatron_scmoe import say, start

start.replace_host_symbols()

import torch
from megatron.core import parallel_state as mpu
from safetensors.torch import load_file, save_file

from megatron_scmoe.arguments import add_scmoe_args, parse
from megatron_scmoe.inference.model import begin, join_and_load, prepare_generation
from megatron_scmoe.inference.one_pass import forward
from megatron_scmoe.run.checkpoint.errors import CheckpointError
from megatron_scmoe.run.watch import watched_ranks


def add_options(parser: ArgumentParser) -> ArgumentParser:
    """The package's options and these; an `extra_args_provider` of the host."""
    add_scmoe_args(parser)
    group = parser.add_argument_group("logits")
    group.add_argument("--tokens", required=True, metavar="FILE", help="`tokens`, [b, s].")
    group.add_argument("--logits", required=True, metavar="FILE", help="`logits`, [b, s, v].")
    return parser


def main() -> int:
    """Write the logits and return the exit code."""
    begin()
    with say.user_errors():
        args = parse(add_options)
        with redirect_stdout(StringIO()):
            config, _ = prepare_generation(args, own=("bf16", "fp16"), reads_text=False)
    with watched_ranks(timedelta(minutes=10), (CheckpointError,)) as store:
        model = join_and_load(config, store)
        logits = forward(model, load_file(args.tokens)["tokens"])
        writes = mpu.get_tensor_model_parallel_rank() == mpu.get_data_parallel_rank() == 0
        if logits is not None and writes:
            save_file({"logits": logits.float().cpu().contiguous()}, args.logits)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
