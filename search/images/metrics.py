"""Figures of images, from the features or logits that a network gives for them; nothing here knows a sampler.

A metric is bound to what it compares with and takes one row for each image: a tensor (n, ...) -> its figures by name.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Metric = Callable[[Tensor], dict[str, float]]
NEIGHBOURS = 3
CHUNK = 1000  # rows of a matrix of all pairs that are held at a time
NORMAL_95 = 1.96


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (n, D), in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


class FrechetDistance:
    """Between the normal distributions of the images' features and of a reference, squared, as FID is:

        |m - m'|^2 + tr C + tr C' - 2 tr (C'^1/2 C C'^1/2)^1/2

    Args:
        mean, covariance: of the reference, (D,) and (D, D).

    Source: Heusel et al., arXiv 1706.08500, eq. 6.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.trace = mean.double(), covariance.double().trace()
        values, vectors = torch.linalg.eigh(covariance.double())
        self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def __call__(self, features: Tensor) -> dict[str, float]:
        mean, covariance = moments(features)
        values = torch.linalg.eigvalsh(self.root @ covariance @ self.root)
        spread = self.trace + covariance.trace() - 2 * values.clamp(min=0).sqrt().sum()
        return {"frechet_distance": ((mean - self.mean).square().sum() + spread).item()}


class KernelDistance:
    """Unbiased squared maximum mean discrepancy for the kernel (x . y / D + 1)^3.

    Args:
        features: of the reference, (m, D).

    Source: Binkowski et al., arXiv 1801.01401.
    """

    def __init__(self, features: Tensor) -> None:
        self.features, self.own = features, self._among(features)

    def __call__(self, features: Tensor) -> dict[str, float]:
        between = self._sum(features, self.features) / (len(features) * len(self.features))
        return {"kernel_distance": self._among(features) + self.own - 2 * between}

    def _among(self, features: Tensor) -> float:
        """Mean over all pairs of two different images."""
        n, itself = len(features), _kernel(features.square().sum(1), features.shape[1]).sum(dtype=torch.float64).item()
        return (self._sum(features, features) - itself) / (n * (n - 1))

    def _sum(self, features: Tensor, others: Tensor) -> float:
        parts = (_kernel(rows @ others.T, features.shape[1]) for rows in features.split(CHUNK))
        return sum(part.sum(dtype=torch.float64).item() for part in parts)


def _kernel(products: Tensor, dimension: int) -> Tensor:
    return (products / dimension + 1) ** 3


class PrecisionRecall:
    """Improved precision: the share of the images inside the reference's manifold; recall: the other way round. A
    manifold is a ball around each image, out to its third nearest neighbour.

    Args:
        features: of the reference, (m, D).

    Source: Kynkaanniemi et al., arXiv 1904.06991, eq. 2.
    """

    def __init__(self, features: Tensor) -> None:
        self.features, self.radii = features, _radii(features)

    def __call__(self, features: Tensor) -> dict[str, float]:
        precision = _share_inside(features, self.features, self.radii)
        return {"precision": precision, "recall": _share_inside(self.features, features, _radii(features))}


def _radii(features: Tensor) -> Tensor:
    """(n,): of each image's ball."""
    distances = (torch.cdist(rows, features) for rows in features.split(CHUNK))
    return torch.cat([part.kthvalue(NEIGHBOURS + 1).values for part in distances])  # the nearest is the image itself


def _share_inside(features: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in features.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def inception_score(logits: Tensor) -> dict[str, float]:
    """exp of the mean of KL(p(y|x) || p(y)) over all images at once, from logits (n, K).

    Source: Salimans et al., arXiv 1606.03498, section 4.
    """
    log_p = logits.double().log_softmax(1)
    marginal = log_p.exp().mean(0).log()
    return {"inception_score": (log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item()}


def clip_score(scores: Tensor) -> dict[str, float]:
    """Mean of what `extractors.Clip.scores` gives, (n,)."""
    return {"clip_score": scores.double().mean().item()}


def with_intervals(metric: Metric, rows: Tensor, subsets: int, seed: int) -> dict[str, dict[str, Any]]:
    """The figures of all rows (n, ...), each with a 95 % interval of how it varies between sets of n images.

    Its half width is 1.96 standard deviations over random halves of the rows, which for a mean is exactly its standard
    error. Images are not repeated, as in the usual bootstrap: a repeated one has itself as a neighbour. The bias that
    a figure has at n images is not in it.

    Source: Shao and Wu, Annals of Statistics 17 (1989), the delete-d jackknife with d = n / 2.
    """
    found: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in metric(rows).items()}
    if subsets == 0:
        return found
    generator = torch.Generator().manual_seed(seed)
    halves = [metric(rows[torch.randperm(len(rows), generator=generator)[: len(rows) // 2]]) for _ in range(subsets)]
    for name, entry in found.items():
        width = NORMAL_95 * statistics.stdev(half[name] for half in halves)
        entry["interval"] = [entry["value"] - width, entry["value"] + width]
    return found
