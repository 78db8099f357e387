"""One solver for several guidance scales: samples take them in turn, and calls never mix them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_search import CLOSED_FORM, WARP, alone, both, make_pipe, make_probe, quiet_reference, search

from diffusers_dssolver import DSSolverScheduler
from dssolver_search.closed_form import ClosedForm, warped_nodes
from dssolver_search.polish import Polish
from dssolver_search.preflight import preflight
from dssolver_search.probe import run
from dssolver_search.replay import Replay
from dssolver_search.sampling import Sampler, load_pipeline
from dssolver_search.stock import record

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")
SCALES = [1.0, 2.5, 4.0]
ROWS = [[1.0], [-0.3, 1.3], [0.2, -0.5, 1.3]]


def at(pipe, scale):
    return Sampler(pipe, {"guidance_scale": scale})


def states_of(sampler, indices, replay=None, unchanged=0):
    probe = make_probe(sampler.pipe)
    probe.prepare(warped_nodes(WARP, 3), ROWS)
    return run(sampler, probe, indices, "train", 3, replay, unchanged)


@both
def test_samples_take_the_scales_in_turn(family):
    pipe = make_pipe(family)
    sampler = Sampler(pipe, guidance_scales=SCALES)
    indices = [4, 0, 5, 1, 3]
    states = states_of(sampler, indices)
    alone_at = {scale: states_of(at(pipe, scale), indices) for scale in SCALES}
    assert len(states) == 4
    for k, index in enumerate(indices):
        for mine, its in zip(states, alone_at[SCALES[index % 3]], strict=True):
            torch.testing.assert_close(mine[k], its[k], rtol=1e-4, atol=1e-5)
    assert (states[-1][0] - alone_at[SCALES[0]][-1][0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="several guidance scales"):
        sampler([0, 1], "train", 3)


def test_one_scale_or_several():
    with pytest.raises(ValueError, match="both given; give one"):
        Sampler(make_pipe("flow"), {"guidance_scale": 1.5}, guidance_scales=SCALES)


def test_replays_of_several_calls():
    sampler = Sampler(make_pipe("flow"), guidance_scales=SCALES)
    replay = Replay()
    whole = states_of(sampler, range(5), replay)
    before = sampler.network_evaluations
    again = states_of(sampler, range(5), replay, unchanged=3)
    copied = states_of(sampler, range(5), Replay(replay), unchanged=3)
    assert sampler.network_evaluations == before
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, again, copied, strict=True))


@both
def test_batches_hold_one_scale_and_rows_are_fitted_to_all(family):
    pipe = make_pipe(family)
    sampler = Sampler(pipe, guidance_scales=SCALES[:2])
    train, validation = (quiet_reference(sampler, range(6), split, 40) for split in ("train", "validation"))
    form = ClosedForm(sampler, make_probe(pipe), (range(6), train), (range(6), validation), 6, alone, batch_size=2)
    batches = list(form.batches(form.train))
    assert [list(indices) for indices, _ in batches] == [[0, 2], [4], [1, 3], [5]]
    for indices, reference in batches:
        assert torch.equal(reference.states, train.states[:, list(indices)])
        its = quiet_reference(at(pipe, SCALES[indices[0] % 2]), indices, steps=40)
        torch.testing.assert_close(reference.states, its.states, rtol=1e-3, atol=1e-4)
    found = form.fit(3, WARP, 1e-6)
    rows = [list(row) for row in found.spec.coefficients]

    def error(last):
        return form.mean_square(form.errors("train", found.raw, [*rows[:-1], last]))

    assert error(rows[-1]) == pytest.approx(found.train_mse, rel=1e-5)
    for change in ([0.02, 0.0, -0.02], [-0.02, 0.02, 0.0], [0.0, -0.02, 0.02]):
        assert error([w + c for w, c in zip(rows[-1], change, strict=True)]) > found.train_mse
    steps = Polish(form, found).step(torch.zeros(Polish(form, found).count, dtype=torch.float64), lambda: None)
    whole = dataclasses.replace(form, batch_size=6)
    for mine, its in zip(steps, Polish(whole, found).step(torch.zeros_like(steps[0]), lambda: None), strict=True):
        assert (mine - its).norm() < 0.2 * its.norm()  # float32


def test_stock_teachers_take_several_scales():
    from diffusers import UniPCMultistepScheduler

    pipe = make_pipe("vp")
    sampler = Sampler(pipe, guidance_scales=SCALES[:2])
    scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    states, angles = record(sampler, scheduler, make_probe(pipe).path, range(3), "train", 8)
    assert len(states) == len(angles) == 9
    for k in range(3):
        alone_at, _ = record(at(pipe, SCALES[k % 2]), scheduler, make_probe(pipe).path, [k], "train", 8)
        torch.testing.assert_close(states[-1][k], alone_at[-1][0], rtol=1e-3, atol=1e-4)


def test_the_preflight_counts_calls_of_one_scale():
    sampler = Sampler(make_pipe("flow"), guidance_scales=SCALES[1:])
    found = preflight(sampler, make_probe(sampler.pipe))
    assert found.calls_per_step == 1 and found.guidance == "one call" and found.verdict == "full"


def test_other_scales_have_other_references():
    pipe = make_pipe("flow")
    prints = [Sampler(pipe, guidance_scales=s).fingerprint()["key"] for s in ([], [1.0], [1.0, 2.0], [2.0, 1.0])]
    assert len(set(prints)) == 4


def test_a_search_over_several_scales(tmp_path):
    make_pipe("flow").save_pretrained(tmp_path / "model")
    settings = {k: v for k, v in CLOSED_FORM.items() if k != "guidance_scale"}
    folder = tmp_path / "out"
    search(tmp_path / "model", folder, {**settings, "nfe": [3], "fill_nfe": [], "guidance_scales": [1.0, 3.0]})
    facts = json.loads((folder / "scheduler_config.json").read_text())["provenance"]
    assert facts["call"] == {"guidance_scale": [1.0, 3.0]}
    pipe = load_pipeline(str(tmp_path / "model"))
    mixed = Sampler(pipe, seed=5, guidance_scales=[1.0, 3.0])
    wanted = quiet_reference(mixed, range(3), "validation").final
    pipe.scheduler = DSSolverScheduler.from_pretrained(folder)
    errors = []
    for k in range(3):  # as a user would run it
        output = Sampler(pipe, {"guidance_scale": [1.0, 3.0][k % 2]}, seed=5)(
            [k], "validation", 3, output_type="latent"
        )
        errors.append((output[0] - wanted[k : k + 1]).double().square().mean().item())
    assert sum(errors) / 3 == pytest.approx(facts["results"]["3"]["validation_mse"], rel=1e-3)
