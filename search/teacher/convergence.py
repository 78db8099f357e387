"""How far a teacher is from converged, estimated by twice its steps on samples of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_dssolver.paths import as_float64

from ..pipeline.student import Student
from .trajectories import Teacher, taught

FIRST_STEPS = 25  # that are tried where the step count is to be chosen
CONVERGENCE_SAMPLES = 4


@dataclass(frozen=True)
class Convergence:
    """How far a teacher is from converged.

    Attributes:
        steps: the teacher's, given or chosen.
        estimated_mse: mean squared difference of its final states and those of `against` steps.
        relative: that, over the variance of the final states.
        against: twice the steps; half, where the solver cannot take twice as many.
        samples: number of samples that it was estimated on.
    """

    steps: int
    estimated_mse: float
    relative: float
    against: int
    samples: int = CONVERGENCE_SAMPLES

    def line(self, teacher: Teacher, tolerance: float) -> str:
        """For the user."""
        measured = f"against {self.against} steps, {self.samples} samples"
        missed = f"; {self.relative:.1g} of the variance misses teacher_tolerance {tolerance:g}"
        told = missed if self.relative > tolerance else ""
        return f"teacher: {teacher}; estimated mse {self.estimated_mse:.1g} ({measured}){told}"


def convergence(student: Student, teacher: Teacher, tolerance: float, above: int, batch_size: int) -> Convergence:
    """How far a teacher is from converged; for steps = 0, how many steps it shall take.

    A step count is chosen from 25, 50, 100, ..: the first one where twice as many steps change the final states by a
    mean square of at most `tolerance` times their variance. Where none does, or the solver cannot take twice as many,
    it is the largest that was tried, and the estimate is the change from half of it.

    Args:
        above: a chosen step count is larger than this one.
        batch_size: samples per pipeline call.

    Raises:
        ValueError: if the final states are not finite, or no step count can be chosen.
    """
    finals: dict[int, Tensor] = {}

    def final(steps: int) -> Tensor:
        if steps not in finals:
            trying, parts = replace(teacher, steps=steps), []
            for first in range(0, CONVERGENCE_SAMPLES, batch_size):
                batch = range(first, min(first + batch_size, CONVERGENCE_SAMPLES))
                parts.append(as_float64(taught(student, trying, batch, "convergence")[0][-1]))
            finals[steps] = torch.cat(parts)
        return finals[steps]

    def compared(steps: int, against: int) -> Convergence:
        mse = float((final(steps) - final(against)).square().mean())
        return Convergence(steps, mse, mse / float(final(max(steps, against)).var()), against)

    steps, chosen = teacher.steps or FIRST_STEPS, teacher.steps == 0
    while chosen and steps <= above:
        steps *= 2
    if not teacher.takes(steps):
        raise ValueError(f"teacher_steps = 0 finds none above {above} calls; give teacher_steps")
    while True:
        finer = teacher.takes(2 * steps)
        found = compared(steps, 2 * steps if finer else max(steps // 2, 1))
        if not (chosen and finer) or found.relative <= tolerance:
            break
        steps *= 2
    if not math.isfinite(found.relative):
        raise ValueError(f"the final states of {steps} teacher steps are not finite; give more teacher_steps")
    return found
