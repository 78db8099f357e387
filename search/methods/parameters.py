"""Numbers that are searched -> a solver. A new parametrisation is a class with the protocol's members in a file of its
own, and an entry of `PARAMETRISATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ..pipeline.plan import Plan, nodes_from_logits
from ..settings import GROUPS

Slopes = Callable[[Tensor], Tensor]


class Parametrisation(Protocol):
    """Free numbers around a solver."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The tensors that an optimiser moves, float64; all 0 give the solver that the search starts from."""

    def plan(self) -> Plan:
        """The solver of the numbers as they are, with their graph."""

    @property
    def count(self) -> int:
        """How many numbers there are."""

    @property
    def shared_calls(self) -> list[int]:
        """By number, in the order of `parameters()`: how many first network calls do not depend on it."""


class PaperParameters(nn.Module):
    """The paper's free numbers: step sizes softmax(r) with r = 1, and c_ij (j < i) from 0, which is Euler or DDIM; the
    diagonal is 1 - sum_j<i c_ij. For N <= 6 the last two steps use only the output before them.

    Paper: Alg. 1 and Sec. 5, arXiv 2505.21114.
    """

    def __init__(self, nfe: int) -> None:
        super().__init__()
        self.nfe = nfe
        self.r = nn.Parameter(torch.ones(nfe, dtype=torch.float64))
        self.c = nn.Parameter(torch.zeros(nfe, nfe, dtype=torch.float64))
        free = torch.ones(nfe, nfe).tril(-1).bool()
        if nfe <= 6:
            for i in range(max(nfe - 2, 1), nfe):
                free[i, : i - 1] = False
        self.register_buffer("free", free, persistent=False)
        self.free: Tensor

    def plan(self) -> Plan:
        """Rows of 0-dim tensors, each summing to 1."""
        c = torch.where(self.free, self.c, 0.0)
        rows = [[*c[i, :i].unbind(), 1 - c[i, :i].sum()] for i in range(self.nfe)]
        return Plan(nodes_from_logits(self.r), rows)

    @property
    def count(self) -> int:
        """N + N(N-1)/2, fewer for N <= 6."""
        return self.nfe + int(self.free.sum())


class CorrectionParameters(nn.Module):
    """Classical second-order rows of the nodes as they are now, plus corrections that sum to 0 and do not move with
    them. They stand around one solver: every parameter starts at 0.

    Args:
        start: that solver: nodes, all rows, offsets.
        slopes: unshifted nodes (N+1,) -> (N,) weights s_i: the classical row is (.., -s_i, 1 + s_i); differentiable.
        free: which of `GROUPS` are parameters: step sizes, corrections, offsets of model times.

    Source: corrections of classical coefficients: GS, ICLR 2026; decoupled network times: LD3, arXiv 2405.15506.
    """

    OFFSET_SCALE = 0.1  # one unit of an offset parameter, as a difference of nodes

    def __init__(self, start: Plan, slopes: Slopes, free: Collection[str] = GROUPS) -> None:
        super().__init__()
        self.start, self.slopes = start, slopes
        self.nfe = n = start.nfe
        self.origin = torch.log(start.unshifted_nodes[:-1] - start.unshifted_nodes[1:])
        rows = [torch.tensor([float(weight) for weight in row], dtype=torch.float64) for row in start.rows or ()]
        self.learned = [row - base for row, base in zip(rows, self._classical(start.unshifted_nodes), strict=True)]
        for group, count in zip(GROUPS, (n - 1, n * (n - 1) // 2, n), strict=True):
            zeros = torch.zeros(count, dtype=torch.float64)
            if group in free:
                self.register_parameter(f"free_{group}", nn.Parameter(zeros))
            else:
                self.register_buffer(f"free_{group}", zeros)
        self.free_nodes: Tensor
        self.free_coefficients: Tensor
        self.free_times: Tensor

    def plan(self) -> Plan:
        return Plan(self._nodes(), self._rows(), self._offsets())

    def _nodes(self) -> Tensor:
        """(N+1,) unshifted."""
        return nodes_from_logits(self.origin + torch.cat([self.free_nodes, self.free_nodes.new_zeros(1)]))

    def _rows(self) -> list[list[Tensor]]:
        """N rows of 0-dim tensors, each summing to 1."""
        rows = []
        parts = torch.split(self.free_coefficients, list(range(self.nfe)))
        for base, learned, part in zip(self._classical(self._nodes()), self.learned, parts, strict=True):
            rows.append(list((base + learned + torch.cat([part, -part.sum()[None]])).unbind()))
        return rows

    def _offsets(self) -> Tensor | None:
        """(N,); None where they are 0 for good. A positive parameter is a lower time: the first node cannot be given a
        noisier one."""
        if self.start.offsets is None and not isinstance(self.free_times, nn.Parameter):
            return None
        moved = -self.OFFSET_SCALE * self.free_times
        return moved if self.start.offsets is None else self.start.offsets + moved

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def shared_calls(self) -> list[int]:
        """Step sizes move all nodes but the first, a correction of row i what comes after step i, a time its own
        call."""
        counts = {
            "nodes": [1] * (self.nfe - 1),
            "coefficients": [i + 1 for i in range(self.nfe) for _ in range(i)],
            "times": list(range(self.nfe)),
        }
        return [n for name, _ in self.named_parameters() for n in counts[name.removeprefix("free_")]]

    def _classical(self, unshifted_nodes: Tensor) -> list[Tensor]:
        one = torch.ones(1, dtype=torch.float64)
        rows = [one]
        for i, slope in enumerate(self.slopes(unshifted_nodes)[1:], start=1):
            rows.append(torch.cat([torch.zeros(i - 1, dtype=torch.float64), -slope[None], one + slope]))
        return rows


def current(parameters: Parametrisation | PaperParameters) -> Plan:
    """The solver of the numbers as they are, without a graph."""
    with torch.no_grad():
        return parameters.plan().detached()


# by name: (solver to start from, its classical slopes, free groups) -> numbers around it
PARAMETRISATIONS: dict[str, Callable[[Plan, Slopes, Collection[str]], Parametrisation]] = {
    "corrections": CorrectionParameters,
}
