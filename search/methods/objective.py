"""Losses of a run against a reference. Each takes N+1 states and N+1 references, (B, ...) each, first to last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

HUBER_WEIGHT, HUBER_DELTA = 1000.0, 0.001


def paper_loss(states: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """Sum over nodes 1..N of the mse of the student's state against the reference's at the nearest time, plus
    1000 * Huber(final states, delta = 0.001).

    Args:
        states, references: N+1 tensors each, (B, ...), first to last.

    Paper: Alg. 1 and 2, arXiv 2505.21114.
    """
    precise = [x.to(y.dtype) for x, y in zip(states[1:], references[1:], strict=True)]  # references: float32 or more
    trajectory = torch.stack([F.mse_loss(x, y) for x, y in zip(precise, references[1:], strict=True)]).sum()
    return trajectory + HUBER_WEIGHT * F.huber_loss(precise[-1], references[-1], delta=HUBER_DELTA)


def terminal_loss(states: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """Mean squared error of the final states."""
    return F.mse_loss(states[-1].to(references[-1].dtype), references[-1])


def trajectory_loss(states: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """Mean over nodes 1..N of the mean squared error."""
    pairs = zip(states[1:], references[1:], strict=True)
    return torch.stack([F.mse_loss(x.to(y.dtype), y) for x, y in pairs]).mean()


def mixed_loss(states: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """The terminal loss plus the trajectory loss."""
    return terminal_loss(states, references) + trajectory_loss(states, references)


Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
OBJECTIVES: dict[str, Loss] = {
    "terminal": terminal_loss,
    "trajectory": trajectory_loss,
    "mixed": mixed_loss,
    "paper": paper_loss,
}
