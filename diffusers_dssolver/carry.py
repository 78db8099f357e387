"""One change of variables: solvers of one path on models of another.

In x/alpha and sigma/alpha every path is the same ODE, so the nodes of a solver are noise levels. Let s be the solver's
path and m the model's, e the ratio of their resolution shifts (1 without any), and w = alpha/sigma. Data of the
solver's world are the model's over e, and three scalars a step differ:

    node        w_m = w_s / e + c
    state       x_s = r x_m        r = hypot(alpha_s, sigma_s) / hypot(e (alpha_m - c sigma_m), sigma_m)
                so A' = A r_i / r_{i+1} and B' = B / r_{i+1}
    quantity    d of s = p x_m + q output

The offset c brings a solver's first node to the model's own first one, where the two paths begin with different noise:
a flow with none of the data, vp with a little. It is 0 for solvers that start elsewhere. For every e and c the model's
trajectories are the solver's, exactly: with z = x/alpha and l = sigma/alpha, dz/dl = (z - data)/l keeps its form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .paths import Path
from .solver import SolverSpec
from .step import Scalar, scalars

Weights = tuple[Scalar, Scalar, Scalar, Scalar]


@dataclass(frozen=True)
class Change:
    """The solver's side of a run on a model of another path or resolution shift.

    Args:
        path: the solver's own.
        nodes: (N+1,) on it.
        factor: e.
        offset: c.
    """

    path: Path
    nodes: Tensor
    factor: float
    offset: float

    def scales(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """r at the model's nodes, whose alphas and sigmas (N+1,) are given."""
        norm = torch.hypot(self.factor * (alpha - self.offset * sigma), sigma)
        norm = torch.where(self.nodes == 0, self.factor, norm)  # the data, whatever noise a path leaves in them
        return torch.hypot(*self.path.alpha_sigma(self.nodes)) / norm


@dataclass(frozen=True)
class Course:
    """A solver as it runs on a model; float64 tensors on the CPU.

    Args:
        nodes: (N+1,) on the model's path.
        times: (N,) what the network is fed.
        rows: N rows of weights.
        change: the solver's side, where it differs.
    """

    nodes: Tensor
    times: Tensor
    rows: Sequence[Sequence[Scalar]] = ()
    change: Change | None = None

    def part(self, first: int, end: int) -> Course:
        """The steps first .. end - 1."""
        change = self.change and replace(self.change, nodes=self.change.nodes[first : end + 1])
        return Course(self.nodes[first : end + 1], self.times[first:end], self.rows[first:end], change)

    def transition(self, path: Path, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (A_i, B_i), each (N,), on a model's path, with alphas and sigmas (N+1,) of its nodes."""
        if self.change is None:
            return path.transition(alpha, sigma)
        r = self.change.scales(alpha, sigma)
        a, b = self.change.path.transition(*self.change.path.alpha_sigma(self.change.nodes))
        return a * r[:-1] / r[1:], b / r[1:]

    def weights(self, path: Path, prediction: str, alpha: Tensor, sigma: Tensor) -> list[Weights]:
        """N times (p, q, u, v): the quantity d = p x + q output of a state x and the network's output, and the data
        u x + v d that it predicts."""
        found: list[Weights] = [
            (*path.quantity_weights(a, s, prediction), *path.denoised_weights(a, s))
            for a, s in zip(scalars(alpha[:-1]), scalars(sigma[:-1]), strict=True)
        ]
        if self.change is None:
            return found
        e, r = self.change.factor, scalars(self.change.scales(alpha, sigma))
        for i, at in enumerate(zip(*map(scalars, self.change.path.alpha_sigma(self.change.nodes[:-1])), strict=True)):
            p, q, u, v = found[i]
            of_state, of_d = self.change.path.denoised_weights(*at)  # data / e = of_state x_s + of_d d
            found[i] = (
                (u + v * p) / (e * of_d) - r[i] * of_state / of_d, v * q / (e * of_d), e * r[i] * of_state, e * of_d
            )  # fmt: skip
        return found


def carried(spec: SolverSpec, own: Path, path: Path, factor: float = 1.0) -> Course:
    """A solver of the path `own` on a model's path, at `factor` times the resolution shift that it was searched at.

    Raises:
        ValueError: for nodes that fall together on the model's path.
    """
    nodes = torch.tensor(spec.nodes, dtype=torch.float64)
    given = None if spec.timesteps is None else torch.tensor(spec.timesteps, dtype=torch.float64)
    if own == path and factor == 1.0:
        return Course(nodes, path.timestep(nodes[:-1]) if given is None else given, spec.coefficients)
    begins = path.alpha_sigma(torch.tensor(path.first_node, dtype=torch.float64)), own.alpha_sigma(nodes[0])
    of_model, of_solver = (float(alpha / sigma) for alpha, sigma in begins)
    offset = of_model - of_solver / factor
    if nodes[0] != own.first_node and offset < 0:  # a solver that starts where the model can
        offset = 0.0

    def moved(own_nodes: Tensor) -> Tensor:
        alpha, sigma = own.alpha_sigma(own_nodes)
        return path.node_of_angle(torch.atan2(sigma, alpha / factor + offset * sigma))

    ours = moved(nodes)
    ours[-1] = 0.0
    if offset or nodes[0] == own.first_node:
        ours[0] = path.first_node
    fed = ours[:-1] if given is None else moved(own.node(given))
    for name, falling in (("nodes", ours), ("timesteps", fed)):
        if not (falling.diff() < 0).all():
            raise ValueError(f"{name} of the table for {spec.nfe} steps fall together on this model; search one for it")
    return Course(ours, path.timestep(fed), spec.coefficients, Change(own, nodes, factor, offset))
