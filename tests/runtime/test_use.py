"""What people and programs do to a scheduler around `set_timesteps` and `step`, from public reports about others."""

from __future__ import annotations

import pytest
import torch

from tests.problems import Metal
from tests.runtime.test_scheduler import ALL_TYPES, make_any, make_solvers, noise

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
