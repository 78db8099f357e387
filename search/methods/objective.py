"""Losses of a run against its teacher. Each takes N+1 states of the student and of the teacher at the same nodes, first
to last, (B, ...) each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

HUBER_WEIGHT, HUBER_DELTA = 1000.0, 0.001


def paper_loss(states: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over nodes 1..N of the mean squared error, plus 1000 * Huber(final states, delta = 0.001).

    Args:
        states, teacher: N+1 tensors each, (B, ...), first to last; the teacher's in float32 or more.

    Paper: Alg. 1 and 2, arXiv 2505.21114.
    """
    precise = [x.to(y.dtype) for x, y in zip(states[1:], teacher[1:], strict=True)]
    trajectory = torch.stack([F.mse_loss(x, y) for x, y in zip(precise, teacher[1:], strict=True)]).sum()
    return trajectory + HUBER_WEIGHT * F.huber_loss(precise[-1], teacher[-1], delta=HUBER_DELTA)


def terminal_loss(states: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error of the final states."""
    return F.mse_loss(states[-1].to(teacher[-1].dtype), teacher[-1])


def trajectory_loss(states: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over nodes 1..N of the mean squared error."""
    pairs = zip(states[1:], teacher[1:], strict=True)
    return torch.stack([F.mse_loss(x.to(y.dtype), y) for x, y in pairs]).mean()


def mixed_loss(states: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The terminal loss plus the trajectory loss."""
    return terminal_loss(states, teacher) + trajectory_loss(states, teacher)


Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
OBJECTIVES: dict[str, Loss] = {
    "terminal": terminal_loss,
    "trajectory": trajectory_loss,
    "mixed": mixed_loss,
    "paper": paper_loss,
}
