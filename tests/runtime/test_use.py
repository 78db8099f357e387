"""What people and programs do to a scheduler around `set_timesteps` and `step`, from public reports about others."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.paths import ContinuousVPPath, FlowPath, VPPath, make_betas
from tests.problems import DoubleTorch, Metal
from tests.runtime import surface
from tests.runtime.test_contract import GRIDS
from tests.runtime.test_scheduler import (
    ALL_TYPES,
    EPS,
    SD_CONFIG,
    VP_TYPES,
    assert_close,
    make_any,
    make_flow,
    make_solvers,
    make_table,
    network,
    noise,
    states_of,
)

# --- devices without float64 -----------------------------------------------------------------------------------------


def everything(scheduler, device):
    """Results of the whole surface, on the CPU."""
    flow = scheduler.config.prediction_type == "flow_prediction"
    x, e = (noise(dtype=torch.float32, seed=seed).to(device) for seed in (3, 4))
    found = []
    grid = torch.linspace(990, 110, 5).to(device)
    calls = [{"num_inference_steps": 5}, {"timesteps": grid}, {"timesteps": grid.tolist()}]
    if flow:
        calls += [{"sigmas": grid / 1000, "mu": torch.tensor(0.5).to(device)}, {"sigmas": list((grid / 1000).cpu())}]
        calls += [{"sigmas": grid / 1000, "timesteps": grid}]
    for call in calls:
        scheduler.set_timesteps(**call, device=device)
        assert scheduler.timesteps.device == x.device
        found.append(scheduler.sigmas)
        y = scheduler.scale_noise(x, scheduler.timesteps[:1], e)
        for t in scheduler.timesteps:
            y = scheduler.scale_model_input(y, t)
            y, data = scheduler.step(torch.tanh(y), t, y, return_dict=False)
            found += [y, data]
        for times in (scheduler.timesteps[2], scheduler.timesteps[1::2], 321.5, 17, torch.tensor([5, 900]).to(device)):
            found += [scheduler.add_noise(x, e, times), scheduler.scale_noise(x, times, e)]
        scheduler.set_timesteps(**call, device=device)  # an unannounced start in the middle, by value
        found.append(scheduler.step(x, scheduler.timesteps[3].clone(), x, return_dict=False)[0])
    return [f.to(device).cpu() for f in found]


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
@pytest.mark.parametrize("options", [{}, {"solvers": make_solvers(5, fed=True)}], ids=["classical", "tables"])
def test_nothing_is_float64_on_a_device(prediction_type, options):
    """Apple's MPS has none; the same numbers come out as on the CPU."""
    for more in ({}, {"mean_decay": 0.5} if prediction_type == "flow_prediction" else {"thresholding": True}):
        scheduler = make_any(prediction_type, **options, **more)
        wanted = everything(scheduler, "cpu")
        with Metal():
            got = everything(scheduler, Metal.device)
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)


def test_the_device_refuses_float64():
    with Metal():
        x = torch.ones(2).to(Metal.device)
        wide = torch.ones(2).double()
        for convert in (lambda: x.double(), lambda: x.to("cpu", torch.float64), lambda: wide.to(Metal.device)):
            with pytest.raises(TypeError, match="float64"):
                convert()
        assert x.cpu().double().sum() == 2


# --- noise belongs to the node, not to what the network is fed -------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
def test_noise_at_an_element_of_the_schedule_is_that_of_its_node(prediction_type):
    """A search may feed the network other times than its nodes' own; samples are integrated between nodes."""
    table = {"nodes": [1.0, 0.5, 0.0], "timesteps": [1000.0, 540.0], "coefficients": [[1.0], [-0.5, 1.5]]}
    fed = make_any(prediction_type, solvers={"2": table})
    plain = make_any(prediction_type, solvers={"2": {**table, "timesteps": [1000.0, 499.0]}})
    own = make_any(prediction_type, solvers={"2": {k: v for k, v in table.items() if k != "timesteps"}})
    for scheduler in (fed, plain, own):
        scheduler.set_timesteps(2)
    x, e = noise(3, 4), noise(3, 4, seed=4)
    for method in ("add_noise", "get_velocity"):
        for times in (1, slice(0, 2)):
            wanted = getattr(own, method)(x[:2], e[:2], own.timesteps[times])
            for convert in (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.double):
                assert_close(getattr(fed, method)(x[:2], e[:2], convert(fed.timesteps[times])), wanted, 1e-12)
        there = (x, e, torch.tensor([540.0, 539.0, 17.0]))  # only the first one is an element
        assert_close(getattr(fed, method)(*there)[1:], getattr(plain, method)(*there)[1:], 0)
    if prediction_type == "flow_prediction":
        assert_close(fed.scale_noise(x, fed.timesteps[1], e), 0.5 * x + 0.5 * e, 1e-12)  # and not .54
        assert_close(fed.scale_noise(x, 541.0, e), 0.459 * x + 0.541 * e, 1e-12)


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
def test_an_exact_network_takes_a_start_in_the_middle_to_the_data(prediction_type):
    scheduler = make_any(prediction_type, solvers=make_solvers(5, fed=True))
    scheduler.set_timesteps(5)
    data, e = noise(seed=8), noise(seed=9)
    x = scheduler.add_noise(data, e, scheduler.timesteps[2:3])
    for i, t in enumerate(scheduler.timesteps[2:], 2):
        alpha, sigma = (torch.tensor(v[i], dtype=torch.float64) for v in (scheduler._alphas, scheduler._sigmas))
        answer = {"epsilon": e, "sample": data, "v_prediction": alpha * e - sigma * data, "flow_prediction": e - data}
        x = scheduler.step(answer[prediction_type], t, x, return_dict=False)[0]
    assert_close(x, data, 1e-12)


