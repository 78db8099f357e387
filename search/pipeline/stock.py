"""diffusers' own schedulers on a model: built for its family, and as teachers checked beforehand and recorded."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers.schedulers import SchedulerMixin
from torch import Tensor

from diffusers_dssolver.config import is_flow
from diffusers_dssolver.paths import FlowPath, Path

from ..console import one_line
from .probe import RunFinished
from .sampler import Sampler

AS_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# a searched solver starts at the noisiest node and clips nothing, and so must its teacher
AS_TEACHER = {"timestep_spacing": "trailing", "clip_sample": False}
GOOD = "UniPCMultistepScheduler"
REHEARSAL_STEPS = 100
MAX_ERROR = 0.1  # of a state of the rehearsal, of size 1: DDIM stays below 0.03, states on another scale are far above
MEANS, DEVIATION = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64), 0.4  # of the rehearsal's data
SAME_ANGLE = 0.01  # whole times and the float32 of schedulers stay below it, another noise schedule is far above


def configured(cls: Any, model_config: Mapping[str, Any], **options: Any) -> Any:
    """A scheduler of this class for a model, by its scheduler's configuration; on a flow model those that serve vp
    models too are told that it is one, and its shift. `options` go over both."""
    if is_flow(model_config) and "use_flow_sigmas" in _parameters(cls):
        shift = model_config.get("shift", model_config.get("flow_shift", 1.0))
        options = {**AS_FLOW, "flow_shift": shift, **options}
    return cls.from_config(model_config, **options)


def teacher_scheduler(name: str, model_config: Mapping[str, Any], path: Path, prediction: str) -> Any:
    """A scheduler of diffusers that can make references of a model, by class name.

    Args:
        model_config: of the pipeline's own scheduler.
        path, prediction: of the model.

    Raises:
        ValueError: one line, for a name that is none, and for classes of the other family or whose states are not
            those of the model's own trajectories, one network call each.
    """

    def refused(reason: str) -> ValueError:
        other = "" if name == GOOD else f"give {GOOD}, or "
        return ValueError(f"teacher_scheduler {name!r} {reason}; {other}leave it empty for our own multistep")

    cls = getattr(diffusers, name, None) if name.isidentifier() else None
    if not inspect.isclass(cls) or not issubclass(cls, SchedulerMixin):
        raise refused("is no scheduler class of the diffusers that is installed")
    known, flow = _parameters(cls), isinstance(path, FlowPath)
    vp_only = "beta_start" in known and "use_flow_sigmas" not in known
    if (vp_only or not {"shift", "use_flow_sigmas"} & set(known)) if flow else "beta_start" not in known:
        raise refused(f"does not serve {'flow' if flow else 'vp'} models, which this one is")
    if flow and path.inverted and "invert_sigmas" not in known:
        raise refused("does not know invert_sigmas, which this model has")
    try:
        options = {key: value for key, value in AS_TEACHER.items() if key in known}
        scheduler = configured(cls, model_config, **options)
        steps = min(REHEARSAL_STEPS, path.num_train_timesteps)
        fault = _fault(scheduler, path, prediction, steps)
    except Exception as error:  # whatever a class that was made for something else may raise
        raise refused(f"cannot be run on this model ({one_line(error)})") from error
    if fault:
        raise refused(fault)
    return scheduler


def takes(scheduler: Any, path: Path, steps: int) -> bool:
    """Whether a run of so many steps has as many falling nodes."""
    try:
        return _start(scheduler, path, steps) is None
    except Exception:  # schedulers raise what they like
        return False


def angles_of(scheduler: Any, path: Path) -> Tensor:
    """(N+1,) float64: `paths.Path.angle` of the states of a run, after `set_timesteps`: from its noise levels, or from
    its times and the noise that it ends at (DDIM)."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        last = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).reshape(1)
        alphas = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps.cpu()], last]).double()
        return torch.atan2((1 - alphas).sqrt(), alphas.sqrt())
    sigmas = sigmas.detach().cpu().double()
    if not isinstance(path, FlowPath):
        return torch.atan(sigmas)
    sigmas = 1 - sigmas if path.inverted else sigmas
    return torch.atan2(sigmas, 1 - sigmas)


def record(
    sampler: Sampler, scheduler: Any, path: Path, indices: Sequence[int], split: str, steps: int
) -> tuple[list[Tensor], Tensor]:
    """The pipeline's call with this scheduler, left after the last step: the N+1 states and their angles.

    Raises:
        ValueError: if the pipeline does not take the steps asked for, or the scheduler repeats a node.
    """
    states = sampler.in_groups(indices, lambda group, _: _recorded(sampler, scheduler, group, split, steps))
    angles = angles_of(scheduler, path)
    if len(angles) != steps + 1 or not bool((angles.diff() < 0).all()):
        who = f"{type(sampler.pipe).__name__} with {type(scheduler).__name__}"
        raise ValueError(f"{who} repeats nodes in {steps} steps; give fewer teacher_steps")
    return states, angles


