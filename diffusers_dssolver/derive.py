"""Solvers for which no table was searched: classical rows on given nodes, and other step counts from searched ones.

The node curve of a searched solver, node as a function of i/N, is what carries over to other step counts; its weights
do not (neighbouring searches sit in different minima), so derived solvers take classical rows for their nodes:
Adams-Bashforth 2 on flow paths, DPM-Solver++(2M) on vp paths, the best of the classical ones there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .paths import FlowPath, Path
from .solver import SolverSpec

Curve = Callable[[float], float]


@dataclass(frozen=True)
class Shift:
    """The resolution shift of flow models: sigma' = e sigma / (1 + (e - 1) sigma), e = `factor`; then, if `terminal`
    is given, a stretch that puts the last network call at sigma = `terminal`.

    Source: Esser et al., arXiv 2403.03206, Sec. 5.3.2, as diffusers' FlowMatchEulerDiscreteScheduler computes it.
    """

    factor: float = 1.0
    terminal: float | None = None

    def __call__(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """N+1 falling sigmas, the last 0, to N+1 shifted ones."""
        moved = [self.factor * s / (self.factor * s + (1 - s)) for s in sigmas]
        if self.terminal and len(sigmas) > 2:
            scale = (1 - moved[-2]) / (1 - self.terminal)
            moved = [1 - (1 - s) / scale for s in moved[:-1]] + [0.0]
        return tuple(moved)


def uniform_nodes(nfe: int, path: Path) -> tuple[float, ...]:
    """nfe + 1 evenly spaced nodes from the path's first one to 0."""
    return tuple(path.first_node * (nfe - i) / nfe for i in range(nfe + 1))


def classical(nodes: Sequence[float], path: Path, order: int = 2) -> SolverSpec:
    """Adams-Bashforth (flow) or DPM-Solver++ (vp) of this order on these nodes; order 1 is Euler or DDIM."""
    if isinstance(path, FlowPath):
        return SolverSpec.adams_bashforth(nodes, order)
    lambdas = path.lambdas(torch.tensor(nodes, dtype=torch.float64)).tolist()
    return SolverSpec.dpm_solver_pp(nodes, lambdas, order)


def from_neighbours(solvers: Mapping[int, SolverSpec], nfe: int, path: Path) -> SolverSpec:
    """A solver for `nfe` steps without a table: the node curves of the next smaller and next larger table, blended
    linearly in N (only the one there is, outside their range), with classical rows.

    Args:
        solvers: at least one searched solver by its NFE.
        nfe: the step count wanted, 1 or more.
    """
    below = max((n for n in solvers if n <= nfe), default=min(solvers))
    above = min((n for n in solvers if n >= nfe), default=max(solvers))
    low, high = node_curve(solvers[below].nodes), node_curve(solvers[above].nodes)
    blend = (nfe - below) / (above - below) if above > below else 0.0
    inner = [(1 - blend) * low(i / nfe) + blend * high(i / nfe) for i in range(nfe)]
    return classical((*inner, 0.0), path)


def node_curve(nodes: Sequence[float]) -> Curve:
    """The monotone cubic through the points (i/N, node i).

    Source: Fritsch and Butland, A method for constructing local monotone piecewise cubic interpolants, 1984 (PCHIP).
    """
    n = len(nodes) - 1
    slopes = [nodes[i + 1] - nodes[i] for i in range(n)]  # per step; all negative
    inner = [2 * a * b / (a + b) for a, b in pairwise(slopes)]
    tangents = [slopes[0], *inner, slopes[-1]]

    def curve(u: float) -> float:
        i = min(int(u * n), n - 1)
        s = u * n - i
        rest = 1 - s
        return rest * rest * ((1 + 2 * s) * nodes[i] + s * tangents[i]) + s * s * (
            (1 + 2 * rest) * nodes[i + 1] - rest * tangents[i + 1]
        )

    return curve


def dynamic_shift(mu: float, kind: str) -> float:
    """The factor e of `Shift` that diffusers derives from a pipeline's `mu`: exp(mu) or, for "linear", mu itself."""
    return math.exp(mu) if kind == "exponential" else mu
