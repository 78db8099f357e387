"""What people and programs do to a scheduler around `set_timesteps` and `step`, from public reports about others."""

from __future__ import annotations

import pytest
import torch

from tests.problems import Metal
from tests.runtime.test_scheduler import ALL_TYPES, assert_close, make_any, make_solvers, noise

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
