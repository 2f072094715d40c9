"""How many bytes autograd keeps for backward passes, now and at the peak; what else is alive."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class KeptBytes:
    """Bytes of the storages that saved tensors stand in, each once; parameters and buffers are
    not counted."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.peak = 0
        self._now = 0
        self._uses: dict[int, int] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._own = {
            _identity(tensor)
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }

    @contextmanager
    def measure(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _SavedTensor(self, tensor.detach()), lambda kept: kept.tensor
        ):
            yield

    @property
    def now(self) -> int:
        """What is kept at this moment, without storages that were emptied on purpose."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def add(self, tensor: Tensor) -> None:
        key = _identity(tensor)
        if key in self._own:
            return
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] == 1:
            self._storages[key] = tensor.untyped_storage()
            self._now += tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self._now)

    def drop(self, tensor: Tensor) -> None:
        key = _identity(tensor)
        if key in self._own:
            return
        self._uses[key] -= 1
        if self._uses[key] == 0:
            del self._uses[key]
            self._now -= self._storages.pop(key).nbytes()


class Alive(TorchDispatchMode):
    """The memory that was allocated inside of it and is not freed yet, whoever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        # Views of older memory and what is written in place are not new.
        old = {_identity(x) for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _identity(tensor) not in old:
                self._storages[_identity(tensor)] = weakref.ref(tensor.untyped_storage())
        return result

    def without(self, kept: KeptBytes, *tensors: Tensor) -> list[int]:
        """Bytes of every piece that autograd does not keep and that is not one of `tensors`."""
        own = {_identity(tensor) for tensor in tensors}
        found = []
        for key, reference in self._storages.items():
            storage = reference()
            if storage is not None and key not in own and key not in kept._storages:
                found.append(storage.nbytes())
        return found


class _SavedTensor:
    """A saved tensor; autograd drops it when its backward step is done."""

    def __init__(self, counter: KeptBytes, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        counter.add(tensor)

    def __del__(self) -> None:
        self.counter.drop(self.tensor)


def _identity(tensor: Tensor) -> int:
    """Of the storage, also when it is resized."""
    return tensor.untyped_storage()._cdata