# --- a grid that is given is used ------------------------------------------------------------------------------------

LTX2_DISTILLED = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]
AYS_SDXL = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113, 0.0]  # diffusers' AysSchedules


@pytest.mark.parametrize("read", ["flux", "flux2", "ovis_image"])
def test_pipelines_do_not_drop_the_users_sigmas(read):
    """They set `sigmas` to None where the attribute `config.use_flow_sigmas` is true. Other classes, which read the
    item, must still hear that this is a flow model."""
    scheduler = make_flow(solvers=make_solvers(4))
    for s in (scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert hasattr(s.config, "use_flow_sigmas") and not s.config.use_flow_sigmas
        assert s.config["use_flow_sigmas"] is True
    scheduler.register_to_config(strict=True)
    assert not scheduler.config.use_flow_sigmas
    other = UniPCMultistepScheduler.from_config(scheduler.config)
    assert other.config.use_flow_sigmas and not DSSolverScheduler.from_config(other.config).config.use_flow_sigmas
    path = Path(diffusers.__file__).parent / "pipelines" / read / f"pipeline_{read}.py"
    condition = 'hasattr(self.scheduler.config, "use_flow_sigmas") and self.scheduler.config.use_flow_sigmas'
    assert condition in path.read_text()  # else this test is of the past
    own = [1, 0.65, 0.44, 0.29]
    sigmas = None if eval(condition, {"self": SimpleNamespace(scheduler=scheduler)}) else own
    times, n = retrieve_timesteps(make_flow(shift=1.577), 28 if sigmas is None else None, sigmas=sigmas)
    assert n == 4
    assert times.tolist() == pytest.approx([1000 * 1.577 * s / (1 + 0.577 * s) for s in own], abs=1e-3)


@pytest.mark.parametrize("solvers", ["classical", make_solvers(5, 12)], ids=["classical", "tables"])
def test_distilled_levels_of_ltx_2_are_kept_unless_a_table_has_as_many_steps(solvers):
    scheduler = make_flow(solvers=solvers)
    scheduler.set_timesteps(sigmas=LTX2_DISTILLED)
    assert_close(scheduler.sigmas, torch.tensor([*LTX2_DISTILLED, 0.0]), EPS)
    assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1].double(), EPS)
    scheduler = make_flow(solvers=make_solvers(8))
    scheduler.set_timesteps(sigmas=LTX2_DISTILLED)
    assert_close(scheduler.sigmas, torch.tensor(make_table(8)["nodes"]), EPS)


@pytest.mark.parametrize("name", GRIDS)
def test_classical_rows_keep_every_grid(name):
    """Those of pipelines too: there is no table to prefer."""
    for n in (2, 6, 9):
        grid = torch.as_tensor(np.asarray(GRIDS[name](n))).double()
        scheduler = make_flow()
        scheduler.set_timesteps(sigmas=grid)
        assert_close(scheduler.sigmas, torch.cat([grid, torch.zeros(1)]), EPS)
        shifted = make_flow(shift=3.0)
        shifted.set_timesteps(timesteps=1000 * grid)
        assert_close(shifted.timesteps, 1000 * grid, EPS)


