"""Gauss-Newton polish of a fitted solver, forward evaluations only.

Closed-form rows look one node ahead; here every number of the solver (step sizes, coefficients, and what the network
is fed in place of each node) moves at once towards the smallest *final* error. The numbers are few and the residuals
many, so the Jacobian is taken by forward differences through the pipeline's own call, and the damping of the step is
the one that is best on held-out samples. No back-propagation: no memory wall, any dtype of weights.

Source: Levenberg 1944, Marquardt 1963 (damped Gauss-Newton); the decoupled network time of LD3, arXiv 2405.15506.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .closed_form import Candidate, ClosedForm
from .parameters import nodes_from_logits

DIFFERENCE = 3e-3  # of a logit or a weight; final states are float32, so that smaller ones drown
OFFSET_SCALE = 0.1  # one unit of an offset parameter, as a difference of nodes
DAMPINGS = (1e-3, 1e-2, 1e-1)


class Polish:
    """Parameters around one candidate: N-1 logits of step sizes, N(N-1)/2 sum-preserving corrections, N offsets."""

    def __init__(self, form: ClosedForm, candidate: Candidate) -> None:
        self.form, self.candidate, self.nfe = form, candidate, candidate.spec.nfe
        self.logits = torch.log(candidate.raw[:-1] - candidate.raw[1:])
        self.count = self.nfe - 1 + self.nfe * (self.nfe - 1) // 2 + self.nfe

    def solver(self, parameters: Tensor) -> tuple[Tensor, list[list[float]], Tensor]:
        """parameters (count,) -> raw nodes (N+1,), rows, offsets (N,)."""
        n = self.nfe
        logits = torch.cat([self.logits[:-1] + parameters[: n - 1], self.logits[-1:]])
        raw = nodes_from_logits(logits)
        rows, at = [], n - 1
        for i, row in enumerate(self.candidate.spec.coefficients):
            delta = parameters[at : at + i].tolist()
            rows.append([c + d for c, d in zip(row, [*delta, -sum(delta)], strict=True)])
            at += i
        return raw, rows, -OFFSET_SCALE * parameters[at:]  # downwards: the first node cannot be fed a noisier time

    def errors(self, split: str, parameters: Tensor) -> Tensor:
        raw, rows, offsets = self.solver(parameters)
        return self.form.errors(split, raw, rows, offsets=offsets)

    def step(self, parameters: Tensor, on_call: Callable[[], object]) -> list[Tensor]:
        """The damped Gauss-Newton steps from here, one per damping."""
        here = self.errors("train", parameters).flatten().double()
        columns = []
        for k in range(self.count):
            moved = parameters.clone()
            moved[k] += DIFFERENCE
            columns.append(((self.errors("train", moved).flatten().double() - here) / DIFFERENCE).float())
            on_call()
        jacobian = torch.stack(columns)
        gram = self.form.reduce((jacobian @ jacobian.T).double()).cpu()
        right = self.form.reduce((jacobian @ here.float()).double()).cpu()
        scale = gram.diagonal().clamp(min=1e-9 * float(gram.diagonal().max()))
        return [parameters - torch.linalg.solve(gram + mu * torch.diag(scale), right) for mu in DAMPINGS]


def polish(
    form: ClosedForm, candidate: Candidate, iterations: int, on_call: Callable[[], object] = lambda: None
) -> Candidate:
    """The candidate after so many Gauss-Newton steps, each kept only if it lowers the validation error.

    Args:
        candidate: a validated one.
        on_call: called after each of the `Polish.count` differences of an iteration.
    """
    if candidate.spec.nfe == 1:
        return candidate  # one step has no freedom but its time, and nothing to compare it with
    problem = Polish(form, candidate)
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
            if error < best.validation_mse:
                best = replace(candidate, raw=raw, spec=spec, offsets=offsets, validation_mse=error)
                parameters = tried
        if best is before:
            break
    if best is candidate:
        return candidate
    return replace(best, train_mse=form.mean_square(problem.errors("train", parameters)))
