"""The kernel density: its network against the gradient of the density itself, and a search of it."""

from __future__ import annotations

import json

import pytest
import torch

from tests.families import FAMILIES
from tests.kernel_density import BANDWIDTH, pipeline_of, synthetic
from tests.searches import search

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("label", [1, 3])
def test_the_network_is_the_score_of_the_density(kind, label):
    """By autograd, in float64: noise = -sigma grad log p, velocity = (x - data) / sigma; of one class and of all."""
    pictures = synthetic(12)
    network = pipeline_of(pictures, kind, classes=3).transformer.double()
    t = torch.tensor([300.0], dtype=torch.float64)
    alpha, sigma = (f.item() for f in network.path.alpha_sigma(network.path.node(t))[:2])
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    chosen = pictures.double()[[k for k in range(12) if label == 3 or k % 3 == label]]
    variance = (alpha * BANDWIDTH) ** 2 + sigma**2
    density = torch.logsumexp(-(x - alpha * chosen).square().flatten(1).sum(1) / (2 * variance), 0)
    (score,) = torch.autograd.grad(density, x)
    noise = -sigma * score
    wanted = noise if kind == "vp" else noise - (x - sigma * noise) / alpha
    (found,) = network(x.detach(), t, torch.tensor([label]))
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_default_search_of_a_kernel_density(kind, tmp_path):
    """Small in samples alone. No table is worse than the classical solver, by mean or by tail."""
    pipe = pipeline_of(synthetic(30), kind, classes=3)
    pipe.transformer.to(torch.float64)
    pipe.save_pretrained(tmp_path / "model")
    few = {"num_train_samples": 8, "num_trial_samples": 6, "num_polish_samples": 4, "num_validation_samples": 12}
    settings = {"nfe": [4, 6], "fill_nfe": [3, 8], "guidance_scale": 1.5, **few}
    search(tmp_path / "model", tmp_path / "out", settings)
    facts = json.loads((tmp_path / "out" / "scheduler_config.json").read_text())["provenance"]
    assert facts["teacher"]["warped"] and facts["teacher"]["steps"] == 50
    results = facts["results"]
    assert set(results) == {str(n) for n in range(3, 9)}
    for result in results.values():
        assert result["ratio"] <= 1 and result["held_out"] in (8, 12)
        assert result.get("source") == "classical" or result["validation_mse"] > 0
    assert [s["stage"] for s in results["4"]["stages"]] == ["closed_form", "polish"]
