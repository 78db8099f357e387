"""`mean_decay`, the paper's cure for grid artefacts (Sec. 7.1): against its formula in numpy, the official schedulers'
recorded states (tests/data/README.md), and what must hold for any velocities."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.published import published_config
from dssolver_search.cli import main
from dssolver_search.pipeline.plan import Plan
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.pipeline.student import Student
from tests.families import make_pipe
from tests.pipelines.zoo import ZOO, generators

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*", "ignore:.*FluxPosEmbed.*:FutureWarning")
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_mean_decay.json").read_text())
TABLES = json.loads((Path(__file__).parents[1] / "data" / "neuralsolver_tables.json").read_text())
SHAPES = {(2, 5, 3): (1,), (2, 3, 4, 4): (2, 3), (1, 2, 2, 3, 3): (2, 3, 4)}  # to the dimensions of their places
EULER = {"nodes": [1.0, 0.7, 0.4, 0.1, 0.0], "coefficients": [[0.0] * i + [1.0] for i in range(4)]}
SIT = "sit-xl-2-256"
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
decays = pytest.mark.parametrize("decay", [0.0, 0.4, 1.0])


def published(decay, name=SIT, **kwargs):
    return DSSolverScheduler.from_published(name, mean_decay=decay, **kwargs)


def with_euler(decay):
    return DSSolverScheduler(prediction_type="flow_prediction", solvers={"4": EULER}, mean_decay=decay)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(scheduler, velocities, start, first=0):
    """All states of a run of so many steps, with velocities (N, ...) that do not depend on the state."""
    scheduler.set_timesteps(len(velocities))
    scheduler.set_begin_index(first)
    x, found = start, [start]
    for t, v in zip(scheduler.timesteps[first:], velocities[first:], strict=True):
        x = scheduler.step(v, t, x, return_dict=False)[0]
        found.append(x)
    return found


# --- the formula ------------------------------------------------------------------------------------------------------


@shapes
@decays
def test_the_update_is_the_formula(shape, decay):
    table, steps = published_config(SIT)["solvers"]["6"], 6
    start, velocities = random(*shape, seed=1), random(steps, *shape) + 3.0
    v = velocities.numpy()
    means = v.mean(tuple(1 + k for k in SHAPES[shape]), keepdims=True)
    x = start.numpy()
    found = states(published(decay), velocities, start)
    for i, row in enumerate(table["coefficients"]):
        weights = np.array([decay ** (i - k) for k in range(i + 1)])
        mean = np.tensordot(weights / weights.sum(), means[: i + 1], 1)
        rest = np.tensordot(row, (v - means)[: i + 1], 1)
        x = x + (table["nodes"][i + 1] - table["nodes"][i]) * (rest + mean)
        np.testing.assert_allclose(found[i + 1], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [5, 8])
def test_official_sd3_scheduler_is_decay_1(steps):
    found, golden = against_official("sd3", steps, 1.0)
    torch.testing.assert_close(found, golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [5, 8])
@decays
def test_official_flux_scheduler_has_the_same_rest(steps, decay):
    """Of the mean it takes the newest over the number of steps so far: no average, of which 1 is the sum of weights."""
    found, golden = against_official("flux", steps, decay)
    rest, wanted = (x - x.mean(2, keepdim=True) for x in (found, golden))
    torch.testing.assert_close(rest, wanted, rtol=0, atol=1e-6)
    case = GOLDEN[f"flux-{steps}"]
    means = np.array(case["velocities"]).reshape(steps, *case["shape"]).mean(2)
    factors = np.array(official_steps(steps)) / np.arange(1, steps + 1)
    wanted = np.array(case["start"]).reshape(case["shape"]).mean(1) - np.tensordot(factors, means, 1)
    np.testing.assert_allclose(golden[-1].mean(1), wanted, rtol=0, atol=1e-6)


def official_steps(steps):
    return TABLES["families"][SIT]["solvers"][str(steps)]["timedeltas"]


def against_official(name, steps, decay):
    """Our states (N, ...) and the official ones, the last step taken as far as theirs, whose sizes sum to .9999."""
    case = GOLDEN[f"{name}-{steps}"]
    start = torch.tensor(case["start"], dtype=torch.float64).view(case["shape"])
    golden = torch.tensor(case["states"], dtype=torch.float64).view(steps, *case["shape"])
    velocities = torch.tensor(case["velocities"], dtype=torch.float64).view(steps, *case["shape"])
    scheduler = published(decay)
    found = torch.stack(states(scheduler, velocities, start)[1:])
    last = published_config(SIT)["solvers"][str(steps)]["nodes"][-2]
    found[-1] = found[-2] + (found[-1] - found[-2]) * official_steps(steps)[-1] / last
    return found, golden


# --- what must hold ---------------------------------------------------------------------------------------------------


@shapes
@decays
def test_a_constant_velocity_is_integrated_exactly(shape, decay):
    start, velocity = random(*shape, seed=1), random(*shape) + 2.0
    final = states(published(decay), velocity.expand(7, *shape), start)[-1]
    torch.testing.assert_close(final, start - velocity, rtol=0, atol=1e-12)


@shapes
@decays
def test_velocities_without_a_mean_are_not_touched(shape, decay):
    velocities, start = random(8, *shape), random(*shape, seed=1)
    velocities -= velocities.mean(tuple(1 + k for k in SHAPES[shape]), keepdim=True)
    for one, other in zip(*(states(published(d), velocities, start) for d in (decay, None)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    kept = states(published(decay), velocities + 1.0, start)[-1]
    assert (kept - (states(published(None), velocities + 1.0, start)[-1])).abs().max() < 1e-12  # the mean is constant
    moving = velocities + torch.arange(8.0).view(-1, *[1] * len(shape))
    changed = states(published(decay), moving, start)[-1] - states(published(None), moving, start)[-1]
    assert changed.abs().min() > 0.01 and changed.std() < 1e-9  # the same at every place


@shapes
def test_of_euler_the_newest_mean_changes_nothing(shape):
    velocities, start = random(4, *shape) + 1.0, random(*shape, seed=1)
    newest, off, average = (states(with_euler(decay), velocities, start)[-1] for decay in (0.0, None, 1.0))
    torch.testing.assert_close(newest, off, rtol=0, atol=1e-12)
    assert (average - off).abs().max() > 0.01


@decays
def test_a_single_step_is_eulers(decay):
    start, velocities = random(2, 5, 3, seed=1), random(1, 2, 5, 3)
    final = states(DSSolverScheduler(prediction_type="flow_prediction", mean_decay=decay), velocities, start)[-1]
    torch.testing.assert_close(final, start - velocities[0], rtol=0, atol=1e-12)


def test_off_is_the_plain_step_to_the_bit():
    velocities, x = random(6, 2, 5, 3).float() + 1, random(2, 5, 3, seed=1).float()
    table = published_config(SIT)["solvers"]["6"]
    found = states(published(None), velocities, x)
    for i, row in enumerate(table["coefficients"]):
        b, total = table["nodes"][i + 1] - table["nodes"][i], x.clone()
        for weight, v in zip(row, velocities[: i + 1], strict=True):
            if weight:
                total = total.add_(v, alpha=b * weight)
        assert torch.equal(found[i + 1], total)
        x = total


def test_means_are_taken_in_float32():
    velocities, start = (random(5, 1, 300, 2) + 40.0).bfloat16(), random(1, 300, 2, seed=1).bfloat16()
    rounded, exact, x = published(0.5), published(0.5), start
    for scheduler in (rounded, exact):
        scheduler.set_timesteps(5)
    for t, v in zip(rounded.timesteps, velocities, strict=True):
        wanted = exact.step(v.float(), t, x.float(), return_dict=False)[0].bfloat16()
        x = rounded.step(v, t, x, return_dict=False)[0]
        assert x.dtype == torch.bfloat16 and torch.equal(x, wanted)


# --- its history ------------------------------------------------------------------------------------------------------

START, VELOCITIES = random(2, 5, 3, seed=1), random(6, 2, 5, 3) + torch.arange(6.0).view(-1, 1, 1, 1)


def begun(scheduler, steps, indices, velocities=VELOCITIES):
    """The scheduler after these steps."""
    scheduler.set_timesteps(steps)
    for i in indices:
        scheduler.step(velocities[i], scheduler.timesteps[i], START)
    return scheduler


def following(scheduler, index, velocity=None, start=START):
    """The state after one more step."""
    velocity = VELOCITIES[index] if velocity is None else velocity
    return scheduler.step(velocity, scheduler.timesteps[index], start, return_dict=False)[0]


@pytest.mark.parametrize("make, steps", [(published, 6), (with_euler, 4)], ids=["searched", "Euler"])
def test_means_die_with_the_history(make, steps):
    fresh = following(begun(make(1.0), steps, []), 2)
    assert torch.equal(following(begun(make(1.0), steps, [0]), 2), fresh)  # a jump
    assert torch.equal(following(begun(begun(make(1.0), steps, [0, 1]), steps, []), 2), fresh)  # another run
    assert not torch.allclose(following(begun(make(1.0), steps, [0, 1]), 2), fresh)
    one = begun(make(1.0), steps, [0, 1])  # another shape
    assert torch.equal(following(one, 2, VELOCITIES[2, :1], START[:1]), fresh[:1])
    one = begun(make(1.0), steps, [0, 1])  # another shape, at the step that was taken last
    again = following(one, 1, VELOCITIES[1, :1], START[:1])
    assert torch.equal(again, following(begun(make(1.0), steps, []), 1)[:1])


@pytest.mark.parametrize("make, steps", [(published, 6), (with_euler, 4)], ids=["searched", "Euler"])
def test_a_step_that_is_taken_again_has_one_mean(make, steps):
    again = begun(make(1.0), steps, [0, 1, 1, 1])
    assert torch.equal(following(again, 2), following(begun(make(1.0), steps, [0, 1]), 2))
    assert torch.equal(following(again, 3), following(begun(make(1.0), steps, [0, 1, 2]), 3))


def test_means_outlive_the_history_that_rows_need():
    """Rows of one weight hold one velocity; the average is of all means."""
    scheduler = begun(with_euler(1.0), 4, [0, 1, 2])
    assert len(scheduler.model_outputs) == 1
    mean = VELOCITIES[:4].mean(2, keepdim=True)
    wanted = START - 0.1 * (VELOCITIES[3] - mean[3] + mean.mean(0))
    torch.testing.assert_close(following(scheduler, 3), wanted, rtol=0, atol=1e-12)


def test_a_late_start_is_that_of_its_own_means():
    found = states(published(1.0), VELOCITIES, START, first=4)
    mean = VELOCITIES[4:].mean(2, keepdim=True)
    nodes, row = (published_config(SIT)["solvers"]["6"][key] for key in ("nodes", "coefficients"))
    x = START + (nodes[5] - nodes[4]) * VELOCITIES[4]
    torch.testing.assert_close(found[1], x, rtol=0, atol=1e-12)
    rest = VELOCITIES[4:] - mean
    x = x + (nodes[6] - nodes[5]) * ((1 - row[5][-1]) * rest[0] + row[5][-1] * rest[1] + mean.mean(0))
    torch.testing.assert_close(found[2], x, rtol=0, atol=1e-12)


def test_a_copy_goes_on_alone():
    scheduler = begun(published(0.5), 6, [0, 1])
    twin = copy.deepcopy(scheduler)
    following(twin, 2, 5 * VELOCITIES[2])
    following(scheduler, 2)
    assert torch.equal(following(scheduler, 3), following(begun(published(0.5), 6, [0, 1, 2]), 3))


# --- its key ----------------------------------------------------------------------------------------------------------


def test_it_is_saved_and_loaded(tmp_path):
    published(0.25).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["mean_decay"] == 0.25
    loaded = DSSolverScheduler.from_pretrained(tmp_path)
    wanted = states(published(0.25), VELOCITIES, START)[-1]
    assert torch.equal(states(loaded, VELOCITIES, START)[-1], wanted)
    assert DSSolverScheduler.from_pretrained(tmp_path, mean_decay=1.0).config.mean_decay == 1.0
    assert DSSolverScheduler.from_config(loaded.config).config.mean_decay == 0.25


def test_it_belongs_to_the_tables(tmp_path):
    flux = ZOO["FLUX"].make().scheduler.config
    assert DSSolverScheduler.from_config(flux, mean_decay=0.5).config.mean_decay == 0.5
    published(0.25).save_pretrained(tmp_path)
    for solvers, own in ((str(tmp_path), 0.25), (SIT, None), ("classical", None)):
        for before in (flux, published(0.75, shift=1.0).config):
            chosen = DSSolverScheduler.from_config(before, solvers=solvers)
            assert chosen.config.mean_decay == own
            asked = DSSolverScheduler.from_config(before, solvers=solvers, mean_decay=1.0)
            assert asked.config.mean_decay == 1.0
        assert DSSolverScheduler.from_config(flux, solvers=solvers, mean_decay=None).config.mean_decay is None


@pytest.mark.parametrize("value", [-0.1, 1.1, True, "0.5", [0.5], float("nan"), float("inf")])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"mean_decay is .*; it must be a number from 0 to 1, or null"):
        published(value)


def test_it_is_for_flow_models_with_places():
    with pytest.raises(ValueError, match=r"mean_decay is 0.5, but it is for flow solvers; with others leave it out"):
        DSSolverScheduler(mean_decay=0.5)
    scheduler = begun(published(0.5), 6, [])
    with pytest.raises(ValueError, match=r"a sample of shape \(2, 3\) lacks; leave it out"):
        scheduler.step(random(2, 3), scheduler.timesteps[0], random(2, 3))


def test_flux_runs_with_it():
    entry = ZOO["FLUX"]
    pipe = entry.make()
    calls, images = [], {}
    pipe.transformer.register_forward_pre_hook(lambda *args: calls.append(args))
    pipe.set_progress_bar_config(disable=True)
    for decay in (None, 1.0):
        pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers=SIT, mean_decay=decay)
        arguments = entry.arguments(pipe, [0, 1])
        images[decay] = pipe(
            **arguments, num_inference_steps=5, generator=generators([0, 1]), output_type="latent"
        ).images
    assert len(calls) == 10 and images[1.0].isfinite().all()
    assert not torch.allclose(images[1.0], images[None], atol=1e-3)


# --- elsewhere --------------------------------------------------------------------------------------------------------


def test_an_exported_file_would_forget_it(tmp_path, capsys):
    published(0.5).save_pretrained(tmp_path / "solver")
    words = ["export", "--solver", str(tmp_path / "solver")]
    with pytest.raises(SystemExit):
        main([*words, "--output_file", str(tmp_path / "file.py")])
    assert "mean_decay is 0.5, which this file cannot do" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["solver"]
    main([*words, "--format", "sigmas", "--nfe", "5"])  # nodes only, as it says
    assert capsys.readouterr().out.startswith("1, ")


def test_a_search_is_of_the_model_itself():
    pipe = make_pipe("flow")
    pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers=SIT, mean_decay=0.5)
    assert Student(Sampler(pipe)).scheduler.config.mean_decay is None
    student = Student(Sampler(pipe), mean_decay=0.5)
    with pytest.raises(ValueError, match=r"mean_decay is 0.5; a search keeps no means apart, leave it out"):
        student.run(Plan(torch.linspace(1, 0, 4, dtype=torch.float64)), [0], "train")
