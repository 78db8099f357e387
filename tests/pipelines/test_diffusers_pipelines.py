"""What a pipeline draws with which solver, beyond the checks that `test_conformance.py` makes in all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler

from diffusers_dssolver import DSSolverScheduler
from tests.pipelines.test_conformance import build, cases, draw
from tests.pipelines.zoo import ZOO, make_ddpm, networks_of


@cases(kinds=("table",), slow=True)
def test_a_table_draws_otherwise_than_classical_rows(entry, solvers):
    table, classical = build(entry, solvers), build(entry, "classical")
    assert 7 in table.scheduler.tables
    assert np.abs(draw(entry, table, 7) - draw(entry, classical, 7)).max() > 1e-4  # equal runs agree to the bit
    automatic = DSSolverScheduler.from_config(entry.make().scheduler.config)  # finds one that fits by itself
    assert automatic.tables


@pytest.mark.parametrize("name", ["DiT", "Stable Diffusion", "PixArt-Sigma"])
@pytest.mark.parametrize("steps", [5, 10])
def test_classical_vp_draws_what_dpm_solver_pp_draws(name, steps):
    entry = ZOO[name]
    config = build(entry).scheduler.config
    drawn = []
    for order in (2, 1):
        pipe = build(entry)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            config, solver_order=order, timestep_spacing="trailing", final_sigmas_type="zero"
        )
        drawn.append(draw(entry, pipe, steps))
    wanted, first_order = drawn
    assert np.abs(draw(entry, build(entry, "classical"), steps) - wanted).max() < 1e-4 * wanted.std()
    assert np.abs(first_order - wanted).max() > 1e-2 * wanted.std()  # so the tolerance tells solvers apart


def test_a_flow_solver_in_a_vp_pipeline_and_the_reverse_are_refused():
    """Unless it was carried over."""
    flux = build(ZOO["FLUX"], "dit-xl-2-256")
    assert np.isfinite(draw(ZOO["FLUX"], flux)).all()
    assert np.isfinite(draw(ZOO["DiT"], build(ZOO["DiT"], "flowdcn-b-2-256"))).all()
    flux.scheduler = DSSolverScheduler.from_published("dit-xl-2-256")
    with pytest.raises(ValueError, match="given to a vp solver"):
        draw(ZOO["FLUX"], flux)


def test_the_ddim_pipeline_hands_over_what_only_ddim_knows():
    """It also makes a DDIMScheduler of whatever it is constructed with: ours is assigned afterwards."""
    pipe = DDIMPipeline(make_ddpm().unet, make_ddpm().scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DSSolverScheduler.from_config(pipe.scheduler.config, solvers="classical")

    def drawn(**others):
        return pipe(
            num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np", **others
        ).images

    assert np.isfinite(drawn()).all()
    assert np.array_equal(drawn(), drawn(use_clipped_model_output=True))
    with pytest.raises(ValueError, match=r"eta is 0.5.*deterministic"):
        drawn(eta=0.5)


@pytest.mark.parametrize("steps", [4, 7, 10])
def test_the_experts_of_wan_are_called_where_the_stock_scheduler_calls_them(steps):
    """The first expert at times of at least `boundary_ratio`; tables have times of their own, under the same rule."""
    entry, calls = ZOO["Wan 2.2"], {}
    for solvers in (None, "classical", entry.table):
        pipe = build(entry, solvers)
        made = calls[solvers] = []
        for number, network in enumerate(networks_of(pipe)):
            network.register_forward_pre_hook(lambda *_, made=made, number=number: made.append(number))
        draw(entry, pipe, steps)
        boundary = pipe.config.boundary_ratio * 1000
        assert made == [int(t < boundary) for t in pipe.scheduler.timesteps for _ in range(entry.calls)]
        assert {*made} == {0, 1}
    assert calls["classical"] == calls[None]
