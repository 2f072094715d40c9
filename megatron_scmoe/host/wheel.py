"""Replacements for defects of the megatron-core 0.19.2 wheel, on every kind of machine."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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


def state_dict_before_first_step(
    state_dict: Callable[[Any], dict[str, Any]],
) -> Callable[[Any], dict[str, Any]]:
    """`DistributedOptimizer.state_dict` that also answers before the first update.

    The host takes `step` from the inner optimizer's per-parameter state and asserts that there is
    exactly one value (core/optimizer/distrib_optimizer.py:839). torch's AdamW has no such state
    until its first update, and loading asks for the state dict before that. So we give the inner
    optimizer the state that its first update would create; loading then overwrites it.
    """

    def replacement(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    moments = {key: torch.zeros_like(param) for key in self.optimizer_state_keys}
                    self.optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    return replacement


def load_state_dict_with_steps(
    load_state_dict: Callable[[Any, dict[str, Any]], None],
) -> Callable[[Any, dict[str, Any]], None]:
    """`DistributedOptimizer.load_state_dict` after which every parameter has the saved `step`.

    The host goes wrong twice for torch's AdamW, and both times the bias correction suffers
    (core/optimizer/distrib_optimizer.py): it puts one step tensor into the state of all parameters
    (:1027), which AdamW then counts up once per parameter; and it copies into it the step from
    before the load, which travels with the parameter state as a local object (:1953). The saved
    step is in the parameter groups.
    """

    def replacement(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                self.optimizer.state[param]["step"] = torch.tensor(float(group["step"]))

    return replacement
