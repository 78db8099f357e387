"""What one run of a pipeline does: the numbers of a solver, before the model's resolution shift is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_dssolver.derive import Shift, classical, first_order_end
from diffusers_dssolver.paths import FlowPath, Path
from diffusers_dssolver.solver import SolverSpec
from diffusers_dssolver.step import Scalar

Rows = Sequence[Sequence[Scalar]]


class Solver(NamedTuple):
    """A plan on a model, as it is integrated and published.

    Attributes:
        nodes: (N+1,) float64, after the path's first node and the resolution shift.
        rows: N rows of weights.
        times: (N,) what the network is given at each node, in the model's own unit.
        spec_times: the same as a spec has them; None where they are those of the nodes.
    """

    nodes: Tensor
    rows: Rows
    times: Tensor
    spec_times: Tensor | None

    def spec(self) -> SolverSpec:
        """Raises ValueError where nodes or times do not fall."""
        rows = [[float(weight) for weight in row] for row in self.rows]
        full = [[0.0] * (i + 1 - len(row)) + row for i, row in enumerate(rows)]
        return SolverSpec(
            self.nodes.detach().tolist(), full, None if self.spec_times is None else self.spec_times.detach().tolist()
        )


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
    """

    unshifted_nodes: Tensor
    rows: Rows | None = None
    offsets: Tensor | None = None
    order: int = 2
    first_order_end: bool = False
    float32_states: bool = False
    spec: SolverSpec | None = None

    @classmethod
    def of(cls, spec: SolverSpec) -> Plan:
        """The run of a published solver; its nodes contain the shift already."""
        return cls(torch.tensor(spec.nodes, dtype=torch.float64), spec=spec)

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
            nodes = torch.tensor(self.spec.nodes, dtype=torch.float64)
            given = self.spec.timesteps
            times = None if given is None else torch.tensor(given, dtype=torch.float64)
            return Solver(nodes, self.spec.coefficients, path.timestep(nodes[:-1]) if times is None else times, times)
        nodes = shifted(self.unshifted_nodes, path, shift)
        rows = list(self.rows or ())
        if len(rows) < self.nfe:
            spec = classical(nodes.detach().tolist(), path, self.order)
            rows += (first_order_end(spec) if self.first_order_end else spec).coefficients[len(rows) :]
        if self.offsets is None:
            return Solver(nodes, rows, path.timestep(nodes[:-1]), None)
        times = path.timestep((nodes[:-1] + self.offsets).clamp(0, 1))
        return Solver(nodes, rows, times, times)


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
