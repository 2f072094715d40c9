"""The CPU backend and defects of the wheel, as rows of replaced host symbols.

Host lines are those of megatron-core 0.19.2.
"""

from collections.abc import Callable
from typing import Any

from megatron_scmoe.host import cpu, optimizer, tensorboard, wheel
from megatron_scmoe.host.replace import Replacement


def _use(value: Any) -> Callable[[Any], Any]:
    """A replacement that does not need the original."""
    return lambda original: value


def _cpu(symbol: str, host_file: str, reason: str, make: Callable[[Any], Any]) -> Replacement:
    return Replacement(symbol, "cpu", host_file, reason, make)


def _stand_in(symbol: str) -> Any:
    """Of `cpu`, for a symbol of `torch.cuda`."""
    return getattr(cpu, symbol.rpartition(".")[2])


OF_TORCH_CUDA = (
    ("current_device", "core/tensor_parallel/layers.py:305", "device of parameters and buffers"),
    ("device_count", "training/initialize.py:270", "0 skips parallel groups and seeds"),
    ("set_device", "training/initialize.py:282", "one device only"),
    ("synchronize", "core/timers.py:152", "nothing is pending"),
    ("get_device_capability", "training/arguments.py:1339", "asserted for --moe-grouped-gemm"),
    (
        "get_device_properties",
        "training/utils/common_utils.py:504",
        "architecture checks of the options",
    ),
    ("memory_stats", "training/training.py:2742", "--log-memory-to-tensorboard"),
    (
        "memory.memory_stats",
        "training/utils/common_utils.py:322",
        "memory report; the same function under its other name",
    ),
    ("Stream", "core/transformer/moe/token_dispatcher.py:469", "no streams"),
    ("Event", "core/utils.py", "no events"),
    ("current_stream", "core/transformer/moe/token_dispatcher.py:922", "no streams"),
    ("stream", "core/transformer/moe/token_dispatcher.py:925", "no streams"),
    ("get_rng_state", "core/tensor_parallel/random.py:303", "the CPU generator"),
    ("set_rng_state", "core/rerun_state_machine.py:992", "the CPU generator"),
    ("manual_seed", "core/tensor_parallel/random.py:305", "the CPU generator"),
)
"""What `cpu` has under torch's own names: the symbol, where the host uses it, and why."""
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "tensor", "zeros")