def _recorded(sampler: Sampler, scheduler: Any, indices: Sequence[int], split: str, steps: int) -> list[Tensor]:
    states: list[Tensor] = []
    take = scheduler.step

    @functools.wraps(take)
    def recording(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not states:
            states.append(sample)
        result = take(model_output, timestep, sample, *args, **kwargs)
        states.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        if len(states) == len(scheduler.timesteps) + 1:
            raise RunFinished
        return result

    def unrecorded(memo: dict[int, Any]) -> Any:
        """For pipelines that keep a second scheduler (of sound): a copy without the recording."""
        plain = copy.copy(scheduler)
        for name in ("step", "__deepcopy__"):
            del plain.__dict__[name]
        return copy.deepcopy(plain, memo)

    scheduler.step, scheduler.__deepcopy__ = recording, unrecorded
    try:
        with sampler.using(scheduler):
            sampler(indices, split, steps)
    except RunFinished:
        pass
    finally:
        del scheduler.step, scheduler.__deepcopy__
    who = f"{type(sampler.pipe).__name__} with {type(scheduler).__name__}"
    if len(states) != steps + 1:
        raise ValueError(f"{who} took {max(len(states) - 1, 0)} steps, not the {steps} of teacher_steps; give {GOOD}")
    return states


def _start(scheduler: Any, path: Path, steps: int) -> str | None:
    """`set_timesteps`, and what is wrong with its grid."""
    scheduler.set_timesteps(steps, **_mu(scheduler))
    if (count := len(scheduler.timesteps)) != steps:
        return f"makes {count} network calls in {steps} steps, not one each"
    if (scale := float(getattr(scheduler, "init_noise_sigma", 1.0))) != 1:
        return f"keeps its states on another scale than the model's own (init_noise_sigma {scale:.4g})"
    if getattr(scheduler, "sigmas", None) is None and path.num_train_timesteps % steps:
        return f"takes whole times only: {steps} steps do not divide {path.num_train_timesteps}"
    angles = angles_of(scheduler, path)
    if len(angles) != steps + 1 or not bool((angles.diff() < 0).all()):
        return f"repeats nodes in {steps} steps"
    if not bool(((path.angle(path.node(scheduler.timesteps.cpu())) - angles[:-1]).abs() < SAME_ANGLE).all()):
        return "has another noise schedule than the model"
    return None


def _fault(scheduler: Any, path: Path, prediction: str, steps: int) -> str | None:
    """What a rehearsal on a solvable model finds wrong."""
    if fault := _start(scheduler, path, steps):
        return fault
    angles = angles_of(scheduler, path)[:, None]
    total = angles.sin() + angles.cos() if isinstance(path, FlowPath) else 1.0
    alphas, sigmas = angles.cos() / total, angles.sin() / total
    states, again = (_rehearsed(scheduler, path, prediction, steps, seed) for seed in (0, 1))
    if not torch.equal(states, again):
        return "is stochastic"
    spread = (_variance(alphas, sigmas) / _variance(alphas[0], sigmas[0])).sqrt()
    error = float((states - alphas * MEANS - spread * (states[0] - alphas[0] * MEANS)).abs().max())
    if not error < MAX_ERROR:
        return f"leaves the model's trajectories (a solvable one by {error:.3g})"
    return None


def _rehearsed(scheduler: Any, path: Path, prediction: str, steps: int, seed: int) -> Tensor:
    """(N+1, 3) states of a run with the exact network of data from N(MEANS, DEVIATION^2) in the network's place, whose
    probability flow keeps (x - mean) / deviation constant; global noise from this seed."""
    _start(scheduler, path, steps)
    states = [torch.tensor([1.1, -0.8, 0.4], dtype=torch.float64)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for t in scheduler.timesteps:
            x = states[-1]
            alpha, sigma = path.alpha_sigma(path.node(t.cpu()))
            data = MEANS + alpha * DEVIATION**2 / _variance(alpha, sigma) * (x - alpha * MEANS)
            d = (x - data) / sigma if isinstance(path, FlowPath) else data
            p, q = path.quantity_weights(alpha, sigma, prediction)
            output, sample = (v.reshape(1, 3, 1, 1) for v in ((d - p * x) / q, x))
            states.append(scheduler.step(output, t, sample, return_dict=False)[0].reshape(3).double())
    return torch.stack(states)


def _variance(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha * DEVIATION) ** 2 + sigma**2


def _mu(scheduler: Any) -> dict[str, float]:
    """What a scheduler with a resolution shift of the pipeline's must be given."""
    return {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}


def _parameters(cls: Any) -> Mapping[str, Any]:
    return inspect.signature(cls.__init__).parameters
