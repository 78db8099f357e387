"""Copies of nested containers of tensors on the CPU, given back as they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Stored:
    """A tensor on the CPU and the device that it was made on."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.device = tensor.detach().to("cpu", copy=True), tensor.device


def stored(tree: Any) -> Any:
    """Nested containers with their tensors copied to the CPU."""
    return pytree.tree_map_only(Tensor, Stored, tree)


def restored(tree: Any) -> Any:
    """What `stored` was given, as fresh copies that nobody else can change."""
    return pytree.tree_map_only(Stored, lambda s: s.tensor.to(s.device, copy=True), tree)


def stored_bytes(tree: Any) -> int:
    """Size of the tensors that `stored` copied."""
    return sum(leaf.tensor.nbytes for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Stored))
