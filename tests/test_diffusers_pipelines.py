"""`DSSolverScheduler` inside diffusers' own pipelines, tiny, random and built offline (`tiny_pipelines.py`)."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny_pipelines import (
    ABSENT,
    FITTING,
    PIPELINES,
    SIZE,
    make_flux_img2img,
    make_sd_img2img,
    network_of,
    prompts_of,
)

from diffusers_dssolver import DSSolverScheduler

CASES = [(name, "classical") for name in PIPELINES] + list(FITTING.items())


class Stop(Exception):
    """Raised in the middle of a run."""


def equip(pipe, solvers):
    pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers=solvers)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(name, solvers=None, dtype=None):
    pipe = PIPELINES[name]()
    if solvers is not None:
        equip(pipe, solvers)
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype is None else pipe.to(dtype)


def draw(pipe, steps=5, **kwargs):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        images = pipe(
            **prompts_of(pipe), num_inference_steps=steps, generator=generator, output_type="np", **kwargs
        ).images
    assert images.shape == (1, SIZE, SIZE, 3)
    assert np.isfinite(images).all()
    return images


def latents_of(pipe, steps, **kwargs):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipe(
            **prompts_of(pipe), num_inference_steps=steps, generator=generator, output_type="latent", **kwargs
        ).images


def counted(pipe):
    """A list that grows by one with each call of the network."""
    calls = []
    network_of(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("name", "solvers"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_equal_images_from_one_object_and_as_many_calls_as_steps(name, solvers, dtype):
    pipe = build(name, solvers, dtype)
    calls, images = counted(pipe), {}
    for steps in (5, 1, 12, 5):
        image = draw(pipe, steps)
        assert len(calls) == steps
        assert len(pipe.scheduler.timesteps) == steps == pipe.scheduler.step_index
        assert np.array_equal(images.setdefault(steps, image), image)
        calls.clear()
    assert np.abs(images[5] - images[12]).max() > 1e-4
    assert np.abs(images[5] - images[1]).max() > 1e-4
    assert images[5].std() > 1e-3


@pytest.mark.parametrize("name", PIPELINES)
def test_half_precision_is_near_single_precision(name):
    single, half = draw(build(name, "classical")), draw(build(name, "classical", torch.bfloat16))
    assert np.abs(single - half).mean() < 0.03


@pytest.mark.parametrize(("name", "solvers"), FITTING.items())
def test_a_published_solver_is_another_than_the_classical_one(name, solvers):
    published, classical = build(name, solvers), build(name, "classical")
    assert np.abs(draw(published) - draw(classical)).max() > 1e-4  # equal runs agree to the bit
    automatic = equip(PIPELINES[name](), None)  # finds a fitting one by itself
    assert automatic.scheduler._solvers  # one of those whose noise schedule fits


@pytest.mark.parametrize(("name", "solvers"), CASES)
def test_saved_and_loaded_pipelines_draw_the_same(name, solvers, tmp_path):
    pipe = build(name, solvers)
    wanted = draw(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_dssolver", "DSSolverScheduler"]
    again = type(pipe).from_pretrained(tmp_path, local_files_only=True, **ABSENT[name])
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is DSSolverScheduler
    assert again.scheduler.config.solvers == pipe.scheduler.config.solvers
    assert again.scheduler._solvers == pipe.scheduler._solvers
    assert np.array_equal(draw(again), wanted)


@pytest.mark.parametrize(("name", "solvers"), CASES)
def test_a_run_after_an_interrupted_one_is_a_fresh_run(name, solvers):
    pipe = build(name, solvers)
    wanted, calls = draw(pipe), counted(pipe)
    del calls[:]

    def stop(*_):
        if len(calls) == 3:
            raise Stop

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:

        def callback(pipe, i, t, kwargs):
            stop()
            return kwargs

        with pytest.raises(Stop):
            draw(pipe, callback_on_step_end=callback)
    else:
        handle = network_of(pipe).register_forward_hook(stop)
        with pytest.raises(Stop):
            draw(pipe)
        handle.remove()
    assert 0 < pipe.scheduler.step_index < 5
    assert np.array_equal(draw(pipe), wanted)


@pytest.mark.parametrize("make", [make_sd_img2img, make_flux_img2img])
@pytest.mark.parametrize("solvers", ["classical", "table"])
def test_image_to_image_starts_in_the_middle(make, solvers):
    if solvers == "table" and make is make_sd_img2img:
        pytest.skip("no published table has these betas")
    pipe = equip(make(), "classical" if solvers == "classical" else "flowdcn-b-2-256")
    calls = counted(pipe)
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    drawn = {}
    for steps, strength in ((8, 0.5), (5, 0.6), (8, 1.0), (8, 0.5)):
        result = draw(pipe, steps, image=image, strength=strength)
        assert len(calls) == int(steps * strength)
        assert pipe.scheduler.step_index == steps
        assert np.array_equal(drawn.setdefault((steps, strength), result), result)
        calls.clear()
    assert np.abs(drawn[8, 0.5] - drawn[8, 1.0]).max() > 1e-3


@pytest.mark.parametrize("make", [make_sd_img2img, make_flux_img2img])
def test_a_weak_image_to_image_keeps_the_image(make):
    """The noise that is put on is the noise that is taken off: little strength leaves the latents nearly alone."""
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    ends = []
    for scheduler in ("ours", "theirs"):
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        if scheduler == "ours":
            equip(pipe, "classical")
        elif make is make_sd_img2img:
            pipe.scheduler = trailing_dpm_solver(pipe)
        ends.append(draw(pipe, 50, image=image, strength=0.1))
    assert np.abs(ends[0] - ends[1]).mean() < 5e-3


def trailing_dpm_solver(pipe):
    return DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, solver_order=2, timestep_spacing="trailing", final_sigmas_type="zero"
    )


@pytest.mark.parametrize("name", ["dit", "sd", "pixart"])
@pytest.mark.parametrize("steps", [5, 10])
def test_classical_vp_draws_what_dpm_solver_pp_draws(name, steps):
    ours, theirs = build(name, "classical"), build(name)
    theirs.scheduler = trailing_dpm_solver(theirs)
    first_order = build(name)
    first_order.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config, solver_order=1)
    wanted = draw(theirs, steps)
    assert np.abs(draw(ours, steps) - wanted).max() < 1e-5
    assert np.abs(draw(first_order, steps) - wanted).max() > 2e-4  # so the tolerance tells solvers apart


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_many_classical_flow_steps_reach_what_flow_match_euler_reaches(name):
    ours, theirs = build(name, "classical"), build(name)
    wanted = latents_of(theirs, 200)
    scale = wanted.std()
    assert (latents_of(ours, 200) - wanted).abs().max() < 0.005 * scale
    assert (latents_of(theirs, 10) - wanted).abs().max() > 0.015 * scale  # so the tolerance is not idle


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_dynamic_shifting_reaches_the_solver(name):
    """With use_dynamic_shifting the pipelines compute mu themselves."""
    pipe = build(name)
    pipe.scheduler = type(pipe.scheduler)(use_dynamic_shifting=True)
    equip(pipe, "classical")
    draw(pipe, 5)
    shifted = pipe.scheduler.timesteps
    pipe.scheduler = DSSolverScheduler(prediction_type="flow_prediction")
    draw(pipe, 5)
    assert (shifted[1:] > pipe.scheduler.timesteps[1:] + 10).all()


def test_a_flow_solver_in_a_vp_pipeline_and_the_reverse_are_refused():
    pipe = build("dit")
    with pytest.raises(ValueError, match="flow models, this model is vp"):
        equip(pipe, "flowdcn-b-2-256")
    flux = build("flux")
    with pytest.raises(ValueError, match="vp models, this model is flow"):
        equip(flux, "dit-xl-2-256")
    flux.scheduler = DSSolverScheduler.from_published("dit-xl-2-256")
    with pytest.raises(ValueError, match="given to a vp solver"):
        draw(flux)
