"""The states that pass through a scheduler's `step`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Recorder:
    """The states of one run.

    Args:
        all_states: keep every state; False: the latest alone, for runs of hundreds of steps.

    Attributes:
        states: first to last: what the first step was given, then what each step returned.
        steps_taken: in the run that goes on.
    """

    def __init__(self, all_states: bool = True) -> None:
        self.all_states, self.steps_taken = all_states, 0
        self.states: list[Tensor] = []

    def note(self, sample: Tensor, result: Any) -> None:
        """One step: its input (B, ...) and what it returned."""
        if not self.all_states:
            self.states.clear()
        elif not self.states:
            self.states.append(sample)
        self.states.append(state_of(result))
        self.steps_taken += 1

    @contextmanager
    def watching(self, scheduler: Any) -> Iterator[Recorder]:
        """Note the steps of any scheduler. A copy that a pipeline makes of it, for sound, is not noted."""
        take = scheduler.step

        @functools.wraps(take)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = take(model_output, timestep, sample, *args, **kwargs)
            self.note(sample, result)
            return result

        def plain(memo: dict[int, Any]) -> Any:
            copied = copy.copy(scheduler)
            for name in ("step", "__deepcopy__"):
                del copied.__dict__[name]
            return copy.deepcopy(copied, memo)

        scheduler.step, scheduler.__deepcopy__ = step, plain
        try:
            yield self
        finally:
            del scheduler.step, scheduler.__deepcopy__


def state_of(result: Any) -> Tensor:
    """The state in a step's result, a tuple or an output of diffusers."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def with_state(result: Any, state: Tensor) -> Any:
    """A step's result with another state."""
    return (state, *result[1:]) if isinstance(result, tuple) else type(result)(state, *result.to_tuple()[1:])
