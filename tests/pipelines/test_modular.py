"""`DSSolverScheduler` in modular pipelines, put there by `update_components` and back from a saved one."""

from __future__ import annotations

import diffusers as d
import numpy as np
import pytest
import torch

from diffusers_dssolver import DSSolverScheduler
from tests.pipelines import test_conformance as conformance
from tests.pipelines.test_conformance import counted, realign, relative
from tests.pipelines.zoo import FLOW_TABLE, ZOO, generators

BLOCKS = {
    "SDXL": d.StableDiffusionXLAutoBlocks,
    "FLUX": d.FluxAutoBlocks,
    "Qwen-Image": d.QwenImageAutoBlocks,
    "Wan": d.WanBlocks,
    "Wan 2.2": d.Wan22Blocks,
}
models = pytest.mark.parametrize("name", BLOCKS)


def blocks_of(name):
    blocks = BLOCKS[name]()
    blocks.sub_blocks.pop("text_encoder")
    return blocks


def prepare(pipe):
    """With the zoo's guidance, which a saved pipeline does not keep."""
    pipe.set_progress_bar_config(disable=True)
    scales = {"guider": 2.0, "guider_2": 1.5}
    pipe.update_components(**{k: d.ClassifierFreeGuidance(s) for k, s in scales.items() if k in pipe.components})
    return pipe


def build(name, solvers="classical"):
    """The modular pipeline with the components of the one in the zoo."""
    pipe = prepare(blocks_of(name).init_pipeline())
    parts = ZOO[name].make().components
    pipe.update_components(**{k: part for k, part in parts.items() if k in pipe.components and part is not None})
    if solvers is not None:
        pipe.update_components(scheduler=DSSolverScheduler.from_config(pipe.scheduler.config, solvers=solvers))
    return pipe


def draw(name, pipe, steps):
    arguments = ZOO[name].arguments(pipe, (0,))
    known = {key: arguments[key] for key in arguments if key in pipe.blocks.input_names}
    with torch.no_grad():
        return pipe(**known, num_inference_steps=steps, generator=generators((0,)), output="latents").float().numpy()


@models
@pytest.mark.parametrize("solvers", ["classical", FLOW_TABLE])
def test_each_step_calls_the_network(name, solvers):
    """And leads where the pipeline that is not modular leads, where guidance is the same."""
    if solvers != "classical" and ZOO[name].table is None:
        pytest.skip("no shipped solver fits")
    pipe = build(name, solvers)
    calls = counted(pipe)
    first, second = draw(name, pipe, 7), draw(name, pipe, 7)
    assert np.array_equal(first, second)
    assert len(pipe.scheduler.timesteps) == pipe.scheduler.step_index == 7
    assert len(calls) == 2 * 7 * (1 if name == "FLUX" else 2)  # guiders call for each prompt
    if name != "Qwen-Image":  # whose guided velocities the other pipeline brings to the length of unguided ones
        entry = ZOO[name]
        wanted = conformance.draw(entry, conformance.build(entry, solvers), 7)
        if name == "FLUX":  # in packs of 2 x 2
            first = first.reshape(1, 1, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5).reshape(1, 16, 4)
        np.testing.assert_allclose(first, wanted, rtol=1e-4, atol=1e-4 * wanted.std())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "FLUX" else []) for n in BLOCKS])
def test_many_steps_agree_with_stock(name):
    stock, ours = build(name, None), build(name)
    stock.update_components(scheduler=conformance.reference_scheduler(stock.scheduler.config))
    wanted = draw(name, stock, 200)
    few, many = (relative(draw(name, ours, steps) - wanted, wanted) for steps in (5, 100))
    assert many < 0.02
    assert many < 0.15 * few


@models
def test_saved_and_loaded(name, tmp_path):
    pipe = build(name)
    wanted = draw(name, pipe, 5)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = prepare(blocks_of(name).init_pipeline(str(tmp_path)))
    again.load_components()
    realign(again)
    assert type(again.scheduler) is DSSolverScheduler
    assert {**pipe.scheduler.config, **again.scheduler.config} == dict(pipe.scheduler.config)
    assert np.array_equal(draw(name, again, 5), wanted)