@pytest.mark.parametrize("solvers", ["classical", make_solvers(4, 5)], ids=["classical", "tables"])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_last_entry_at_clean_data_is_a_step_that_changes_nothing(solvers, inverted):
    """In the documentation of LTX: timesteps=[1000, 909, 725, 421, 0]; stock schedulers list it too."""
    scheduler, x = make_flow(solvers=solvers, invert_sigmas=inverted), noise(dtype=torch.float32)
    times = [1000, 909, 725, 421]
    own = [1000 - t for t in times] if inverted else times
    end = 1000 if inverted else 0
    wanted = states_of(scheduler, x, timesteps=own)
    got = states_of(scheduler, x, timesteps=[*own, end])
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == 5
    assert torch.equal(got[4], wanted[4]) and torch.equal(got[5], wanted[4])
    theirs = FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted)
    levels = [t / 1000 for t in times]
    for s in (scheduler, theirs):
        s.set_timesteps(sigmas=[*levels, 0.0])
    assert_close(scheduler.timesteps, theirs.timesteps, 1e-6)
    assert_close(scheduler.sigmas, theirs.sigmas, 1e-6)
    scheduler.set_timesteps(5, sigmas=[*levels, 0.0], timesteps=[*own, end])
    assert_close(scheduler.timesteps, theirs.timesteps, 1e-6)
    with pytest.raises(ValueError, match="nothing but clean data"):
        scheduler.set_timesteps(sigmas=[0.0])


@pytest.mark.parametrize("prediction_type", VP_TYPES[:2])
def test_levels_of_a_vp_model_are_sigma_over_alpha(prediction_type):
    """Align Your Steps (arXiv 2404.14507) on SDXL, as EulerDiscrete takes it: a last 0 is no step."""
    theirs = EulerDiscreteScheduler(prediction_type=prediction_type, **SD_CONFIG)
    ours = DSSolverScheduler.from_config(theirs.config, solvers="classical")
    for s in (theirs, ours):
        s.set_timesteps(sigmas=AYS_SDXL)
    assert len(ours.timesteps) == len(theirs.timesteps) == 10 == ours.num_inference_steps
    assert_close(ours.sigmas[1:], theirs.sigmas[1:], 1e-5)
    assert_close(ours.timesteps, theirs.timesteps, 1e-4)  # theirs interpolates in float32
    without = copy.deepcopy(ours)
    without.set_timesteps(sigmas=AYS_SDXL[:-1])
    assert torch.equal(without.sigmas, ours.sigmas)
    x = noise()
    assert torch.equal(*(states_of(s, x, sigmas=AYS_SDXL)[-1] for s in (ours, without)))
    with pytest.raises(ValueError, match=r"sigmas\[0\] is 80.0; sigma/alpha of this model is 14.61"):
        ours.set_timesteps(sigmas=[80.0, 10.0, 1.0])


@pytest.mark.parametrize("kind", ["linear", "zero snr", "continuous", "flow", "inverted"])
def test_nodes_of_levels_are_the_inverse_of_levels_of_nodes(kind):
    betas = make_betas(1000, 0.0001, 0.02, "linear", None, kind == "zero snr")
    paths = {"continuous": ContinuousVPPath(betas), "flow": FlowPath(), "inverted": FlowPath(inverted=True)}
    path = paths.get(kind) or VPPath(betas)
    nodes = torch.cat([torch.linspace(0.0015, 0.996, 1777), torch.tensor([0.0001])[kind == "continuous" :]]).double()
    assert_close(path.node_at(path.level(nodes)), nodes, 1e-9)
    zero = torch.zeros(1, dtype=torch.float64)
    assert path.node_at(zero if kind != "inverted" else 1 - zero).item() == 0


# --- what a user writes is followed, or refused with the reason ------------------------------------------------------


def exact_run(scheduler, times, x, data, e):
    """The last state of a network that knows the answer of a flow model."""
    for t in times:
        x = scheduler.step(e - data, t, x, return_dict=False)[0]
    return x


def finish(scheduler, x, times=None):
    for t in scheduler.timesteps if times is None else times:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("first, end", [(4, 8), (0, 5), (2, 6), (0, 8)])
def test_a_part_of_the_schedule_that_is_written_is_run(prediction_type, fed, first, end):
    """`scheduler.timesteps = scheduler.timesteps[4:]`, and `sigmas` alike, in one statement, in two, or not at all."""
    scheduler, x = make_any(prediction_type, solvers=make_solvers(8, fed=fed)), noise()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(first)
    wanted = finish(scheduler, x, scheduler.timesteps[first:end])
    levels = scheduler.sigmas[first : end + 1]

    def both(s):
        s.timesteps, s.sigmas = s.timesteps[first:end], s.sigmas[first : end + 1]

    def one_after_the_other(s):
        s.timesteps = s.timesteps[first:end]
        s.add_noise(x, x, s.timesteps[:1])
        s.sigmas = s.sigmas[first : end + 1]

    def without_the_last(s):
        s.timesteps, s.sigmas = s.timesteps[first:end].tolist(), s.sigmas[first:end].numpy()

    def times_only(s):
        s.timesteps = s.timesteps[first:end].clone()

    for write in (both, one_after_the_other, without_the_last, times_only):
        scheduler.set_timesteps(8)
        write(scheduler)
        noised = scheduler.add_noise(x, noise(seed=4), scheduler.timesteps[:1])
        assert torch.equal(finish(scheduler, x), wanted)
        assert scheduler.num_inference_steps == len(scheduler.timesteps) == end - first
        if write in (both, one_after_the_other):
            assert torch.equal(scheduler.sigmas, levels)
        full = make_any(prediction_type, solvers=make_solvers(8, fed=fed))
        full.set_timesteps(8)
        assert torch.equal(noised, full.add_noise(x, noise(seed=4), full.timesteps[first : first + 1]))
        with pytest.raises(ValueError, match=f"all {end - first} steps were taken"):
            scheduler.step(x, 0.5, x)


