"""Replacements for defects of the megatron-core 0.19.2 wheel, on every kind of machine."""

import copy
import importlib.util
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def makefile_missing() -> bool:
    """True where the dataset helpers are already built but cannot be built again."""
    datasets = importlib.util.find_spec("megatron.core.datasets")
    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    folders = datasets.submodule_search_locations if datasets else None
    return bool(built and folders and not (Path(folders[0]) / "Makefile").exists())


def te_and_apex_missing() -> bool:
    """True where the host falls back to torch's AdamW, as its optimizer itself decides."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


def te_missing() -> bool:
    """True where the host cannot import Transformer Engine, as its recomputation itself decides."""
    from megatron.core.tensor_parallel import random

    return not random.HAVE_TE


def checkpoint_without_fp8(init: Callable[..., None]) -> Callable[..., None]:
    """`CheckpointWithoutOutput.__init__` that takes fp8=False as "no fp8".

    The host tests `fp8 is not None` against its own default False (tensor_parallel/random.py:740)
    and then needs Transformer Engine's state manager, which is not imported without TE.
    """

    def replacement(self: Any, fp8: Any = False) -> None:
        init(self, fp8 or None)

    return replacement


def skip_compiling(compile_helpers: Callable[[], None]) -> Callable[[], None]:
    """The extension is in the wheel; only the Makefile that would rebuild it is not."""
    return lambda: None


def flops_of_gated_units(count: Callable[..., float]) -> Callable[..., float]:
    """`num_floating_point_operations` that knows every gated unit, and units with two gates.

    The host asks for --swiglu and counts two products for --quick-geglu, which has three. It knows
    one router for each MoE layer. On a copy: it writes `num_query_groups` into the run's options on
    its way.
    """

    def replacement(args: Any, *others: Any, **named: Any) -> float:
        args = copy.copy(args)
        args.swiglu |= args.quick_geglu
        if getattr(args, "scmoe_dual_gating", "none") != "none":
            args.moe_router_topk *= 2
        return count(args, *others, **named)

    return replacement


def report_losses_that_exist(report: Callable[..., str]) -> Callable[..., str]:
    """`MoEMetricsTracker.report` without the balancing loss that this run does not have.

    The host looks for "aux_loss" inside of "seq_aux_loss" (training/training.py:2762) and logs a
    loss of 0 beside the real one.
    """

    def replacement(
        self: Any, *args: Any, track_names: Any = None, total_loss_dict: Any = None, **named: Any
    ) -> str:
        if isinstance(track_names, list) and len(track_names) > 1:
            from megatron.training import get_args

            if get_args().moe_router_load_balancing_type in ("seq_aux_loss", "global_aux_loss"):
                track_names = [name for name in track_names if name != "load_balancing_loss"]
        return report(
            self, *args, track_names=track_names, total_loss_dict=total_loss_dict, **named
        )

    return replacement


def full_validation_of_one_set(evaluate: Callable[..., None]) -> Callable[..., None]:
    """`evaluate_and_print_results` for --full-validation without --multiple-validation-sets.

    The host makes a tensor of the one number of iterations and takes its first element
    (training/training.py:4382).
    """

    def replacement(*args: Any, **named: Any) -> None:
        from megatron.training import get_args

        options = get_args()
        if options.full_validation and isinstance(options.eval_iters, int):
            options.eval_iters = [options.eval_iters]  # a number again when it returns
        evaluate(*args, **named)

    return replacement


def default_timeout() -> timedelta:
    """How long a collective of the default group may take, as the host has set it."""
    from torch.distributed import distributed_c10d

    group = distributed_c10d._get_default_group()
    return group._get_backend(group._device_types[0]).options._timeout


def inherit_timeout(create_group: Callable[..., Any]) -> Callable[..., Any]:
    """`create_group` with the default group's time-out where the caller names none.

    The host forgets it for the gloo group of the experts' data parallel ranks
    (core/parallel_state.py:1465), which gets torch's 30 minutes.
    """

    def replacement(ranks: list[int], timeout: timedelta | None = None, **kwargs: Any) -> Any:
        return create_group(ranks, timeout=timeout or default_timeout(), **kwargs)

    return replacement


def pass_errors_silently(leave: Callable[..., bool]) -> Callable[..., bool]:
    """`StragglerDetector.__exit__` that leaves an error to whoever handles it."""

    def replacement(self: Any, *error: Any) -> bool:
        return leave(self, None, None, None)

    return replacement
