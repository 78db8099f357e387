"""Network outputs of one batch, kept by step: a run that begins like an earlier one takes the outputs of its beginning
from here. The input of a network at step i depends on the steps before it alone, so a solver that differs from another
from its row i on differs in the network calls after step i only.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .copies import restored, stored
from .sampler import Sampler


class Replay:
    """Outputs of every network that takes a time, for one batch of samples.

    Args:
        other: a replay whose outputs this one begins with.
        frozen: keep no more of them.
    """

    def __init__(self, other: Replay | None = None, frozen: bool = False) -> None:
        self._kept: dict[tuple[int, int, int], Any] = dict(other._kept) if other else {}
        self._frozen = frozen

    @contextmanager
    def around(self, sampler: Sampler, steps_taken: Callable[[], int], shared_calls: int) -> Iterator[None]:
        """One run. Network calls of its first `shared_calls` steps are answered from here where their output is kept;
        others are made, and kept where none is. Only calls that are made are counted.

        Args:
            steps_taken: of the run that goes on.
            shared_calls: the run gives the networks in so many first steps what the runs before it gave them.
        """
        networks = list(dict.fromkeys(sampler.timed.values()))
        calls: Counter[tuple[int, int]] = Counter()

        def key(number: int) -> tuple[int, int, int]:
            step = steps_taken()
            return number, step, calls[number, step]

        def kept(module: nn.Module) -> bool:
            at = key(networks.index(module))
            return at[1] < shared_calls and at in self._kept

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
            before, sampler.is_answered = sampler.is_answered, kept
            try:
                yield
            finally:
                sampler.is_answered = before


@contextmanager
def patched(networks: list[nn.Module], forwards: list[Any]) -> Iterator[None]:
    """Networks with other forwards. What was there is put back, and nothing left where nothing was."""
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
