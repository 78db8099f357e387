"""Solvers for which no table was searched: other step counts, guidance scales between searched ones, grids of the
user's own.

The node curve of a searched solver (node as a function of i/N) is used at other step counts, with classical rows:
Adams-Bashforth 2 on flow paths, DPM-Solver++(2M) on vp paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch

from .paths import FlowPath, Path
from .solver import Row, SolverSpec

Curve = Callable[[float], float]
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6
Number = TypeVar("Number", float, torch.Tensor)


@dataclass(frozen=True)
class Shift:
    """The resolution shift of flow models: sigma' = e sigma / (1 + (e - 1) sigma) with e = `factor`. If `terminal` is
    given, a stretch then puts the last network call at sigma = `terminal`.

    Source: Esser et al., arXiv 2403.03206, Sec. 5.3.2, as diffusers' FlowMatchEulerDiscreteScheduler computes it.
    """

    factor: float = 1.0
    terminal: float | None = None

    def __call__(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """Shift N+1 falling sigmas, the last of them 0."""
        moved = [warp(s, self.factor) for s in sigmas]
        if self.terminal and len(sigmas) > 2:
            scale = (1 - moved[-2]) / (1 - self.terminal)
            moved = [1 - (1 - s) / scale for s in moved[:-1]] + [0.0]
        return tuple(moved)


def warp(sigma: Number, factor: float) -> Number:
    """e sigma / (1 + (e - 1) sigma); 1/e undoes it."""
    return factor * sigma / (factor * sigma + (1 - sigma))


def at_guidance(by_scale: Mapping[float, Mapping[int, SolverSpec]], scale: float, path: Path) -> dict[int, SolverSpec]:
    """Solvers by NFE for a guidance scale between searched ones.

    Nodes, weights and network times of the next lower and next higher scale are blended linearly in the scale. Outside
    all scales, the solvers of the nearest one.
    """
    scales = sorted(by_scale)
    scale = min(max(scale, scales[0]), scales[-1])
    lower, upper = max(s for s in scales if s <= scale), min(s for s in scales if s >= scale)
    if lower == upper:
        return dict(by_scale[lower])
    share = (scale - lower) / (upper - lower)
    return {nfe: _blended(spec, by_scale[upper][nfe], share, path) for nfe, spec in by_scale[lower].items()}


def _blended(a: SolverSpec, b: SolverSpec, share: float, path: Path) -> SolverSpec:
    """(1 - share) a + share b, for two solvers with the same number of steps."""

    def mix(first: Sequence[float], second: Sequence[float]) -> Row:
        return tuple((1 - share) * x + share * y for x, y in zip(first, second, strict=True))

    rows = tuple(mix(*pair) for pair in zip(a.coefficients, b.coefficients, strict=True))
    times = None
    if a.timesteps is not None or b.timesteps is not None:
        times = mix(*(spec.timesteps or _times(spec.nodes[:-1], path) for spec in (a, b)))
    return SolverSpec(mix(a.nodes, b.nodes), rows, times)


def uniform_nodes(nfe: int, path: Path) -> tuple[float, ...]:
    """nfe + 1 evenly spaced nodes from the path's first one to 0."""
    return tuple(path.first_node * (nfe - i) / nfe for i in range(nfe + 1))


def classical(nodes: Sequence[float], path: Path, order: int = 2, stretched: bool = False) -> SolverSpec:
    """Adams-Bashforth (flow) or DPM-Solver++ (vp) of this order on these nodes; order 1 is Euler or DDIM.

    The last step of a grid that is `stretched` to a terminal shift is far longer than the others, and an extrapolation
    over it grows with N. Where it is longer than twice the step before, it is an Euler step.
    """
    if isinstance(path, FlowPath):
        spec = SolverSpec.adams_bashforth(nodes, order)
        n = spec.nfe
        return first_order_end(spec) if stretched and n > 1 and nodes[-2] > 2 * (nodes[-3] - nodes[-2]) else spec
    lambdas = path.lambdas(torch.tensor(nodes, dtype=torch.float64)).tolist()
    return SolverSpec.dpm_solver_pp(nodes, lambdas, order)


def first_order_end(spec: SolverSpec) -> SolverSpec:
    """The same with an Euler or DDIM step at the end, which gives the data that the last network call predicts."""
    return replace(spec, coefficients=(*spec.coefficients[:-1], (0.0,) * (spec.nfe - 1) + (1.0,)))


def from_neighbours(solvers: Mapping[int, SolverSpec], nfe: int, path: Path) -> SolverSpec:
    """A solver for `nfe` steps without a table: classical rows on interpolated nodes.

    The node curves of the next smaller and next larger table are blended linearly in N; outside the range of the
    tables the nearest curve is used alone.
    """
    below = max((n for n in solvers if n <= nfe), default=min(solvers))
    above = min((n for n in solvers if n >= nfe), default=max(solvers))
    blend = (nfe - below) / (above - below) if above > below else 0.0
    curves = [(1 - blend, node_curve(solvers[below].nodes)), (blend, node_curve(solvers[above].nodes))]
    nodes = [sum(share * curve(i / nfe) for share, curve in curves) for i in range(nfe)]
    return classical((*nodes, 0.0), path)


def _times(nodes: Sequence[float], path: Path) -> tuple[float, ...]:
    return tuple(path.timestep(torch.tensor(nodes, dtype=torch.float64).clamp(0, 1)).tolist())


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
    """The factor e of `Shift` that diffusers derives from a pipeline's `mu`: exp(mu) or, for "linear", mu itself.

    Raises:
        ValueError: for a mu whose factor is not between MIN_FACTOR and MAX_FACTOR.
    """
    low, high = (math.log(MIN_FACTOR), math.log(MAX_FACTOR)) if kind == "exponential" else (MIN_FACTOR, MAX_FACTOR)
    if not low <= mu <= high:
        raise ValueError(f"mu is {mu!r}; a shift of type {kind!r} takes {low:.4g} to {high:.4g}")
    return math.exp(mu) if kind == "exponential" else mu
