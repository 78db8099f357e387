"""alpha, sigma, times and model quantities of the paths, against diffusers, numerical integrals and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from diffusers_dssolver.paths import PREDICTION_TYPES, ContinuousVPPath, FlowPath, Path, VPPath, make_betas
from tests.problems import DoubleTorch, denoised, quantity

T = 1000
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": [1e-4 + 2e-5 * i for i in range(T)]},
}


def betas_of(zero_snr=False, count=T, **given_keys):
    keys = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None, **given_keys}
    return make_betas(
        count, keys["beta_start"], keys["beta_end"], keys["beta_schedule"], keys["trained_betas"], zero_snr
    )


def all_paths() -> dict[str, Path]:
    return {
        "flow": FlowPath(),
        "flow inverted": FlowPath(inverted=True),
        "continuous": ContinuousVPPath(betas_of()),
        "zero snr": VPPath(betas_of(zero_snr=True)),
        **{name: VPPath(betas_of(**keys)) for name, keys in SCHEDULES.items()},
    }


PATHS = all_paths()
VP_NAMES = [name for name in PATHS if not name.startswith("flow")]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- alpha and sigma -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_integer_timesteps_equal_diffusers(name, zero_snr, scheduler, monkeypatch):
    """First as diffusers is: it multiplies 1000 factors in float32, so relative errors of a few 1e-5 where little
    signal is left, and with zero terminal SNR, where neighbouring square roots are subtracted, 1e-6 absolute as well.
    Then with float64 in the place of its float32: the same to rounding, but for the last alphas_cumprod of zero
    terminal SNR, which is 0 there and 2^-24 (6e-8) here, as in its DPM-Solver."""
    path = VPPath(betas_of(zero_snr, **SCHEDULES[name]))
    alpha, sigma = path.alpha_sigma(path.node(torch.arange(T)))

    theirs = scheduler(**SCHEDULES[name], rescale_betas_zero_snr=zero_snr).alphas_cumprod.double()
    torch.testing.assert_close(alpha**2, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sigma**2, 1 - theirs, rtol=1e-4, atol=1e-6)

    for module in (scheduling_ddim, scheduling_ddpm):
        monkeypatch.setattr(module, "torch", DoubleTorch())
    theirs = scheduler(**SCHEDULES[name], rescale_betas_zero_snr=zero_snr).alphas_cumprod
    assert theirs.dtype == torch.float64
    if zero_snr:
        theirs = theirs.clamp(min=2.0**-24)
    torch.testing.assert_close(alpha**2, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sigma**2, 1 - theirs, rtol=1e-9, atol=1e-12)


def test_integer_timesteps_equal_the_formulas_in_float64():
    t = np.arange(T + 1) / T
    bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = {
        "linear": np.linspace(1e-4, 0.02, T),
        "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2,
        "squaredcos_cap_v2": np.minimum(1 - bar[1:] / bar[:-1], 0.999),
        "trained_betas": np.array(SCHEDULES["trained_betas"]["trained_betas"]),
    }
    for name, betas in expected.items():
        np.testing.assert_allclose(betas_of(**SCHEDULES[name]), betas, rtol=1e-10)
        alpha, sigma = PATHS[name].alpha_sigma((torch.arange(T).double() + 1) / T)
        cumprod = np.cumprod(1 - betas)  # down to 2.4e-9 for squaredcos_cap_v2: no floor
        np.testing.assert_allclose(alpha**2, cumprod, rtol=1e-10)
        np.testing.assert_allclose(sigma**2, 1 - cumprod, rtol=1e-9)


def test_zero_terminal_snr_keeps_the_first_alpha_and_floors_the_last():
    alpha, _ = PATHS["zero snr"].alpha_sigma(double(1 / T, 1.0))
    assert alpha[0].item() == pytest.approx(math.sqrt(1 - 1e-4), abs=1e-12)
    assert alpha[1].item() == pytest.approx(2.0**-12, rel=1e-9)


@pytest.mark.parametrize("name", VP_NAMES)
@given(st.floats(0, 1))
def test_vp_keeps_the_variance(name, node):
    alpha, sigma = PATHS[name].alpha_sigma(double(node))
    assert (alpha**2 + sigma**2).item() == pytest.approx(1, abs=1e-13)
    assert alpha.item() > 0
    assert sigma.item() >= 0


@pytest.mark.parametrize("name", ["flow", "flow inverted"])
def test_flow_is_linear(name):
    alpha, sigma = PATHS[name].alpha_sigma(double(1.0, 0.3, 0.0))
    assert alpha.tolist() == [0, 0.7, 1]
    assert sigma.tolist() == [1, 0.3, 0]


@pytest.mark.parametrize("name", PATHS)
def test_snr_falls_along_the_nodes(name):
    nodes = torch.linspace(0.0013, 0.9995, 4001, dtype=torch.float64)
    if name == "zero snr":  # the last alphas are all at the floor of 2^-12
        nodes = nodes[nodes < 0.997]
    lambdas, angles = PATHS[name].lambdas(nodes), PATHS[name].angle(nodes)
    assert (lambdas.diff() < 0).all()
    assert (angles.diff() > 0).all()
    torch.testing.assert_close(torch.tan(angles), torch.exp(-lambdas), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [*SCHEDULES, "flow", "flow inverted"])
def test_node_zero_is_the_data(name):
    alpha, sigma = PATHS[name].alpha_sigma(double(0.0))
    assert (alpha.item(), sigma.item()) == (1, 0)
    assert PATHS[name].lambdas(double(0.0)).item() == math.inf
    assert PATHS[name].angle(double(0.0)).item() == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_between_timesteps_log_ratio_is_linear(name):
    path = PATHS[name]
    bar = np.cumprod(1 - np.array(path.betas))
    log_ratio = 0.5 * np.log((1 - bar) / bar)
    t = np.sort(np.random.default_rng(0).uniform(0, T - 1, 500))
    lambdas = path.lambdas(path.node(torch.tensor(t)))
    np.testing.assert_allclose(-lambdas, np.interp(t, np.arange(T), log_ratio), atol=1e-8)
    below = double(0.0, 0.25 / T, 0.5 / T, 1 / T)
    alpha, sigma = path.alpha_sigma(below)
    np.testing.assert_allclose(sigma / alpha, math.exp(log_ratio[0]) * np.array([0, 0.25, 0.5, 1]), rtol=1e-9)


@given(st.floats(0, 1))
def test_continuous_formula_is_the_integral_of_beta(node):
    """alpha = exp(-1/2 int_0^t beta(s) ds), beta(s) = 0.1 + 19.9 s, t clamped to [0.001, 1]."""
    t = min(max(node, 0.001), 1.0)
    integral, _ = quad(lambda s: 0.1 + (20 - 0.1) * s, 0, t, epsabs=1e-12, epsrel=1e-12)
    alpha, sigma = PATHS["continuous"].alpha_sigma(double(node))
    assert alpha.item() == pytest.approx(math.exp(-integral / 2), rel=1e-10)
    assert sigma.item() == pytest.approx(math.sqrt(-math.expm1(-integral)), rel=1e-10)


def test_a_schedule_of_one_timestep():
    path = VPPath((0.25,))
    alpha, sigma = path.alpha_sigma(double(1.0, 0.0))
    assert alpha.tolist() == pytest.approx([math.sqrt(0.75), 1], abs=1e-15)
    assert sigma.tolist() == pytest.approx([0.5, 0], abs=1e-15)


# --- times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
@given(st.floats(0, 1))
def test_node_and_timestep_are_inverse(name, u):
    path = PATHS[name]
    vp = type(path) is VPPath
    time = double(u * (T - 1 if vp else T))
    assert path.timestep(path.node(time)).item() == pytest.approx(time.item(), abs=1e-9)
    node = double(max(u, 1 / T) if vp else u)
    assert path.node(path.timestep(node)).item() == pytest.approx(node.item(), abs=1e-12)


def test_times_by_hand():
    assert PATHS["flow"].timestep(double(1.0, 0.25, 0.0)).tolist() == [1000, 250, 0]
    assert PATHS["flow inverted"].timestep(double(1.0, 0.25, 0.0)).tolist() == [0, 750, 1000]
    assert PATHS["flow inverted"].node(double(0.0, 750.0, 1000.0)).tolist() == [1, 0.25, 0]
    assert PATHS["linear"].timestep(double(1.0, 0.5, 0.001, 0.0)).tolist() == pytest.approx([999, 499, 0, 0], abs=1e-12)
    assert PATHS["continuous"].timestep(double(0.999, 0.5)).tolist() == [999, 500]
    assert FlowPath(8).timestep(double(0.5)).item() == 4


@pytest.mark.parametrize("name", PATHS)
def test_times_outside_are_clamped_to_the_path(name):
    nodes = PATHS[name].node(torch.tensor([-5, 2000]))
    assert nodes.dtype == torch.float64
    assert sorted(nodes.tolist()) == [0, 1]


def test_first_nodes():
    assert {name: path.first_node for name, path in PATHS.items()} == {
        n: 0.999 if n == "continuous" else 1.0 for n in PATHS
    }


# --- transitions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VP_NAMES)
def test_vp_factors_are_equation_19(name):
    path = PATHS[name]
    alpha, sigma = path.alpha_sigma(double(path.first_node, 0.8, 0.55, 0.2, 0.03, 0.0015))
    w = alpha / sigma
    a, b = path.transition(alpha, sigma)
    torch.testing.assert_close(a, sigma[1:] / sigma[:-1], rtol=1e-14, atol=0)
    torch.testing.assert_close(b, sigma[1:] * (w[1:] - w[:-1]), rtol=1e-12, atol=0)


def test_vp_factors_of_the_last_step_onto_the_data():
    alpha, sigma = PATHS["linear"].alpha_sigma(double(0.1, 0.0))
    a, b = PATHS["linear"].transition(alpha, sigma)
    assert (a.item(), b.item()) == (0, 1)


@pytest.mark.parametrize("name", ["flow", "flow inverted"])
def test_flow_factors_are_equation_16(name):
    alpha, sigma = PATHS[name].alpha_sigma(double(1.0, 0.75, 0.25, 0.0))
    a, b = PATHS[name].transition(alpha, sigma)
    assert a.tolist() == [1, 1, 1]
    assert b.tolist() == [-0.25, -0.5, -0.25]


@pytest.mark.parametrize("name", PATHS)
def test_gradients_in_the_nodes(name):
    """Nodes away from the timesteps, where the interpolation of the discrete schedules has kinks."""
    nodes = double(
        0.98765, 0.61234, 0.23456, 0.01234, 0.00034 if type(PATHS[name]) is VPPath else 0.00234
    ).requires_grad_()
    path = PATHS[name]

    def everything(nodes):
        alpha, sigma = path.alpha_sigma(nodes)
        return torch.cat([alpha, sigma, path.lambdas(nodes), path.angle(nodes), *path.transition(alpha, sigma)])

    assert torch.autograd.gradcheck(everything, (nodes,), eps=1e-7, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradcheck(path.timestep, (double(0.9, 0.4).requires_grad_(),))


# --- quantities ----------------------------------------------------------------------------------------------------


def outputs(data, noise, alpha, sigma):
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * data,
        "sample": data,
        "flow_prediction": noise - data,
    }


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("node", [0.95, 0.5, 0.02])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES[:3])
@pytest.mark.parametrize("name", VP_NAMES)
def test_vp_quantity_is_the_data(name, prediction, node, as_float):
    torch.manual_seed(0)
    data, noise = torch.randn(2, 5, dtype=torch.float64)
    alpha, sigma = PATHS[name].alpha_sigma(double(node)[0])
    x, output = alpha * data + sigma * noise, outputs(data, noise, alpha, sigma)[prediction]
    factors = (alpha.item(), sigma.item()) if as_float else (alpha, sigma)
    d = quantity(PATHS[name], output, x, *factors, prediction)
    torch.testing.assert_close(d, data, rtol=0, atol=1e-11)
    torch.testing.assert_close(denoised(PATHS[name], d, x, *factors), data, rtol=0, atol=1e-11)


@pytest.mark.parametrize("node", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("name", ["flow", "flow inverted"])
def test_flow_quantity_is_noise_minus_data(name, node):
    torch.manual_seed(0)
    data, noise = torch.randn(2, 5, dtype=torch.float64)
    alpha, sigma = PATHS[name].alpha_sigma(double(node)[0])
    x = alpha * data + sigma * noise
    output = data - noise if name == "flow inverted" else noise - data
    d = quantity(PATHS[name], output, x, alpha, sigma, "flow_prediction")
    torch.testing.assert_close(d, noise - data, rtol=0, atol=1e-14)
    torch.testing.assert_close(denoised(PATHS[name], d, x, alpha, sigma), data, rtol=0, atol=1e-14)


FOREIGN = [
    (name, prediction)
    for name in PATHS
    for prediction in [*PREDICTION_TYPES, "other"]
    if prediction == "other" or name.startswith("flow") != (prediction == "flow_prediction")
]


@pytest.mark.parametrize(("name", "prediction"), FOREIGN)
def test_a_prediction_of_the_other_kind_is_refused(name, prediction):
    kind = "flow" if name.startswith("flow") else "vp"
    with pytest.raises(ValueError, match=f"prediction_type '{prediction}' on a {kind} path"):
        quantity(PATHS[name], double(1.0), double(1.0), 0.6, 0.8, prediction)


# --- betas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["beta_start", "beta_end"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", None, True])
def test_bad_ends_are_named(schedule, key, value):
    with pytest.raises(ValueError, match=f"{key} is {value!r}; it must be a finite number"):
        betas_of(beta_schedule=schedule, **{key: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", None, False])
def test_bad_trained_betas_are_named(value):
    with pytest.raises(ValueError, match=f"trained_betas is {value!r}"):
        betas_of(trained_betas=[0.1, value])


@pytest.mark.parametrize("schedule", ["sigmoid", "", None, 3])
def test_unknown_schedule_is_named(schedule):
    with pytest.raises(
        ValueError, match=r"beta_schedule is .*linear, scaled_linear, squaredcos_cap_v2, or give trained_betas"
    ):
        betas_of(beta_schedule=schedule)


@pytest.mark.parametrize(
    "keys", [{"beta_start": 0.0}, {"beta_start": -0.1}, {"beta_end": 1.0}, {"trained_betas": [0.5, 1.5]}]
)
def test_betas_outside_zero_to_one_are_refused(keys):
    with pytest.raises(ValueError, match=r"give betas from .* every beta must lie between 0 and 1"):
        betas_of(**keys)


def test_betas_are_as_many_as_asked():
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        assert len(betas_of(count=17, **SCHEDULES[name])) == 17
