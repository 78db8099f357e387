"""The loss of the paper's search."""

from __future__ import annotations

from collections.abc import Sequence

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
    pairs = list(zip(states[1:], references[1:], strict=True))
    trajectory = torch.stack([F.mse_loss(x.float(), y) for x, y in pairs]).sum()
    return trajectory + HUBER_WEIGHT * F.huber_loss(states[-1].float(), references[-1], delta=HUBER_DELTA)
