"""What a solver is searched for: a student, and samples with the trajectories that its teacher gives them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_dssolver.paths import as_float64
from diffusers_dssolver.solver import SolverSpec

from ..pipeline.plan import Plan
from ..pipeline.replay import Replay
from ..pipeline.student import Student, Trajectory
from ..settings import GROUPS
from ..teacher.ends import even_nodes
from ..teacher.trajectories import TeacherTrajectory

StepWarp = tuple[float, float, float]
Reduce = Callable[[Tensor], Tensor]
# Round solutions of linear systems: later digits depend on the order in which batches and processes are summed.
DECIMALS = 7


def comparable(error: float) -> float:
    """Ten significant digits: which of two equals is taken must not depend on the order of a sum over processes."""
    return float(f"{error:.9e}")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One solver that was found.

    Attributes:
        step_warp, ridge: what its rows were fitted with.
        plan: its unshifted nodes, rows and offsets.
        spec: the solver as it is published.
        train_mse, validation_mse: of final states, on the samples it was fitted to and on held-out ones.
        errors: of each held-out sample, as `Problem.each` tells them.
    """

    step_warp: StepWarp
    ridge: float
    plan: Plan
    spec: SolverSpec
    train_mse: float
    validation_mse: float = float("nan")
    errors: Tensor | None = None

    @property
    def nfe(self) -> int:
        return self.plan.nfe


@dataclass(frozen=True, eq=False)
class Samples:
    """This process's samples of a split, and their teacher trajectory."""

    split: str
    indices: Sequence[int]
    teacher: TeacherTrajectory

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, first: int, last: int) -> Samples:
        """Those from place `first` to before `last`."""
        return Samples(self.split, self.indices[first:last], self.teacher.part(slice(first, last)))

    def below(self, index: int) -> Samples:
        """Those of a smaller index: of all processes together, so many."""
        return self.part(0, sum(i < index for i in self.indices))


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that run together, and the network outputs kept of their runs, if any are."""

    student: Student
    samples: Samples
    replay: Replay | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def teacher(self) -> TeacherTrajectory:
        return self.samples.teacher

    def run(self, plan: Plan, shared_calls: int = 0, **options: Any) -> Trajectory:
        """One run on these samples.

        Args:
            shared_calls: so many first network calls are those of the runs before.
            options: of `Student.run`.
        """
        return self.student.run(
            plan, self.samples.indices, self.samples.split, replay=self.replay, shared_calls=shared_calls, **options
        )

    def off(self, run: Trajectory) -> Tensor:
        """Final states (B, ...) minus the teacher's, in float32 or more."""
        return run.final - self.teacher.final.to(run.final.device)

    def errors(self, plan: Plan, shared_calls: int = 0) -> Tensor:
        """`off` after a run of this plan."""
        return self.off(self.run(plan, shared_calls))


@dataclass
class Problem:
    """Samples to fit solvers to and samples to judge them by.

    Args:
        student: the pipeline.
        train, validation: this process's samples of each split.
        num_trial_samples: so many of its training samples serve to compare step warps.
        reduce: sum over processes.
        batch_size: samples that run together.
        share: those of some global sample indices that this process runs.
        accelerator: the processes.
        differentiable: which of `GROUPS` get gradients through the pipeline.
        perceptual: the objective on decoded images, if it is asked for.
        known: entries of the step counts (text) that are done.
    """

    student: Student
    train: Samples
    validation: Samples
    num_trial_samples: int
    reduce: Reduce = field(default=lambda mine: mine)
    batch_size: int = 64
    share: Callable[[range], range] = field(default=lambda every: every)
    accelerator: Accelerator = field(default_factory=Accelerator)
    differentiable: Collection[str] = GROUPS
    perceptual: Any = None
    known: Mapping[str, Any] = field(default_factory=dict)
    _first_calls: dict[Any, Replay] = field(default_factory=dict, init=False, repr=False)

    @property
    def trial(self) -> Samples:
        """The samples that compare step warps."""
        return self.train.part(0, self.num_trial_samples)

    def run_together(self, batch_size: int) -> None:
        """Run so many samples together from here on."""
        if batch_size != self.batch_size:
            self.batch_size = batch_size
            self._first_calls.clear()

    def batches(self, samples: Samples, plan: Plan | None = None, keep: bool = False) -> Iterator[Batch]:
        """Samples that run together.

        Args:
            plan: of the coming runs; their first network call is known if every plan of as many steps has it in common.
            keep: keep outputs of the coming runs for later ones, beginning with that call.
        """
        for first in range(0, len(samples), self.batch_size):
            part = samples.part(first, first + self.batch_size)
            known = self.first_call(part, plan.nfe) if plan and plan.shares_first_call else None
            yield Batch(self.student, part, Replay(known) if keep else known)

    def first_call(self, samples: Samples, nfe: int) -> Replay:
        """The first network call of these samples, which all plans of so many steps share that begin at the first node.
        Those of one step count are kept."""
        if any(key[2] != nfe for key in self._first_calls):
            self._first_calls.clear()
        key = (samples.split, tuple(samples.indices), nfe)
        if key not in self._first_calls:
            made = Replay()
            self.student.run(Plan(even_nodes(nfe)), samples.indices, samples.split, until=0, replay=made)
            self._first_calls[key] = Replay(made, frozen=True)
        return self._first_calls[key]

    def errors(self, samples: Samples, plan: Plan) -> Tensor:
        """Final states (B, ...) minus the teacher's, of all of this process's samples."""
        return torch.cat([batch.errors(plan, shared_calls=1) for batch in self.batches(samples, plan)])

    def each(self, samples: Samples, plan: Plan) -> Tensor:
        """Mean squared error of the final state of each sample of every process, (n,) float64 in their order."""
        whole = torch.zeros(int(self.reduce(torch.tensor(len(samples)))), dtype=torch.float64)
        for batch in self.batches(samples, plan):
            errors = as_float64(batch.errors(plan, shared_calls=1)).square()
            whole[list(batch.samples.indices)] = errors.flatten(1).mean(1)
        return self.reduce(whole)

    def score(self, plan: Plan) -> float:
        """Mean squared error of final states on every process's held-out samples."""
        return float(self.each(self.validation, plan).mean())

    def cost(self, samples: Samples, calls: int) -> int:
        """Network evaluations of so many calls on each of these samples, over all processes, as the teacher's were."""
        teacher = self.train.teacher
        a_call = teacher.network_evaluations / (len(self.train) * (len(teacher.angles) - 1))
        return round(a_call * calls * float(self.reduce(torch.tensor(len(samples)))))

    def mean_square(self, errors: Tensor) -> float:
        """Over every process's samples."""
        squares = as_float64(errors).square()
        total = self.reduce(torch.stack([squares.sum(), torch.tensor(squares.numel()).double()]))
        return float(total[0] / total[1])