TABLE: tuple[Replacement, ...] = (
    # torch first: the host is imported when its first row is looked up.
    _cpu(
        "torch.compile",
        "core/jit.py:25",
        "compiling the fused functions takes minutes and gains nothing here",
        _use(cpu.run_eagerly),
    ),
    *(
        _cpu(f"torch.cuda.{name}", host_file, reason, _use(_stand_in(name)))
        for name, host_file, reason in OF_TORCH_CUDA
    ),
    _cpu(
        "torch.Tensor.cuda",
        "core/tensor_parallel/data.py:84",
        "tensors stay on the CPU",
        _use(cpu.stay),
    ),
    _cpu(
        "torch.nn.Module.cuda",
        "training/training.py:1818",
        "modules stay on the CPU",
        _use(cpu.stay),
    ),
    _cpu(
        "torch.Tensor.type",
        "core/optimizer/clip_grads.py:174",
        "clipping and optimizers compare type() with 'torch.cuda.FloatTensor'",
        cpu.cuda_type_name,
    ),
    *(
        _cpu(f"torch.{name}", "training/training.py:1131", 'device="cuda" literals', cpu.on_cpu)
        for name in FACTORIES
    ),
    _cpu(
        "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
        ".prepare_write_data",
        "core/dist_checkpointing/strategies/filesystem_async.py:146",
        "--async-save shares CPU tensors with the writer while training goes on",
        cpu.stage_copies,
    ),
    _cpu(
        "torch.utils.data.DataLoader.__iter__",
        "training/training.py:4615",
        "draws from the generator that dropout uses here: no exact resume",
        cpu.iterate_without_drawing,
    ),
    _cpu(
        "megatron.training.training.initialize_megatron",
        "training/initialize.py:66",
        "pretrain does not pass allow_no_cuda",
        cpu.allow_no_cuda,
    ),
    _cpu(
        "megatron.core.tensor_parallel.random._get_cuda_rng_state",
        "core/tensor_parallel/random.py:318",
        "the CPU generator",
        _use(cpu.get_rng_state),
    ),
    _cpu(
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        "core/tensor_parallel/random.py:323",
        "the CPU generator",
        _use(cpu.set_rng_state),
    ),
    _cpu(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        "core/transformer/moe/moe_utils.py:1184",
        "gloo's all-to-all wants splits as integers, not as a tensor",
        _use(cpu.maybe_move_tensor_to_cpu),
    ),
    _cpu(
        "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
        "core/tensor_parallel/mappings.py:154",
        "gloo gathers parts of one size only: no --expert-tensor-parallel-size > 1",
        cpu.gather_padded,
    ),
    _cpu(
        "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
        "core/tensor_parallel/mappings.py:197",
        "the same for its backward",
        cpu.reduce_scatter_padded,
    ),
    Replacement(
        "megatron.core.datasets.utils.compile_helpers",
        "no Makefile",
        "training/initialize.py:165",
        "runs make, but the wheel ships no Makefile: rank 0 exits, the others hang",
        wheel.skip_compiling,
    ),
    Replacement(
        "megatron.core.parallel_state.create_group",
        "always",
        "core/parallel_state.py:1465",
        "one gloo group is made without the configured time-out: 30 minutes",
        wheel.inherit_timeout,
    ),
    Replacement(
        "megatron.core.utils.StragglerDetector.__exit__",
        "always",
        "core/utils.py:2090",
        "logs every error that passes on one long line, even if it is handled",
        wheel.pass_errors_silently,
    ),
    Replacement(
        "megatron.training.training.num_floating_point_operations",
        "always",
        "training/training.py:390",
        "counts two of the three products of a --quick-geglu unit",
        wheel.flops_of_gated_units,
    ),
    Replacement(
        "megatron.core.transformer.moe.moe_logging.MoEMetricsTracker.report",
        "always",
        "training/training.py:2762",
        "with seq_aux_loss or global_aux_loss a load_balancing_loss of 0 is logged beside theirs",
        wheel.report_losses_that_exist,
    ),
    Replacement(
        "megatron.training.training.evaluate_and_print_results",
        "always",
        "training/training.py:4382",
        "--full-validation of one data set: 'int' object is not subscriptable",
        wheel.full_validation_of_one_set,
    ),
    Replacement(
        "megatron.training.global_vars._set_tensorboard_writer",
        "always",
        "training/global_vars.py:139",
        "a full disk under --tensorboard-dir ends the training",
        tensorboard.writer_that_may_end,
    ),
    Replacement(
        "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
        "no TE",
        "core/tensor_parallel/random.py:740",
        "reads its default fp8=False as a recipe and calls TE: no --recompute-modules layernorm",
        wheel.checkpoint_without_fp8,
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
        "._set_main_param_and_optimizer_states",
        "always",
        "core/optimizer/distrib_optimizer.py:1225",
        "copies into views of leaves that require grad, and misses `step`: fp32 cannot resume",
        optimizer.set_states_without_step,
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
        ".sharded_param_state_fully_reshardable",
        "always",
        "core/optimizer/distrib_optimizer.py:1768",
        "saves the state of parameters behind a padded bucket shifted, as of tied embeddings",
        optimizer.states_behind_padded_buckets,
    ),
    Replacement(
        "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
        "always",
        "core/optimizer/optimizer.py:1578",
        "wants as many optimizers as were saved: no resume at another expert parallel size",
        optimizer.load_chain_of_any_layout,
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict",
        "no TE or Apex",
        "core/optimizer/distrib_optimizer.py:839",
        "asserts one step value, torch's AdamW has none before its first update: no resume",
        optimizer.state_dict_before_first_step,
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
        "no TE or Apex",
        "core/optimizer/distrib_optimizer.py:1027",
        "loses the step of torch's AdamW: wrong bias correction after a resume",
        optimizer.load_state_dict_with_steps,
    ),
    Replacement(
        "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler.load_state_dict",
        "always",
        "core/optimizer_param_scheduler.py:386",
        "takes the step before it loads the schedule of weight decay",
        optimizer.load_schedule_and_step,
    ),
)
