"""Gradient descent from a fitted solver: the pipeline's own call, differentiated, on all training samples at once.

The objective over a full batch is smooth and has few parameters, so a quasi-Newton method with a line search is at
home. Whatever it does, the solver that is kept is the best on held-out samples, and the descent ends when that has not
moved for `PATIENCE` calls.

Source: Nocedal and Wright, Numerical Optimization, ch. 7 (L-BFGS) and 3 (strong Wolfe line search).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_dssolver.paths import as_float64

from ..pipeline.plan import Plan
from ..pipeline.student import Trajectory
from ..settings import PERCEPTUAL, SearchConfig
from .closed_form import closed_form
from .gauss_newton import parametrised
from .log import Log
from .objective import OBJECTIVES, Loss
from .parameters import Parametrisation, current
from .perceptual import MOST_CALLS, Perceptual
from .problem import Batch, Candidate, Problem, comparable

HISTORY = 30  # of L-BFGS
PATIENCE = 15  # calls without a better held-out error
BACKWARD = 3  # forward passes that a backward pass costs: two, and one more to compute the network calls again


class NoProgress(Exception):
    """Private: ends the optimiser from within its closure."""


class Descent:
    """One descent from one candidate.

    Args:
        candidate: a validated one.
        parameters: around it.
        loss: of a batch, a mean over its samples.
        on_call: called with (training loss, the descent) after each evaluation of loss and gradient.

    Attributes:
        best: the candidate that is kept.
        reached: its held-out error, the one that decides.
    """

    def __init__(
        self,
        problem: Problem,
        candidate: Candidate,
        parameters: Parametrisation,
        loss: Loss,
        on_call: Callable[[float, Any], object] = lambda loss, descent: None,
    ) -> None:
        self.problem, self.best, self.parameters = problem, candidate, parameters
        self.loss, self.on_call = loss, on_call
        self.reached, self.since_best = candidate.validation_mse, 0
        self.samples = float(problem.reduce(torch.tensor(float(len(problem.train)), dtype=torch.float64)))

    def run(self, calls: int) -> Candidate:
        """The best candidate on held-out samples after at most so many evaluations of loss and gradient."""
        method = torch.optim.LBFGS(
            self.parameters.parameters(),
            max_iter=calls,
            max_eval=calls,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-12,
            tolerance_change=1e-14,
        )
        scale = 1.0 / max(self.value(), 1e-30)  # a loss near 1: the first step is of the size of its inverse gradient

        def closure() -> float:
            loss = self.value()
            self.judge(loss)
            for p in self.parameters.parameters():
                p.grad = None if p.grad is None else p.grad * scale
            return loss * scale

        with suppress(NoProgress):
            method.step(closure)
        return self.best

    def value(self) -> float:
        """The loss over every process's samples; its gradient is put into the parameters, the same in each."""
        for p in self.parameters.parameters():
            p.grad = None
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.problem.batches(self.problem.train):
            loss = self._batch_loss(batch) * len(batch) / self.samples
            loss.backward()
            total += as_float64(loss)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.parameters()]
        summed = self.problem.reduce(torch.cat([*(g.flatten() for g in grads), total[None]]))
        at = 0
        for p in self.parameters.parameters():
            p.grad = summed[at : at + p.numel()].view_as(p).clone()
            at += p.numel()
        return float(summed[-1])

    def judge(self, loss: float) -> None:
        """Keep the solver of the parameters as they are if it is the best on held-out samples."""
        plan = current(self.parameters)
        self.since_best += 1
        try:
            error, mse, errors = self._held_out(plan)
            if math.isfinite(error) and comparable(error) < comparable(self.reached):
                spec = self.problem.student.spec(plan)
                self.best = replace(self.best, plan=plan, spec=spec, validation_mse=mse, errors=errors)
                self.reached, self.since_best = error, 0
        except ValueError:
            pass  # nodes or times that no longer fall: too long a step
        self.on_call(loss, self)
        if self.since_best >= PATIENCE or not math.isfinite(loss):
            raise NoProgress

    def _batch_loss(self, batch: Batch) -> Tensor:
        run = self._counted(lambda: batch.run(self.parameters.plan()))
        angles = self.problem.student.path.angle(run.nodes)
        return self.loss(run.states, [batch.teacher.at(angle).to(run.final.device) for angle in angles])

    def _counted(self, run: Callable[[], Trajectory]) -> Trajectory:
        """A run whose backward pass is counted too."""
        sampler = self.problem.student.sampler
        before = sampler.network_evaluations
        made = run()
        sampler.network_evaluations += BACKWARD * (sampler.network_evaluations - before)
        return made

    def _held_out(self, plan: Plan) -> tuple[float, float, Tensor | None]:
        """(error by which the best is kept, final-state mse, that of each, if it is known) on held-out samples."""
        errors = self.problem.each(self.problem.validation, plan)
        mse = float(errors.mean())
        return mse, mse, errors


