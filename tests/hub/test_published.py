"""Every published table, restated here in plain float64 numpy, against `DSSolverScheduler` as a pipeline drives it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_dssolver import DSSolverScheduler, published_solvers
from diffusers_dssolver.published import published_config

TABLES = json.loads((Path(__file__).parents[1] / "data" / "neuralsolver_tables.json").read_text(encoding="utf-8"))
FAMILIES = TABLES["families"]
CASES = [(family, int(nfe)) for family in FAMILIES for nfe in FAMILIES[family]["solvers"]]


def model(x, time):
    """A smooth nonlinear network of diffusers' convention: time 0..1000. The scheduler keeps its times in float32, as
    pipelines expect, so the restatement has to round them likewise: without it the two differ by about 1e-8."""
    s = np.float64(np.float32(time)) / 1000
    return np.tanh(1.3 * x + np.roll(x, 1, -1) * s) + 0.4 * np.sin(2 * x - 3 * s) + 0.1 * s


def table(family, nfe):
    """Step sizes and the full coefficients of a published table: the diagonal is 1 - the rest of its row."""
    data = FAMILIES[family]["solvers"][str(nfe)]
    c = np.array(data["coeffs"])
    assert c.shape == (nfe, nfe)
    assert not np.triu(c).any()
    return np.array(data["timedeltas"]), c + np.diag(1 - c.sum(axis=1))


def published_flow(family, nfe, x):
    """Eq. 16 in the paper's convention: t rises from 0 (noise) to 1 (data), v = data - noise. The rounded step sizes
    sum to 0.9999..1.0002, so the last step is the one that ends at 1."""
    deltas, c = table(family, nfe)
    t, states, velocities = 0.0, [x], []
    for i in range(nfe):
        velocities.append(-model(x, 1000 * (1 - t)))
        dt = 1 - t if i == nfe - 1 else deltas[i]
        x = x + dt * sum(c[i, j] * velocities[j] for j in range(i + 1))
        t += dt
        states.append(x)
    return states


def published_vp(family, nfe, x):
    """Eq. 19 with the continuous VP formula (beta from 0.1 to 20): t falls from 0.999 and is clamped to [0.001, 1]."""
    deltas, c = table(family, nfe)

    def alpha_sigma(t):
        t = min(max(t, 0.001), 1.0)
        log_alpha = -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1
        return np.exp(log_alpha), np.sqrt(1 - np.exp(2 * log_alpha))

    t, states, data = 0.999, [x], []
    for i in range(nfe):
        alpha, sigma = alpha_sigma(t)
        data.append((x - sigma * model(x, 1000 * t)) / alpha)
        t = 0.0 if i == nfe - 1 else t - deltas[i]
        alpha_next, sigma_next = alpha_sigma(t)
        w, w_next = alpha / sigma, alpha_next / sigma_next
        x = sigma_next / sigma * x + sigma_next * (w_next - w) * sum(c[i, j] * data[j] for j in range(i + 1))
        states.append(x)
    return states


def scheduler_states(scheduler, nfe, x, as_number):
    """One run; a time is passed as an element of `timesteps`, which tells its place, or as a number, which does not."""
    scheduler.set_timesteps(nfe)
    x = torch.from_numpy(x)
    assert x.dtype == torch.float64
    states = [x]
    for t in scheduler.timesteps:
        output = torch.from_numpy(model(x.numpy(), t.item()))
        x = scheduler.step(output, t.item() if as_number else t, x).prev_sample
        states.append(x)
    return [state.numpy() for state in states]


@pytest.mark.parametrize(("family", "nfe"), CASES)
def test_whole_trajectory_is_the_published_one(family, nfe):
    start = np.random.default_rng(nfe).standard_normal((2, 3, 8))
    expected = {"flow": published_flow, "vp": published_vp}[FAMILIES[family]["path"]](family, nfe, start)
    scheduler = DSSolverScheduler.from_published(family)
    for as_number in (False, True):  # the second image as the first
        states = scheduler_states(scheduler, nfe, start, as_number)
        assert len(states) == nfe + 1
        for ours, theirs in zip(states, expected, strict=True):
            assert np.abs(ours - theirs).max() <= 1e-9 * np.abs(theirs).max()


def test_every_table_is_shipped_and_nothing_else():
    assert set(FAMILIES) <= set(published_solvers())
    assert list(published_solvers()) == sorted(published_solvers())
    for family in FAMILIES:
        assert set(published_config(family)["solvers"]) == set(FAMILIES[family]["solvers"])


@pytest.mark.parametrize("family", FAMILIES)
def test_provenance_names_upstream_commit_and_licence(family):
    provenance = published_config(family)["provenance"]
    upstream, commit, licence = TABLES["source"].split(";")[0].split(", ", 2)
    assert provenance["source"] == upstream
    assert provenance["commit"] in commit
    assert len(provenance["commit"]) >= 7
    assert provenance["license"].split(",")[0] in licence
    assert provenance["license"].split("(c) ")[1] in licence
    assert provenance["kind"] == "upstream"


@pytest.mark.parametrize("name", published_solvers())
def test_every_shipped_solver_says_where_it_came_from(name):
    provenance = published_config(name)["provenance"]
    assert provenance.get("license")
    assert provenance.get("commit")
    assert provenance.get("model")


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_schedule_of_the_card(family):
    config = published_config(family)
    if FAMILIES[family]["path"] == "flow":
        assert config["prediction_type"] == "flow_prediction"
        assert config["shift"] == 1.0
    else:
        assert config["prediction_type"] == "epsilon"
        assert config["continuous_time"] is True
        assert (config["beta_schedule"], config["beta_start"], config["beta_end"]) == ("linear", 1e-4, 0.02)


@pytest.mark.parametrize("name", ["", "nothing", "../dit-xl-2-256", "dit-xl-2-256/", "DIT-XL-2-256"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name):
    with pytest.raises(ValueError, match=r"no published solver is named .*dit-xl-2-256, .*sit-xl-2-256"):
        published_config(name)


def test_a_configuration_is_read_afresh_each_time():
    published_config("sit-xl-2-256")["solvers"].clear()
    assert published_config("sit-xl-2-256")["solvers"]
