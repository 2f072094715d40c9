"""Measured times of a pair's parts, and predictions against measured runs.

One JSON file (`Measurement.read`):

    {
      "source": "machine, commit, command",
      "topk": 1,
      "forward":  {"dense_qkv": 0.003, "dense_core_attention": 0.004, "dense_projection": 0.003,
                   "dense_mlp": 0.012, "qkv": 0.003, "core_attention": 0.004, "projection": 0.003,
                   "shared_expert": 0.012, "experts": 0.013, "dispatch": 0.020, "combine": 0.019},
      "backward": {the same keys},
      "rest": 0.005,
      "runs": [
        {"position": "none", "topk": 2, "shared_expert": false, "seconds": 0.21},
        {"position": "none", "topk": 1, "shared_expert": true, "seconds": 0.18},
        {"position": "pos2", "slot": 1, "backward_slot": 3, "overlap": true, "seconds": 0.15}
      ]
    }

All times are seconds of one rank, one micro-batch and one MoE layer with the dense layer in front
of it: an iteration divided by its micro-batches and MoE layers. `topk` is that of experts,
dispatch and combine. The keys of a direction are the dense steps of schedule.window("pos3"),
`experts`, and `dispatch` and `combine`, which may both be left out: then they are the cluster's.
`rest` (default 0) is everything outside the pair, forward and backward, and `runs` (default none)
are whole runs, `rest` included, that the prediction is compared with. `backward_slot` is `slot`
where it is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_scmoe.overlap.measure.cost import RoutedTimes
from megatron_scmoe.overlap.schedule import POSITIONS, Slots, window
from megatron_scmoe.planner.predict import PAIR, Model, PassTimes, predict, stock_seconds
from megatron_scmoe.words import read_json

TOLERANCE = 0.1
"""A prediction is right if it is this close to the measured time, relative to it."""


class MeasuredRun(NamedTuple):
    """Seconds of a whole run, for one micro-batch and MoE layer."""

    position: str
    seconds: float
    topk: int
    slots: Slots | None = None
    overlap: bool = True
    shared_expert: bool = True

    @property
    def name(self) -> str:
        if self.position == "none":
            return f"top-{self.topk}" + (" + shared expert" if self.shared_expert else "")
        return f"{self.position} slot {self.slots}" + ("" if self.overlap else ", no overlap")


class CheckedPrediction(NamedTuple):
    """A prediction beside what was measured, in seconds."""

    name: str
    predicted: float
    measured: float

    @property
    def deviation(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1

    @property
    def agrees(self) -> bool:
        return abs(self.deviation) <= TOLERANCE


@dataclass(frozen=True)
class Measurement:
    """The content of a file of measured times."""

    source: str
    topk: int
    forward: PassTimes
    backward: PassTimes
    has_exchanges: bool
    rest: float
    runs: tuple[MeasuredRun, ...]

    @classmethod
    def read(cls, path: Path) -> "Measurement":
        """Read a file.

        Raises:
            ValueError: it is not of the form above, in one line.
            OSError: it cannot be read.
        """
        try:
            return cls._from_json(read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            detail = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"--measured {path}: {detail} (form: megatron_scmoe/planner/measured.py)."
            ) from error

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> "Measurement":
        _check_keys(content, {"source", "topk", "forward", "backward"}, {"rest", "runs"})
        topk = content["topk"]
        _check_kind(topk, "topk", int)
        if topk < 1:
            raise ValueError(f"topk {topk} is no positive integer")
        forward, backward, runs = content["forward"], content["backward"], content.get("runs", [])
        for name, kind in (("source", str), ("forward", dict), ("backward", dict)):
            _check_kind(content[name], name, kind)
        _check_kind(runs, "runs", list)
        has_exchanges = "dispatch" in forward
        return cls(
            source=content["source"],
            topk=topk,
            forward=_pass_times(forward, topk, has_exchanges),
            backward=_pass_times(backward, topk, has_exchanges),
            has_exchanges=has_exchanges,
            rest=_seconds(content.get("rest", 0.0), "rest"),
            runs=tuple(_run(run, topk) for run in runs),
        )


def compare(model: Model, topk: int, runs: tuple[MeasuredRun, ...]) -> list[CheckedPrediction]:
    """Predict every measured run.

    Args:
        model: times of the parts, with top-`topk`.
    """
    return [
        CheckedPrediction(run.name, _run_seconds(model, topk, run), run.seconds) for run in runs
    ]


def _run_seconds(model: Model, topk: int, run: MeasuredRun) -> float:
    if run.position == "none":
        pair = stock_seconds(model, wider=run.topk == topk + 1, shared_expert=run.shared_expert)
    elif run.overlap:
        assert run.slots is not None
        pair = predict(model, run.position, run.slots).seconds
    else:
        # Without overlap a unit runs what the stock layers run, in another order; two top-1 gates
        # what top-2 runs.
        pair = stock_seconds(model, wider=bool(model.further), shared_expert=True)
    return model.rest + pair


# Reading. -----------------------------------------------------------------------------------------


def _check_keys(content: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"an object was expected, not {content!r}")
    for key in sorted(required - set(content)):
        raise KeyError(key)
    for key in sorted(set(content) - required - optional):
        raise ValueError(f"unknown key '{key}'")


KINDS = {str: "a text", int: "a whole number", bool: "true or false", dict: "an object"}


def _check_kind(value: Any, name: str, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r:.40}, not {KINDS.get(kind, 'a list')}")


def _seconds(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{name} is {value!r}, not a time in seconds")
    return float(value)


def _pass_times(content: Any, topk: int, has_exchanges: bool) -> PassTimes:
    exchanges = {"dispatch", "combine"} if has_exchanges else set()
    _check_keys(content, {step.value for step in PAIR} | {"experts"} | exchanges, set())
    seconds = {name: _seconds(value, name) for name, value in content.items()}
    routed = [seconds.get(name, 0.0) for name in ("experts", "dispatch", "combine")]
    return PassTimes(
        dense={step: seconds[step.value] for step in PAIR},
        routed=RoutedTimes(*routed),
        # Experts and exchanges take as much longer as there are more rows.
        wider=RoutedTimes(*(value * (topk + 1) / topk for value in routed)),
    )


def _run(content: Any, topk: int) -> MeasuredRun:
    optional = {"topk", "slot", "backward_slot", "overlap", "shared_expert"}
    _check_keys(content, {"position", "seconds"}, optional)
    values = {"topk": topk, **content}
    forward = values.pop("slot", None)
    slots = Slots(forward, values.pop("backward_slot", forward))
    run = MeasuredRun(**values, slots=slots)
    _check_kind(run.position, "position of a run", str)
    for name, kind in (("topk", int), ("overlap", bool), ("shared_expert", bool)):
        _check_kind(getattr(run, name), f"{name} of a run", kind)
    if run.position in POSITIONS and run.position != "none":
        for slot in slots:
            _check_kind(slot, "slot of a run", int)
    if _seconds(run.seconds, "seconds of a run") == 0:
        raise ValueError("seconds of a run is 0")
    if run.position == "none":
        if run.topk not in (topk, topk + 1):
            raise ValueError(
                f"a run with topk {run.topk}: only {topk} and {topk + 1} are predicted"
            )
    elif run.position not in POSITIONS:
        raise ValueError(f"a run at position {run.position!r}")
    elif run.topk != topk:
        raise ValueError(f"a run at {run.position} with topk {run.topk}, the parts have {topk}")
    elif not all(0 <= slot <= len(window(run.position)) for slot in slots):
        raise ValueError(f"a run at {run.position} with slot {slots}")
    return run
