"""Metrics of sets of images, from the features or logits that a network gives for them.

To add a metric, write a function of one row per image, (n, ...) -> its values by name, and an entry in `METRICS`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Values = Callable[[Tensor], dict[str, float]]
NEIGHBOURS = 3
CHUNK = 1000  # rows of a matrix of all pairs that are held at a time
NORMAL_95 = 1.96


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (n, D), float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


class FrechetDistance:
    """Squared Frechet distance of the normal distributions of two sets of features, the quantity of FID:

        |m - m'|^2 + tr C + tr C' - 2 tr (C'^1/2 C C'^1/2)^1/2

    Args:
        mean, covariance: of the real images, (D,) and (D, D).

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
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3.

    Args:
        features: of the real images, (m, D).

    Source: Binkowski et al., arXiv 1801.01401.
    """

    def __init__(self, features: Tensor) -> None:
        self.features, self.own = features, self._among(features)

    def __call__(self, features: Tensor) -> dict[str, float]:
        between = self._sum(features, self.features) / (len(features) * len(self.features))
        return {"kernel_distance": self._among(features) + self.own - 2 * between}

    def _among(self, features: Tensor) -> float:
        """Mean kernel over all pairs of two different images."""
        n, itself = len(features), _kernel(features.square().sum(1), features.shape[1]).sum(dtype=torch.float64).item()
        return (self._sum(features, features) - itself) / (n * (n - 1))

    def _sum(self, features: Tensor, others: Tensor) -> float:
        parts = (_kernel(rows @ others.T, features.shape[1]) for rows in features.split(CHUNK))
        return sum(part.sum(dtype=torch.float64).item() for part in parts)


def _kernel(products: Tensor, dimension: int) -> Tensor:
    return (products / dimension + 1) ** 3


class PrecisionRecall:
    """Precision: share of the images inside the manifold of the real ones. Recall: the other way round. A manifold is
    the union of balls around each image, out to its third nearest neighbour.

    Args:
        features: of the real images, (m, D).

    Source: Kynkaanniemi et al., arXiv 1904.06991, eq. 2.
    """

    def __init__(self, features: Tensor) -> None:
        self.features, self.radii = features, _radii(features)

    def __call__(self, features: Tensor) -> dict[str, float]:
        precision = _share_inside(features, self.features, self.radii)
        return {"precision": precision, "recall": _share_inside(self.features, features, _radii(features))}


def _radii(features: Tensor) -> Tensor:
    """(n,) radius of each image's ball."""
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
    """Mean of `features.Clip.scores`, (n,)."""
    return {"clip_score": scores.double().mean().item()}


@dataclass(frozen=True)
class Metric:
    """How a metric is made.

    Attributes:
        of: tensor that it takes: `features`, `logits` or `clip`.
        bind: statistics of the real images (`real_images.Statistics`) -> the metric; if it is paired, their features.
        paired: whether images are compared one by one. Then as many images are taken as there are real ones, since more
            images make a finer manifold, and features of single real images are needed.
    """

    of: str
    bind: Callable[[Any], Values]
    paired: bool = False


METRICS = (
    Metric("features", lambda real: FrechetDistance(real.mean, real.covariance)),
    Metric("logits", lambda real: inception_score),
    Metric("clip", lambda real: clip_score),
    Metric("features", KernelDistance, paired=True),
    Metric("features", PrecisionRecall, paired=True),
)


def bound(real: Any, count: int) -> list[tuple[str, int | None, Values]]:
    """All metrics of sets of `count` images: the tensor that each takes, how many of its rows (None: all), and itself.
    Paired ones are left out if the statistics hold no features."""
    features = None if real.features is None else real.features[:count]
    metrics: list[tuple[str, int | None, Values]] = []
    for metric in METRICS:
        if not metric.paired:
            metrics.append((metric.of, None, metric.bind(real)))
        elif features is not None:
            metrics.append((metric.of, len(features), metric.bind(features)))
    return metrics


def with_intervals(values: Values, rows: Tensor, subsets: int, seed: int) -> dict[str, dict[str, Any]]:
    """Values of all rows (n, ...), each with a 95 % interval of how it varies between sets of n images.

    Half of the interval is 1.96 standard deviations over random halves of the rows, which for a mean is exactly 1.96
    standard errors. No image is drawn twice, as in the usual bootstrap: it would be its own neighbour. The interval
    does not contain the bias that a metric has at n images.

    Args:
        subsets: number of halves; 0: no intervals.

    Source: Shao and Wu, Annals of Statistics 17 (1989), the delete-d jackknife with d = n / 2.
    """
    found: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in values(rows).items()}
    if subsets == 0:
        return found
    generator = torch.Generator().manual_seed(seed)
    halves = [values(rows[torch.randperm(len(rows), generator=generator)[: len(rows) // 2]]) for _ in range(subsets)]
    for name, entry in found.items():
        width = NORMAL_95 * statistics.stdev(half[name] for half in halves)
        entry["interval"] = [entry["value"] - width, entry["value"] + width]
    return found
