"""Pretrain a GPT model with shortcut-connected MoE layers on Megatron-Core.

    torchrun --nproc-per-node 2 pretrain_gpt_scmoe.py <Megatron options>
    python pretrain_gpt_scmoe.py <Megatron options>             # one rank

Takes Megatron's own options and the --scmoe-* ones. Differs from the host's `pretrain_gpt.py` in
what it leaves out: SFT, fill-in-the-middle, packed documents and hybrid context parallelism.

Shapes: b micro-batch, s tokens of a sequence on this rank.
"""

import sys
import time

PROGRAM_START = time.time()

from megatron_scmoe import recipe, say
from megatron_scmoe.checks.before_torch import refuse_words

say.one_line_interrupts()
if __name__ == "__main__":
    with say.user_errors():
        refuse_words(recipe.expand(sys.argv[1:]))

from megatron_scmoe import start

with say.user_errors():
    start.replace_host_symbols()

from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, inprocess_restart, print_rank_0
from megatron.training.global_vars import get_tensorboard_writer
from megatron.training.training import pretrain, set_startup_timestamps
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_scmoe.arguments import parse_and_validate_args, prepare
from megatron_scmoe.planner.twin import what_the_flag_changes
from megatron_scmoe.run.checkpoint.errors import CheckpointError
from megatron_scmoe.run.collaboration_dir import write_counts
from megatron_scmoe.run.doctor.machine import start_up
from megatron_scmoe.run.shared_folder import SharedFolderError, check_shared
from megatron_scmoe.run.watch import watched_ranks

# Whose message is for the user, without a traceback.
FOR_USERS = (CheckpointError, SharedFolderError)
SPIKY_LOSS_FACTOR = 10  # times the largest loss seen, as in the host's script
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")

stimer = StragglerDetector()
Batch = dict[str, Any]  # tensors; None where this stage needs none


def get_batch(data_iterator: Iterator[Batch] | None, vp_stage: int | None) -> Batch:
    """This rank's part of the next micro-batch, [b, s]; nothing on inner pipeline stages."""
    first_stage = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last_stage = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not (first_stage or last_stage):
        return dict.fromkeys(BATCH_KEYS)

    args = get_args()
    batch: Batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        for key in BATCH_KEYS:
            value = sample.get(key)
            batch[key] = value.cuda(non_blocking=True) if value is not None else None
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first_stage,
        is_pipeline_last_stage=last_stage,
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def loss_func(
    loss_mask: torch.Tensor | None, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the masked losses, number of tokens, and both for the log; losses are [b, s]."""
    args = get_args()
    assert loss_mask is not None  # the host asks for the loss on the last pipeline stage only
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)

    rerun = get_rerun_state_machine()
    rejections = []
    if args.check_for_nan_in_loss_and_grad:
        rejections += [(torch.isnan, "found NaN in local forward loss calculation", True)]
        rejections += [(torch.isinf, "found Inf in local forward loss calculation", True)]
    if args.check_for_spiky_loss:
        is_spiky = partial(rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        rejections += [(is_spiky, "Spiky loss", False)]
    for rejection_func, message, fatal in rejections:
        # Tolerance 0: on one machine a repeated forward pass gives the same loss.
        rerun.validate_result(loss, rejection_func, message, tolerance=0.0, fatal=fatal)

    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator[Batch] | None, model: GPTModel
) -> tuple[torch.Tensor, partial[Any]]:
    """One micro-batch through this rank's layers."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with stimer:
        output_tensor = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output_tensor, partial(loss_func, batch["loss_mask"])


def dataset_config_from_args(args: Namespace) -> GPTDatasetConfig:
    """Fields whose name is an option are copied, the others are named here."""
    names = {field.name for field in fields(GPTDatasetConfig) if field.init}
    same_name = {name: value for name, value in vars(args).items() if name in names}
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        **same_name,
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )


def train_valid_test_datasets_provider(
    train_val_test_num_samples: tuple[int, int, int], vp_stage: int | None = None
) -> list[GPTDataset | None]:
    """The three datasets, on the ranks that read data: first and last stage, TP rank 0."""

    def reads_data() -> bool:
        at_end = mpu.is_pipeline_first_stage(
            ignore_virtual=False, vp_stage=vp_stage
        ) or mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        return at_end and mpu.get_tensor_model_parallel_rank() == 0

    config = dataset_config_from_args(get_args())
    dataset_type = MockGPTDataset if config.mock else GPTDataset
    if config.path_to_cache is not None and not config.mock:
        check_shared(Path(config.path_to_cache), "--data-cache-path")
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    return BlendedMegatronDatasetBuilder(
        dataset_type, train_val_test_num_samples, reads_data, config
    ).build()


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def main() -> None:
    start.one_rank_by_itself()
    set_startup_timestamps(program_start=PROGRAM_START, main_entry=time.time())
    with say.user_errors():
        args = parse_and_validate_args()
        container = prepare(args)
        for line in (*what_the_flag_changes(args), *start_up(args)):
            print_rank_0(line, args.rank)

    run, store = pretrain, None
    if args.inprocess_restart:
        run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    guard: AbstractContextManager[Any]
    if args.inprocess_restart or args.fake_process_group:
        # The one has a monitor of its own, the other no other ranks.
        guard = say.user_errors(FOR_USERS)
    else:
        timeout = timedelta(minutes=args.distributed_timeout_minutes)
        guard = watched_ranks(timeout, FOR_USERS)
    try:
        with guard as watched_store:
            run(
                container,
                train_valid_test_datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
                store=store or watched_store,
            )
    except SystemExit as leaving:  # --exit-interval and --exit-duration-in-mins leave this way
        finish(args, counts=not leaving.code)
        raise
    finish(args)


def finish(args: Namespace, counts: bool = True) -> None:
    """Write what would be lost with the process, and leave the job."""
    if counts:
        write_counts(args, args.curr_iteration + 1)
    if (curves := get_tensorboard_writer()) is not None:
        # The host flushes before the last evaluation; the writer's thread dies with the process.
        curves.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
