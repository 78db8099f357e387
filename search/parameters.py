"""Numbers that are searched -> nodes and coefficients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
