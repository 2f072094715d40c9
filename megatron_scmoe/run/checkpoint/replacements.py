"""Where the host has no hook for what this package adds to its checkpoints: replaced symbols.

Host lines are those of megatron-core 0.19.2.
"""

from megatron_scmoe.host.replace import Replacement
from megatron_scmoe.run.checkpoint import errors, transfer, unpickle, writer

TABLE: tuple[Replacement, ...] = (
    Replacement(
        "megatron.training.training.save_checkpoint",
        "always",
        "training/training.py:3086",
        "no hook: writes the record of the options first; a full disk is one line",
        errors.saving,
    ),
    Replacement(
        "megatron.training.training.maybe_finalize_async_save",
        "always",
        "training/training.py",
        "no hook: a full disk is one line with --async-save too",
        errors.finalizing,
    ),
    Replacement(
        "megatron.training.checkpointing.cleanup_old_non_persistent_checkpoint",
        "always",
        "training/checkpointing.py:624",
        "keeps the newest folder, whole or not: the last whole one goes while that is half written",
        errors.cleaning,
    ),
    Replacement(
        "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller.async_loop",
        "always",
        "core/dist_checkpointing/strategies/async_utils.py:380",
        "the writer of --async-save dies of a SIGTERM meant for its rank, and outlives its rank",
        writer.only_for_its_rank,
    ),
    Replacement(
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        "always",
        "core/dist_checkpointing/strategies/filesystem_async.py:200",
        "the same for the process that carries its results, which no other save needs",
        writer.results_queue,
    ),
    Replacement(
        "megatron.training.initialize.init_persistent_async_worker",
        "always",
        "training/initialize.py:74",
        "the same: its processes start with SIGTERM blocked",
        writer.starting_deaf,
    ),
    Replacement(
        "megatron.training.training.load_checkpoint",
        "always",
        "training/training.py:2199",
        "no hook: a broken file is one line",
        errors.loading,
    ),
    Replacement(
        "torch.distributed.checkpoint.filesystem.pickle",
        "always",
        "torch/distributed/checkpoint/filesystem.py:930",
        "a plain pickle.load of the metadata runs whatever it names",
        unpickle.reading_metadata_only,
    ),
    Replacement(
        "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
        "always",
        "torch/distributed/checkpoint/default_planner.py:362",
        "unpickles objects with weights_only=False, which runs whatever they name",
        unpickle.loading_safe_bytes,
    ),
    Replacement(
        "megatron.training.checkpointing._load_global_dist_base_checkpoint",
        "always",
        "training/checkpointing.py:1601",
        "no hook: norms have two names; --finetune leaves what is new as it was initialised",
        transfer.loading_related,
    ),
)