def test_an_exact_network_on_the_second_half_ends_at_the_data():
    scheduler = make_flow(solvers=make_solvers(8))
    scheduler.set_timesteps(8)
    data, e = torch.full((1, 1, 2), 2.0), noise(1, 1, 2, dtype=torch.float32)
    x = scheduler.scale_noise(data, scheduler.timesteps[4], e)
    scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[4:], scheduler.sigmas[4:]
    assert_close(exact_run(scheduler, scheduler.timesteps, x, data, e), data, 1e-6)


def test_a_run_goes_on_with_its_history_where_the_rest_is_cut():
    scheduler, x = make_flow(solvers=make_solvers(8)), noise()
    wanted = states_of(scheduler, x, 8)
    for written in (slice(0, 6), slice(3, 8)):
        scheduler.set_timesteps(8)
        y = finish(scheduler, x, scheduler.timesteps[:3])
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[written], scheduler.sigmas[written.start :]
        if written.stop == 6:
            scheduler.sigmas = scheduler.sigmas[:7]
        rest = scheduler.timesteps[3:] if written.start == 0 else scheduler.timesteps
        assert torch.equal(finish(scheduler, y, rest), wanted[written.stop])


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_a_grid_that_is_written_is_run_with_classical_rows(prediction_type):
    x = noise()
    times = [980.0, 600.0, 250.0, 40.0]
    for solvers in ("classical", make_solvers(4, 8)):
        scheduler = make_any(prediction_type, solvers=solvers)
        wanted = states_of(scheduler, x, timesteps=times)
        levels = scheduler.sigmas
        for n in (4, 8):
            for write in (("timesteps",), ("timesteps", "sigmas"), ("sigmas", "timesteps")):
                scheduler.set_timesteps(n)
                for name in write:
                    setattr(scheduler, name, torch.tensor(times) if name == "timesteps" else levels.clone())
                assert_close(finish(scheduler, x), wanted[-1], 1e-5)  # levels are float32
        scheduler.set_timesteps(4)
        scheduler.timesteps[:] = torch.tensor(times)  # in place
        assert_close(finish(scheduler, x), wanted[-1], 1e-5)
        scheduler.set_timesteps(4)
        scheduler.timesteps = torch.tensor(times)
        scheduler.sigmas = scheduler.sigmas.clone()
        scheduler.sigmas[:] = levels
        assert_close(finish(scheduler, x), wanted[-1], 1e-5)
        scheduler.set_timesteps(4)
        scheduler.timesteps, scheduler.sigmas = torch.tensor(times[:3]), levels[:4].clone()  # ends early
        assert_close(finish(scheduler, x), wanted[3], 1e-5 if prediction_type == "flow_prediction" else 0.05)


def test_levels_that_are_written_move_the_nodes_only():
    """What the network is fed stays as it is."""
    scheduler, x = make_flow(), noise()
    scheduler.set_timesteps(4)
    scheduler.sigmas = torch.tensor([0.9, 0.6, 0.5, 0.2, 0.0])
    got = finish(scheduler, x)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    wanted = SolverSpec.adams_bashforth([0.9, 0.6, 0.5, 0.2, 0.0], 2).to_dict()
    table = {**wanted, "timesteps": [1000.0, 750.0, 500.0, 250.0]}
    assert_close(got, states_of(make_flow(solvers={"4": table}), x, 4)[-1], 1e-6)


def test_what_cannot_be_followed_is_refused_with_the_reason():
    scheduler, x = make_flow(solvers=make_solvers(8)), noise()
    for name, value, reason in (
        ("sigmas", lambda s: s.sigmas[4:], r"sigmas was written with 5 entries for 8 timesteps; write both"),
        ("timesteps", lambda s: s.timesteps.flip(0), r"cannot be run: nodes\[1\] is .* must fall"),
        ("timesteps", lambda s: s.timesteps.repeat_interleave(2), r"cannot be run: nodes\[1\] is"),
    ):
        scheduler.set_timesteps(8)
        setattr(scheduler, name, value(scheduler))
        for _ in range(2):
            with pytest.raises(ValueError, match=reason):
                scheduler.step(x, scheduler.timesteps[0], x)
    for name in ("timesteps", "sigmas"):
        for value in (None, [], torch.ones(2, 2), 3.0):
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                setattr(scheduler, name, value)
    scheduler.set_timesteps(8)
    scheduler.timesteps, scheduler.sigmas = scheduler.timesteps.double(), scheduler.sigmas.double()  # no change
    assert torch.equal(finish(scheduler, x), states_of(scheduler, x, 8)[-1])


