"""How many bytes autograd keeps for backward passes, now and at the peak."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
            lambda tensor: _Kept(self, tensor.detach()), lambda kept: kept.tensor
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


class _Kept:
    """A saved tensor; autograd drops it when its backward step is done."""

    def __init__(self, counter: KeptBytes, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        counter.add(tensor)

    def __del__(self) -> None:
        self.counter.drop(self.tensor)


def _identity(tensor: Tensor) -> int:
    """Of the storage, also when it is resized."""
    return tensor.untyped_storage()._cdata
