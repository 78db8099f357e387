"""A pipeline that samples with any solver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_dssolver.derive import Shift
from diffusers_dssolver.paths import Path
from diffusers_dssolver.solver import SolverSpec

from .gradients import differentiable
from .plan import Plan, Solver, second_order_slopes, shifted
from .probe import BEFORE, ProbeScheduler, Request, RunFinished, Watcher
from .replay import Replay
from .sampler import Sampler


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a run gave.

    Attributes:
        states: N+1 tensors (B, ...), first to last; fewer where `until` ended the run.
        solver: the numbers that were used.
        output: what the pipeline's call returned, of a run that decodes.
    """

    states: Sequence[Tensor]
    solver: Solver
    output: Any = None

    @property
    def final(self) -> Tensor:
        """The last state (B, ...)."""
        return self.states[-1]

    @property
    def nodes(self) -> Tensor:
        """(N+1,) float64, as they were integrated."""
        return self.solver.nodes

    @property
    def spec(self) -> SolverSpec:
        """The solver as it is published. Raises ValueError where nodes or times do not fall."""
        return self.solver.spec()


class Student:
    """A pipeline and the scheduler that puts a plan's solver into its call.

    Args:
        sampler: the pipeline.
        options: of the scheduler's configuration, over those of the pipeline's own.
    """

    def __init__(self, sampler: Sampler, **options: Any) -> None:
        self.sampler = sampler
        options = {"solvers": "classical", "strict": False, "history_length": None, **options}
        self.scheduler: ProbeScheduler = ProbeScheduler.from_config(sampler.pipe.scheduler.config, **options)
        self._shifts: dict[int, Shift | None] = {}  # by step count, of the runs so far

    @property
    def name(self) -> str:
        """Class of the pipeline, for messages."""
        return type(self.sampler.pipe).__name__

    @property
    def path(self) -> Path:
        """The model's path from noise to data."""
        return self.scheduler.path

    def resolution_shift(self, nfe: int) -> Shift | None:
        """Of a flow model at a step count, on which a dynamic shift may depend (FLUX.2); None on vp.

        A dynamic shift is known to the pipeline only: where none ran at this step count yet, a call is begun, and ended
        before its first network call.
        """
        shifts, scheduler = self._shifts, self.scheduler
        if nfe not in shifts and scheduler.config.use_dynamic_shifting:
            uniform = torch.linspace(1, 0, nfe + 1, dtype=torch.float64)
            self.run(Plan(uniform), [0], "train", until=BEFORE)
        return shifts.get(nfe, scheduler.resolution_shift)

    def searched_shift(self, counts: Iterable[int]) -> dict[str, Any] | None:
        """The resolution shifts that nodes of these step counts contain, as the configuration key of that name."""
        shifts = {str(nfe): self.resolution_shift(nfe) for nfe in counts}
        found = {nfe: {"factor": s.factor, "terminal": s.terminal} for nfe, s in shifts.items() if s is not None}
        one = next(iter(found.values()), None)
        return one if all(shift == one for shift in found.values()) else found

    def nodes(self, unshifted_nodes: Tensor) -> Tensor:
        """(N+1,) nodes as they are integrated and published; differentiable."""
        return shifted(unshifted_nodes, self.path, self.resolution_shift(len(unshifted_nodes) - 1))

    def angles(self, unshifted_nodes: Tensor) -> Tensor:
        """(N+1,) angles of these nodes, the coordinate in which teacher trajectories are interpolated."""
        return self.path.angle(self.nodes(unshifted_nodes))

    def spec(self, plan: Plan) -> SolverSpec:
        """A plan's solver as it is published. Raises ValueError where nodes or times do not fall."""
        return plan.on(self.path, self.resolution_shift(plan.nfe)).spec()

    def slopes(self, unshifted_nodes: Tensor) -> Tensor:
        """(N,) `second_order_slopes` of these nodes."""
        return second_order_slopes(self.nodes(unshifted_nodes), self.path)

    def run(
        self,
        plan: Plan,
        indices: Sequence[int],
        split: str,
        *,
        until: int | None = None,
        watch: tuple[Tensor, Watcher] | None = None,
        decode: bool = False,
        final: Tensor | None = None,
        replay: Replay | None = None,
        shared_calls: int = 0,
        recompute: bool = True,
    ) -> Trajectory:
        """One call of the pipeline on these samples.

        Args:
            until: end the run in the step of this index, before it is taken; BEFORE: before any network call.
            watch: (target, watcher): there, show the watcher that step's row, target (B, ...) minus the state that the
                row makes, and the change of that state per unit of weight moved from the newest output to each earlier
                one.
            decode: go on to the end of the call after the last step.
            final: (B, ...) taken in place of the last step's result.
            replay: outputs of these samples' network calls; of runs without gradients.
            shared_calls: so many first network calls are those of the runs that `replay` has seen.
            recompute: `gradients.differentiable`.

        Raises:
            ValueError: if the pipeline does not take the steps of the plan, or takes them with another scheduler.
        """
        sampler, scheduler = self.sampler, self.scheduler
        live = torch.is_grad_enabled() and plan.requires_grad
        scheduler.begin(Request(plan, until, watch, decode, final, live))
        recorder = scheduler.recorder
        replayed = replay.around(sampler, lambda: recorder.steps_taken, shared_calls) if replay else nullcontext()
        total = scheduler.config.num_train_timesteps
        networks = sampler.timed.values()
        gradients = differentiable(networks, scheduler.time, total, recompute) if live else nullcontext()
        output, ended = None, False
        with replayed, sampler.using(scheduler), gradients:
            try:
                output = sampler(indices, split, plan.nfe)
            except RunFinished:
                ended = True
                for network in networks:
                    if getattr(network, "is_cache_enabled", False):
                        network._reset_stateful_cache()  # as pipelines do at the end of their call
            if not ended and sampler.pipe.scheduler is not scheduler:
                other = type(sampler.pipe.scheduler).__name__
                raise ValueError(
                    f"{self.name} puts a {other} of its own in the scheduler's place, so no solver can reach it"
                )
        self._shifts[plan.nfe] = scheduler.resolution_shift
        if not ended and not (decode and recorder.steps_taken == plan.nfe):
            raise ValueError(
                f"{self.name} ended its loop without taking all {plan.nfe} steps, but {recorder.steps_taken}; leave "
                "out what takes a part of them, or give strength=1 to a pipeline that starts from a picture"
            )
        return Trajectory([state[: len(indices)] for state in recorder.states], scheduler.solver, output)