def test_nothing_is_read_from_a_device_where_nothing_was_written(monkeypatch):
    scheduler, x = make_flow(), noise(dtype=torch.float32)
    scheduler.set_timesteps(3)
    twin = copy.deepcopy(scheduler)
    for s in (scheduler, twin):
        with monkeypatch.context() as patch:
            patch.setattr("diffusers_dssolver.writing.as_float64", None)
            finish(s, x, [*s.timesteps])


def test_in_inference_mode_schedules_are_set_and_written():
    with torch.inference_mode():
        scheduler, x = make_flow(solvers=make_solvers(8)), noise()
        wanted = states_of(scheduler, x, 8)
        scheduler.set_timesteps(8)
        scheduler.timesteps = scheduler.timesteps[:3]
        assert torch.equal(finish(scheduler, x), wanted[3])


def edits(name, value):
    """Ways to change a key of a live configuration."""

    def attribute(s):
        setattr(s.config, name, value)

    def item(s):
        s.config[name] = value

    return [attribute, item, lambda s: s.register_to_config(**{name: value})]


@pytest.mark.parametrize("name", ["shift", "flow_shift"])
@pytest.mark.parametrize(
    "solvers", ["classical", "sit-xl-2-256", make_solvers(4)], ids=["classical", "published", "own"]
)
def test_a_shift_that_is_written_is_followed(name, solvers):
    """Wan, xFuser and SD.Next set flow_shift in the configuration of a model that came with UniPC."""
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    nfe = 5 if solvers == "sit-xl-2-256" else 4
    ways = edits(name, 8.0) + ([lambda s: s.set_shift(8.0)] if name == "shift" else [])
    for write in ways:
        scheduler = DSSolverScheduler.from_config(unipc.config, solvers=solvers)
        scheduler.set_timesteps(nfe)
        before = scheduler.sigmas.double()
        write(scheduler)
        for _ in range(2):
            scheduler.set_timesteps(nfe)
            ratio = 8 / 3
            assert_close(scheduler.sigmas, ratio * before / (1 + (ratio - 1) * before), 1e-6)
        assert scheduler.shift == scheduler.config.shift == scheduler.config["flow_shift"] == 8.0
        assert UniPCMultistepScheduler.from_config(scheduler.config).config.flow_shift == 8.0
    assert DSSolverScheduler.from_config(unipc.config, solvers=solvers, shift=5.0).shift == 5.0


def test_every_key_that_is_written_is_read():
    scheduler = make_flow(solvers=make_solvers(4))
    scheduler.register_to_config(solvers=make_solvers(6), strict=True, note="kept")
    assert scheduler.tables == (6,) and scheduler.config.note == "kept"
    with pytest.raises(ValueError, match="there are tables for: 6"):
        scheduler.set_timesteps(4)
    scheduler.config.strict = False
    scheduler.config["invert_sigmas"] = True
    scheduler.set_timesteps(4)
    assert (scheduler.timesteps.diff() > 0).all()
    vp = DSSolverScheduler()
    for write in edits("prediction_type", "v_prediction") + edits("beta_end", 0.012):
        write(vp)
    vp.set_timesteps(4)
    wanted = DSSolverScheduler(prediction_type="v_prediction", beta_end=0.012)
    assert torch.equal(states_of(vp, noise(), 4)[-1], states_of(wanted, noise(), 4)[-1])


