"""Replacements for the optimizer's half of checkpoints: defects of the megatron-core 0.19.2 wheel.

Optimizers on disk: each tensor under its parameter's name, whatever layout saved it, and the
options of the parameter groups in the common state, as the first rank had them. The host chains
one optimizer for dense and one for expert parameters where experts are split over ranks, so the
common state has one of two forms:

    one optimizer   {"optimizer": {"param_groups": [...]}, ...}
    a chain         {0: {"optimizer": ...}, 1: {"optimizer": ...}}
"""

from collections.abc import Callable
from typing import Any

import torch

StateDict = dict[Any, Any]
Load = Callable[[Any, StateDict], None]


def state_dict_before_first_step(state_dict: Callable[[Any], StateDict]) -> Callable[..., Any]:
    """`DistributedOptimizer.state_dict` that also answers before the first update.

    The host takes `step` from the inner optimizer's per-parameter state and asserts that there is
    exactly one value (core/optimizer/distrib_optimizer.py:839). torch's AdamW has no such state
    until its first update, and loading asks for the state dict before that. So we give the inner
    optimizer the state that its first update would create; loading then overwrites it.
    """

    def replacement(self: Any) -> StateDict:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    moments = {key: torch.zeros_like(param) for key in self.optimizer_state_keys}
                    self.optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    return replacement


def load_state_dict_with_steps(load_state_dict: Load) -> Load:
    """`DistributedOptimizer.load_state_dict` after which every parameter has the saved `step`.

    The host goes wrong twice for torch's AdamW, and both times the bias correction suffers
    (core/optimizer/distrib_optimizer.py): it puts one step tensor into the state of all parameters
    (:1027), which AdamW then counts up once per parameter; and it copies into it the step from
    before the load, which travels with the parameter state as a local object (:1953). The saved
    step is in the parameter groups.
    """

    def replacement(self: Any, state_dict: StateDict) -> None:
        load_state_dict(self, state_dict)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                self.optimizer.state[param]["step"] = torch.tensor(float(group["step"]))

    return replacement


def set_states_without_step(
    set_states: Callable[[Any, torch.Tensor, StateDict], None],
) -> Callable[[Any, torch.Tensor, StateDict], None]:
    """`DistributedOptimizer._set_main_param_and_optimizer_states` that can do its work.

    It copies into views of leaves that require grad, so fp32 models could not resume; and it wants
    a `step` where the fully reshardable format has dropped it (distrib_optimizer.py:1223, :2390).
    """

    @torch.no_grad()
    def replacement(self: Any, model_param: torch.Tensor, tensors: StateDict) -> None:
        set_states(self, model_param, {"step": None, **tensors})

    return replacement


def states_behind_padded_buckets(sharded_states: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedOptimizer.sharded_param_state_fully_reshardable` that saves what it means to.

    The host gathers its buffers without the padding between buckets and cuts the parameters out by
    places that count it (core/optimizer/distrib_optimizer.py:1768): behind a bucket that is no
    multiple of 128 and of the ranks, state was saved shifted, without a word. Tied embeddings are
    such a bucket on every pipeline stage that has them.
    """

    def replacement(self: Any, *args: Any, **named: Any) -> Any:
        places = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_padding(buffer)
            return sharded_states(self, *args, **named)
        finally:
            for buffer, own in zip(self.buffers, places, strict=True):
                buffer.param_index_map = own

    return replacement


def _without_padding(buffer: Any) -> dict[torch.Tensor, tuple[int, int, int]]:
    """Where each parameter begins and ends if the buckets stand side by side, and its bucket."""
    padding = [0]
    for bucket in buffer.buckets:
        padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return {
        param: (begin - padding[bucket], end - padding[bucket], bucket)
        for param, (begin, end, bucket) in buffer.param_index_map.items()
    }


def load_schedule_and_step(load_state_dict: Load) -> Load:
    """`OptimizerParamScheduler.load_state_dict` that computes weight decay from what it has loaded.

    The host takes the step first and the schedule of weight decay after it
    (core/optimizer_param_scheduler.py:386), so that the first iteration decays as this run's
    options say.
    """

    def replacement(self: Any, state_dict: StateDict) -> None:
        load_state_dict(self, state_dict)
        self.step(0)

    return replacement


def load_chain_of_any_layout(load_state_dict: Load) -> Load:
    """`ChainedOptimizer.load_state_dict` for a checkpoint of another expert parallel size.

    The host wants the common state in the form that this run would save (optimizer.py:1578). Here
    every optimizer of this run gets its own tensors and the saved step; the options of its
    parameter groups are its own.
    """

    def replacement(self: Any, state_dict: StateDict) -> None:
        optimizers = self.chained_optimizers
        if isinstance(state_dict, dict):  # a list comes from a checkpoint that is not distributed
            parts = {key: value for key, value in state_dict.items() if type(key) is int}
            whole = {key: value for key, value in state_dict.items() if type(key) is not int}
            saved = [part for part in (whole, *parts.values()) if _saved_groups(part)]
            if len(optimizers) == 1:
                state_dict = _in_this_layout(optimizers[0], whole, saved)
            else:
                state_dict = {
                    index: _in_this_layout(optimizer, parts[index], saved)
                    for index, optimizer in enumerate(optimizers)
                }
        load_state_dict(self, state_dict)

    return replacement


def _in_this_layout(optimizer: Any, own: StateDict, saved: list[StateDict]) -> StateDict:
    """One optimizer's state dict.

    Args:
        own: what was loaded for this optimizer: its tensors, and nothing or some of the rest.
        saved: the common states of all saved optimizers.
    """
    merged = {key: value for part in reversed(saved) for key, value in part.items()} | own
    inner = {key: value for part in reversed(saved) for key, value in _inner(part).items()}
    inner |= _inner(own)
    groups = [group for part in saved for group in _saved_groups(part)]
    own_groups = _inner(own).get("param_groups", [{}] * len(optimizer.param_groups))
    inner["param_groups"] = [
        # The numbers of the parameters are this run's.
        _with_saved_step(current, groups) | {key: own[key] for key in own if key == "params"}
        for current, own in zip(optimizer.param_groups, own_groups, strict=True)
    ]
    steps = [step for part in saved if (step := _inner(part).get("state", {}).get("common_step"))]
    if steps:
        inner["state"] = {**inner["state"], "common_step": steps[0]}
    return {**merged, "optimizer": inner} if "optimizer" in merged else {**merged, **inner}


def _inner(part: StateDict) -> StateDict:
    """The inner optimizer's state dict: FP32Optimizer has it at the top, the others one below."""
    return part.get("optimizer", part)


def _saved_groups(part: StateDict) -> list[StateDict]:
    """Parameter groups with their options; what was loaded for this run has the numbers only."""
    return [group for group in _inner(part).get("param_groups", []) if "lr" in group]


def _with_saved_step(current: StateDict, saved: list[StateDict]) -> StateDict:
    """A parameter group of this run at the checkpoint's step.

    Its other options are what training does not change, or what the scheduler computes from the
    step; whether they are the checkpoint's or this run's was decided before the optimizer was built
    (run/checkpoint/param_schedule.py).
    """
    options = {key: value for key, value in current.items() if key != "params"}
    return {**options, "step": saved[0]["step"]} if "step" in saved[0] else options
