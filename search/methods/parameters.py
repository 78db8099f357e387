"""Numbers that are searched -> nodes and coefficients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from ..settings import GROUPS


def nodes_from_logits(logits: Tensor) -> Tensor:
    """(N,) float64 -> (N+1,) nodes from exactly 1 to exactly 0 whose step sizes are softmax(logits); differentiable.

    Paper: Alg. 1, arXiv 2505.21114.
    """
    falling = 1 - torch.cumsum(torch.softmax(logits, 0), 0)
    return torch.cat([torch.ones(1, dtype=torch.float64), falling[:-1], torch.zeros(1, dtype=torch.float64)])


class PaperParameters(nn.Module):
    """The paper's free parameters: step sizes softmax(r) with r = 1, and c_ij (j < i) from 0, which is Euler or DDIM;
    the diagonal is 1 - sum_j<i c_ij. For N <= 6 the last two steps use only the output before them.

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

    def nodes(self) -> Tensor:
        """(N+1,) from 1 to 0, before any resolution shift."""
        return nodes_from_logits(self.r)

    def rows(self) -> list[list[Tensor]]:
        """N rows of 0-dim tensors, each summing to 1."""
        c = torch.where(self.free, self.c, 0.0)
        return [[*c[i, :i].unbind(), 1 - c[i, :i].sum()] for i in range(self.nfe)]

    @property
    def count(self) -> int:
        """Numbers that are searched: N + N(N-1)/2, fewer for N <= 6."""
        return self.nfe + int(self.free.sum())


class CorrectionParameters(nn.Module):
    """Classical second-order rows of the nodes as they are now, plus corrections that sum to 0 and do not move with
    them; around one solver, whose numbers are the origin: every parameter starts at 0.

    Args:
        raw: its nodes before any resolution shift, (N+1,) float64 from 1 to 0.
        rows: its N rows.
        slopes: nodes like `raw` -> (N,) weights s_i: the classical row is (.., -s_i, 1 + s_i); differentiable.
        offsets: (N,) what the network is fed in place of each node, minus that node; None: 0.
        free: which of `GROUPS` are parameters: step sizes, corrections, offsets.

    Source: corrections of classical coefficients: GS, ICLR 2026; decoupled network times: LD3, arXiv 2405.15506.
    """

    OFFSET_SCALE = 0.1  # one unit of an offset parameter, as a difference of nodes

    def __init__(
        self,
        raw: Tensor,
        rows: Sequence[Sequence[float]],
        slopes: Callable[[Tensor], Tensor],
        offsets: Tensor | None = None,
        free: Collection[str] = GROUPS,
    ) -> None:
        super().__init__()
        self.nfe = n = len(rows)
        self.slopes = slopes
        self.origin = torch.log(raw[:-1] - raw[1:])
        self.fed = offsets
        started = [torch.tensor(list(row), dtype=torch.float64) for row in rows]
        self.learned = [row - base for row, base in zip(started, self._classical(raw), strict=True)]
        for group, count in zip(GROUPS, (n - 1, n * (n - 1) // 2, n), strict=True):
            zeros = torch.zeros(count, dtype=torch.float64)
            if group in free:
                self.register_parameter(f"free_{group}", nn.Parameter(zeros))
            else:
                self.register_buffer(f"free_{group}", zeros)
        self.free_nodes: Tensor
        self.free_coefficients: Tensor
        self.free_times: Tensor

    def nodes(self) -> Tensor:
        """(N+1,) from 1 to 0, before any resolution shift."""
        return nodes_from_logits(self.origin + torch.cat([self.free_nodes, self.free_nodes.new_zeros(1)]))

    def rows(self) -> list[list[Tensor]]:
        """N rows of 0-dim tensors, each summing to 1."""
        rows = []
        parts = torch.split(self.free_coefficients, list(range(self.nfe)))
        for base, learned, part in zip(self._classical(self.nodes()), self.learned, parts, strict=True):
            rows.append(list((base + learned + torch.cat([part, -part.sum()[None]])).unbind()))
        return rows

    def offsets(self) -> Tensor | None:
        """(N,), None if they are 0 for good; a positive parameter is a lower time: the first node cannot be fed a
        noisier one."""
        if self.fed is None and not self.free_times.requires_grad:
            return None
        moved = -self.OFFSET_SCALE * self.free_times
        return moved if self.fed is None else self.fed + moved

    def numbers(self) -> tuple[Tensor, list[list[float]], Tensor | None]:
        """Nodes, rows and offsets as they are, without a graph."""
        with torch.no_grad():
            return self.nodes(), [[float(w) for w in row] for row in self.rows()], self.offsets()

    @property
    def count(self) -> int:
        """Numbers that are searched."""
        return sum(p.numel() for p in self.parameters())

    @property
    def unchanged(self) -> list[int]:
        """By number, in the order of `parameters()`: how many first network calls do not depend on it. Step sizes move
        all nodes but the first, a correction of row i what comes after step i, a time its own call."""
        counts = {
            "nodes": [1] * (self.nfe - 1),
            "coefficients": [i + 1 for i in range(self.nfe) for _ in range(i)],
            "times": list(range(self.nfe)),
        }
        return [n for name, _ in self.named_parameters() for n in counts[name.removeprefix("free_")]]

    def _classical(self, raw: Tensor) -> list[Tensor]:
        one = torch.ones(1, dtype=torch.float64)
        rows = [one]
        for i, slope in enumerate(self.slopes(raw)[1:], start=1):
            rows.append(torch.cat([torch.zeros(i - 1, dtype=torch.float64), -slope[None], one + slope]))
        return rows
