"""CUDA's streams, events and caching allocator over CPU tensors: who may touch which memory when.

Inside of `StreamModel` the overlap engine runs as on a GPU, with side streams, while the values are
computed on the CPU as ever. Every operator, seen by torch's dispatcher, is work on the stream that
is current then. What was copied to the host, and what is computed from that, is the host's; all
other tensors are the device's. An access that is not ordered behind the last ones of the same
memory is a hazard:

    a read              behind the last write
    a write             behind the last write and all reads
    of new memory       behind all that was done with whatever its stream has got back so far

The last rule is an allocator that hands out freed memory at once, to whoever asks first: memory
that was freed belongs to its stream again without waiting for any other stream that used it, unless
`record_stream` had named that one. The host is ordered behind what it synchronised with, and so is
all that it enqueues later.

Orders are vector clocks: for every stream, how much of its work is known to be done.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_scmoe.overlap import streams

Clock = dict[str, int]
"""Stream -> number of its pieces of work that are done."""


def join(clock: Clock, other: Clock) -> None:
    """Let `clock` know what `other` knows."""
    for stream, done in other.items():
        clock[stream] = max(clock.get(stream, 0), done)


@dataclass(eq=False)
class Stream:
    """Work that runs in order."""

    model: "StreamModel"
    name: str
    clock: Clock = field(default_factory=dict)

    def wait_event(self, event: "Event") -> None:
        if self.model.keeps("wait of " + self.kind):
            join(self.clock, event.clock)

    def record_event(self) -> "Event":
        event = Event(self.model)
        event.record(self)
        return event

    @property
    def kind(self) -> str:
        return "compute" if self is self.model.compute else "side"


class Event:
    """A point of a stream."""

    def __init__(self, model: "StreamModel", enable_timing: bool = False) -> None:
        self.model = model
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        self.model.events.append("host waits")
        if self.model.keeps("wait of host"):
            join(self.model.host, self.clock)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds; the work of this model takes none."""
        return 0.0


@dataclass
class Block:
    """Memory of one storage."""

    allocated_on: str
    before: Clock
    """What was done with this memory before it was allocated."""
    written: Clock = field(default_factory=dict)
    """The last write: one stream and its time."""
    read: Clock = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    on_host: bool = False
    name: str = ""


class Cuda:
    """The part of torch.cuda that `streams` uses."""

    def __init__(self, model: "StreamModel") -> None:
        self._model = model

    def Stream(self, device: torch.device, priority: int) -> Stream:
        return self._model.new_stream("side")

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self._model, enable_timing)

    def current_stream(self, device: torch.device) -> Stream:
        return self._model.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._model.current = self._model.current, stream
        yield
        self._model.current = before


