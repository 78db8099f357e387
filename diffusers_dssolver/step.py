"""The one step that every solver of this project takes, and a whole run of it. Stateless and differentiable.

Paper: Eq. (16) (flow) and Eq. (19) (vp), arXiv 2505.21114.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Scalar = float | Tensor


def step(x: Tensor, history: Sequence[Tensor], row: Sequence[Scalar], a: Scalar, b: Scalar) -> Tensor:
    """x_next = a x + b * sum_j row_j d_j, in memory of its own.

    Args:
        x: state at the current node, any shape.
        history: the model quantities d_0 .. d_i, newest last, each of the shape of x or broadcast to it.
        row: their weights c_i0 .. c_ii, as many; numbers or 0-dim tensors (then the result is differentiable in them).
        a, b: the two factors of the path for this step (`paths.Path.transition`).

    Returns:
        The state at the next node, of the shape and dtype of x.

    Raises:
        ValueError: if row and history differ in length.
    """
    if len(row) != len(history):
        raise ValueError(f"a row of {len(row)} weights for a history of {len(history)}; they must be as many")
    return weighted_sum([(a, x), *((b * weight, d) for weight, d in zip(row, history, strict=True))])


def weighted_sum(terms: Sequence[tuple[Scalar, Tensor]]) -> Tensor:
    """sum of weight * tensor, shapes (...), in the dtype of the first; one pass over memory per term.

    The first product is memory of its own and takes up the others in place, so nothing else is allocated; terms of
    weight 0 are not read. Weights that are tensors are differentiated in.
    """
    (weight, total), *rest = [(w, t) for w, t in terms if isinstance(w, Tensor) or w != 0.0] or terms[:1]
    if rest and isinstance(weight, float) and weight == 1.0 and isinstance(rest[0][0], float):
        total = torch.add(total, rest[0][1], alpha=rest[0][0])
        rest = rest[1:]
    else:
        total = total * weight
    for weight, tensor in rest:
        total = total + weight * tensor if isinstance(weight, Tensor) else total.add_(tensor, alpha=weight)
    return total


def split_mean(d: Tensor) -> tuple[Tensor, Tensor]:
    """d without its mean over all places, and that mean, which has size 1 there. Places are the tokens of
    (B, tokens, channels), as FLUX packs its latents, and all behind the second dimension of (B, channels, ...).

    Raises:
        ValueError: d has fewer than three dimensions.
    """
    if d.ndim < 3:
        raise ValueError(
            f"mean_decay takes means over places, which a sample of shape {tuple(d.shape)} lacks; leave it out"
        )
    mean = d.mean(1 if d.ndim == 3 else tuple(range(2, d.ndim)), keepdim=True)
    return d - mean, mean


def decayed_mean(means: Sequence[Tensor], decay: float) -> Tensor:
    """Average of the means, newest last, that of k steps ago with weight decay^k; of the shape of each."""
    weights = [decay**age for age in reversed(range(len(means)))]
    return weighted_sum([(weight / sum(weights), mean) for weight, mean in zip(weights, means, strict=True)])


def rollout(
    evaluate: Callable[[Tensor, Scalar], Tensor],
    x: Tensor,
    timesteps: Sequence[Scalar],
    transitions: Iterable[tuple[Scalar, Scalar]],
    coefficients: Sequence[Sequence[Scalar]],
) -> list[Tensor]:
    """All N+1 states of one run.

    Args:
        evaluate: (x, timestep) -> d, the model quantity that is integrated; called N times.
        x: state at the first node.
        timesteps: N times to evaluate at.
        transitions: N pairs (A_i, B_i).
        coefficients: N rows, row i of i+1 weights.
    """
    states, history = [x], []
    for t, (a, b), row in zip(timesteps, transitions, coefficients, strict=True):
        history.append(evaluate(states[-1], t))
        states.append(step(states[-1], history, row, a, b))
    return states