def test_a_change_that_solvers_cannot_follow_is_refused_and_undone():
    scheduler = DSSolverScheduler.from_published("dit-xl-2-256")
    for changes, reason in (
        ({"beta_end": 0.012}, "cannot follow: it was searched with beta_end = 0.02, this model has 0.012"),
        ({"prediction_type": "flow_prediction"}, "cannot follow: it is for vp models"),
        ({"history_length": 0}, "history_length is 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            scheduler.register_to_config(**changes)
        assert {key: scheduler.config[key] for key in changes} != changes
    scheduler.config.beta_schedule = "scaled_linear"
    with pytest.raises(ValueError, match="cannot follow: it was searched with beta_schedule"):
        scheduler.set_timesteps(5)
    unknown = make_flow(use_dynamic_shifting=True, solvers=make_solvers(4))
    with pytest.raises(ValueError, match="cannot follow"):  # at which shift they were searched is not known
        unknown.set_shift(2.0)
    with pytest.raises(ValueError, match="shift is of flow models"):
        scheduler.set_shift(2.0)


@pytest.mark.parametrize("name", ["betas", "alphas", "alphas_cumprod"])
def test_tables_of_the_noise_schedule_can_be_moved_and_replaced(name):
    """Training scripts move them to the device, and replace them for zero terminal SNR."""
    scheduler, zero = DSSolverScheduler(), DDIMScheduler(rescale_betas_zero_snr=True)
    setattr(scheduler, name, getattr(scheduler, name).double())
    assert getattr(scheduler, name).dtype == torch.float64 and scheduler.config.trained_betas is None
    value = getattr(zero, name)
    setattr(scheduler, name, value)
    assert_close(scheduler.alphas_cumprod, zero.alphas_cumprod.clamp(min=2**-24), 1e-6)
    x, e = noise(), noise(seed=4)
    times = torch.tensor([3, 700])
    assert_close(scheduler.add_noise(x, e, times), zero.add_noise(x, e, times), 1e-5)
    with pytest.raises(ValueError, match="set_timesteps was not called"):
        scheduler.step(x, 3, x)
    searched = DSSolverScheduler.from_published("dit-xl-2-256")
    setattr(searched, name, getattr(searched, name).clone())
    with pytest.raises(ValueError, match="cannot follow: it was searched with"):
        setattr(searched, name, value)
    with pytest.raises(AttributeError):
        setattr(make_flow(), name, value)


# --- knowing what one does not know ----------------------------------------------------------------------------------

NEEDED = {  # by constructors
    "AmusedScheduler": {"mask_token_id": 1},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
UNKNOWN, OTHER = "neither betas nor a flow shift", "keep its own scheduler"
VP_CLASSES = """CogVideoXDDIM CogVideoXDPM DDIMInverse DDIMParallel DDIM DDPMParallel DDPM DEISMultistep
    DPMSolverMultistepInverse DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE EulerAncestralDiscrete EulerDiscrete
    HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM RePaint SASolver TCD UnCLIP UniPCMultistep"""
FLOW_CLASSES = "FlowMapEulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM MiniMaxH3"
# EDM's noise levels, several resolutions, policies
OTHER_CLASSES = """CMStochasticIterative ConsistencyDecoder CosineDPMSolverMultistep EDMDPMSolverMultistep EDMEuler
    HeliosDMD Helios Piflow SCM"""
# nothing that tells a schedule: other processes, masks and text, or a schedule inside the class
UNKNOWN_CLASSES = """Amused BlockRefinement DDPMWuerstchen DiscreteDDIM EntropyBound IPNDM KarrasVe LTXEulerAncestralRF
    RFD4Proteina ScoreSdeVe ScoreSdeVp VQDiffusion"""
KINDS = {"vp": VP_CLASSES, "flow": FLOW_CLASSES, OTHER: OTHER_CLASSES, UNKNOWN: UNKNOWN_CLASSES}
VERDICTS = {name: verdict for verdict, names in KINDS.items() for name in names.split()}
CLASSES = sorted(
    name
    for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and isinstance(getattr(diffusers.schedulers, name), type)
)


def made(name):
    """A scheduler of diffusers with its own defaults, or a skip where a library is missing."""
    try:
        return getattr(diffusers.schedulers, name)(**NEEDED.get(name, {}))
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_every_scheduler_class_of_diffusers_is_known_or_refused(name):
    verdict = VERDICTS.get(name.removesuffix("Scheduler"))
    assert verdict, f"{name} is new: write down what from_config makes of it"
    theirs = made(name)
    for config in (theirs.config, dict(theirs.config), json.loads(theirs.to_json_string())):
        for solvers in ("classical", None):
            if verdict in (UNKNOWN, OTHER):
                with pytest.raises(ValueError, match=verdict):
                    DSSolverScheduler.from_config(config, solvers=solvers)
            elif solvers:
                ours = DSSolverScheduler.from_config(config, solvers=solvers)
                assert (ours.config.prediction_type == "flow_prediction") == (verdict == "flow")
                if verdict == "vp" and not name.endswith("InverseScheduler"):
                    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_distilled_models_are_told_where_their_scheduler_marks_them(tmp_path, caplog):
    """Their few-step sampler is part of the model. A pipeline's own marks (`is_distilled`, `sample_sigmas`) never reach
    a scheduler; those of SCM (Sana-Sprint) and PiFlow are errors already."""
    marked = {
        "LCM or TCD": [LCMScheduler(), TCDScheduler()],
        "flow LCM": [FlowMatchLCMScheduler()],
        "stochastic_sampling": [FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)],
        "a flow map": [diffusers.FlowMapEulerDiscreteScheduler()],
        "Turbo": [EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **SD_CONFIG)],
        None: [
            EulerAncestralDiscreteScheduler(),
            EulerDiscreteScheduler(timestep_spacing="trailing"),
            FlowMatchEulerDiscreteScheduler(),
            DDIMScheduler(timestep_spacing="trailing"),
        ],
    }
    for kind, schedulers in marked.items():
        for theirs in schedulers:
            theirs.save_pretrained(tmp_path)  # a pipeline's scheduler was loaded, so it knows its class
            loaded = type(theirs).from_pretrained(tmp_path)
            caplog.clear()
            ours = DSSolverScheduler.from_config(loaded.config, solvers="classical")
            told = [r.message for r in caplog.records if "distilled" in r.message]
            assert [f"distilled model ({kind})" in message for message in told] == [True] * (kind is not None)
            DSSolverScheduler.from_config(ours.config)
            assert len([r for r in caplog.records if "distilled" in r.message]) == len(told)  # once


def test_a_schedule_that_is_named_is_taken():
    config = made("LTXEulerAncestralRFScheduler").config
    ours = DSSolverScheduler.from_config(config, prediction_type="flow_prediction", shift=2.0, solvers="classical")
    assert ours.shift == 2.0 and ours.config.prediction_type == "flow_prediction"
    wuerstchen = made("DDPMWuerstchenScheduler").config
    named = DSSolverScheduler.from_config(wuerstchen, beta_schedule="squaredcos_cap_v2", solvers="classical")
    assert named.config.beta_schedule == "squaredcos_cap_v2"
    with pytest.raises(ValueError, match=r"its keys: none\), so the noise schedule is unknown"):
        DSSolverScheduler.from_config({})


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
@pytest.mark.parametrize("by", ["live", "dict", "file", "UniPC"])
def test_a_scheduler_made_by_its_constructor_comes_back_as_itself(prediction_type, by, tmp_path):
    if prediction_type == "sample" and by == "UniPC":
        pytest.skip("one type is enough")
    ours = make_any(prediction_type)
    if by == "file":
        ours.save_pretrained(tmp_path)
    config = {
        "live": lambda: ours.config,
        "dict": lambda: dict(ours.config),
        "file": lambda: DSSolverScheduler.load_config(tmp_path),
        "UniPC": lambda: UniPCMultistepScheduler.from_config(ours.config).config,
    }[by]()
    back = DSSolverScheduler.from_config(config)
    assert back.tables == () and back.config.solvers == "classical"
    assert back.config.prediction_type == prediction_type and not back.config.continuous_time
    assert torch.equal(states_of(back, noise(), 4)[-1], states_of(ours, noise(), 4)[-1])


# --- loading as diffusers loads --------------------------------------------------------------------------------------

OPTIONS = {
    "variant": (None, "fp16"), "torch_dtype": (torch.bfloat16,), "dtype": (torch.float16,), "use_safetensors": (True,),
    "device_map": (None, "balanced"), "low_cpu_mem_usage": (True,), "trust_remote_code": (True, False),
    "max_memory": ({0: "1GB"},), "offload_folder": ("x",), "offload_state_dict": (True,), "use_flashpack": (False,),
    "disable_mmap": (False,), "quantization_config": (None,), "local_files_only": (True,), "revision": (None, "main"),
    "token": (None,), "cache_dir": (None,), "force_download": (False,), "proxies": (None,),
}  # fmt: skip


def test_options_that_diffusers_passes_to_every_component_are_taken(tmp_path):
    make_flow(solvers=make_solvers(4)).save_pretrained(tmp_path)
    for name, values in OPTIONS.items():
        for value in values:
            loaded = DSSolverScheduler.from_pretrained(tmp_path, **{name: value})
            assert loaded.tables == (4,) and name not in loaded.config
    strict, unused = DSSolverScheduler.from_pretrained(
        tmp_path, variant="fp16", strict=True, return_unused_kwargs=True, torch_dtype=torch.float16
    )
    assert strict.config.strict and "variant" not in unused
    for wrong in ("varient", "solver", "dtypes"):
        with pytest.raises(ValueError, match=f"no argument '{wrong}'"):
            DSSolverScheduler.from_pretrained(tmp_path, **{wrong: None})


def test_a_component_of_a_modular_pipeline_is_loaded(tmp_path):
    """Its `load` passes `variant=None` always; a failure there leaves the pipeline with `scheduler=None`."""
    ours = make_flow(solvers=make_solvers(4))
    ours.save_pretrained(tmp_path)
    spec = ComponentSpec("scheduler", DSSolverScheduler, pretrained_model_name_or_path=str(tmp_path))
    for options in ({}, {"torch_dtype": torch.bfloat16}, {"variant": "fp16"}):
        assert spec.load(**options).solvers == ours.solvers


class OnlyAScheduler(ModularPipelineBlocks):
    """The smallest modular pipeline."""

    model_name = "none"

    @property
    def expected_components(self):
        return [ComponentSpec("scheduler", DSSolverScheduler)]

    @torch.no_grad()
    def __call__(self, components, state):
        return components, state


def test_a_saved_modular_pipeline_comes_back_with_its_scheduler(tmp_path):
    ours = make_flow(solvers=make_solvers(4))
    ours.save_pretrained(tmp_path / "solver")
    pipe = OnlyAScheduler().init_pipeline()
    spec = pipe.get_component_spec("scheduler")
    spec.pretrained_model_name_or_path = str(tmp_path / "solver")
    pipe.update_components(scheduler=spec.load())
    pipe.save_pretrained(str(tmp_path / "pipe"), overwrite_modular_index=True)
    again = OnlyAScheduler().init_pipeline(str(tmp_path / "pipe"))
    again.load_components()
    assert isinstance(again.scheduler, DSSolverScheduler) and again.scheduler.solvers == ours.solvers


# --- the surface of the stock classes --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_every_name_of_the_stock_classes_is_there_or_absent_for_a_reason():
    names, have = surface.surface(), surface.ours()
    assert len(names) > 60
    missing = {name for name in names if name not in have}
    assert not missing - set(surface.REASONS), "write down why, or add it"
    assert not set(surface.REASONS) - missing, "these are there, or no longer in diffusers"
    assert surface.TABLE.read_text(encoding="utf-8") == surface.render(), "run python -m tests.runtime.surface"


def test_names_of_training_scripts_are_ddims(monkeypatch):
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.torch", DoubleTorch())
    theirs, ours = DDIMScheduler(**SD_CONFIG), DSSolverScheduler(**SD_CONFIG)
    x, e, times = noise(3, 2, 4), noise(3, 2, 4, seed=4), torch.tensor([0, 499, 999])
    assert_close(ours.get_velocity(x, e, times), theirs.get_velocity(x, e, times), 1e-12)
    assert_close(ours.alphas, theirs.alphas, EPS)
    assert ours.final_alpha_cumprod == theirs.final_alpha_cumprod
    euler = EulerDiscreteScheduler(**SD_CONFIG)
    ours.set_timesteps(10)
    assert (ours.sigma_max, ours.sigma_min) == pytest.approx(
        (euler.sigmas[0].item(), euler.sigmas[-2].item()), rel=1e-4
    )
    log_sigmas = np.log(euler.sigmas.numpy()[:-1][::-1])
    for level in (14.0, 1.3, 0.05):
        assert ours._sigma_to_t(level) == pytest.approx(float(euler._sigma_to_t(np.array(level), log_sigmas)), abs=1e-2)
    alpha, sigma = ours._sigma_to_alpha_sigma_t(ours.sigmas)
    assert_close(sigma / alpha, ours.sigmas, 1e-5)
    assert_close(alpha**2 + sigma**2, torch.ones(11), 1e-6)
    ddpm = DDPMScheduler(timestep_spacing="trailing", **SD_CONFIG)
    ddpm.set_timesteps(10)
    for t in ddpm.timesteps:
        assert float(ours.previous_timestep(t)) == pytest.approx(float(ddpm.previous_timestep(t)), abs=1e-3)


def test_names_of_flow_schedulers_are_flow_match_eulers():
    theirs, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), make_flow(shift=3.0)
    assert (ours.sigma_max, ours.sigma_min) == pytest.approx((theirs.sigma_max, theirs.sigma_min), rel=1e-6)
    for s in (ours, theirs):
        s.set_shift(2.0)
        s.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    assert ours.shift == theirs.shift == 2.0
    assert_close(ours.sigmas, theirs.sigmas, 1e-6)
    x, e = noise(), noise(seed=4)
    assert torch.equal(ours.get_velocity(x, e, 300), e - x)
    assert torch.equal(make_flow(invert_sigmas=True).get_velocity(x, e, 300), x - e)
    for i, t in enumerate(ours.timesteps):
        assert ours.index_for_timestep(t) == theirs.index_for_timestep(theirs.timesteps[i]) == i
        assert ours.index_for_timestep(float(t) + 3) == i
        assert ours.index_for_timestep(t, ours.timesteps.flip(0)) == 2 - i
        for begin in (None, 1):
            ours.set_timesteps(3)
            if begin is not None:
                ours.set_begin_index(begin)
            ours._init_step_index(ours.timesteps[i])
            assert ours.step_index == (i if begin is None else begin)


def test_a_start_by_init_step_index_is_a_start_in_the_middle():
    """DemoFusion sets the index once and steps from there."""
    scheduler, x = make_flow(solvers=make_solvers(6)), noise()
    scheduler.set_timesteps(6)
    wanted = finish(scheduler, x, scheduler.timesteps[2:])
    scheduler.set_timesteps(6)
    scheduler._init_step_index(scheduler.timesteps[2])
    assert torch.equal(finish(scheduler, x, scheduler.timesteps[2:].tolist()), wanted)
