"""What one run of a pipeline does: the numbers of a solver, before the model's resolution shift is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_dssolver.carry import Course, carried
from diffusers_dssolver.derive import Shift, classical, first_order_end
from diffusers_dssolver.paths import FlowPath, Path
from diffusers_dssolver.solver import SolverSpec
from diffusers_dssolver.step import Scalar

Rows = Sequence[Sequence[Scalar]]


class Solver(NamedTuple):
    """A plan on a model, as it is integrated and published.

    Attributes:
        course: nodes after the path's first node and the resolution shift, rows, and the times that the network is fed.
        own_times: whether these are not those of the nodes.
        given: the solver as it was published, if it was.
    """

    course: Course
    own_times: bool
    given: SolverSpec | None = None

    @property
    def nodes(self) -> Tensor:
        """(N+1,) float64."""
        return self.course.nodes

    def spec(self) -> SolverSpec:
        """Raises ValueError where nodes or times do not fall."""
        if self.given is not None:
            return self.given
        rows = [[float(weight) for weight in row] for row in self.course.rows]
        full = [[0.0] * (i + 1 - len(row)) + row for i, row in enumerate(rows)]
        times = self.course.times.detach().tolist() if self.own_times else None
        return SolverSpec(self.nodes.detach().tolist(), full, times)


@dataclass(frozen=True, eq=False)
class Plan:
    """The solver of a run. Gradients flow to nodes, rows and offsets, to each that requires them.

    Attributes:
        unshifted_nodes: (N+1,) float64 falling from 1 to 0, before the path's first node and any resolution shift.
        rows: N rows of weights, floats or 0-dim tensors. Those missing at the end (None: all) are classical.
        offsets: (N,) model time minus node, after the shift; None: 0.
        order: of the classical rows.
        first_order_end: give the last step a classical row of first order.
        float32_states: keep states in float32 between steps and hand the pipeline a rounded copy, so that the errors
            of bfloat16 do not accumulate.
        spec: a whole solver as it is published, in place of nodes, rows and offsets.
        own: the path that `spec` belongs to; None: the model's.
        factor: the run's resolution shift over that of `spec`.
    """

    unshifted_nodes: Tensor
    rows: Rows | None = None
    offsets: Tensor | None = None
    order: int = 2
    first_order_end: bool = False
    float32_states: bool = False
    spec: SolverSpec | None = None
    own: Path | None = None
    factor: float = 1.0

    @classmethod
    def of(cls, spec: SolverSpec, own: Path | None = None, factor: float = 1.0) -> Plan:
        """The run of a published solver; its nodes contain the shift already. That of another path, or of another
        resolution shift, is carried over by noise level."""
        return cls(torch.tensor(spec.nodes, dtype=torch.float64), spec=spec, own=own, factor=factor)

    @property
    def nfe(self) -> int:
        """Number of steps N."""
        return len(self.unshifted_nodes) - 1

    @property
    def shares_first_call(self) -> bool:
        """Whether the first network call is that of every such plan of as many steps: at the first node itself."""
        return self.spec is None and (self.offsets is None or bool(self.offsets[0] == 0))

    @property
    def requires_grad(self) -> bool:
        """Whether any number of the solver is to be differentiated in."""
        numbers = (self.unshifted_nodes, self.offsets, *(weight for row in self.rows or () for weight in row))
        return any(isinstance(number, Tensor) and number.requires_grad for number in numbers)

    def detached(self) -> Plan:
        """The same without a graph, its weights as floats."""
        rows = None if self.rows is None else [[float(weight) for weight in row] for row in self.rows]
        offsets = None if self.offsets is None else self.offsets.detach()
        return replace(self, unshifted_nodes=self.unshifted_nodes.detach(), rows=rows, offsets=offsets)

    def on(self, path: Path, shift: Shift | None) -> Solver:
        """The numbers on a model."""
        if self.spec is not None:
            run = carried(self.spec, self.own or path, path, self.factor)
            return Solver(run, self.spec.timesteps is not None, self.spec)
        nodes = shifted(self.unshifted_nodes, path, shift)
        rows = list(self.rows or ())
        if len(rows) < self.nfe:
            spec = classical(nodes.detach().tolist(), path, self.order)
            rows += (first_order_end(spec) if self.first_order_end else spec).coefficients[len(rows) :]
        if self.offsets is None:
            return Solver(Course(nodes, path.timestep(nodes[:-1]), rows), False)
        return Solver(Course(nodes, path.timestep((nodes[:-1] + self.offsets).clamp(0, 1)), rows), True)


def nodes_from_logits(logits: Tensor) -> Tensor:
    """(N,) float64 -> (N+1,) nodes from exactly 1 to exactly 0 whose step sizes are softmax(logits); differentiable.

    Paper: Alg. 1, arXiv 2505.21114.
    """
    falling = 1 - torch.cumsum(torch.softmax(logits, 0), 0)
    return torch.cat([torch.ones(1, dtype=torch.float64), falling[:-1], torch.zeros(1, dtype=torch.float64)])


def warped_nodes(step_warp: Sequence[float], nfe: int) -> Tensor:
    """nfe + 1 nodes from 1 to 0 whose step sizes are softmax(a u + b u^2 + c u^3), u from -1 to 1; (nfe + 1,)
    float64."""
    u = torch.linspace(-1, 1, nfe, dtype=torch.float64) if nfe > 1 else torch.zeros(1, dtype=torch.float64)
    powers = torch.stack([u, u**2, u**3])
    return nodes_from_logits(torch.tensor(step_warp, dtype=torch.float64) @ powers)


def shifted(unshifted_nodes: Tensor, path: Path, shift: Shift | None) -> Tensor:
    """Nodes (N+1,) as they are integrated on a path: on flow paths with the resolution shift; differentiable."""
    if shift is None:
        return unshifted_nodes * path.first_node
    moved = shift(list(unshifted_nodes.unbind()))
    return torch.stack([torch.as_tensor(node, dtype=unshifted_nodes.dtype) for node in moved])


def second_order_slopes(nodes: Tensor, path: Path) -> Tensor:
    """(N,) weights s_i of the classical second-order rows (.., -s_i, 1 + s_i) of shifted nodes, 0 where the classical
    row is of first order; differentiable."""
    rows = classical(nodes.detach().tolist(), path).coefficients
    at = nodes if isinstance(path, FlowPath) else path.lambdas(nodes[:-1])  # infinite at the last node
    steps = at[1:] - at[:-1]
    second = [i > 0 and row[i - 1] != 0.0 for i, row in enumerate(rows)]
    return torch.stack([steps[i] / (2 * steps[i - 1]) if s else steps.new_zeros(()) for i, s in enumerate(second)])
