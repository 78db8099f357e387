"""Closed-form search, forward evaluations only.

Inside: for given nodes, row i is the ridge least-squares solution that brings the student's state closest to the
reference's state at node i+1, solved in the very step where its history and that state meet. Outside: step sizes are
softmax(a u + b u^2 + c u^3), u from -1 to 1 over the steps; the three numbers by Nelder-Mead, from uniform.
A smooth warp finds the shape that free node logits miss (they have many local minima).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from diffusers_dssolver.solver import SolverSpec

from .probe import ProbeScheduler, run
from .sampling import Sampler
from .teacher import Reference

Warp = tuple[float, float, float]
Reduce = Callable[[Tensor], Tensor]
IDENTITY: Warp = (0.0, 0.0, 0.0)
MAX_WARP = 15.0  # beyond it step sizes vanish in float64
RIDGE_FACTORS = (10, 100)  # tried on the best warp besides the ridge that the search ran with


def warped_nodes(warp: Sequence[float], nfe: int) -> Tensor:
    """nfe + 1 nodes from 1 to 0 whose step sizes are softmax(a u + b u^2 + c u^3); (nfe + 1,) float64."""
    u = torch.linspace(-1, 1, nfe, dtype=torch.float64) if nfe > 1 else torch.zeros(1, dtype=torch.float64)
    powers = torch.stack([u, u**2, u**3])
    sizes = torch.softmax(torch.tensor(warp, dtype=torch.float64) @ powers, 0)
    nodes = 1 - torch.cumsum(sizes, 0)
    return torch.cat([torch.ones(1, dtype=torch.float64), nodes[:-1], torch.zeros(1, dtype=torch.float64)])


@dataclass
class RowFit:
    """Ridge least squares for one row: min over delta of |left - columns^T delta|^2 + ridge * s * |delta|^2, where s is
    the mean squared length of the columns, so that `ridge` has no unit.

    Args:
        ridge: strength of the pull towards the classical row.
        reduce: sums a tensor over processes, so that every process solves the same system.
    """

    ridge: float
    reduce: Reduce

    def __call__(self, index: int, left: Tensor, columns: Tensor) -> Tensor:
        """left (M,), columns (i, M) -> delta (i,) float64."""
        columns, left = columns.double(), left.double()
        system = self.reduce(torch.cat([columns @ columns.T, (columns @ left)[:, None]], dim=1)).cpu()
        gram, right = system[:, :-1], system[:, -1]
        gram = gram + self.ridge * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype)
        return torch.linalg.solve(gram, right)


@dataclass(frozen=True)
class Candidate:
    """One fitted solver: where its warp and ridge are, and its final-state mse on the samples it was fitted to."""

    warp: Warp
    ridge: float
    spec: SolverSpec
    train_mse: float
    validation_mse: float = float("nan")


@dataclass
class ClosedForm:
    """The closed-form search on one set of reference trajectories.

    Args:
        sampler, probe: the pipeline and the scheduler that runs in it.
        train, validation: this process's sample indices and reference of each split.
        reduce: sum over processes.
        on_trial: called after every fit with its candidate.
    """

    sampler: Sampler
    probe: ProbeScheduler
    train: tuple[Sequence[int], Reference]
    validation: tuple[Sequence[int], Reference]
    reduce: Reduce
    on_trial: Callable[[Candidate], None] = field(default=lambda candidate: None)

    def fit(self, nfe: int, warp: Sequence[float], ridge: float) -> Candidate:
        """Closed-form rows on warped nodes; nfe evaluations a sample."""
        indices, reference = self.train
        nodes = warped_nodes(warp, nfe)
        angles = self.probe.angle(self.probe.final_nodes(nodes))
        targets = [reference.at(angle) for angle in angles]
        self.probe.prepare(nodes, targets=targets, row_solver=RowFit(ridge, self.reduce))
        states = run(self.sampler, self.probe, indices, "train", nfe)
        candidate = Candidate((*map(float, warp),), ridge, self.probe.spec(), self._mse(states[-1], reference))  # type: ignore[arg-type]
        self.on_trial(candidate)
        return candidate

    def score(self, nodes: Tensor, rows: Sequence[Sequence[float]] | None, order: int = 2) -> float:
        """Final-state mse on the validation samples: fitted rows, or classical ones of this order; nodes unshifted."""
        indices, reference = self.validation
        self.probe.prepare(nodes, rows, order=order)
        return self._mse(run(self.sampler, self.probe, indices, "validation", len(nodes) - 1)[-1], reference)

    def validated(self, candidate: Candidate) -> Candidate:
        nodes = warped_nodes(candidate.warp, candidate.spec.nfe)
        score = self.score(nodes, candidate.spec.coefficients)
        return Candidate(candidate.warp, candidate.ridge, candidate.spec, candidate.train_mse, score)

    def search(
        self, nfe: int, trials: int, ridge: float, start: Sequence[float] = IDENTITY, keep: int = 5
    ) -> Candidate:
        """The best on validation samples of the `keep` best of `trials` fits, each also with ridge x 10 and x 100."""
        seen: list[Candidate] = []

        def objective(warp: np.ndarray) -> float:
            if np.abs(warp).sum() > MAX_WARP:
                return np.inf
            seen.append(self.fit(nfe, warp.tolist(), ridge))
            return np.log(seen[-1].train_mse + 1e-30)

        simplex = np.array([start, *(np.array(start) + 0.8 * np.eye(3))])
        minimize(
            objective,
            np.array(start),
            method="Nelder-Mead",
            options={"maxfev": trials, "initial_simplex": simplex, "xatol": 1e-2, "fatol": 1e-3},
        )
        finalists = sorted(seen, key=lambda c: c.train_mse)[:keep]
        best = finalists[0]
        finalists += [self.fit(nfe, best.warp, best.ridge * factor) for factor in RIDGE_FACTORS]
        return min(map(self.validated, finalists), key=lambda c: c.validation_mse)

    def _mse(self, final: Tensor, reference: Reference) -> float:
        """Mean squared error of final states over every process's samples."""
        wanted = reference.final.to(final)
        error = (final[: wanted.shape[0]] - wanted).double()
        total = self.reduce(
            torch.stack([error.square().sum(), torch.tensor(error.numel(), dtype=torch.float64).to(error.device)])
        )
        return float(total[0] / total[1])
