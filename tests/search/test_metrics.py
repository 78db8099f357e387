"""Metrics of images against clean-fid, loops written out here, and values known beforehand; in float64."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from cleanfid import fid

from dssolver_search.artefacts.figures import columns
from dssolver_search.console import metric_name
from dssolver_search.images import metrics
from dssolver_search.images.metrics import (
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
    clip_score,
    inception_score,
    moments,
    with_intervals,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning")  # of scipy, which clean-fid calls


def draw(n, dimension, seed, scale=1.0, shift=0.0):
    """Features that are correlated and not centred."""

    def normal(rows, seed):
        return torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return (normal(n, seed) @ normal(dimension, 99) / dimension**0.5 + 0.3) * scale + shift


def frechet(features, real):
    return FrechetDistance(*moments(real))(features)["frechet_distance"]


# --- distances --------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy():
    x = draw(7, 3, 0)
    mean, covariance = moments(x)
    assert mean.dtype == covariance.dtype == torch.float64
    np.testing.assert_allclose(mean, x.numpy().mean(0), atol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(x.numpy(), rowvar=False), atol=1e-14)


def test_frechet_distance_is_that_of_clean_fid():
    real, made = draw(400, 24, 0), draw(300, 24, 1, scale=1.3, shift=0.2)
    expected = fid.fid_from_feats(made.numpy(), real.numpy())
    assert frechet(made, real) == pytest.approx(expected, rel=1e-6)
    assert expected > 1


def test_frechet_distance_of_axis_parallel_normal_distributions():
    """For diagonal covariances it is the sum of (m - m')^2 + (s - s')^2."""
    spread = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    corners = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])  # covariance 8/7
    unit = corners.double() * (7 / 8) ** 0.5
    made = unit * spread + torch.tensor([0.0, 3.0, 0.0])
    assert frechet(made, unit) == pytest.approx(9 + 0 + 1 + 0.25, rel=1e-6)
    assert frechet(unit, unit) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_images_than_features():
    """Without full rank: tr (C C')^1/2 is the sum of the singular values of A A'^T for covariances A^T A."""
    real, made = draw(9, 30, 0), draw(7, 30, 1, shift=0.2)
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (real, made))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    expected = (real.mean(0) - made.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    assert frechet(made, real) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_kernel_distance_is_that_of_clean_fid(chunk, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    real, made = draw(60, 12, 0), draw(60, 12, 1, shift=0.3)
    expected = fid.kernel_distance(made.numpy(), real.numpy(), num_subsets=1)
    assert KernelDistance(real)(made)["kernel_distance"] == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_unequal_numbers_is_the_loop_over_pairs():
    real, made = draw(5, 2, 0), draw(3, 2, 1)

    def kernel(x, y):
        return (float(x @ y) / 2 + 1) ** 3

    def among(a):
        pairs = [kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in made for y in real]
    expected = among(made) + among(real) - 2 * sum(between) / len(between)
    assert KernelDistance(real)(made)["kernel_distance"] == pytest.approx(expected, rel=1e-9)


# --- manifolds --------------------------------------------------------------------------------------------------------


def share_inside(points, centres):
    """By loops over all pairs, without torch."""
    radii = [sorted(math.dist(c, other) for other in centres)[3] for c in centres]
    return np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])


@pytest.mark.parametrize("chunk", [1000, 4])
def test_precision_and_recall_are_the_loops(chunk, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    real, made = draw(30, 3, 0), draw(25, 3, 1, scale=0.7, shift=0.5)
    found = PrecisionRecall(real)(made)
    assert found["precision"] == pytest.approx(share_inside(made.tolist(), real.tolist()))
    assert found["recall"] == pytest.approx(share_inside(real.tolist(), made.tolist()))
    assert found["precision"] != found["recall"] and 0 < found["recall"] < 1


def test_precision_without_recall_and_the_other_way_round():
    wide, narrow = (torch.linspace(a, b, 101, dtype=torch.float64)[:, None] for a, b in ((0, 100), (50, 51)))
    assert PrecisionRecall(wide)(narrow) == {"precision": 1.0, "recall": pytest.approx(2 / 101)}  # of it 50 and 51
    assert PrecisionRecall(narrow)(wide) == {"precision": pytest.approx(2 / 101), "recall": 1.0}
    assert PrecisionRecall(wide)(wide + 1000) == {"precision": 0.0, "recall": 0.0}


# --- scores -----------------------------------------------------------------------------------------------------------


def test_inception_score_is_the_number_of_classes_at_best_and_one_at_worst():
    sure = 100 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure)["inception_score"] == pytest.approx(5)
    assert inception_score(sure[:1].repeat(9, 1))["inception_score"] == pytest.approx(1)
    assert inception_score(torch.zeros(9, 5))["inception_score"] == pytest.approx(1)


def test_inception_score_is_the_formula_in_numpy():
    logits = draw(20, 6, 0, scale=3).numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(torch.from_numpy(logits))["inception_score"] == pytest.approx(expected, rel=1e-9)


def test_clip_score_is_the_mean():
    assert clip_score(torch.tensor([10.0, 20.0, 33.0])) == {"clip_score": pytest.approx(21)}


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_of_a_mean_is_that_of_its_standard_error():
    scores = draw(200, 1, 0)[:, 0] * 5 + 30
    entry = with_intervals(clip_score, scores, 2000, 0)["clip_score"]
    low, high = entry["interval"]
    assert (low + high) / 2 == pytest.approx(entry["value"]) == pytest.approx(scores.mean().item())
    assert (high - low) / 2 == pytest.approx(1.96 * scores.std().item() / 200**0.5, rel=0.05)


def test_intervals_are_repeatable_and_left_out_if_not_wanted():
    scores = torch.arange(20.0, dtype=torch.float64)
    assert with_intervals(clip_score, scores, 5, 3) == with_intervals(clip_score, scores, 5, 3)
    assert with_intervals(clip_score, scores, 5, 3) != with_intervals(clip_score, scores, 5, 4)
    assert with_intervals(clip_score, scores, 0, 3) == {"clip_score": {"value": 9.5}}


@pytest.mark.parametrize("bound", [FrechetDistance, KernelDistance, PrecisionRecall], ids=lambda c: c.__name__)
def test_intervals_show_how_figures_vary_between_sets_of_images(bound):
    n, real = 200, draw(200, 8, 0)
    metric = bound(*moments(real)) if bound is FrechetDistance else bound(real)
    sets = [draw(n, 8, 1 + k, scale=1.05, shift=0.1) for k in range(40)]
    figures = [metric(made) for made in sets]
    for name in figures[0]:
        entries = [with_intervals(metric, made, 20, 0)[name] for made in sets[:8]]
        width = statistics.mean((e["interval"][1] - e["interval"][0]) / 2 for e in entries)
        assert width == pytest.approx(1.96 * statistics.stdev(f[name] for f in figures), rel=0.35), name


def test_only_inception_makes_an_fid():
    assert (
        metric_name("frechet_distance", "inception") == "FID" and metric_name("kernel_distance", "inception") == "KID"
    )
    assert metric_name("precision", "inception") == "Precision"
    assert metric_name("frechet_distance", "fashion-classifier") == "Frechet distance (fashion-classifier)"
    assert metric_name("kernel_distance", "clip:a/b") == "Kernel distance (clip:a/b)"


def test_a_new_metric_needs_no_name():
    """Known metrics have titles and an order; any other is shown after them, by its key."""
    results = [{"metrics": {"sharp_edges": {}, "recall": {}}}, {"metrics": {"<b>": {}, "precision": {}}}]
    titles = columns({"results": results, "extractor": "net"})
    assert list(titles.items()) == [
        ("precision", "Precision (net)"), ("recall", "Recall (net)"), ("sharp_edges", "Sharp edges (net)")
    ]  # fmt: skip
    assert (
        metric_name("sharp_edges", "inception") == "Sharp edges"
        and metric_name("kernel_distance", "inception") == "KID"
    )
