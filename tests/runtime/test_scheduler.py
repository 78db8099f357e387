"""The contract of `DSSolverScheduler`: equal to diffusers where that has the same solver, exact where it has not."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from diffusers_dssolver import DSSolverScheduler, SolverSpec, published_solvers
from diffusers_dssolver.paths import FlowPath, VPPath, make_betas
from diffusers_dssolver.published import published_config
from tests.problems import DoubleTorch, quantity, rollout

VP_TYPES = ("epsilon", "v_prediction", "sample")
ALL_TYPES = (*VP_TYPES, "flow_prediction")
SD_CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LOGGER = "diffusers_dssolver.scheduler"
EPS = torch.finfo(torch.float32).eps  # twice the error of one rounding to float32


def make_table(nfe, seed=0, first=1.0, fed=False, peak=1000.0):
    """A solver as it stands in a file: uneven nodes, full rows that sum to 1."""
    rng = np.random.default_rng(100 * nfe + seed)
    widths = rng.uniform(0.5, 1.5, nfe)
    nodes = first * (1 - np.concatenate([[0.0], np.cumsum(widths) / widths.sum()]))
    nodes[-1] = 0.0
    rows = []
    for i in range(nfe):
        row = rng.normal(0, 0.3, i + 1)
        row[-1] += 1 - row.sum()
        rows.append(row.tolist())
    table = {"nodes": nodes.tolist(), "coefficients": rows}
    if fed:
        table["timesteps"] = (nodes[:-1] * peak * 0.97).tolist()
    return table


def make_solvers(*nfes, **kwargs):
    return {str(n): make_table(n, **kwargs) for n in nfes}


def make_flow(**config):
    return DSSolverScheduler(prediction_type="flow_prediction", **config)


def make_any(prediction_type, **config):
    return DSSolverScheduler(prediction_type=prediction_type, **config)


def network(x, t):
    """A smooth nonlinear stand-in for the network; depends on state and time."""
    phase = torch.sin(torch.as_tensor(float(t), dtype=torch.float64) / 300)
    return torch.tanh(1.3 * x + phase.to(x.dtype)) - 0.2 * x


def noise(*shape, dtype=torch.float64, seed=3):
    return torch.randn(*(shape or (2, 4, 3, 3)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def states_of(scheduler, x, nfe=None, model=network, **schedule):
    """All states of a run, as a pipeline makes it."""
    scheduler.set_timesteps(nfe, **schedule)
    states = [x]
    for t in scheduler.timesteps:
        states.append(scheduler.step(model(states[-1], t), t, states[-1], return_dict=False)[0])
    return states


def run(scheduler, x, nfe=None, **schedule):
    return states_of(scheduler, x, nfe, **schedule)[-1]


def assert_close(got, wanted, tolerance):
    error = (got.double() - wanted.double()).abs().max().item()
    assert error <= tolerance * max(1.0, wanted.double().abs().max().item()), error


# --- what pipelines look up ------------------------------------------------------------------------------------------


def test_signatures_list_what_pipelines_look_up():
    names = list(inspect.signature(DSSolverScheduler.set_timesteps).parameters)
    assert names == ["self", "num_inference_steps", "device", "timesteps", "sigmas", "mu"]
    names = list(inspect.signature(DSSolverScheduler.step).parameters)
    named = ["self", "model_output", "timestep", "sample", "generator", "return_dict", "per_token_timesteps"]
    assert names == [*named, "stochastic"]  # and no "eta", which pipelines would look up and offer to their users
    assert list(inspect.signature(DSSolverScheduler.add_noise).parameters)[1:] == [
        "original_samples",
        "noise",
        "timesteps",
    ]
    assert list(inspect.signature(DSSolverScheduler.scale_noise).parameters)[1:] == ["sample", "timestep", "noise"]
    assert "Scheduler" in DSSolverScheduler.__name__  # push_to_hub looks for it


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
def test_a_fresh_object_has_what_pipelines_read(prediction_type):
    scheduler = make_any(prediction_type, num_train_timesteps=500)
    assert scheduler.order == 1
    assert isinstance(scheduler.order, int)
    assert scheduler.init_noise_sigma == 1.0
    assert len(scheduler) == 500
    assert scheduler.config.num_train_timesteps == 500
    assert scheduler.begin_index is None
    assert scheduler.step_index is None
    assert scheduler.config["use_flow_sigmas"] is (prediction_type == "flow_prediction")
    assert len(scheduler.timesteps) == 500
    assert len(scheduler.sigmas) == 501
    x = noise(dtype=torch.float16)
    for t in (0.0, 0, torch.tensor(7.0), None):
        assert scheduler.scale_model_input(x, t) is x
    assert isinstance(scheduler, SchedulerMixin)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 3.0, x)


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
@pytest.mark.parametrize("source", ["classical", "tables"])
def test_every_step_count_is_honoured(prediction_type, source):
    solvers = "classical" if source == "classical" else make_solvers(5, 9)
    scheduler = make_any(prediction_type, solvers=solvers)
    for n in [*range(1, 16), 1000]:
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n == scheduler.num_inference_steps
        assert len(scheduler.sigmas) == n + 1
        assert scheduler.sigmas[-1] == 0
        assert (scheduler.timesteps.diff() < 0).all()
        assert (scheduler.sigmas.diff() < 0).all()
        assert scheduler.timesteps[-1] >= 0
        assert scheduler.timesteps[0] <= 1000
        assert scheduler.timesteps[0].ndim == 0  # pipelines call t.expand(batch)


@pytest.mark.parametrize("wrong", [0, -1, 1001, 2.5, "8", True, None])
def test_a_senseless_step_count_is_refused(wrong):
    with pytest.raises(ValueError, match="num_inference_steps is"):
        make_flow().set_timesteps(wrong)


def test_retrieve_timesteps_of_the_pipelines_takes_all_three_exits():
    scheduler = make_flow(solvers=make_solvers(4))
    table = torch.tensor(make_table(4)["nodes"][:-1]) * 1000
    for kwargs in (
        {"num_inference_steps": 4},
        {"sigmas": np.linspace(1, 1 / 4, 4), "mu": 0.7},
        {"timesteps": table.tolist()},
    ):
        times, count = retrieve_timesteps(scheduler, device="cpu", **kwargs)
        assert count == 4
        assert_close(times, table, 1e-6)


def test_sigmas_tell_the_noise_level():
    flow = make_flow(solvers=make_solvers(6))
    flow.set_timesteps(6)
    assert_close(flow.sigmas[:-1] * 1000, flow.timesteps, 1e-6)
    vp = DSSolverScheduler()
    vp.set_timesteps(10)
    bar = DDIMScheduler().alphas_cumprod.double()[vp.timesteps.round().long()]
    assert_close(vp.sigmas[:-1], torch.sqrt((1 - bar) / bar), 1e-5)


# --- equal to diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", VP_TYPES)
@pytest.mark.parametrize("nfe", [1, 2, 20])
@pytest.mark.parametrize(
    "betas", [{}, SD_CONFIG, {"beta_schedule": "squaredcos_cap_v2"}], ids=["linear", "scaled", "cosine"]
)
def test_classical_vp_is_dpm_solver_pp_2m(prediction_type, nfe, betas, monkeypatch):
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.torch", DoubleTorch())
    theirs = DPMSolverMultistepScheduler(
        prediction_type=prediction_type, solver_order=2, timestep_spacing="trailing", final_sigmas_type="zero", **betas
    )
    ours = DSSolverScheduler.from_config(theirs.config, solvers="classical")
    x = noise()
    wanted, got = states_of(theirs, x, nfe), states_of(ours, x, nfe)
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 20 * EPS)  # their sigmas are rounded to float32
    if nfe > 2:
        euler = DPMSolverMultistepScheduler.from_config(theirs.config, solver_order=1)
        assert (run(euler, x, nfe) - wanted[-1]).abs().max() > 2e-3  # the tolerance tells the orders apart


def test_classical_vp_with_zero_terminal_snr_is_diffusers(monkeypatch):
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.torch", DoubleTorch())
    theirs = DPMSolverMultistepScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    ours = DSSolverScheduler.from_config(theirs.config, solvers="classical")
    x = noise()
    for a, b in zip(states_of(ours, x, 10), states_of(theirs, x, 10), strict=True):
        assert_close(a, b, 20 * EPS)  # their sigmas are rounded to float32
    assert (run(DSSolverScheduler(prediction_type="v_prediction"), x, 10) - run(theirs, x, 10)).abs().max() > 5e-3


@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({}, None),
        ({"shift": 3.0}, None),
        ({"use_dynamic_shifting": True}, 0.83),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.1),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.6),
        ({"shift": 2.0, "shift_terminal": 0.1}, None),
        ({"invert_sigmas": True}, None),
    ],
)
@pytest.mark.parametrize("nfe", [1, 6])
def test_euler_rows_are_flow_match_euler(config, mu, nfe):
    if nfe == 1 and config.get("shift_terminal"):
        pytest.skip("diffusers divides by zero there")
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    schedule = {"sigmas": np.linspace(1, 1 / nfe, nfe).tolist(), "mu": mu}
    theirs.set_timesteps(**schedule)
    x = noise()
    wanted = states_of(theirs, x, **schedule)
    nodes = theirs.sigmas.double()
    nodes = 1 - nodes if config.get("invert_sigmas") else nodes
    classical = make_flow(**config)
    classical.set_timesteps(**schedule)
    assert_close(classical.timesteps, theirs.timesteps, 1e-6)
    assert_close(classical.sigmas, theirs.sigmas, 1e-6)
    if nfe == 1:
        got = states_of(classical, x, **schedule)
    else:  # the same nodes with a history of one, as a table
        table = make_flow(**config, solvers={str(nfe): SolverSpec.euler(nodes.tolist()).to_dict()})
        got = states_of(table, x, nfe)
        assert (run(classical, x, **schedule) - wanted[-1]).abs().max() > 1e-3  # order 2 differs
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-5)


def test_mu_shifts_only_where_the_configuration_says_so_and_is_remembered():
    plain, dynamic = make_flow(), make_flow(use_dynamic_shifting=True)
    plain.set_timesteps(5)
    unshifted = plain.timesteps
    plain.set_timesteps(5, mu=1.0)
    assert torch.equal(plain.timesteps, unshifted)
    dynamic.set_timesteps(5, mu=1.0)
    shifted = dynamic.timesteps
    assert (shifted[1:] > unshifted[1:] + 1).all()
    dynamic.set_timesteps(5)
    assert torch.equal(dynamic.timesteps, shifted)


@pytest.mark.parametrize("times", [[0, 1, 500, 999], [10], [999.0]])
@pytest.mark.parametrize("betas", [{}, SD_CONFIG], ids=["linear", "scaled"])
def test_add_noise_is_ddim(times, betas, monkeypatch):
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.torch", DoubleTorch())
    x, e = noise(4, 2, 3, 3), noise(4, 2, 3, 3, seed=4)
    wanted = DDIMScheduler(**betas).add_noise(x, e, torch.tensor(times).long())
    ours = DSSolverScheduler(**betas)
    for _ in range(2):  # before and after set_timesteps
        assert_close(ours.add_noise(x, e, torch.tensor(times)), wanted, 1e-12)
        ours.set_timesteps(7)


def test_add_noise_between_timesteps_lies_between():
    ours, x, e = DSSolverScheduler(), noise(), noise(seed=4)
    low, mid, high = (ours.add_noise(torch.zeros_like(x), e, t) / e for t in (400, 400.25, 401))
    assert (low < mid).all()
    assert (mid < high).all()
    assert_close((mid - low) / (high - low), torch.full_like(x, 0.25), 1e-2)
    both = ours.add_noise(x, e, torch.tensor([400.25, 10.0]))
    assert torch.equal(both[:1], ours.add_noise(x[:1], e[:1], 400.25))
    assert torch.equal(both[1:], ours.add_noise(x[1:], e[1:], torch.tensor([10])))


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}])
def test_scale_noise_is_flow_match_euler(config):
    theirs, ours = FlowMatchEulerDiscreteScheduler(**config), make_flow(**config)
    x, e = noise(3, 5, 2), noise(3, 5, 2, seed=4)
    sigmas = np.linspace(1, 1 / 6, 6).tolist()
    theirs.set_timesteps(sigmas=sigmas)
    times = theirs.timesteps[[0, 2, 5]]
    wanted = theirs.scale_noise(x, times, e)
    for _ in range(2):
        assert_close(ours.scale_noise(x, times, e), wanted, 1e-6)
        assert_close(ours.add_noise(x, e, times), wanted, 1e-6)
        assert_close(ours.scale_noise(x, times[1:2], e), theirs.scale_noise(x, times[[1, 1, 1]], e), 1e-6)
        ours.set_timesteps(sigmas=sigmas)
    assert_close(ours.scale_noise(x, 321.25, e), x + 0.32125 * (e - x), 1e-12)
    assert_close(ours.scale_noise(x, 250, e), x + 0.25 * (e - x), 1e-12)  # a whole number is a time, not an index


def test_add_noise_keeps_the_samples_dtype_and_computes_in_float32():
    x, e = noise(2, 3), noise(2, 3, seed=4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        got = make_flow().add_noise(x.to(dtype), e.to(dtype), torch.tensor([123.4], dtype=torch.float64))
        assert got.dtype == dtype
        exact = (1 - 0.1234) * x.to(dtype).double() + 0.1234 * e.to(dtype).double()
        inside = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert_close(got, exact, torch.finfo(dtype).eps / 2 + 2 * inside)  # the last rounding, and four inside


# --- equal to the project's own rollout ------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("nfe", [1, 7])
def test_a_run_is_the_rollout_of_the_search(prediction_type, fed, nfe):
    table = make_table(nfe, fed=fed)
    scheduler = make_any(prediction_type, solvers={str(nfe): table})
    x = noise()
    got = states_of(scheduler, x, nfe)

    flow = prediction_type == "flow_prediction"
    path = FlowPath() if flow else VPPath(make_betas(1000, 0.0001, 0.02, "linear", None, False))
    nodes = torch.tensor(table["nodes"], dtype=torch.float64)
    alphas, sigmas = path.alpha_sigma(nodes)
    levels = iter(zip(alphas.tolist(), sigmas.tolist(), strict=True))
    own_times = path.timestep(nodes[:-1]).tolist()
    times = torch.tensor(table.get("timesteps", own_times), dtype=torch.float32)
    assert torch.equal(scheduler.timesteps, times)

    def evaluate(state, t):
        return quantity(path, network(state, t), state, *next(levels), prediction_type)

    transitions = zip(*(f.tolist() for f in path.transition(alphas, sigmas)), strict=True)
    wanted = rollout(evaluate, x, times.tolist(), transitions, table["coefficients"])
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-12)


def test_a_flow_table_against_the_equation_written_out():
    table, x = make_table(6), noise()
    velocities, by_hand = [], x
    for i, row in enumerate(table["coefficients"]):
        velocities.append(network(by_hand, torch.tensor(table["nodes"][i] * 1000, dtype=torch.float32)))
        mean = sum(c * v for c, v in zip(row, velocities, strict=True))
        by_hand = by_hand + (table["nodes"][i + 1] - table["nodes"][i]) * mean
    assert_close(run(make_flow(solvers={"6": table}), x, 6), by_hand, 1e-12)


@pytest.mark.parametrize("prediction_type", ALL_TYPES)
def test_a_network_that_knows_the_answer_is_integrated_exactly(prediction_type):
    scheduler = make_any(prediction_type, solvers=make_solvers(5))
    data, e = noise(seed=8), noise(seed=9)
    scheduler.set_timesteps(5)
    x = scheduler.add_noise(data, e, scheduler.timesteps[0])
    for t in scheduler.timesteps:
        alpha = scheduler.add_noise(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), t)
        sigma = scheduler.add_noise(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), t)
        answer = {"epsilon": e, "sample": data, "v_prediction": alpha * e - sigma * data, "flow_prediction": e - data}
        out = scheduler.step(answer[prediction_type], t, x)
        assert_close(out.pred_original_sample, data, 1e-3)  # the step's times are float32
        x = out.prev_sample
    assert_close(x, data, 1e-4)


# --- starting in the middle, restarts, copies ------------------------------------------------------------------------


def continue_from(scheduler, x, index, announced, convert=lambda t: t):
    if announced:
        scheduler.set_begin_index(index)
    for t in scheduler.timesteps[index:]:
        x = scheduler.step(network(x, t), convert(t), x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("index", [1, 4, 7])
def test_a_start_in_the_middle_needs_no_announcement(prediction_type, index):
    scheduler, x = make_any(prediction_type, solvers=make_solvers(8)), noise()
    conversions = [
        lambda t: t,
        float,
        lambda t: t.clone(),
        lambda t: t.double(),
        lambda t: t.expand(3)[0],
        lambda t: t[None],
    ]
    results = []
    for announced in (False, True):
        for convert in conversions:
            scheduler.set_timesteps(8)
            results.append(continue_from(scheduler, x, index, announced, convert))
            assert scheduler.step_index == 8
    assert all(torch.equal(r, results[0]) for r in results)

    # the same by hand: row i of the table, its weights for what is missing given to the oldest that is there
    path = FlowPath() if prediction_type == "flow_prediction" else scheduler.path
    table = make_table(8)
    nodes = torch.tensor(table["nodes"], dtype=torch.float64)
    alphas, sigmas = path.alpha_sigma(nodes)
    a, b = path.transition(alphas, sigmas)
    ds, y = [], x
    for i in range(index, 8):
        t = path.timestep(nodes)[i].float()
        ds.append(quantity(path, network(y, t), y, alphas[i], sigmas[i], prediction_type))
        row = table["coefficients"][i]
        folded = [sum(row[: i - len(ds) + 2]), *row[i - len(ds) + 2 :]]
        y = a[i] * y + b[i] * sum(c * d for c, d in zip(folded, ds, strict=True))
        if i == index:
            euler = a[i] * x + b[i] * ds[0]  # the first row is Euler's
            assert_close(y, euler, 1e-12)
    assert_close(results[0], y, 1e-12)


def test_the_announced_index_counts_where_the_time_is_ambiguous():
    scheduler, x = make_flow(solvers=make_solvers(8)), noise()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    assert scheduler.begin_index == 3
    scheduler.step(network(x, 1.0), 1.0, x)
    assert scheduler.step_index == 4
    scheduler.set_timesteps(8)
    assert scheduler.begin_index is None
    assert scheduler.step_index is None


def test_the_same_index_twice_replaces_the_last_quantity():
    scheduler, x = make_flow(solvers=make_solvers(5)), noise()
    wanted = run(scheduler, x, 5)
    for step_twice_at in range(5):
        scheduler.set_timesteps(5)
        y = x
        for i, t in enumerate(scheduler.timesteps):
            if i == step_twice_at:
                scheduler.step(torch.full_like(y, 1e3), t, y)
            y = scheduler.step(network(y, t), t, y, return_dict=False)[0]
        assert torch.equal(y, wanted)


def test_step_index_set_back_from_outside_replaces_too():  # Cosmos 1
    scheduler, x = make_flow(solvers=make_solvers(5)), noise()
    wanted = run(scheduler, x, 5)
    scheduler.set_timesteps(5)
    y = x
    for t in scheduler.timesteps.tolist():
        scheduler.step(torch.full_like(y, 1e3), t, y)
        scheduler._step_index -= 1
        y = scheduler.step(network(y, t), t, y, return_dict=False)[0]
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("again", [True, False], ids=["set_timesteps", "same schedule"])
def test_a_restart_after_an_aborted_run_is_a_fresh_run(again):
    scheduler, x = make_flow(solvers=make_solvers(6)), noise()
    wanted = run(scheduler, x, 6)
    for steps in (1, 3, 6):
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps[:steps]:
            scheduler.step(torch.full_like(x, 1e3), t, x)
        if again:
            scheduler.set_timesteps(6)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(network(y, t), t, y, return_dict=False)[0]
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("announced", [True, False])
def test_a_run_that_starts_where_the_last_one_stopped_knows_nothing_of_it(announced):
    scheduler, x = make_flow(solvers=make_solvers(6)), noise()
    scheduler.set_timesteps(6)
    wanted = continue_from(scheduler, x, 3, announced)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:3]:
        scheduler.step(torch.full_like(x, 1e3), t, x)
    scheduler.set_timesteps(6)
    assert torch.equal(continue_from(scheduler, x, 3, announced), wanted)


def test_another_shape_or_a_jump_drops_the_history():
    scheduler, x = make_flow(solvers=make_solvers(6)), noise()
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:3]:
        scheduler.step(torch.full_like(x, 1e3), t, x)
    small = noise(1, 4, 3, 3, seed=6)
    got = scheduler.step(network(small, 0), scheduler.timesteps[3], small, return_dict=False)[0]
    nodes = make_table(6)["nodes"]
    assert_close(got, small + (nodes[4] - nodes[3]) * network(small, 0), 1e-12)

    scheduler.set_timesteps(6)
    scheduler.step(torch.full_like(x, 1e3), scheduler.timesteps[0], x)
    got = scheduler.step(network(x, 0), scheduler.timesteps[2], x, return_dict=False)[0]
    assert_close(got, x + (nodes[3] - nodes[2]) * network(x, 0), 1e-12)


def test_steps_past_the_end_and_unequal_shapes_are_refused():
    scheduler, x = make_flow(), noise()
    run(scheduler, x, 3)
    with pytest.raises(ValueError, match="all 3 steps were taken"):
        scheduler.step(x, 0.5, x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"shape \(2, 8, 3, 3\)"):
        scheduler.step(noise(2, 8, 3, 3), scheduler.timesteps[0], x)
    assert_close(run(scheduler, x, 3), run(make_flow(), x, 3), 0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [None, 0, 1, 4])
def test_copies_continue_alike_and_apart(clone, steps):
    original, x = make_flow(solvers=make_solvers(6)), noise()
    wanted = run(original, x, 6)
    original = make_flow(solvers=make_solvers(6))
    if steps is None:
        assert torch.equal(run(clone(original), x, 6), wanted)
        return
    original.set_timesteps(6)
    y = x
    for t in original.timesteps[:steps]:
        y = original.step(network(y, t), t, y, return_dict=False)[0]
    second, third = clone(original), clone(original)
    assert dict(second.config) == dict(original.config)
    # with the times of another object, with its own, and the original last: it must not have moved on with its copies
    for scheduler, times in ((second, original.timesteps), (third, third.timesteps), (original, third.timesteps)):
        assert scheduler.step_index == (steps or None)
        z = y
        for t in times[steps:]:
            z = scheduler.step(network(z, t), t, z, return_dict=False)[0]
        assert torch.equal(z, wanted)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_a_step_reads_nothing_back_from_the_device(prediction_type, monkeypatch):
    scheduler, x = make_any(prediction_type, solvers=make_solvers(5)), noise()
    output = network(x, 3)
    scheduler.set_timesteps(5)
    times = list(scheduler.timesteps[2:]) + list(scheduler.timesteps)

    def forbidden(*args, **kwargs):
        raise AssertionError("a host synchronisation")

    names = [
        "item",
        "cpu",
        "tolist",
        "nonzero",
        "numpy",
        "argmin",
        "__float__",
        "__int__",
        "__bool__",
        "__index__",
        "__contains__",
    ]
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, forbidden)
        for t in times:
            scheduler.step(output, t, x)
    assert scheduler.step_index == 5


def test_history_holds_only_what_later_rows_need():
    for prediction_type in ("epsilon", "flow_prediction"):
        scheduler, x, most = make_any(prediction_type), noise(), 0
        scheduler.set_timesteps(50)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
            most = max(most, len(scheduler.model_outputs))
        assert 2 <= most <= 3
    full, x = make_flow(solvers=make_solvers(9)), noise()
    full.set_timesteps(9)
    for i, t in enumerate(full.timesteps):
        x = full.step(network(x, t), t, x).prev_sample
        assert len(full.model_outputs) == i + 1
    full.set_timesteps(9)
    assert not full.model_outputs


def test_a_row_that_reaches_far_back_after_short_ones_finds_its_history():
    spec = SolverSpec.euler(make_table(6)["nodes"]).to_dict()
    spec["coefficients"][5] = [0.5, 0.0, 0.0, 0.0, 0.0, 0.5]
    x, ds, y = noise(), [], noise()
    for i, row in enumerate(spec["coefficients"]):
        ds.append(network(y, torch.tensor(spec["nodes"][i] * 1000).float()))
        y = y + (spec["nodes"][i + 1] - spec["nodes"][i]) * sum(c * d for c, d in zip(row, ds, strict=True))
    assert_close(run(make_flow(solvers={"6": spec}), x, 6), y, 1e-12)


def test_the_sample_argument_decides_and_history_is_not_aliased():
    """Inpainting edits the latents between steps, some pipelines in place."""
    scheduler, x = make_flow(solvers=make_solvers(4)), noise()
    scheduler.set_timesteps(4)
    apart, output = copy.deepcopy(scheduler), network(x, 0)
    first = apart.step(output.clone(), apart.timesteps[0], x, return_dict=False)[0]
    edited = first * 0.5 + 1
    wanted = apart.step(network(edited, 0), apart.timesteps[1], edited, return_dict=False)[0]
    y = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)[0]
    y.mul_(0.5).add_(1)
    assert torch.equal(scheduler.step(network(y, 0), scheduler.timesteps[1], y, return_dict=False)[0], wanted)


# --- dtypes and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", ALL_TYPES)
def test_the_models_dtype_outside_float32_inside(dtype, prediction_type):
    scheduler = make_any(prediction_type, solvers=make_solvers(5))
    scheduler.set_timesteps(5)
    exact = copy.deepcopy(scheduler)
    inside = torch.promote_types(dtype, torch.float32)
    x = noise(dtype=torch.float32).to(dtype)
    for t, u in zip(scheduler.timesteps, exact.timesteps, strict=True):
        output = network(x, t)
        got = scheduler.step(output, t, x)
        wanted = exact.step(output.to(inside), u, x.to(inside))
        assert got.prev_sample.dtype == got.pred_original_sample.dtype == dtype
        assert torch.equal(got.prev_sample, wanted.prev_sample.to(dtype))  # rounded once, at the end
        assert torch.equal(got.pred_original_sample, wanted.pred_original_sample.to(dtype))
        assert all(d.dtype == inside for d in scheduler.model_outputs)
        x = got.prev_sample


def test_float32_latents_with_a_half_precision_model():
    scheduler, x = make_flow(), noise(dtype=torch.float32)
    scheduler.set_timesteps(2)
    output = network(x, 0).bfloat16()
    got = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (x - 0.5 * output.float()).bfloat16())
    got = scheduler.step(x, scheduler.timesteps[0], x.half()).prev_sample
    assert got.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 4, 3, 3), (1, 2, 3, 2, 2), (2, 6), (4,)])
def test_any_shape_gives_the_same_numbers(shape):
    x = noise(*shape)
    for solvers in ("classical", make_solvers(5)):
        got = run(make_flow(solvers=solvers), x, 5)
        assert got.shape == x.shape
        assert_close(got.reshape(-1), run(make_flow(solvers=solvers), x.reshape(-1), 5), 1e-12)


def test_channels_last_keeps_numbers_and_layout():
    x = noise(2, 4, 5, 5)
    wanted = run(make_flow(), x, 4)
    got = run(make_flow(), x.to(memory_format=torch.channels_last), 4)
    assert_close(got, wanted, 1e-12)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_both_forms_of_the_result_and_the_generator_agree():
    scheduler, x = make_flow(), noise()
    scheduler.set_timesteps(3)
    t, generator = scheduler.timesteps[0], torch.Generator().manual_seed(0)
    state = generator.get_state()
    first = scheduler.step(x, t, x, generator=generator)
    prev, denoised = scheduler.step(x, t, x, generator, return_dict=False)
    assert torch.equal(first.prev_sample, prev)
    assert torch.equal(first.pred_original_sample, denoised)
    assert torch.equal(first[0], prev)
    assert torch.equal(generator.get_state(), state)
    assert_close(denoised, x - x, 1e-12)  # velocity x at sigma 1


# --- which solver a run uses -----------------------------------------------------------------------------------------


def test_an_unknown_count_is_derived_and_said_once(caplog):
    solvers = make_solvers(4, 8)
    scheduler = make_flow(solvers=solvers)
    with caplog.at_level(logging.WARNING, LOGGER):
        scheduler.set_timesteps(4)
        scheduler.set_timesteps(8)
        assert not caplog.records
        scheduler.set_timesteps(6)
        scheduler.set_timesteps(6)
        assert len(caplog.records) == 1
        assert "no table for 6 steps" in caplog.text
        assert "4, 8" in caplog.text
        middle = scheduler.timesteps
        scheduler.set_timesteps(7)
        assert len(caplog.records) == 2
    # the node curve lies between those of its neighbours
    curves = [np.interp(np.arange(6) / 6, np.arange(n + 1) / n, solvers[str(n)]["nodes"]) * 1000 for n in (4, 8)]
    assert np.abs(middle.numpy() - sum(curves) / 2).max() < 40
    assert np.abs(middle.numpy() - np.arange(6, 0, -1) / 6 * 1000).max() > 20  # and is not the uniform one


def test_classical_says_nothing(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        make_flow().set_timesteps(6)
    assert not caplog.records


def test_strict_raises_and_names_the_tables():
    scheduler = make_flow(solvers=make_solvers(4, 8), strict=True)
    scheduler.set_timesteps(8)
    with pytest.raises(ValueError, match=r"no table for 6 steps \(there are tables for: 4, 8\)"):
        scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="there are tables for: none"):
        make_flow(strict=True).set_timesteps(6)
    assert len(scheduler.timesteps) == 8


def uniform_grids(n):
    ramp = np.linspace(1, 1 / n, n)
    return [
        ramp.tolist(),
        ramp,
        np.linspace(1, 0, n + 1)[:-1],
        torch.tensor(ramp),
        torch.tensor(ramp).float(),
        ramp + 5e-5,
    ]


@pytest.mark.parametrize("grid", range(6))
def test_the_default_sigmas_of_pipelines_pick_the_table_of_their_length(grid):
    scheduler, x = make_flow(solvers=make_solvers(5)), noise()
    assert torch.equal(run(scheduler, x, sigmas=uniform_grids(5)[grid], mu=1.2), run(scheduler, x, 5))


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_own_sigmas_are_honoured(config):
    own = [0.98, 0.7, 0.55, 0.2]
    for solvers in ("classical", make_solvers(4)):
        scheduler, theirs = make_flow(solvers=solvers, **config), FlowMatchEulerDiscreteScheduler(**config)
        mu = 0.7 if config.get("use_dynamic_shifting") else None
        scheduler.set_timesteps(sigmas=own, mu=mu)
        theirs.set_timesteps(sigmas=own, mu=mu)
        assert_close(scheduler.sigmas, theirs.sigmas, 1e-6)
        assert_close(scheduler.timesteps, theirs.timesteps, 1e-6)
        nodes = theirs.sigmas.double().tolist()
        wanted = make_flow(solvers={"4": SolverSpec.adams_bashforth(nodes, 2).to_dict()})
        assert_close(run(scheduler, noise(), sigmas=own, mu=mu), run(wanted, noise(), 4), 1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_own_timesteps_are_honoured(prediction_type):
    own = [998, 700, 333.5, 20]
    for solvers in ("classical", make_solvers(4)):
        scheduler = make_any(prediction_type, solvers=solvers)
        for given in (own, torch.tensor(own), np.array(own)):
            scheduler.set_timesteps(timesteps=given)
            assert scheduler.timesteps.tolist() == pytest.approx(own, abs=1e-3)
            assert scheduler.num_inference_steps == 4
            assert len(scheduler.sigmas) == 5
        scheduler.set_timesteps(4, timesteps=own)
    vp = DPMSolverMultistepScheduler(timestep_spacing="trailing", final_sigmas_type="zero", solver_order=2)
    whole = [998, 700, 333, 20]
    if prediction_type == "epsilon":
        assert_close(run(scheduler, noise(), timesteps=whole), run(vp, noise(), timesteps=whole), 2e-4)


@pytest.mark.parametrize("fed", [False, True])
def test_the_schedulers_own_timesteps_given_back_are_its_table(fed):
    scheduler, x = make_flow(solvers=make_solvers(6, fed=fed)), noise()
    wanted = run(scheduler, x, 6)
    assert_close(run(scheduler, x, timesteps=scheduler.timesteps.tolist()), wanted, 1e-12)


def test_contradictions_and_bad_grids_are_refused():
    scheduler = make_flow(solvers=make_solvers(4))
    scheduler.set_timesteps(4, sigmas=np.linspace(1, 1 / 4, 4))
    before = scheduler.timesteps
    with pytest.raises(ValueError, match=r"num_inference_steps is 8.* 4 entries"):
        scheduler.set_timesteps(8, sigmas=np.linspace(1, 1 / 4, 4))
    with pytest.raises(ValueError, match="num_inference_steps is 3"):
        scheduler.set_timesteps(3, timesteps=[900, 500])
    for bad in ([0.5, 0.7], [0.0], [1.0, 0.5, 0.0, 0.0], [1.0, math.nan], [], [0.5, 0.5], [1.5, 0.5]):
        with pytest.raises(ValueError, match=r"nodes|sigmas"):
            scheduler.set_timesteps(sigmas=bad)
    for bad in ([500, 700], [], [math.nan], [900, 900]):
        with pytest.raises(ValueError, match=r"nodes|timesteps"):
            scheduler.set_timesteps(timesteps=bad)
    assert scheduler.timesteps is before  # a refused call leaves everything as it was


# --- from_config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_from_a_vp_schedulers_config(cls, prediction_type):
    theirs = cls(prediction_type=prediction_type, **SD_CONFIG)
    ours = DSSolverScheduler.from_config(theirs.config, solvers="classical")
    assert ours.config.prediction_type == prediction_type
    assert not ours.config["use_flow_sigmas"]
    assert {k: ours.config[k] for k in SD_CONFIG} == SD_CONFIG
    ours.set_timesteps(10)
    wanted = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - wanted, 0)[99::100].flip(0)
    assert_close(ours.sigmas[:-1], ((1 - bar) / bar).sqrt(), 1e-6)
    with pytest.raises(ValueError, match=r"beta_schedule.*dssolver_search"):
        DSSolverScheduler.from_config(theirs.config)
    default = DSSolverScheduler.from_config(cls().config)
    assert default.solvers
    assert default.config.continuous_time
    assert default.config.solvers == published_config("dit-xl-2-256")["solvers"]


def test_defaults_of_another_class_are_values_of_the_model():
    """LCM's defaults are Stable Diffusion's betas: left out of a conversion, they would silently become linear ones."""
    ours = DSSolverScheduler.from_config(LCMScheduler().config, solvers="classical")
    assert {k: ours.config[k] for k in SD_CONFIG} == SD_CONFIG
    with pytest.raises(ValueError, match="beta_"):
        DSSolverScheduler.from_config(LCMScheduler().config)


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_from_a_flow_schedulers_config(cls):
    ours = DSSolverScheduler.from_config(cls(shift=3.0).config, solvers="classical")
    assert ours.config.prediction_type == "flow_prediction"
    assert ours.config["use_flow_sigmas"]
    assert ours.config.shift == 3.0
    plain = DSSolverScheduler.from_config(cls().config)
    assert plain.solvers
    assert plain.config.prediction_type == "flow_prediction"
    shifted = DSSolverScheduler.from_config(cls(shift=3.0).config)  # searched at shift 1
    assert shifted.solvers == plain.solvers
    for scheduler in (plain, shifted):
        scheduler.set_timesteps(8)
    s = plain.sigmas
    assert_close(shifted.sigmas, 3 * s / (1 + 2 * s), 1e-6)


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_the_flow_shift_of_multistep_classes_is_not_lost(cls):
    """Wan and SANA ship these classes with flow_shift = 3 or 5."""
    config = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).config
    ours = DSSolverScheduler.from_config(config, solvers="classical")
    ours.set_timesteps(4)
    assert_close(ours.sigmas, torch.tensor([3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25, 0)]), 1e-6)
    assert DSSolverScheduler.from_config(config).config.shift == 3.0


@pytest.mark.parametrize(
    "config",
    [EDMEulerScheduler().config, EulerDiscreteScheduler(timestep_type="continuous", **SD_CONFIG).config],
    ids=["EDM", "SVD"],
)
def test_noise_levels_that_are_neither_flow_nor_vp_are_refused(config):
    for solvers in ("classical", "dit-xl-2-256", None):
        with pytest.raises(ValueError, match=r"(sigma_data|timestep_type) is .*EDM"):
            DSSolverScheduler.from_config(config, solvers=solvers)


@pytest.mark.parametrize("rescale", [False, True])
def test_the_snr_shift_of_cogvideox_is_in_the_noise_levels(rescale):
    theirs = CogVideoXDDIMScheduler(rescale_betas_zero_snr=rescale)
    ours = DSSolverScheduler.from_config(theirs.config, solvers="classical")
    assert ours.config.snr_shift_scale == 3.0  # a default of theirs, not of ours
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.clamp(min=2.0**-24 if rescale else 0), 1e-6)
    with pytest.raises(ValueError, match=r"'dit-xl-2-256' was searched with .*, this model has"):
        DSSolverScheduler.from_config(theirs.config)


def test_from_config_with_a_named_artefact(tmp_path):
    for name in published_solvers():
        model = published_config(name)
        plain = DDIMScheduler() if model["prediction_type"] == "epsilon" else FlowMatchEulerDiscreteScheduler()
        folder = tmp_path / name
        DSSolverScheduler.from_published(name).save_pretrained(folder)
        for source in (name, str(folder)):
            ours = DSSolverScheduler.from_config(plain.config, solvers=source)
            assert ours.config.solvers == model["solvers"]
            assert ours.config.provenance == model["provenance"]
            assert ours.config.continuous_time == model["continuous_time"]
        other = FlowMatchEulerDiscreteScheduler() if model["prediction_type"] == "epsilon" else DDIMScheduler()
        with pytest.raises(ValueError, match=r"is for (vp|flow) models, this model is (flow|vp)"):
            DSSolverScheduler.from_config(other.config, solvers=name, strict=True)

    def strictly(theirs):
        DSSolverScheduler.from_config(theirs.config, solvers="dit-xl-2-256", strict=True)

    with pytest.raises(ValueError, match="searched with num_train_timesteps = 1000, this model has 500"):
        strictly(DDIMScheduler(num_train_timesteps=500))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        strictly(DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match=r"trained_betas|beta_schedule"):
        strictly(DDIMScheduler(trained_betas=[0.01] * 1000))
    DDIMScheduler().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="without solvers"):
        DSSolverScheduler.from_config(DDIMScheduler().config, solvers=str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="nowhere"):
        DSSolverScheduler.from_config(DDIMScheduler().config, solvers=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", published_solvers())
def test_published_solvers_load_and_run(name):
    scheduler = DSSolverScheduler.from_published(name)
    for key, table in published_config(name)["solvers"].items():
        assert torch.isfinite(run(scheduler, noise(), int(key))).all()
        wanted = table.get("timesteps", [n * 1000 for n in table["nodes"][:-1]])
        assert scheduler.timesteps.tolist() == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match=f"no published solver is named 'x'; there are: .*{name}"):
        DSSolverScheduler.from_published("x")


def test_unknown_keywords_and_wrong_configs_are_refused():
    with pytest.raises(ValueError, match=r"no argument 'solver'; there are: .*solvers"):
        DSSolverScheduler.from_config(DDIMScheduler().config, solver="classical")
    with pytest.raises(ValueError, match="no argument 'stricct'"):
        DSSolverScheduler.from_published("dit-xl-2-256", stricct=True)
    with pytest.raises(TypeError):
        DSSolverScheduler(solver="classical")
    for config in (None, "dit", 3):
        with pytest.raises(ValueError, match="config is"):
            DSSolverScheduler.from_config(config)
    ours, unused = DSSolverScheduler.from_config(DDIMScheduler().config, return_unused_kwargs=True)
    assert isinstance(ours, DSSolverScheduler)
    assert unused == {}


@pytest.mark.parametrize("other", [UniPCMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_a_table_survives_a_visit_to_another_class(other, prediction_type):
    if other is EulerDiscreteScheduler and prediction_type == "flow_prediction":
        pytest.skip("EulerDiscrete refuses flow")
    ours = make_any(prediction_type, solvers=make_solvers(5, 8), provenance={"model": "toy"}, strict=True)
    back = DSSolverScheduler.from_config(other.from_config(ours.config).config)
    assert back.config.solvers == ours.config.solvers
    assert back.config.provenance == {"model": "toy"}
    assert back.config.strict
    assert back.config.prediction_type == prediction_type
    assert torch.equal(run(back, noise(), 8), run(ours, noise(), 8))


def test_flow_settings_survive_a_visit_to_another_class():
    ours = make_flow(shift=3.0)
    for other in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler):
        back = DSSolverScheduler.from_config(other.from_config(ours.config).config, solvers="classical")
        assert back.config.shift == 3.0
        assert torch.equal(run(back, noise(), 8), run(ours, noise(), 8))


# --- files -----------------------------------------------------------------------------------------------------------


def plain(value):
    if isinstance(value, dict):
        return all(type(k) is str and plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(plain(v) for v in value)
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize(
    "config",
    [
        {
            "prediction_type": "flow_prediction",
            "shift": 3.0,
            "invert_sigmas": True,
            "strict": True,
            "solvers": make_solvers(8),
        },
        {"solvers": make_solvers(3, 8, fed=True), "provenance": {"seed": 1, "libraries": {"torch": "2"}}},
        {"trained_betas": np.linspace(0.001, 0.02, 20), "num_train_timesteps": 20, "solvers": make_solvers(4)},
        {"solvers": {8: make_table(8), 5: make_table(5)}},
        {"solvers": {"8": SolverSpec.from_dict(make_table(8))}},
    ],
    ids=["flow", "tables", "numpy betas", "whole-number keys", "specs"],
)
def test_save_and_load_are_bit_exact(config, tmp_path):
    ours = DSSolverScheduler(**config)
    ours.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    stored = json.loads((tmp_path / "scheduler_config.json").read_text(), parse_constant=pytest.fail)
    assert plain(stored)
    assert stored["_class_name"] == "DSSolverScheduler"
    back = DSSolverScheduler.from_pretrained(tmp_path)
    assert back.solvers == ours.solvers  # specs of the same floats
    for key in ("num_train_timesteps", "prediction_type", "shift", "invert_sigmas", "strict", "provenance"):
        assert back.config[key] == ours.config[key]
    n = 4 if "trained_betas" in config else 8
    assert torch.equal(run(back, noise(), n), run(ours, noise(), n))
    again = tmp_path / "again"
    back.save_pretrained(again)
    assert (again / "scheduler_config.json").read_bytes() == (tmp_path / "scheduler_config.json").read_bytes()


def test_numpy_betas_are_plain_in_the_config():
    betas = np.linspace(0.001, 0.02, 20, dtype=np.float64)
    ours = DSSolverScheduler(num_train_timesteps=20, trained_betas=betas)
    assert type(ours.config.trained_betas) is list
    assert ours.config["trained_betas"] == betas.tolist()
    theirs = DDIMScheduler(num_train_timesteps=20, trained_betas=betas)
    x, e = noise(dtype=torch.float32), noise(seed=4, dtype=torch.float32)
    t = torch.tensor([3, 19])
    assert_close(ours.add_noise(x, e, t), theirs.add_noise(x, e, t), 1e-6)


def test_later_changes_of_the_config_do_not_reach_the_solver():
    solvers = make_solvers(4)
    ours = make_flow(solvers=solvers)
    wanted = run(ours, noise(), 4)
    solvers["4"]["coefficients"][1][0] = 55.0
    ours.config["solvers"]["4"]["nodes"][1] = 0.999
    assert torch.equal(run(ours, noise(), 4), wanted)


def good_config(**changes):
    config = {"_class_name": "DSSolverScheduler", "_diffusers_version": "0.42.1", "solvers": make_solvers(3), **changes}
    return {k: v for k, v in config.items() if v is not ...}


def with_table(**changes):
    table = {**make_table(3), **changes}
    return good_config(solvers={"3": {k: v for k, v in table.items() if v is not ...}})


FLOW = {"prediction_type": "flow_prediction"}
HOSTILE = {
    "truncated": (json.dumps(good_config())[:-20], "JSON"),
    "list": ("[1, 2]", "list, not a JSON object"),
    "number": ("3", "int, not a JSON object"),
    "null": ("null", "NoneType, not a JSON object"),
    "empty": ("", "JSON"),
    "binary": (b"\x80\x04\x95\xff\xfe\x00cos\nsystem\n", "JSON"),
    "deep": ("[" * 100_000 + "]" * 100_000, "."),
    "solvers list": (good_config(solvers=[1, 2]), "solvers must be a dict"),
    "solvers number": (good_config(solvers=3), "solvers must be a dict"),
    "solvers empty": (good_config(solvers={}), "solvers must be a dict"),
    "solvers null table": (good_config(solvers={"3": None}), r"solvers\['3'\]: a solver must be a dict"),
    "solvers a missing folder": (good_config(solvers="/nowhere/at/all"), "nowhere"),
    "key 08": (good_config(solvers={"03": make_table(3)}), r"solvers\['03'\]: the key"),
    "key negative": (good_config(solvers={"-1": make_table(3)}), r"solvers\['-1'\]: the key"),
    "key zero": (good_config(solvers={"0": make_table(3)}), r"solvers\['0'\]: the key"),
    "key huge": (good_config(solvers={"99999": make_table(3)}), r"solvers\['99999'\]: the key"),
    "key 1001": (good_config(solvers={"1001": make_table(3)}), r"solvers\['1001'\]: the key"),
    "key superscript": (good_config(solvers={"³": make_table(3)}), "the key must be a step count"),
    "key word": (good_config(solvers={"three": make_table(3)}), r"solvers\['three'\]: the key"),
    "key mismatch": (good_config(solvers={"4": make_table(3)}), r"solvers\['4'\] has 3 steps"),
    "wrong keys": (with_table(weights=[1]), r"solvers\['3'\]: unknown key 'weights'"),
    "no nodes": (with_table(nodes=...), "lacks the key 'nodes'"),
    "nan node": (with_table(nodes=[1.0, math.nan, 0.3, 0.0]), r"solvers\['3'\]: nodes\[1\] is nan"),
    "infinite node": (with_table(nodes=[math.inf, 0.6, 0.3, 0.0]), r"nodes\[0\] is inf"),
    "nan coefficient": (
        with_table(coefficients=[[1.0], [math.nan, 1.0], [0.0, 0.0, 1.0]]),
        r"coefficients\[1\]\[0\] is nan",
    ),
    "text node": (with_table(nodes=[1.0, "0.6", 0.3, 0.0]), r"nodes\[1\] is '0.6'"),
    "rising nodes": (with_table(nodes=[1.0, 0.3, 0.6, 0.0]), r"nodes\[2\] is 0.6, not below"),
    "row sum": (with_table(coefficients=[[1.0], [0.5, 0.6], [0.0, 0.0, 1.0]]), r"coefficients\[1\] sums to 1.1"),
    "fed times": (with_table(timesteps=[900, 950, 100]), r"timesteps\[1\] is 950"),
    "huge count": (good_config(num_train_timesteps=10**12), "num_train_timesteps is 1000000000000"),
    "text count": (good_config(num_train_timesteps="1000"), "num_train_timesteps is '1000'"),
    "true count": (good_config(num_train_timesteps=True), "num_train_timesteps is True"),
    "float count": (good_config(num_train_timesteps=1000.5), "num_train_timesteps is 1000.5"),
    "null count": (good_config(num_train_timesteps=None), "num_train_timesteps is None"),
    "zero count": (good_config(num_train_timesteps=0), "num_train_timesteps is 0"),
    "prediction": (good_config(prediction_type="score"), "prediction_type is 'score'"),
    "prediction list": (good_config(prediction_type=["epsilon"]), "prediction_type is"),
    "beta nan": (good_config(beta_end=math.nan), "beta_end is nan"),
    "beta text": (good_config(beta_start="0.1"), "beta_start is '0.1'"),
    "beta huge": (good_config(beta_end=10**400), "beta_end is"),
    "beta large": (good_config(beta_end=2.0), "beta"),
    "beta schedule": (good_config(beta_schedule="cubic"), "beta_schedule is 'cubic'"),
    "beta schedule list": (good_config(beta_schedule=["linear"]), "beta_schedule is"),
    "betas text": (good_config(num_train_timesteps=2, trained_betas=["a", "b"]), "trained_betas is 'a'"),
    "betas none": (good_config(trained_betas=[]), "trained_betas must be a list of 1 to"),
    "betas word": (good_config(num_train_timesteps=4, trained_betas="beta"), "trained_betas must be a list"),
    "betas nan": (good_config(num_train_timesteps=2, trained_betas=[0.1, math.nan]), "trained_betas is nan"),
    "betas zero": (good_config(num_train_timesteps=2, trained_betas=[0.1, 0.0]), "every beta must lie between"),
    "continuous text": (good_config(continuous_time="false"), "continuous_time is 'false'"),
    "zero snr text": (good_config(rescale_betas_zero_snr="no"), "rescale_betas_zero_snr is 'no'"),
    "strict text": (good_config(strict="no"), "strict is 'no'"),
    "shift nan": (good_config(**FLOW, shift=math.nan), "shift is nan"),
    "shift negative": (good_config(**FLOW, shift=-1), "shift is -1"),
    "shift text": (good_config(**FLOW, shift="3"), "shift is '3'"),
    "shift huge": (good_config(**FLOW, shift=10**400), "shift is"),
    "shift type": (good_config(**FLOW, time_shift_type="cubic"), "time_shift_type is 'cubic'"),
    "terminal text": (good_config(**FLOW, shift_terminal="x"), "shift_terminal is 'x'"),
    "terminal one": (good_config(**FLOW, shift_terminal=1.0), "shift_terminal is 1.0"),
    "base shift nan": (good_config(**FLOW, use_dynamic_shifting=True, base_shift=math.nan), "base_shift is nan"),
    "invert text": (good_config(**FLOW, invert_sigmas="no"), "invert_sigmas is 'no'"),
    "dynamic text": (good_config(**FLOW, use_dynamic_shifting="no"), "use_dynamic_shifting is 'no'"),
}
EVENTS: list[str] = []
WATCHING = [False]


def _watch(event, args):
    if WATCHING[0] and (
        event
        in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class", "os.mkdir", "os.rename")
        or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
    ):
        EVENTS.append(f"{event} {args}")


sys.addaudithook(_watch)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_value_error_that_names_the_fault(name, tmp_path):
    content, fault = HOSTILE[name]
    if isinstance(content, dict):
        content = json.dumps(content)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "scheduler_config.json").write_bytes(content)
    EVENTS.clear()
    WATCHING[0] = True
    try:
        with pytest.raises(ValueError, match=fault) as caught:
            DSSolverScheduler.from_pretrained(tmp_path)
    finally:
        WATCHING[0] = False
    assert not EVENTS
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    assert (tmp_path / "scheduler_config.json").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_the_good_file_beside_the_hostile_ones_loads(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(good_config()))
    assert DSSolverScheduler.from_pretrained(tmp_path).solvers.keys() == {3}


def test_keys_that_name_code_stay_data(tmp_path):
    code = {"auto_map": {"AutoModel": "evil.Evil"}, "_class_name": "EvilScheduler", "use_flow_sigmas": "x"}
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(good_config(**code)))
    scheduler = DSSolverScheduler.from_pretrained(tmp_path)
    assert type(scheduler) is DSSolverScheduler
    assert scheduler.solvers.keys() == {3}
    assert "evil" not in sys.modules
    for key, value in (("_class_name", "os.system"), ("__reduce__", "x"), ("__class__", "x"), ("items", "x")):
        (tmp_path / "scheduler_config.json").write_text(json.dumps(good_config(**{key: value})))
        with pytest.raises(ValueError, match=key):
            DSSolverScheduler.from_pretrained(tmp_path)


def test_a_missing_folder_is_an_os_error_and_a_value_error(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):  # absent; present without the file
        for kind in (OSError, ValueError):
            with pytest.raises(kind, match="no solver could be read from") as caught:
                DSSolverScheduler.from_pretrained(folder)
            assert "\n" not in str(caught.value)
