"""Network outputs of one batch, kept by step: a run that begins like an earlier one takes the outputs of its beginning
from here. What a network is given at step i depends on the steps before it alone, so a solver that differs from
another from its row i on differs in the network calls after step i only.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from .probe import ProbeScheduler
    from .sampler import Sampler


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


class Replay:
    """Outputs of every network that takes a time, of one batch of samples.

    Args:
        other: one whose outputs this one begins with.
        frozen: whether no more are kept.
    """

    def __init__(self, other: Replay | None = None, frozen: bool = False) -> None:
        self._kept: dict[tuple[int, int, int], Any] = dict(other._kept) if other else {}
        self._frozen = frozen
        self._parts: dict[int, Replay] = {0: self}
        for number, part in other._parts.items() if other else ():
            if number:
                self._parts[number] = Replay(part, frozen)

    def part(self, number: int) -> Replay:
        """That of one of several pipeline calls which the samples take together."""
        return self._parts.setdefault(number, Replay(frozen=self._frozen))

    @contextmanager
    def around(self, sampler: Sampler, probe: ProbeScheduler, unchanged: int) -> Iterator[None]:
        """One run, in which calls of the first `unchanged` steps take what is kept; others are made, and kept where
        nothing is. Calls that are not made are not counted."""
        networks = list(dict.fromkeys(sampler.timed.values()))
        calls: Counter[tuple[int, int]] = Counter()

        def key(number: int) -> tuple[int, int, int]:
            step = probe.steps_taken
            return number, step, calls[number, step]

        def kept(module: nn.Module) -> bool:
            at = key(networks.index(module))
            return at[1] < unchanged and at in self._kept

        def wrapped(number: int, forward: Any) -> Any:
            @functools.wraps(forward)
            def replayed(*args: Any, **kwargs: Any) -> Any:
                at, given = key(number), kept(networks[number])
                calls[number, at[1]] += 1
                if given:
                    return restored(self._kept[at])
                made = forward(*args, **kwargs)
                if at not in self._kept and not self._frozen:
                    self._kept[at] = stored(made)
                return made

            return replayed

        forwards = [module.forward for module in networks]
        with patched(networks, [wrapped(k, forward) for k, forward in enumerate(forwards)]):
            before, sampler.not_made = sampler.not_made, kept
            try:
                yield
            finally:
                sampler.not_made = before


@contextmanager
def patched(networks: list[nn.Module], forwards: list[Any]) -> Iterator[None]:
    """These networks with other forwards; what was there is put back, and nothing left where nothing was."""
    before = [vars(module).get("forward") for module in networks]
    for module, forward in zip(networks, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in zip(networks, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def uncounted(sampler: Sampler) -> Iterator[None]:
    """The sampler counting from 0, and put back afterwards."""
    before = sampler.network_evaluations, sampler.network_calls
    sampler.network_evaluations = sampler.network_calls = 0
    try:
        yield
    finally:
        sampler.network_evaluations, sampler.network_calls = before