class PerceptualDescent(Descent):
    """A descent in the perceptual loss, which also decides on held-out samples.

    Args:
        perceptual: has seen the training and validation samples of the problem.

    Attributes:
        before: held-out perceptual loss of the candidate.
    """

    def __init__(
        self,
        problem: Problem,
        candidate: Candidate,
        parameters: Parametrisation,
        perceptual: Perceptual,
        on_call: Callable[[float, Any], object] = lambda loss, descent: None,
    ) -> None:
        super().__init__(problem, candidate, parameters, OBJECTIVES["terminal"], on_call)
        self.perceptual = perceptual
        self.before, _ = perceptual.held_out(problem, candidate.plan)
        self.reached = self.before if math.isfinite(self.before) else math.inf

    def _batch_loss(self, batch: Batch) -> Tensor:
        run = self._counted(
            lambda: self.perceptual.run(self.parameters.plan(), batch.samples.indices, batch.samples.split)
        )
        return self.perceptual.loss(run.output, batch.samples)

    def _held_out(self, plan: Plan) -> tuple[float, float, Tensor | None]:
        return *self.perceptual.held_out(self.problem, plan), None


def gradient(problem: Problem, nfe: int, settings: SearchConfig, log: Log) -> Candidate:
    """The method: the closed form, then a descent of the groups that get gradients."""
    found = closed_form(problem, nfe, settings, log)
    free = [group for group in settings.search_over if group in problem.differentiable]
    parameters = parametrised(problem, found, free, settings.parametrisation)
    figures: dict[str, float] = {}
    if not parameters.count:
        log.stage("gradient", found)
        return found
    perceptual = problem.perceptual if nfe <= MOST_CALLS else None
    if settings.objective == PERCEPTUAL and not perceptual:
        log.say(f"objective {PERCEPTUAL} is for up to {MOST_CALLS} calls; terminal takes its place at {nfe}")
    with log.progress(f"gradient, {nfe} calls", "call", settings.gradient_calls) as advance:

        def on_call(loss: float, descent: Descent) -> None:
            advance(loss=f"{loss:.4g}", best=f"{descent.reached:.3g}")
            named = {"best_validation_perceptual": descent.reached} if perceptual else {}
            log.call(nfe=nfe, loss=loss, **named, best_validation_mse=descent.best.validation_mse)

        if perceptual:
            descent: Descent = PerceptualDescent(problem, found, parameters, perceptual, on_call)
        else:
            loss = OBJECTIVES["terminal" if settings.objective == PERCEPTUAL else settings.objective]
            descent = Descent(problem, found, parameters, loss, on_call)
        better = descent.run(settings.gradient_calls)
    if isinstance(descent, PerceptualDescent):
        log.say(
            f"held out at {nfe} calls: perceptual loss {descent.before:.4g} -> {descent.reached:.4g}, final-state "
            f"mse {found.validation_mse:.4g} -> {better.validation_mse:.4g}"
        )
        figures = {"validation_perceptual": descent.reached, "validation_perceptual_before": descent.before}
    log.stage("gradient", better, **figures)
    return better
