"""The CPU backend: what stands in for `torch.cuda` where there is no CUDA device.

`torch.cuda.is_available()` stays False, so whatever asks takes its own CPU branch (Adam's
graph-capture check, pinned memory, checkpoint writers). Only what the host calls without asking
is replaced. Collectives run over gloo, random numbers come from torch's default CPU generator.
"""

import functools
import logging
import os
import re
import resource
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

CPU = torch.device("cpu")


def no_cuda_device() -> bool:
    """The one question about the device in this package."""
    return not torch.cuda.is_available()


# Streams and events: work on the CPU is finished when the call returns. ---------------------------


class CpuStream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "CpuStream") -> None:
        pass

    def wait_event(self, event: "CpuEvent") -> None:
        pass

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        event = event or CpuEvent()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class CpuEvent:
    """An event that remembers when it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: CpuStream | None = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: CpuStream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "CpuEvent") -> float:
        """Milliseconds, as `torch.cuda.Event.elapsed_time`."""
        return (end.seconds - self.seconds) * 1e3


Stream, Event = CpuStream, CpuEvent  # as torch.cuda calls them
CURRENT_STREAM = CpuStream()


def current_stream(device: Any = None) -> CpuStream:
    return CURRENT_STREAM


def stream(stream: CpuStream | None) -> AbstractContextManager[None]:
    return nullcontext()


# Device queries. ----------------------------------------------------------------------------------


def current_device() -> torch.device:
    return CPU


def set_device(device: Any) -> None:
    """There is one."""


def synchronize(device: Any = None) -> None:
    """Nothing is pending."""


def device_count() -> int:
    """One per process of this node: the host skips its parallel groups and seeds where it is 0."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """10.0, the first one for which the host does not demand CUDA_DEVICE_MAX_CONNECTIONS=1
    (training/arguments.py:1412)."""
    return 10, 0


def get_device_properties(device: Any = None) -> SimpleNamespace:
    major, minor = get_device_capability()
    return SimpleNamespace(
        name="cpu", major=major, minor=minor, multi_processor_count=1, total_memory=0
    )


def memory_stats(device: Any = None) -> dict[str, int]:
    """The process's resident memory in bytes under the names of the CUDA allocator."""
    with open("/proc/self/statm") as file:
        current = int(file.read().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = {"current": current, "peak": max(current, peak)}
    kinds = ("allocated_bytes", "reserved_bytes")
    return {f"{kind}.all.{when}": sizes[when] for kind in kinds for when in sizes} | {
        "allocation.all.current": 0
    }


# Random numbers: one generator, where the host keeps one for the CPU and one for CUDA. ------------


def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def manual_seed(seed: int) -> None:
    """Not `torch.manual_seed`, which may come back to the function this one replaces."""
    torch.default_generator.manual_seed(seed)


def iterate_without_drawing(iter_: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`DataLoader.__iter__` that leaves the generator as it was.

    It draws a seed for its workers. With CUDA that is another generator than the one of dropout;
    here a resumed run, which makes its iterators after loading the generator's state, would drop
    other elements than the uninterrupted run.
    """

    @functools.wraps(iter_)
    def replacement(self: Any) -> Any:
        state = torch.get_rng_state()
        iterator = iter_(self)
        torch.set_rng_state(state)
        return iterator

    return replacement


# Tensors. -----------------------------------------------------------------------------------------


def stay(tensor_or_module: Any, *args: Any, **kwargs: Any) -> Any:
    """`x.cuda()` of something that is where it belongs."""
    return tensor_or_module


def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that reads `device="cuda"` as the CPU."""
    # `with torch.device("meta")` knows factories by identity, from its first use on: the originals.
    with torch.device("cpu"):
        torch.empty(0)

    @functools.wraps(factory)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return replacement


def stage_copies(prepare_write_data: Callable[..., None]) -> Callable[..., None]:
    """`FileSystemWriterAsync.prepare_write_data` that copies what will be written.

    From a GPU the tensors are copied to the host before training goes on. Tensors that are there
    already would be shared with the writer's process, which would save a later step's values.
    """

    def replacement(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare_write_data(self, *args, **kwargs)
        self.write_buckets = [
            (path, name, (parts, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, name, (parts, tensors) in self.write_buckets
        ]

    return replacement


def cuda_type_name(type_: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` that names float tensors as the host's comparisons expect."""

    @functools.wraps(type_)
    def replacement(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    return replacement


def maybe_move_tensor_to_cpu(
    tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    """The host converts the all-to-all's splits to numpy only when it moves them off the GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def run_eagerly(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile` that compiles nothing, as `@compile` and as `@compile(...)`."""
    return function if function is not None else lambda function: function


def allow_no_cuda(initialize_megatron: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(initialize_megatron, allow_no_cuda=True)


# Options and messages. ----------------------------------------------------------------------------


class CpuOption(NamedTuple):
    """An option that the CPU backend switches: `args.<dest> = value`.

    Where `only` is given, other values than that one are left alone.
    """

    dest: str
    value: Any
    flag: str
    reason: str
    only: Any = None


CPU_OPTIONS = (
    CpuOption("distributed_backend", "gloo", "--distributed-backend gloo", "NCCL needs CUDA"),
    CpuOption(
        "transformer_impl", "local", "--transformer-impl local", "Transformer Engine needs CUDA"
    ),
    CpuOption(
        "gradient_accumulation_fusion",
        False,
        "--no-gradient-accumulation-fusion",
        "Apex or Transformer Engine kernel",
    ),
    CpuOption("masked_softmax_fusion", False, "--no-masked-softmax-fusion", "CUDA kernel"),
    CpuOption("apply_rope_fusion", False, "--no-rope-fusion", "Transformer Engine kernel"),
    CpuOption("no_persist_layer_norm", True, "--no-persist-layer-norm", "Apex kernel"),
    CpuOption("cross_entropy_loss_fusion", False, "no --cross-entropy-loss-fusion", "CUDA kernel"),
    CpuOption("moe_permute_fusion", False, "no --moe-permute-fusion", "Transformer Engine kernel"),
    CpuOption("moe_router_fusion", False, "no --moe-router-fusion", "Transformer Engine kernel"),
    CpuOption(
        "moe_token_dispatcher_type",
        "alltoall",
        "--moe-token-dispatcher-type alltoall",
        "DeepEP and HybridEP need CUDA",
        only="flex",
    ),
    CpuOption("tp_comm_overlap", False, "no --tp-comm-overlap", "Transformer Engine user buffers"),
    CpuOption("cuda_graph_impl", "none", "--cuda-graph-impl none", "CUDA graphs"),
)


def apply_cpu_defaults(args: Namespace) -> None:
    """Make a GPU command line runnable here and say, in one line from one rank, how.

    Call it between the host's `parse_args` and `validate_args`. Does nothing with a CUDA device.
    """
    if not no_cuda_device():
        return
    switched = switch_kernels(args)
    if args.rank == 0:
        print(f"No CUDA device: CPU backend. Switched: {', '.join(switched) or 'nothing'}")


def switch_kernels(args: Namespace) -> list[str]:
    """Set the options of `CPU_OPTIONS`; the model and its shapes stay the same.

    Returns:
        the flags that say what was changed.
    """
    switched = []
    for option in CPU_OPTIONS:
        value = getattr(args, option.dest)
        if value != option.value and option.only in (None, value):
            setattr(args, option.dest, option.value)
            switched.append(option.flag)
    return switched


# Collectives over parts of different sizes, which gloo refuses and NCCL takes. --------------------


def gather_padded(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`_gather_along_first_dim` that pads the parts to the largest one and cuts the result."""

    def replacement(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1 or max(output_split_sizes) == 0:
            return gather(input_, group, None, use_global_buffer)
        size = max(output_split_sizes)
        parts = gather(_padded(input_, size), group).split(size)
        return torch.cat([part[:n] for part, n in zip(parts, output_split_sizes, strict=True)])

    return replacement


def reduce_scatter_padded(
    reduce_scatter: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """`_reduce_scatter_along_first_dim` that pads the parts to the largest one."""

    def replacement(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1 or max(input_split_sizes) == 0:
            return reduce_scatter(input_, group, None, use_global_buffer)
        size = max(input_split_sizes)
        parts = torch.cat([_padded(part, size) for part in input_.split(input_split_sizes)])
        return reduce_scatter(parts, group)[: input_split_sizes[group.rank()]].contiguous()

    return replacement


def _padded(part: torch.Tensor, size: int) -> torch.Tensor:
    rows = part.new_zeros((size, *part.shape[1:]))
    rows[: part.shape[0]] = part
    return rows


class Noise(NamedTuple):
    """A message that says nothing on a CPU: who says it ("warnings" or a logger), how it begins
    (a regular expression), and why it may go."""

    source: str
    message: str
    reason: str


NOISE = (
    Noise("warnings", "Transformer Engine and Apex are not installed", "torch's optimizers"),
    Noise("warnings", "Apex is not installed", "torch's norms"),
    Noise("warnings", "Only transformer-engine", "the local experts are used"),
    Noise("warnings", "MimoModelConfig is experimental", "imported by the host, not used"),
    Noise("warnings", "When using async grad allreduce", "about CUDA_DEVICE_MAX_CONNECTIONS"),
    Noise("warnings", "The .grad attribute of a Tensor", "the optimizer's look at its shards"),
    Noise("warnings", "'pin_memory' argument", "nothing to pin"),
    Noise("warnings", "Please use DTensor instead", "from torch's checkpoint planner"),
    Noise("warnings", "The argument order of load", "from torch's checkpoint reader"),
    Noise("warnings", "torch.distributed is disabled", "each rank reads the common state itself"),
    Noise("torch.utils.cpp_extension", "No CUDA runtime", "known: this is the CPU backend"),
    Noise(
        "megatron.core.tensor_parallel.random",
        "CPU RNG state changed",
        "there is one generator, the CPU's",
    ),
    Noise(
        "megatron.core.models.gpt.gpt_model",
        "GPTModel IS DEPRECATED",
        "the package pins megatron-core below 0.20",
    ),
)


def hide_gpu_libraries() -> None:
    """Let imports of Transformer Engine and apex fail, installed or not.

    Where the host can import them it calls their CUDA kernels without asking for the device
    (router, optimizer, gradient clipping); without them it has code of its own. What was already
    imported stays: the tests of Transformer Engine's specs need it.
    """
    for name in ("apex", "transformer_engine"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def silence_noise() -> None:
    """Drop the messages of `NOISE`, whether warned or logged."""
    for noise in NOISE:
        if noise.source == "warnings":
            warnings.filterwarnings("ignore", message=noise.message)
        else:
            logging.getLogger(noise.source).addFilter(functools.partial(_says_more, noise))


def _says_more(noise: Noise, record: logging.LogRecord) -> bool:
    """A logging filter: False drops the record."""
    return not re.match(noise.message, record.getMessage())
