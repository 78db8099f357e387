"""What diffusers demands of each of its own schedulers (its `SchedulerCommonTest`), of this one, in every kind."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.published import published_config
from tests.runtime.test_scheduler import LOGGER, SD_CONFIG, assert_close, make_solvers, network, noise, run, states_of

TABLES = published_config("dit-xl-2-256")["solvers"]
FLOW = {"prediction_type": "flow_prediction"}
KINDS = {
    "vp": {},
    "vp, v": {"prediction_type": "v_prediction", **SD_CONFIG},
    "vp, zero snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "vp, tables": {"solvers": TABLES, "continuous_time": True},
    "flow": {**FLOW, "shift": 3.0},
    "flow, dynamic": {**FLOW, "use_dynamic_shifting": True},
    "flow, tables": {**FLOW, "solvers": make_solvers(5, 10, fed=True)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
N = 10


def make(kind, **more):
    return DSSolverScheduler(**copy.deepcopy(KINDS[kind]), **more)


def first_step(scheduler, time=None, **more):
    scheduler.set_timesteps(N)
    x = noise(4, 3, 8, 8, dtype=torch.float32)
    return scheduler.step(0.1 * x, scheduler.timesteps[0] if time is None else time, x, **more)


@every_kind
@pytest.mark.parametrize("options", [{}, {"num_train_timesteps": 500}, {"history_length": 1}], ids=str)
def test_saved_and_loaded_it_is_the_same(kind, options, tmp_path):
    ours = make(kind, **options)
    ours.save_pretrained(tmp_path)
    loaded = DSSolverScheduler.from_pretrained(tmp_path)
    config = dict(ours.config)
    assert config.pop("_use_default_values")  # diffusers' own test takes it for granted
    assert config == dict(loaded.config)
    for time in (None, 0, 5, 49):  # times that are not in the schedule too
        assert torch.equal(first_step(ours, time).prev_sample, first_step(loaded, time).prev_sample)
    again = pickle.loads(pickle.dumps(ours))
    assert again.config == ours.config == copy.deepcopy(ours).config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["vp", "vp, tables", "flow, tables"])
def test_compatible_classes_take_its_configuration_and_give_it_back(kind):
    ours, back = make(kind), None
    assert len(ours.compatibles) > 5
    for cls in ours.compatibles:
        try:
            other = cls.from_config(ours.config)
        except ImportError:  # a library that only this class needs
            continue
        back = DSSolverScheduler.from_config(other.config)
        assert {key: back.config[key] for key in ours.config} == dict(ours.config), cls
        foreign = {key for key in back.config if key not in ours.config}
        assert not foreign & set(inspect.signature(DSSolverScheduler.__init__).parameters)
    assert back is not None and torch.equal(run(back, noise(), N), run(ours, noise(), N))


@every_kind
def test_it_comes_back_from_its_own_configuration(kind):
    ours = make(kind)
    for config in (ours.config, dict(ours.config)):
        assert dict(DSSolverScheduler.from_config(config).config) == dict(ours.config)


@pytest.mark.filterwarnings("ignore")
def test_it_comes_back_from_a_journey_through_other_classes():
    for classes, config in (
        ((DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler), KINDS["vp, v"]),
        ((UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler), KINDS["flow"]),
    ):
        ours = back = DSSolverScheduler(**config)
        for cls in classes:
            back = cls.from_config(back.config)
        assert torch.equal(run(DSSolverScheduler.from_config(back.config), noise(), N), run(ours, noise(), N))


@every_kind
def test_both_forms_of_the_result_agree_after_a_reset(kind):
    ours = make(kind)
    for generator in (None, torch.Generator().manual_seed(0)):
        named = first_step(ours, generator=generator)
        plain = first_step(ours, generator=generator, return_dict=False)
        assert len(plain) == len(named) and all(map(torch.equal, plain, named.values()))
    second = ours.step(0.1 * plain[0], ours.timesteps[1], plain[0]).prev_sample
    assert second.shape == plain[0].shape


@every_kind
def test_the_public_interface_is_there_before_a_run(kind):
    ours, x = make(kind), noise(4, 3, 8, 8, dtype=torch.float32)
    assert ours.init_noise_sigma == 1.0
    assert ours.scale_model_input(x, 0.0).shape == x.shape
    ours.set_timesteps(50)
    assert ours.add_noise(x, x, ours.timesteps[5][None]).shape == x.shape
    assert "kwargs" not in inspect.signature(DSSolverScheduler.__init__).parameters


@every_kind
def test_trained_betas_are_kept_as_they_are_given(kind, tmp_path):
    if KINDS[kind].get("rescale_betas_zero_snr"):
        pytest.skip("two betas leave no signal to rescale")
    ours = make(kind, trained_betas=np.array([0.1, 0.3]))
    ours.save_pretrained(tmp_path)
    loaded = DSSolverScheduler.from_pretrained(tmp_path)
    assert ours.betas.tolist() == loaded.betas.tolist() == pytest.approx([0.1, 0.3])


@every_kind
def test_attributes_are_found_where_diffusers_finds_them(kind):
    ours = make(kind)
    ours.own_attribute = 5
    ours.register_to_config(foreign_key=7)
    assert ours.own_attribute == 5 and ours.save_pretrained == ours.save_pretrained
    with pytest.warns(FutureWarning, match="foreign_key"):
        assert ours.foreign_key == 7
    with pytest.raises(AttributeError, match="'DSSolverScheduler' object has no attribute 'absent'"):
        _ = ours.absent


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("vp")])
def test_a_resolution_shift_means_nothing_on_vp_as_with_unipc(kind, caplog):
    """Pipelines of flow models pass `mu`, whatever scheduler they have; stock classes of vp pass it over in silence."""
    ours, x = make(kind), noise()
    wanted = run(ours, x, N)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert torch.equal(run(ours, x, N, mu=0.83), wanted)
        assert torch.equal(run(ours, x, N, mu=2.0), wanted)
    told = "mu is a resolution shift of flow models and means nothing to this vp solver"
    assert [r.message.startswith(told) for r in caplog.records] == [True]
    with pytest.raises(ValueError, match="sigmas and mu given to a vp solver: this is a flow model"):
        ours.set_timesteps(sigmas=[1.0, 0.5], mu=0.83)  # as FLUX gives them; UniPC refuses such sigmas too
    if kind == "vp, v":
        theirs = [UniPCMultistepScheduler(**KINDS[kind]) for _ in range(2)]
        assert torch.equal(*(run(s, x, N, **mu) for s, mu in zip(theirs, ({}, {"mu": 0.83}), strict=True)))


@every_kind
def test_a_loop_is_finite_and_repeats(kind):
    ours, x = make(kind), noise(dtype=torch.float32)
    states = states_of(ours, x, N)
    assert torch.isfinite(torch.stack(states)).all() and len(states) == N + 1
    assert torch.equal(states_of(ours, x, N)[-1], states[-1])
    assert_close(states_of(ours, x, N, model=lambda y, t: network(y, t).double())[-1], states[-1], 1e-5)
