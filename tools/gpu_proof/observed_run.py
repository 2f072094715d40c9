"""The entry script, observed: every loss to the last bit, and where the host waits for the device.

    torchrun observed_run.py --record FILE [--travel] [--one-by-one] [--waits-of N] -- <options>

Rank 0 writes FILE at the end of the run:

    {"curves": {"lm loss": {iteration: value}, "grad norm": ...}, "waits": [[kind, site, count]]}

--travel: exchanges are not short-circuited in a group of one.
--one-by-one: DDP reduces its buckets one by one.
--waits-of: list the host's waits from the start of the Nth step of this run to that of the next.

A run that does not ask for Transformer Engine's layers is without its optimizer and kernels too,
which Megatron takes wherever it can import them.

The waits are those that torch reports (`torch.cuda.set_sync_debug_mode`) and, since it does not
report waits on events and for the whole device, the calls of these.
"""

import sys

from megatron_scmoe import say, start
from megatron_scmoe.host.cpu import hide_gpu_libraries

with say.user_errors():
    if "transformer_engine" not in sys.argv:  # the value of --transformer-impl
        hide_gpu_libraries()
    start.replace_host_symbols()

import argparse
import functools
import inspect
import json
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.training import training

import pretrain_gpt_scmoe
from megatron_scmoe.overlap.collectives import PerTensor
from megatron_scmoe.words import write_whole

REPOSITORY = Path(__file__).resolve().parents[2]
REPORTERS = (__file__, warnings.__file__, str(Path(torch.__file__).parent), "<")
REPORTED = "synchronizing CUDA operation"  # in torch's message

Wait = tuple[str, str]
"""What waits, and the place that asks for it."""


class Curves:
    """What `training_log` gets, kept on the device until the end: reading it would be a wait."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, Any]] = {"lm loss": {}, "grad norm": {}}

    def observe(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(training_log)

        @functools.wraps(training_log)
        def observed(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            found = {"lm loss": given["loss_dict"]["lm loss"], "grad norm": given["grad_norm"]}
            for name, value in found.items():
                kept = value.detach().clone() if isinstance(value, torch.Tensor) else value
                self._values[name][given["iteration"]] = kept
            return training_log(*args, **kwargs)

        return observed

    def read(self) -> dict[str, dict[int, float]]:
        return {
            name: {iteration: float(value) for iteration, value in curve.items()}
            for name, curve in self._values.items()
        }


class Waits:
    """The host's waits during one step."""

    def __init__(self, step: int) -> None:
        self.counts: Counter[Wait] = Counter()
        self._step = step
        self._steps = 0
        self._watching: Any = None

    def observe(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train_step)
        def observed(*args: Any, **kwargs: Any) -> Any:
            self._steps += 1
            if self._steps == self._step:
                self._watching = watched(self.counts)
                self._watching.__enter__()
            elif self._watching is not None:
                self._watching.__exit__(None, None, None)
                self._watching = None
            return train_step(*args, **kwargs)

        return observed


@contextmanager
def watched(counts: Counter[Wait]) -> Iterator[None]:
    """Count the waits of the block, by kind and place."""
    show = warnings.showwarning

    def note(message: Warning | str, *where: Any) -> None:
        if REPORTED in str(message):
            counts["reported by torch", site()] += 1
        else:
            show(message, *where)

    def counted(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            counts[kind, site()] += 1
            return call(*args, **kwargs)

        return replacement

    event: Any = torch.cuda.Event
    wait_event, wait_device = event.synchronize, torch.cuda.synchronize
    event.synchronize = counted("event", wait_event)
    torch.cuda.synchronize = counted("device", wait_device)
    on_device = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        if on_device:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if on_device:
                torch.cuda.set_sync_debug_mode("default")
            event.synchronize, torch.cuda.synchronize = wait_event, wait_device


def site() -> str:
    """The innermost frame outside of what reports: 'megatron_scmoe/x.py:12 name'.

    What autograd's own threads wait for is seen from the call of backward.
    """
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(REPORTERS):
            path = frame.filename.rpartition("site-packages/")[2]
            path = path.removeprefix(f"{REPOSITORY}/")
            return f"{path}:{frame.lineno} {frame.name}"
    return "torch"


def main() -> None:
    parser = argparse.ArgumentParser(prog="observed_run")
    add = parser.add_argument
    add(
        "--record",
        type=Path,
        required=True,
        metavar="FILE",
        help="receives what was observed, as JSON",
    )
    add("--travel", action="store_true", help="let exchanges of one rank travel")
    add("--one-by-one", action="store_true", help="reduce gradients' buckets one by one")
    add(
        "--waits-of",
        type=int,
        default=0,
        metavar="N",
        help="the iteration whose waits of the host are listed",
    )
    end = sys.argv.index("--")
    args = parser.parse_args(sys.argv[1:end])
    sys.argv = [pretrain_gpt_scmoe.__file__, *sys.argv[end + 1 :]]

    curves, waits = Curves(), Waits(args.waits_of)
    training.training_log = curves.observe(training.training_log)
    training.train_step = waits.observe(training.train_step)
    if args.travel:
        PerTensor.moves = lambda self: True  # type: ignore[method-assign]
    if args.one_by_one:
        param_and_grad_buffer._coalescing_manager = lambda *_, **__: nullcontext()
    try:
        pretrain_gpt_scmoe.main()
    finally:
        if os.environ["RANK"] == "0":
            listed = [[*wait, count] for wait, count in waits.counts.most_common()]
            write_whole(args.record, json.dumps({"curves": curves.read(), "waits": listed}))


if __name__ == "__main__":
    main()
