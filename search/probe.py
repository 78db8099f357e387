"""The scheduler of the search: run inside a pipeline's ordinary call it *is* the differentiable sampler of that
pipeline. It records every state, takes nodes and coefficients that may be live tensors, can solve for each row where
the history and the reference's next state meet, and leaves the call after the last step, before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import classical, from_neighbours
from diffusers_dssolver.paths import FlowPath
from diffusers_dssolver.solver import SolverSpec
from diffusers_dssolver.step import Scalar, step

from .sampling import Sampler

Rows = Sequence[Sequence[Scalar]]
# (index, offset, columns) -> corrections: fits offset (M,) by columns (i, M); see `closed_form.RowFit`
RowSolver = Callable[[int, Tensor, Tensor], Tensor]


class RunFinished(Exception):
    """Private: the last step was taken, nothing after it is wanted."""


class ProbeScheduler(DSSolverScheduler):
    """A `DSSolverScheduler` for searches. Make one with `from_config(pipe.scheduler.config, solvers="classical")`.

    Attributes after a run:
        states: the N+1 states, first to last, each (B, ...).
        rows: the N rows that were used.
    """

    def prepare(
        self,
        nodes: Tensor,
        rows: Rows | None = None,
        *,
        order: int = 2,
        offsets: Tensor | None = None,
        targets: Sequence[Tensor] | None = None,
        row_solver: RowSolver | None = None,
    ) -> None:
        """What the next run shall do.

        Args:
            nodes: (N+1,) float64 in [0, 1] before any resolution shift, falling to 0; with a graph: gradients flow.
            rows: N rows of weights, floats or 0-dim tensors; None: classical rows of this order for these nodes.
            offsets: (N,), what the network is fed in place of each node, minus that node (after the shift); None: 0.
            targets: N+1 reference states to fit rows to, for `row_solver`.
            row_solver: given, every row but the first is classical + the corrections that it returns.
        """
        self._plan = (nodes, rows, order, offsets)
        self._targets, self._row_solver = targets, row_solver

    def prepare_spec(self, spec: SolverSpec) -> None:
        """The next run is this solver's, as it would be published."""
        self._plan, self._targets, self._row_solver = spec, None, None

    def final_nodes(self, nodes: Tensor) -> Tensor:
        """Nodes after the path's first node and the model's resolution shift, as they are integrated and published."""
        if isinstance(self._path, FlowPath):
            moved = self._shift()(list(nodes.unbind()))
            return torch.stack([torch.as_tensor(m, dtype=nodes.dtype) for m in moved])
        return nodes * self._path.first_node

    def searched_shift(self) -> dict[str, float | None] | None:
        """The resolution shift that the last run's nodes contain, as the configuration key of that name; None on vp."""
        if not isinstance(self._path, FlowPath):
            return None
        shift = self._shift()
        return {"factor": shift.factor, "terminal": shift.terminal}

    def derived(self, solvers: Mapping[int, SolverSpec], nfe: int, interpolate_corrections: bool) -> SolverSpec:
        """What a user gets at a step count between two tables."""
        return from_neighbours(solvers, nfe, self._path, interpolate_corrections)

    def angle(self, nodes: Tensor) -> Tensor:
        """The coordinate in which references are interpolated, at final nodes."""
        return self._path.angle(nodes)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """As the parent's, for the arguments a pipeline gives; then the prepared nodes and rows are put in place."""
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
        plan = self._plan
        steps = plan.nfe if isinstance(plan, SolverSpec) else len(plan[0]) - 1
        if self.num_inference_steps != steps:
            raise ValueError(f"the pipeline asks for {self.num_inference_steps} steps, the search for {steps}")
        self._live, self.states, self.rows = False, [], []
        if isinstance(plan, SolverSpec):
            self.nodes, self._fed = torch.tensor(plan.nodes, dtype=torch.float64), plan.timesteps
            self._install(plan, device)
            return
        raw, rows, order, offsets = plan
        self._live = raw.requires_grad
        if self._live:
            torch.set_grad_enabled(True)  # the pipeline's own no_grad puts the mode back when its call ends
        self.nodes = nodes = self.final_nodes(raw)
        if rows is None:
            rows = classical(nodes.detach().tolist(), self._path, order).coefficients
        fed = nodes[:-1] if offsets is None else (nodes[:-1] + offsets).clamp(0, 1)
        self._install_tensors(nodes, self._path.timestep(fed), rows, device)
        self._needed = [i + 1 for i in range(len(raw) - 1)] if self._row_solver else self._needed
        self._fed = None if offsets is None else self._path.timestep(fed).tolist()

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """The parent's step, recorded."""
        if self._live:  # pipelines may write into their tensors, which a graph cannot bear
            model_output, sample = model_output.clone(), sample.clone()
        if not self.states:
            self.states.append(sample)
        result = super().step(model_output, timestep, sample, generator, return_dict)
        self.states.append(result[0])
        if len(self.states) == len(self.timesteps) + 1:
            raise RunFinished
        return result

    def _row(self, index: int, x: Tensor) -> Sequence[Scalar]:
        row = super()._row(index, x)
        if self._row_solver is not None and self._targets is not None and index > 0:
            row = self._solved_row([*[0.0] * (index + 1 - len(row)), *row], index, x)
        self.rows.append(row)
        return row

    def _solved_row(self, prior: list[Scalar], index: int, x: Tensor) -> list[Scalar]:
        """prior + (delta_0, .., delta_{i-1}, -sum delta), delta fitted to what the prior leaves of the reference."""
        target = self._targets[index + 1].to(x)
        target = target.repeat(x.shape[0] // target.shape[0], *[1] * (x.ndim - 1))  # guidance may double the batch
        newest = self._history[-1]
        left = target - step(x, self._history, prior, self._a[index], self._b[index])
        columns = torch.stack([(self._b[index] * (d - newest)).flatten() for d in self._history[:-1]])
        delta = self._row_solver(index, left.flatten(), columns).tolist()
        return [p + d for p, d in zip(prior, [*delta, -sum(delta)], strict=True)]

    def spec(self) -> SolverSpec:
        """The solver that the last run used."""
        n = len(self.timesteps)
        rows = [[float(w) for w in row] for row in self.rows]
        full = [[0.0] * (i + 1 - len(row)) + row for i, row in enumerate(rows)]
        return SolverSpec(self.nodes.detach().tolist()[: n + 1], full, self._fed)


def run(sampler: Sampler, probe: ProbeScheduler, indices: Sequence[int], split: str, nfe: int) -> list[Tensor]:
    """One prepared run: the N+1 states. Raises ValueError if the pipeline does not take the steps asked for."""
    with sampler.using(probe):
        try:
            sampler(indices, split, nfe)
        except RunFinished:
            return probe.states
    raise ValueError(f"{type(sampler.pipe).__name__} ended its loop without taking all {nfe} steps")
