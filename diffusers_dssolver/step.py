"""One step of any solver, and the arithmetic around it. Stateless and differentiable.

Paper: Eq. (16) (flow) and Eq. (19) (vp), arXiv 2505.21114.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor


def step(x: Tensor, history: Sequence[Tensor], row: Sequence[Scalar], a: Scalar, b: Scalar) -> Tensor:
    """x_next = a x + b * sum_j row_j d_j, in memory of its own.

    Args:
        x: state at the current node, any shape.
        history: model quantities d_0 .. d_i, newest last, each of the shape of x or broadcast to it.
        row: their weights c_i0 .. c_ii, numbers or 0-dim tensors; the result is differentiable in tensors.
        a, b: factors of the path for this step (`paths.Path.transition`).

    Returns:
        The state at the next node, of the shape and dtype of x.

    Raises:
        ValueError: if row and history differ in length.
    """
    if len(row) != len(history):
        raise ValueError(f"a row of {len(row)} weights for a history of {len(history)}; they must be as many")
    return weighted_sum([(a, x), *((b * weight, d) for weight, d in zip(row, history, strict=True))])


def weighted_sum(terms: Sequence[tuple[Scalar, Tensor]]) -> Tensor:
    """sum of weight * tensor, shapes (...), in the dtype of the first.

    The first product is a new tensor; the other terms are added to it in place, one pass over memory each. Terms of
    weight 0 are not read. The gradient of a 0-dim weight is float64 only on the CPU: some devices have none.
    """
    terms = [(_narrow(w, t) if isinstance(w, Tensor) else w, t) for w, t in terms]
    (weight, total), *rest = [(w, t) for w, t in terms if isinstance(w, Tensor) or w != 0.0] or terms[:1]
    if rest and isinstance(weight, float) and weight == 1.0 and isinstance(rest[0][0], float):
        total = torch.add(total, rest[0][1], alpha=rest[0][0])
        rest = rest[1:]
    else:
        total = total * weight
    for weight, tensor in rest:
        total = total + weight * tensor if isinstance(weight, Tensor) else total.add_(tensor, alpha=weight)
    return total


def _narrow(weight: Tensor, tensor: Tensor) -> Tensor:
    """The weight in the precision in which it multiplies the tensor."""
    return weight.to(torch.promote_types(tensor.dtype, torch.float32))


def combine(x: Tensor, other: Tensor, p: Scalar, q: Scalar) -> Tensor:
    """p x + q other in the dtype of x, always a new tensor."""
    if isinstance(p, float) and p == 0.0:
        return other.to(x.dtype, copy=True) if q == 1.0 else weighted_sum([(q, other.to(x.dtype))])
    return weighted_sum([(p, x), (q, other)])


def threshold(data: Tensor, ratio: float, limit: float) -> Tensor:
    """Dynamic thresholding: predicted data (B, ...) clamped per sample to s, the quantile `ratio` of its absolute
    values within [1, limit], and divided by s. Source: Saharia et al., arXiv 2205.11487, Sec. 2.3."""
    s = torch.quantile(data.flatten(1).abs(), ratio, dim=1)
    s = s.clamp(min=1, max=limit).reshape(-1, *[1] * (data.ndim - 1))
    return torch.clamp(data, -s, s) / s


def scalars(values: Tensor) -> list[Scalar]:
    """Entries of a vector: plain floats, which need no device; 0-dim tensors where a search differentiates in them."""
    return list(values.unbind()) if values.requires_grad else values.tolist()


def split_mean(d: Tensor) -> tuple[Tensor, Tensor]:
    """d without its mean over all places, and that mean, of size 1 along places.

    Places are the tokens of (B, tokens, channels), as FLUX packs its latents, or all dimensions after the second.

    Raises:
        ValueError: if d has fewer than three dimensions.
    """
    if d.ndim < 3:
        raise ValueError(
            f"mean_decay takes means over places, which a sample of shape {tuple(d.shape)} lacks; leave it out"
        )
    mean = d.mean(1 if d.ndim == 3 else tuple(range(2, d.ndim)), keepdim=True)
    return d - mean, mean


def decayed_mean(means: Sequence[Tensor], decay: float) -> Tensor:
    """Average of the means (newest last), the one of k steps ago with weight decay^k."""
    weights = [decay**age for age in reversed(range(len(means)))]
    return weighted_sum([(weight / sum(weights), mean) for weight, mean in zip(weights, means, strict=True)])
