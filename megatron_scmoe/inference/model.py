"""From the command line to a model that can generate: options, ranks, weights.

Model and tokenizer are those of the checkpoint's record; the layout is the command line's, whatever
layout the checkpoint was trained at.
"""

import logging
import sys
import warnings
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args, get_tokenizer, training
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import initialize_megatron
from torch.distributed import Store
from torch.nn import Module

from megatron_scmoe import start
from megatron_scmoe.arguments import model_config_from_args, typed_options, validate
from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.run.checkpoint.adopt import adopt_model


def begin() -> None:
    """What a program does first: it is one rank where no launcher started it, and what the host
    logs was not asked for."""
    start.one_rank_by_itself()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def prepare_generation(
    args: Namespace, own: tuple[str, ...] = (), offloads: bool = False, reads_text: bool = True
) -> tuple[ScMoEModelConfig, Any]:
    """Everything that needs no process group, so that what is wrong ends the run here.

    Without --load the model is the command line's, with weights as they are drawn.

    Args:
        args: parsed; becomes the host's global options.
        own: dests that are not the checkpoint's, beside those on the command line.
        offloads: routed experts will not all be on the device.
        reads_text: without it the record's tokenizer need not be on this machine.

    Returns:
        the model, and the tokenizer.

    Raises:
        ValueError and other say.USER_ERRORS: what the host or we refuse.
    """
    if args.load is not None:
        adopt_model(args, [*typed_options(sys.argv[1:]), *own])
    if not reads_text and args.tokenizer_type != "NullTokenizer":
        args.tokenizer_type, args.vocab_size = "NullTokenizer", 1
    replica = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    args.micro_batch_size, args.global_batch_size = 1, max(1, args.world_size // replica)
    args.skip_train = args.no_load_optim = args.no_load_rng = True
    # Needs no equal numbers of tokens on the ranks that share experts.
    args.moe_token_dispatcher_type = "alltoall"
    # Asked for where tensor parallel ranks train experts.
    args.sequence_parallel = args.tensor_model_parallel_size > 1
    if offloads:
        # Transformer Engine's grouped experts are one module; ours hold theirs one by one.
        args.moe_grouped_gemm &= args.transformer_impl == "local"
        # Ranks that load for each other would not load in place.
        args.ckpt_fully_parallel_load = False
    validate(args)
    # One token at a time cannot be split over ranks.
    args.sequence_parallel = False
    set_global_variables(args)
    return model_config_from_args(args), get_tokenizer()


def join_and_load(config: ScMoEModelConfig, store: Store | None) -> Module:
    """Meet the other ranks and load this one's stage, without the host's words.

    Raises:
        CheckpointError: the files cannot be read.
    """
    with redirect_stdout(StringIO()):
        join_job(store)
        return load_model(config)


def join_job(store: Store | None) -> None:
    """Meet the other ranks."""
    initialize_megatron(allow_no_cuda=True, store=store)


def load_model(config: ScMoEModelConfig) -> Module:
    """Build this rank's stage and load its weights, if there is a checkpoint.

    Raises:
        CheckpointError: the files cannot be read.
    """
    (model,) = ScMoEModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    if get_args().load is not None:
        training.load_checkpoint([model], None, None)
    return model.eval()
