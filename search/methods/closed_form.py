"""Closed-form search, forward evaluations only.

Inside: for given nodes, row i is the ridge least-squares solution that brings the student's state closest to the
reference's state at node i+1, solved in the very step where its history and that state meet; batch after batch goes up
to that step, the network calls before it replayed, so that no more than one batch is ever run at a time. Outside: step
sizes are softmax(a u + b u^2 + c u^3), u from -1 to 1 over the steps; the three numbers by Nelder-Mead, from uniform. A
smooth warp finds the shape that free node logits miss (they have many local minima); it has some of its own, so it is
searched from several places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from diffusers_dssolver.solver import SolverSpec

from ..pipeline.probe import ProbeScheduler, run
from ..pipeline.replay import Replay
from ..pipeline.sampler import Sampler
from ..teacher.trajectories import Reference
from .parameters import nodes_from_logits

Warp = tuple[float, float, float]
Reduce = Callable[[Tensor], Tensor]
Samples = tuple[Sequence[int], Reference]
IDENTITY: Warp = (0.0, 0.0, 0.0)
MAX_WARP = 15.0  # beyond it step sizes vanish in float64
DECIMALS = 7  # of what a linear system gives: finer ones, of no use to a float32 state, hang on the order of sums
KEEP = 5  # warps of the best start that are fitted again to all training samples
RIDGE_FACTORS = (10, 100)  # tried on the best warp besides the ridge that the search ran with


def comparable(error: float) -> float:
    """Ten significant digits: which of two equals is taken must not hang on the order of a sum over processes."""
    return float(f"{error:.9e}")


def fits_of(trials: int, starts: int) -> tuple[int, int]:
    """How many fits `ClosedForm.search` makes at most: to trial samples, to all training samples."""
    return trials + (starts - 1) * -(-trials // 2), starts - 1 + min(KEEP, trials) + len(RIDGE_FACTORS)


def warped_nodes(warp: Sequence[float], nfe: int) -> Tensor:
    """nfe + 1 nodes from 1 to 0 whose step sizes are softmax(a u + b u^2 + c u^3); (nfe + 1,) float64."""
    u = torch.linspace(-1, 1, nfe, dtype=torch.float64) if nfe > 1 else torch.zeros(1, dtype=torch.float64)
    powers = torch.stack([u, u**2, u**3])
    return nodes_from_logits(torch.tensor(warp, dtype=torch.float64) @ powers)


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
        """Of one batch: the classical row, left (M,), columns (i, M)."""
        columns, left = columns.double(), left.double()
        self.row = list(row)
        self.system = self.system + torch.cat([columns @ columns.T, (columns @ left)[:, None]], dim=1).cpu()

    def solve(self, reduce: Reduce) -> list[float]:
        """row + (delta_0, .., delta_{i-1}, -sum of delta), the same in every process."""
        system = reduce(self.system)
        gram, right = system[:, :-1], system[:, -1]
        gram = gram + self.ridge * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype)
        delta = torch.linalg.solve(gram, right).round(decimals=DECIMALS).tolist()
        return [w + d for w, d in zip(self.row, [*delta, -sum(delta)], strict=True)]


@dataclass(frozen=True)
class Candidate:
    """One fitted solver.

    Attributes:
        warp, ridge: what it was fitted with.
        raw: its nodes before the path's first node and any resolution shift, (N+1,) float64.
        spec: the solver as it is published.
        train_mse, validation_mse: of final states, on the samples it was fitted to and on held-out ones.
        offsets: as in `ProbeScheduler.prepare`.
    """

    warp: Warp
    ridge: float
    raw: Tensor
    spec: SolverSpec
    train_mse: float
    validation_mse: float = float("nan")
    offsets: Tensor | None = None


@dataclass
class ClosedForm:
    """The closed-form search on one set of reference trajectories.

    Args:
        sampler, probe: the pipeline and the scheduler that runs in it.
        train, validation: this process's sample indices and reference of each split.
        num_trial_samples: so many of this process's training samples serve to compare warps.
        reduce: sum over processes.
        on_trial: called after every fit with its candidate.
        batch_size: samples that run together.
    """

    sampler: Sampler
    probe: ProbeScheduler
    train: Samples
    validation: Samples
    num_trial_samples: int
    reduce: Reduce
    on_trial: Callable[[Candidate], None] = field(default=lambda candidate: None)
    batch_size: int = 64
    _starts: dict[Any, Replay] = field(default_factory=dict, init=False, repr=False)

    def batches(self, samples: Samples) -> Iterator[Samples]:
        """Samples that run together, with their references."""
        indices, reference = samples
        groups = self.sampler.groups(indices)
        for group in groups:
            for first in range(0, len(group), self.batch_size):
                part = group[first : first + self.batch_size]
                where = part if len(groups) > 1 else slice(part[0], part[-1] + 1)  # a view, no copy
                yield [indices[k] for k in part], replace(reference, states=reference.states[:, where])

    def start(self, split: str, indices: Sequence[int], nfe: int, offsets: Tensor | None = None) -> Replay:
        """The first network calls of these samples, the same for every solver of so many steps that feeds the network
        the first node itself; nothing if these offsets make it another."""
        if offsets is not None and offsets[0] != 0:
            return Replay(frozen=True)
        if any(key[2] != nfe for key in self._starts):
            self._starts.clear()
        key = (split, tuple(indices), nfe)
        if key not in self._starts:
            made = Replay()
            self.probe.prepare(warped_nodes(IDENTITY, nfe), until=0)
            run(self.sampler, self.probe, indices, split, nfe, made)
            self._starts[key] = Replay(made, frozen=True)
        return self._starts[key]

    def fit(self, nfe: int, warp: Sequence[float], ridge: float, samples: Samples | None = None) -> Candidate:
        """Closed-form rows on warped nodes, fitted to these training samples (all); nfe evaluations a sample, one less
        once the first is known."""
        raw = warped_nodes(warp, nfe)
        batches = list(self.batches(samples or self.train))
        replays = [Replay(self.start("train", indices, nfe)) for indices, _ in batches]
        angles = self.probe.angle(self.probe.final_nodes(raw))
        rows: list[list[float]] = [[1.0]]
        for i in range(1, nfe):
            row = RowFit(ridge)
            for (indices, reference), replay in zip(batches, replays, strict=True):
                self.probe.prepare(raw, rows, until=i, watch=(reference.at(angles[i + 1]), row))
                run(self.sampler, self.probe, indices, "train", nfe, replay, unchanged=i)
            rows.append(row.solve(self.reduce))
        errors = [
            self.batch_errors("train", batch, raw, rows, replay=replay, unchanged=nfe)
            for batch, replay in zip(batches, replays, strict=True)
        ]
        a, b, c = map(float, warp)
        candidate = Candidate((a, b, c), ridge, raw, self.probe.spec(), self.mean_square(torch.cat(errors)))
        self.on_trial(candidate)
        return candidate

    def batch_errors(
        self,
        split: str,
        batch: Samples,
        raw: Tensor,
        rows: Sequence[Sequence[float]] | None,
        *,
        order: int = 2,
        offsets: Tensor | None = None,
        replay: Replay | None = None,
        unchanged: int = 0,
    ) -> Tensor:
        """Final states minus the reference's, (B, ...): given rows, or classical ones of this order; `replay` and
        `unchanged` as in `probe.run`."""
        self.probe.prepare(raw, rows, order=order, offsets=offsets)
        return self._prepared_errors(split, batch, len(raw) - 1, replay, unchanged)

    def _prepared_errors(
        self, split: str, batch: Samples, nfe: int, replay: Replay | None = None, unchanged: int = 0
    ) -> Tensor:
        indices, reference = batch
        final = run(self.sampler, self.probe, indices, split, nfe, replay, unchanged)[-1][: len(indices)]
        return final - reference.final.to(final.device)  # in the precision of the reference, float32 or more

    def errors(
        self,
        split: str,
        raw: Tensor,
        rows: Sequence[Sequence[float]] | None,
        *,
        order: int = 2,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """The same of all of this process's samples of a split."""
        samples = self.train if split == "train" else self.validation
        parts = []
        for batch in self.batches(samples):
            replay = self.start(split, batch[0], len(raw) - 1, offsets)
            parts.append(
                self.batch_errors(split, batch, raw, rows, order=order, offsets=offsets, replay=replay, unchanged=1)
            )
        return torch.cat(parts)

    def score_spec(self, spec: SolverSpec) -> float:
        """Final-state mse of a whole solver on the validation samples."""
        parts = []
        for batch in self.batches(self.validation):
            self.probe.prepare_spec(spec)
            parts.append(self._prepared_errors("validation", batch, spec.nfe))
        return self.mean_square(torch.cat(parts))

    def score(self, raw: Tensor, rows: Sequence[Sequence[float]] | None, order: int = 2) -> float:
        """Final-state mse on the validation samples."""
        return self.mean_square(self.errors("validation", raw, rows, order=order))

    def validated(self, candidate: Candidate) -> Candidate:
        """The candidate with its validation error measured."""
        return replace(candidate, validation_mse=self.score(candidate.raw, candidate.spec.coefficients))

    def search(self, nfe: int, trials: int, ridge: float, starts: Sequence[Warp] = (IDENTITY,)) -> Candidate:
        """From every start half of the trials; the start whose best warp, fitted again to all training samples, does
        best there gets the other half. Its `KEEP` best warps are fitted so, the best of these also with larger ridges,
        and the best on validation samples is returned. One start gets all trials at once."""
        half = trials if len(starts) == 1 else -(-trials // 2)
        searches = [
            _WarpSearch(self, nfe, ridge, np.array(start) + np.array([IDENTITY, *(0.8 * np.eye(3))]))
            for start in starts
        ]
        firsts = []
        for one in searches:
            one.go(half)
            firsts.append(self.fit(nfe, one.best(1)[0].warp, ridge))
        taken = min(range(len(starts)), key=lambda k: comparable(firsts[k].train_mse))
        searches[taken].go(trials - half)
        finalists = [
            firsts[taken] if c.warp == firsts[taken].warp else self.fit(nfe, c.warp, ridge)
            for c in searches[taken].best(KEEP)
        ]
        best = min(finalists, key=lambda c: comparable(c.train_mse))
        finalists += [self.fit(nfe, best.warp, ridge * factor) for factor in RIDGE_FACTORS]
        return min(map(self.validated, finalists), key=lambda c: comparable(c.validation_mse))

    def mean_square(self, errors: Tensor) -> float:
        """Over every process's samples."""
        count = torch.tensor(errors.numel(), dtype=torch.float64, device=errors.device)
        total = self.reduce(torch.stack([errors.double().square().sum(), count]))
        return float(total[0] / total[1])


class _WarpSearch:
    """Nelder-Mead over warps on the trial samples, which can be stopped and gone on with."""

    def __init__(self, form: ClosedForm, nfe: int, ridge: float, simplex: np.ndarray) -> None:
        indices, reference = form.train
        few = form.num_trial_samples
        self.samples = indices[:few], Reference(reference.angles, reference.states[:, :few])
        self.form, self.nfe, self.ridge, self.simplex = form, nfe, ridge, simplex
        self.seen: dict[Warp, Candidate] = {}

    def go(self, trials: int) -> None:
        """So many more warps."""
        if trials:
            known = sum(tuple(vertex) in self.seen for vertex in self.simplex.tolist())
            options = {"maxfev": trials + known, "initial_simplex": self.simplex, "xatol": 1e-2, "fatol": 1e-3}
            found = minimize(self._error, self.simplex[0], method="Nelder-Mead", options=options)
            self.simplex = found.final_simplex[0]

    def best(self, count: int) -> list[Candidate]:
        return sorted(self.seen.values(), key=lambda c: comparable(c.train_mse))[:count]

    def _error(self, warp: np.ndarray) -> float:
        if np.abs(warp).sum() > MAX_WARP:
            return np.inf
        a, b, c = warp.tolist()
        if (a, b, c) not in self.seen:
            self.seen[a, b, c] = self.form.fit(self.nfe, (a, b, c), self.ridge, self.samples)
        return comparable(np.log(self.seen[a, b, c].train_mse + 1e-30))
