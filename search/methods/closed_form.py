"""Closed-form search, forward evaluations only.

Inside: for given nodes, row i is the ridge least-squares solution that brings the student's state closest to the
teacher's state at node i+1, solved in the very step where its history and that state meet. Batch after batch goes up to
that step, the network calls before it replayed, so that no more than one batch is ever run at a time.

Outside: step sizes are softmax(a u + b u^2 + c u^3), u from -1 to 1 over the steps. The three numbers (a, b, c), the
step warp, are found by Nelder-Mead from several starts. A smooth warp finds the shape that free node logits miss, which
have many local minima; it has some of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from diffusers_dssolver.paths import as_float64
from diffusers_dssolver.solver import SolverSpec

from ..pipeline.plan import Plan, warped_nodes
from ..settings import STARTS, SearchConfig
from .gauss_newton import polished
from .log import Log
from .prior import starts
from .problem import DECIMALS, Candidate, Problem, Reduce, Samples, StepWarp, comparable

IDENTITY: StepWarp = (0.0, 0.0, 0.0)
MAX_STEP_WARP = 15.0  # beyond it step sizes vanish in float64
KEEP = 5  # warps of the best start that are fitted again to all training samples
SIMPLEX, NARROW = 0.8, 0.4  # first steps of a warp search, from fixed starts and from a prior
RIDGE_FACTORS = (10, 100)  # tried on the best warp besides the ridge that the search ran with


class RowFit:
    """Ridge least squares for one row: min over delta of |left - columns^T delta|^2 + ridge * s * |delta|^2, where s is
    the mean squared length of the columns, so that `ridge` has no unit. Batches add up; so do processes.

    Args:
        ridge: strength of the pull towards the classical row.
    """

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge
        self.row: list[float] = []
        self.system = torch.zeros(())

    def __call__(self, row: Sequence[float], left: Tensor, columns: Tensor) -> None:
        """Add one batch: the classical row, left (M,), columns (i, M)."""
        columns, left = as_float64(columns), as_float64(left)
        self.row = list(row)
        self.system = self.system + torch.cat([columns @ columns.T, (columns @ left)[:, None]], dim=1)

    def solve(self, reduce: Reduce) -> list[float]:
        """row + (delta_0, .., delta_{i-1}, -sum of delta), the same in every process."""
        system = reduce(self.system)
        gram, right = system[:, :-1], system[:, -1]
        gram = gram + self.ridge * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype)
        delta = torch.linalg.solve(gram, right).round(decimals=DECIMALS).tolist()
        return [w + d for w, d in zip(self.row, [*delta, -sum(delta)], strict=True)]


def fit(problem: Problem, nfe: int, step_warp: Sequence[float], ridge: float, samples: Samples) -> Candidate:
    """Closed-form rows on warped nodes, fitted to these training samples; costs nfe evaluations a sample, one less
    where the first is known."""
    plan = Plan(warped_nodes(step_warp, nfe), [[1.0]])
    batches = list(problem.batches(samples, plan, keep=True))
    angles = problem.student.angles(plan.unshifted_nodes)
    for i in range(1, nfe):
        row = RowFit(ridge)
        for batch in batches:
            batch.run(plan, shared_calls=i, until=i, watch=(batch.teacher.at(angles[i + 1]), row))
        plan = replace(plan, rows=[*(plan.rows or ()), row.solve(problem.reduce)])
    errors = [batch.errors(plan, shared_calls=nfe) for batch in batches]
    a, b, c = map(float, step_warp)
    return Candidate((a, b, c), ridge, plan, problem.student.spec(plan), problem.mean_square(torch.cat(errors)))


def validated(problem: Problem, candidate: Candidate) -> Candidate:
    """The candidate with its validation error measured."""
    errors = problem.each(problem.validation, candidate.plan)
    return replace(candidate, validation_mse=float(errors.mean()), errors=errors)


@dataclass
class Fits:
    """Fits for one step count. Those that an earlier, killed run made are recalled from the log.

    Args:
        advance: called after each fit.
    """

    problem: Problem
    nfe: int
    log: Log
    advance: Callable[..., None] = lambda **figures: None

    def __call__(self, step_warp: Sequence[float], ridge: float, on_trial_samples: bool = False) -> Candidate:
        a, b, c = map(float, step_warp)
        problem, which = self.problem, "trial" if on_trial_samples else "train"
        samples = problem.trial if on_trial_samples else problem.train
        task = {"nfe": self.nfe, "warp": [a, b, c], "ridge": ridge, "samples": which}
        if known := self.log.recall(task):
            spec = SolverSpec.from_dict(known["spec"])
            plan = Plan(warped_nodes(step_warp, self.nfe), [list(row) for row in spec.coefficients])
            self.advance()
            with problem.student.sampler.uncounted():  # its first network calls were counted when it was made
                list(problem.batches(samples, plan))
            return Candidate((a, b, c), ridge, plan, spec, known["train_mse"])
        before = self.log.evaluations()
        found = fit(problem, self.nfe, step_warp, ridge, samples)
        self.advance(mse=f"{found.train_mse:.3g}")
        self.log.trial(found)
        result = {"spec": found.spec.to_dict(), "train_mse": found.train_mse}
        self.log.remember(task, {**result, "network_evaluations": self.log.evaluations() - before})
        return found


class _StepWarpSearch:
    """Nelder-Mead over warps on the trial samples, which can be stopped and gone on with."""

    def __init__(self, fits: Fits, ridge: float, simplex: np.ndarray) -> None:
        self.fits, self.ridge, self.simplex = fits, ridge, simplex
        self.seen: dict[StepWarp, Candidate] = {}

    def go(self, trials: int) -> None:
        """So many more warps."""
        if trials:
            known = sum(tuple(vertex) in self.seen for vertex in self.simplex.tolist())
            options = {"maxfev": trials + known, "initial_simplex": self.simplex, "xatol": 1e-2, "fatol": 1e-3}
            found = minimize(self._error, self.simplex[0], method="Nelder-Mead", options=options)
            self.simplex = found.final_simplex[0]

    def best(self, count: int) -> list[Candidate]:
        return sorted(self.seen.values(), key=lambda c: comparable(c.train_mse))[:count]

    def _error(self, step_warp: np.ndarray) -> float:
        if np.abs(step_warp).sum() > MAX_STEP_WARP:
            return np.inf
        a, b, c = step_warp.tolist()
        if (a, b, c) not in self.seen:
            self.seen[a, b, c] = self.fits((a, b, c), self.ridge, on_trial_samples=True)
        return comparable(np.log(self.seen[a, b, c].train_mse + 1e-30))


def search_step_warp(fits: Fits, trials: int, ridge: float, starts: Sequence[StepWarp] = (IDENTITY,)) -> Candidate:
    """The best solver on validation samples.

    Every start gets half of the trials. The start whose best warp, fitted again to all training samples, does best
    there gets the other half; a single start gets all trials at once. Its `KEEP` best warps are fitted so, the best of
    these with larger ridges too.
    """
    half = trials if len(starts) == 1 else -(-trials // 2)
    simplex = np.array([IDENTITY, *(SIMPLEX * np.eye(3))])
    searches = [_StepWarpSearch(fits, ridge, np.array(start) + simplex) for start in starts]
    firsts = []
    for one in searches:
        one.go(half)
        firsts.append(fits(one.best(1)[0].step_warp, ridge))
    taken = min(range(len(starts)), key=lambda k: comparable(firsts[k].train_mse))
    searches[taken].go(trials - half)
    finalists = [
        firsts[taken] if c.step_warp == firsts[taken].step_warp else fits(c.step_warp, ridge)
        for c in searches[taken].best(KEEP)
    ]
    best = min(finalists, key=lambda c: comparable(c.train_mse))
    finalists += [fits(best.step_warp, ridge * factor) for factor in RIDGE_FACTORS]
    return min((validated(fits.problem, c) for c in finalists), key=lambda c: comparable(c.validation_mse))


def search_near(fits: Fits, trials: int, ridge: float, starts: Sequence[StepWarp]) -> Candidate:
    """The best of so many warps, these starts first and then those near the best of them, fitted again to all training
    samples and held out. What is not affordable is not tried."""
    problem, step = fits.problem, NARROW * np.eye(3)
    cost = problem.cost(problem.trial, fits.nfe - 1)
    trials = sum(fits.log.affords(k * cost) for k in range(1, trials + 1))
    tried = [fits(start, ridge, on_trial_samples=True) for start in starts[:trials]]
    best = min(tried, key=lambda c: comparable(c.train_mse)).step_warp if tried else starts[0]
    search = _StepWarpSearch(fits, ridge, np.array(best) + np.array([IDENTITY, *step]))
    search.seen = {c.step_warp: c for c in tried}
    search.go(trials - len(tried))
    best = search.best(1)[0].step_warp if tried else best
    return validated(problem, fits(best, ridge))


def fits_of(trials: int, starts: int) -> tuple[int, int]:
    """How many fits `search_step_warp` makes at most: to trial samples, to all training samples."""
    return trials + (starts - 1) * -(-trials // 2), starts - 1 + min(KEEP, trials) + len(RIDGE_FACTORS)


def fitted(problem: Problem, nfe: int, settings: SearchConfig, log: Log) -> Candidate:
    """The closed form alone, with the trials and starts of the settings."""
    if not settings.starts:
        near = starts(problem.student.path, nfe, problem.known)
        with log.progress(f"closed form, {nfe} calls", "fit", settings.trials + 1) as advance:
            return search_near(Fits(problem, nfe, log, advance), settings.trials, settings.ridge, near)
    fixed = STARTS[: settings.starts]
    with log.progress(f"closed form, {nfe} calls", "fit", sum(fits_of(settings.trials, len(fixed)))) as advance:
        return search_step_warp(Fits(problem, nfe, log, advance), settings.trials, settings.ridge, fixed)


def closed_form(problem: Problem, nfe: int, settings: SearchConfig, log: Log) -> Candidate:
    """The method: the closed form, then a polish where the step count allows it."""
    found = fitted(problem, nfe, settings, log)
    log.stage("closed_form", found)
    if settings.polish and nfe <= settings.polish_nfe:
        found = polished(problem, found, settings, log)
        log.stage("polish", found)
    return found