class StreamModel(TorchDispatchMode):
    """See the head of this file.

    Args:
        dropped: an order that is not kept, by kind and number: ("wait of side", 3), or all of a
            kind: ("wait of side", None). Kinds: "wait of compute", "wait of side", "wait of host",
            "record_stream".

    Attributes:
        hazards: what went wrong, a line each.
        events: operators, exchanges and waits of the host, in order.
        orders: how many orders of each kind were asked for.
    """

    def __init__(self, dropped: tuple[str, int | None] | None = None) -> None:
        super().__init__()
        self.hazards: list[str] = []
        self.events: list[str] = []
        self.orders: Counter[str] = Counter()
        self.host: Clock = {}
        self._dropped = dropped
        self._num_streams = 0
        self._blocks: dict[int, Block] = {}
        self._pools: dict[str, Clock] = {}
        self.compute = self.current = self.new_stream("compute")
        self._patches = [
            mock.patch.object(streams, "_cuda", self._cuda_of),
            mock.patch.object(streams, "_to_host", self._to_host),
            mock.patch.object(
                torch.Tensor, "record_stream", lambda *args: self._record_stream(*args)
            ),
            # On the CPU these look at the values without an operator.
            *(self._watched(name) for name in ("cpu", "tolist", "numpy")),
        ]
        self._cuda = Cuda(self)

    def __enter__(self) -> "StreamModel":
        for patch in self._patches:
            patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def new_stream(self, kind: str) -> Stream:
        self._num_streams += 1
        return Stream(self, f"{kind} {self._num_streams}")

    def keeps(self, kind: str) -> bool:
        """Whether an order is kept that the engine asks for now."""
        number = self.orders[kind]
        self.orders[kind] += 1
        return self._dropped not in ((kind, number), (kind, None))

    # What `streams` is given in place of torch's. -------------------------------------------------

    def _cuda_of(self, tensor: Tensor) -> Cuda | None:
        return None if self._block(tensor).on_host else self._cuda

    def _to_host(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self._block(copy).on_host = True
        return copy

    def _watched(self, name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._block(tensor).on_host:
                self.events.append(f"host waits in {name}")
            return original(tensor, *args, **kwargs)

        return mock.patch.object(torch.Tensor, name, watched)

    def is_on_host(self, *tensors: Tensor) -> None:
        """These are the host's, although nothing has copied them there."""
        for tensor in tensors:
            self._block(tensor).on_host = True

    def _record_stream(self, tensor: Tensor, stream: Stream) -> None:
        if self.keeps("record_stream"):
            self._block(tensor).recorded.add(stream.name)

    # Memory. --------------------------------------------------------------------------------------

    def _block(self, tensor: Tensor) -> Block:
        """Of a tensor; one that is new here was there before the model, complete."""
        return self._blocks.get(self._key(tensor)) or self._allocate(tensor, {})

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _allocate(self, tensor: Tensor, before: Clock) -> Block:
        key = self._key(tensor)
        block = Block(self.current.name, before, name=str(tuple(tensor.shape)))
        # A generator's state is on the host, whatever it generates for.
        block.on_host = tensor.dtype == torch.uint8
        self._blocks[key] = block
        weakref.finalize(tensor.untyped_storage(), self._free, key)
        return block

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is None or block.on_host:
            return
        # The pool waits for the streams that were recorded, for no other.
        for use in (block.before, block.written, block.read):
            left = {stream: at for stream, at in use.items() if stream not in block.recorded}
            join(self._pools.setdefault(block.allocated_on, {}), left)

    def _access(self, block: Block, write: bool, operator: str) -> None:
        if block.on_host:
            self._expect(self.host, block.written, f"the host reads early in {operator}", block)
            return
        stream = self.current
        join(stream.clock, self.host)
        stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        now = {stream.name: stream.clock[stream.name]}
        self._expect(
            stream.clock, block.written, f"{operator} on {stream.name} sees a write", block
        )
        if write:
            self._expect(
                stream.clock, block.read, f"{operator} on {stream.name} hits a read", block
            )
            self._expect(
                stream.clock, block.before, f"{operator} on {stream.name} hits freed memory", block
            )
            block.written, block.read, block.before = now, {}, {}
        else:
            join(block.read, now)

    def _expect(self, known: Clock, done: Clock, what: str, block: Block) -> None:
        for stream, at in done.items():
            if known.get(stream, 0) < at:
                self.hazards.append(f"{what} of {stream}, {block.name} of {block.allocated_on}")

    # Operators. -----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        facts = _facts(operator)
        reads, writes = facts.accesses(args, kwargs)
        blocks = [(self._block(x), False) for x in reads] + [(self._block(x), True) for x in writes]
        on_host = bool(blocks) and all(block.on_host for block, _ in blocks)
        if not on_host and facts.needs_values(args):
            self.events.append(f"host waits in {facts.name}")
        result = operator(*args, **kwargs)
        if facts.is_view:
            return result
        for block, write in blocks:
            self._access(block, write, facts.name)
        for tensor in _tensors(result):
            if self._key(tensor) not in self._blocks:
                pool = self._pools.get(self.current.name, {})
                block = self._allocate(tensor, dict(pool))
                block.on_host |= on_host
                if "empty" not in facts.name and not on_host:
                    self._access(block, True, facts.name)
        if on_host:
            return result
        self.events.append(f"{self.current.kind}: {facts.name}")
        return result


def _tensors(value: Any) -> list[Tensor]:
    """A tensor, or those of lists in lists, which is all that an operator takes and returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


@dataclass(frozen=True)
class Facts:
    """What the schema of an operator says of all its calls."""

    operator: Any
    name: str
    arguments: list[tuple[str, bool]]
    """Name, and whether it is written."""
    is_view: bool
    """Whether it makes another tensor of the same memory, and looks at none of it."""
    waits: bool
    """Whether the host has to know values to go on: a number or a shape that depends on them."""

    def accesses(self, args: tuple[Any, ...], kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
        """(read, written) tensors of a call."""
        if self.operator.namespace == "c10d":
            # Its schemas do not say what is written: the first argument, everything in place.
            return _tensors(args[1:]), _tensors(args[0])
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        for index, (name, written) in enumerate(self.arguments):
            value = args[index] if index < len(args) else kwargs.get(name)
            (writes if written else reads).extend(_tensors(value))
        return reads, writes

    def needs_values(self, args: tuple[Any, ...]) -> bool:
        """Whether the host waits in this call: for values, or until its own are on the device, out
        of memory that is not pinned.

        Those are the numbers of `torch.tensor` and of a list that is an index. A number that is
        assigned to a part of a tensor looks the same on the CPU; `fill_` does not.
        """
        if self.operator is torch.ops.aten.index.Tensor:
            return any(x is not None and x.dtype == torch.bool for x in args[1])
        return self.waits


@cache
def _facts(operator: Any) -> Facts:
    schema = operator._schema
    returned = [value.alias_info for value in schema.returns]
    tags = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
    return Facts(
        operator,
        str(operator),
        [
            (argument.name, argument.alias_info is not None and argument.alias_info.is_write)
            for argument in schema.arguments
        ],
        bool(returned) and all(alias is not None and not alias.is_write for alias in returned),
        operator is torch.ops.aten.lift_fresh.default or any(tag in operator.tags for tag in tags),
    )
