"""DSSolverScheduler with the published tables against the schedulers of the official release themselves, which ran on
the model below (`data/golden_neuralsolver.safetensors`; what was run is in `data/README.md`).

They differ in two conventions, both tested here. Flow: the rounded step sizes sum to 0.9999 .. 1.0002 and the release
takes the last one as it is; ours ends at the data. VP: the release cuts the times that it feeds the network down to
whole numbers, and steps between the exact ones; ours feeds the exact ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.published import published_config

DATA = Path(__file__).parents[1] / "data"
GOLDEN = load_file(DATA / "golden_neuralsolver.safetensors")
TABLES = json.loads((DATA / "neuralsolver_tables.json").read_text(encoding="utf-8"))["families"]
FLOW, VP, COUNTS = ("flowdcn-b-2-256", "sit-xl-2-256"), "dit-xl-2-256", range(5, 11)


def model(x, time):
    s = float(time) / 1000
    return torch.tanh(1.3 * x + x.roll(1, -1) * s) + 0.4 * torch.sin(2 * x - 3 * s) + 0.1 * s


def run(scheduler, nfe):
    """The states (nfe + 1, 2, 4, 2, 2) of one run in float64."""
    scheduler.set_timesteps(nfe)
    states = [GOLDEN["x"]]
    for t in scheduler.timesteps:
        states.append(scheduler.step(model(states[-1], t), t, states[-1]).prev_sample)
    assert states[-1].dtype == torch.float64
    return torch.stack(states)


def assert_same(found, wanted, tolerance):
    """To a share of the largest element of each state: the release's tables are float32, and its noise levels, by the
    smallest of which, 0.007, the first states are divided."""
    assert found.shape == wanted.shape
    largest = wanted.flatten(1).abs().amax(1)
    assert float(((found - wanted).flatten(1).abs().amax(1) / largest).max()) < tolerance


@pytest.mark.parametrize("family", FLOW)
@pytest.mark.parametrize("nfe", COUNTS)
def test_flow(family, nfe):
    scheduler = DSSolverScheduler.from_published(family)
    found, wanted = run(scheduler, nfe), GOLDEN[f"{family}.{nfe}.states"]
    torch.testing.assert_close(scheduler.timesteps.double(), GOLDEN[f"{family}.{nfe}.timesteps"], rtol=0, atol=1e-3)
    assert_same(found[:-1], wanted[:-1], 3e-7)
    deltas = TABLES[family]["solvers"][str(nfe)]["timedeltas"]  # the last step: the same velocity, another length
    to_data = 1 - sum(deltas[:-1])
    assert abs(to_data - deltas[-1]) < 2.1e-4
    assert_same((found[-1:] - found[-2:-1]) / to_data, (wanted[-1:] - wanted[-2:-1]) / deltas[-1], 3e-6)


@pytest.mark.parametrize("nfe", COUNTS)
def test_vp(nfe):
    scheduler = DSSolverScheduler.from_published(VP)
    assert_same(run(scheduler, nfe), GOLDEN[f"{VP}.{nfe}.continuous.states"], 5e-6)
    exact = GOLDEN[f"{VP}.{nfe}.continuous.timesteps"]
    torch.testing.assert_close(scheduler.timesteps.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("nfe", COUNTS)
def test_vp_fed_whole_times_as_the_release_feeds_them(nfe):
    whole = GOLDEN[f"{VP}.{nfe}.timesteps"]
    assert torch.equal(whole, GOLDEN[f"{VP}.{nfe}.continuous.timesteps"].floor())
    config = published_config(VP)
    config["solvers"][str(nfe)]["timesteps"] = whole.tolist()
    found = run(DSSolverScheduler.from_config(config), nfe)
    assert_same(found, GOLDEN[f"{VP}.{nfe}.states"], 5e-6)
    other = GOLDEN[f"{VP}.{nfe}.continuous.states"][-1]
    assert 1e-4 < float((found[-1] - other).abs().max() / other.abs().max()) < 5e-3  # what the cut costs on this model
