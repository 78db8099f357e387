"""Gauss-Newton polish of a fitted solver, forward evaluations only.

Closed-form rows look one node ahead; here every number of the solver (step sizes, coefficients, and what the network
is fed in place of each node) moves at once towards the smallest *final* error. The numbers are few and the residuals
many, so the Jacobian is taken by forward differences through the pipeline's own call, batch by batch; network calls
that a number does not reach are replayed, which leaves less than half of them. The damping of the step is the one that
is best on held-out samples. No back-propagation: no memory wall, any dtype of weights.

Source: Levenberg 1944, Marquardt 1963 (damped Gauss-Newton); the decoupled network time of LD3, arXiv 2405.15506.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from ..pipeline.replay import Replay
from .closed_form import DECIMALS, Candidate, ClosedForm, Samples, comparable
from .parameters import GROUPS, CorrectionParameters

# of a logit or a weight, by the dtype of final states: smaller ones drown in its roundings
DIFFERENCES = {torch.float64: 3e-3, torch.float32: 3e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
DAMPINGS = (1e-3, 1e-2, 1e-1)


def around(form: ClosedForm, candidate: Candidate, free: Collection[str] = GROUPS) -> CorrectionParameters:
    """Parameters with this candidate as their origin."""
    slopes = form.probe.slopes
    return CorrectionParameters(candidate.raw, candidate.spec.coefficients, slopes, candidate.offsets, free)


class Polish:
    """Damped Gauss-Newton around one candidate."""

    def __init__(self, form: ClosedForm, candidate: Candidate, free: Collection[str] = GROUPS) -> None:
        self.form, self.candidate = form, candidate
        self.numbers = around(form, candidate, free)
        self.count, self.unchanged = self.numbers.count, self.numbers.unchanged

    def solver(self, parameters: Tensor) -> tuple[Tensor, list[list[float]], Tensor | None]:
        """parameters (count,) -> raw nodes (N+1,), rows, offsets (N,)."""
        vector_to_parameters(parameters, self.numbers.parameters())
        return self.numbers.numbers()

    def errors(self, split: str, parameters: Tensor) -> Tensor:
        raw, rows, offsets = self.solver(parameters)
        return self.form.errors(split, raw, rows, offsets=offsets)

    def step(self, parameters: Tensor, on_call: Callable[[], object]) -> list[Tensor]:
        """The damped Gauss-Newton steps from here, one per damping."""
        unchanged = self.unchanged
        gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        right = torch.zeros(self.count, dtype=torch.float64)
        for batch in self.form.batches(self.form.train):
            replay = Replay(self.form.start("train", batch[0], self.numbers.nfe, self.solver(parameters)[2]))
            here = self._batch_errors(batch, parameters, replay, unchanged=1)
            difference = DIFFERENCES[self.form.probe.states[-1].dtype]
            precision, here = torch.promote_types(here.dtype, torch.float32), here.double()
            columns = []
            for k in range(self.count):
                moved = parameters.clone()
                moved[k] += difference
                there = self._batch_errors(batch, moved, replay, unchanged[k])
                columns.append(((there.double() - here) / difference).to(precision))
                on_call()
            jacobian = torch.stack(columns)
            gram += (jacobian @ jacobian.T).double().cpu()
            right += (jacobian @ here.to(precision)).double().cpu()
        gram, right = self.form.reduce(gram), self.form.reduce(right)
        scale = gram.diagonal().clamp(min=1e-9 * float(gram.diagonal().max()))
        steps = [torch.linalg.solve(gram + mu * torch.diag(scale), right) for mu in DAMPINGS]
        return [(parameters - step).round(decimals=DECIMALS) for step in steps]

    def _batch_errors(self, batch: Samples, parameters: Tensor, replay: Replay, unchanged: int = 0) -> Tensor:
        raw, rows, offsets = self.solver(parameters)
        form = self.form
        errors = form.batch_errors("train", batch, raw, rows, offsets=offsets, replay=replay, unchanged=unchanged)
        return errors.flatten()


def polish(
    form: ClosedForm,
    candidate: Candidate,
    iterations: int,
    on_call: Callable[[], object] = lambda: None,
    free: Collection[str] = GROUPS,
) -> Candidate:
    """The candidate after so many Gauss-Newton steps, each kept only if it lowers the validation error.

    Args:
        candidate: a validated one.
        on_call: called after each of the `Polish.count` differences of an iteration.
        free: what moves, as in `CorrectionParameters`.
    """
    problem = Polish(form, candidate, free)
    if candidate.spec.nfe == 1 or not problem.count:
        return candidate  # one step has no freedom but its time, and nothing to compare it with
    parameters, best = torch.zeros(problem.count, dtype=torch.float64), candidate
    for _ in range(iterations):
        before = best
        for tried in problem.step(parameters, on_call):
            raw, rows, offsets = problem.solver(tried)
            try:
                error = form.mean_square(form.errors("validation", raw, rows, offsets=offsets))
                spec = form.probe.spec()
            except ValueError:  # nodes or times that no longer fall: too long a step
                continue
            if comparable(error) < comparable(best.validation_mse):
                best = replace(candidate, raw=raw, spec=spec, offsets=offsets, validation_mse=error)
                parameters = tried
        if best is before:
            break
    if best is candidate:
        return candidate
    return replace(best, train_mse=form.mean_square(problem.errors("train", parameters)))
