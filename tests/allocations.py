"""Memory of tensors, counted by their storages."""

from __future__ import annotations

import weakref

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Bytes in tensors made within: those alive now, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = set(), 0, 0

    def now(self):
        return self.bytes

    def _gone(self, place, size):
        self.alive.discard(place)
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place, size = storage._cdata, storage.nbytes()
                if place not in self.alive:
                    self.alive.add(place)
                    self.bytes += size
                    weakref.finalize(storage, self._gone, place, size)
        self.peak = max(self.peak, self.bytes)
        return result
