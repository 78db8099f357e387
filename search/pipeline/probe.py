"""The scheduler of the search. Run inside a pipeline's ordinary call it *is* the differentiable sampler of that
pipeline. It records every state, takes nodes and coefficients that may be live tensors, can show what a step has to
work with and end there, and leaves the call after the last step unless the decoded output is asked for.

Gradients: `set_timesteps` switches them on (the pipeline's own no_grad puts the mode back when its call ends), and
`step` clones tensors that pipelines may write into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import Shift
from diffusers_dssolver.history import History
from diffusers_dssolver.paths import FlowPath
from diffusers_dssolver.step import Scalar, step

from .plan import Plan, Solver
from .recorder import Recorder, state_of, with_state

# (row of step i, target minus the state that it makes (M,), columns (i, M)): what corrections of the row are fitted to
Watcher = Callable[[list[Scalar], Tensor, Tensor], object]


BEFORE = -1  # in the place of a step's index: before the first network call


class RunFinished(BaseException):
    """Private: nothing after this step is wanted. No Exception, which modular pipelines report as an error."""


@dataclass(frozen=True)
class Request:
    """What the next run does; `Student.run` explains the rest.

    Attributes:
        live: differentiate in the numbers of the plan.
    """

    plan: Plan
    until: int | None = None
    watch: tuple[Tensor, Watcher] | None = None
    decode: bool = False
    final: Tensor | None = None
    live: bool = False


class ProbeScheduler(DSSolverScheduler):
    """A `DSSolverScheduler` that carries out requests of a `Student`.

    Attributes:
        request: of the run.
        recorder: its states.
        solver: the numbers of the plan on this model, from `set_timesteps` on.
    """

    request: Request
    recorder: Recorder
    solver: Solver
    _twin = False  # a copy made by the pipeline, for sound
    _float32_state: Tensor | None = None

    def begin(self, request: Request) -> None:
        """Prepare one run."""
        self.request, self.recorder = request, Recorder()

    @property
    def resolution_shift(self) -> Shift | None:
        """Of a flow model; a dynamic one as the last run's pipeline computed it. None on vp."""
        return self._shift() if isinstance(self._path, FlowPath) else None

    def time(self) -> Tensor:
        """Of the step that is being taken, 0-dim."""
        index = self._step_index if self._step_index is not None else self._begin_index or 0
        return self.timesteps[min(index, len(self.timesteps) - 1)]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """As the parent's, for the arguments a pipeline gives; then the solver of the plan is put in place."""
        if self.config.mean_decay is not None:
            raise ValueError(f"mean_decay is {self.config.mean_decay}; a search keeps no means apart, leave it out")
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
        plan = self.request.plan
        if self.num_inference_steps != plan.nfe:
            raise ValueError(
                f"the pipeline takes {self.num_inference_steps} steps where {plan.nfe} are asked for; a distilled "
                "(Turbo) model with fixed noise levels has no solver to be searched"
            )
        if self.request.live:
            torch.set_grad_enabled(True)
        self.solver, self._float32_state = plan.on(self._path, self.resolution_shift), None
        self._install(self.solver.course, device)
        if self.request.watch:  # the watcher looks at the whole history
            self._history.needed = [i + 1 for i in range(plan.nfe)]
        if self.request.until == BEFORE:
            raise RunFinished

    @functools.wraps(DSSolverScheduler.step)
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.request.live:  # a graph cannot bear tensors that pipelines write into
            model_output, sample = model_output.clone(), sample.clone()
        first, given = sample, model_output.dtype
        wide = torch.promote_types(given, torch.float32)
        carry = self.request.plan.float32_states and given != wide
        if carry:
            known = self._float32_state is not None and torch.equal(self._float32_state.to(sample.dtype), sample)
            model_output, sample = model_output.to(wide), self._float32_state if known else sample.to(wide)
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        final = self.request.final
        if final is not None and self._step_index == len(self.timesteps) and not self._twin:
            result = with_state(result, as_batch(final.to(state_of(result)), sample))
        self.recorder.note(first, result)
        if carry:
            self._float32_state = state_of(result)
            result = with_state(result, self._float32_state.to(given))
        if self.recorder.steps_taken == len(self.timesteps) and not self._twin and not self.request.decode:
            raise RunFinished
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> ProbeScheduler:
        """For pipelines that keep a second scheduler (of sound): of the same run, with a history and states of its
        own; it never ends the run. Tensors are shared: those with a graph cannot be copied."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({k: v.copy() if type(v) in (list, set, History) else v for k, v in vars(self).items()})
        twin._twin, twin.recorder = True, Recorder()
        return twin

    def _row(self, index: int, x: Tensor) -> Sequence[Scalar]:
        row = super()._row(index, x)
        if index == self.request.until and not self._twin:
            if self.request.watch:
                self._show(index, x, [*[0.0] * (index + 1 - len(row)), *row], *self.request.watch)
            raise RunFinished
        return row

    def _show(self, index: int, x: Tensor, row: list[Scalar], target: Tensor, watcher: Watcher) -> None:
        *earlier, newest = history = self._history.outputs
        left = as_batch(target.to(x), x) - step(x, history, row, self._a[index], self._b[index])
        columns = torch.stack([(self._b[index] * (d - newest)).flatten() for d in earlier])
        watcher(row, left.flatten(), columns)


def as_batch(states: Tensor, x: Tensor) -> Tensor:
    """A copy of states (B, ...), as often as guidance has each sample in the batch x."""
    return states.repeat(x.shape[0] // states.shape[0], *[1] * (x.ndim - 1))
