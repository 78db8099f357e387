"""The schedulers of diffusers that searched solvers are compared with.

Each is configured as its documentation recommends for the model's family (flow or vp) and runs in every node spacing
and variant that it offers for few steps: which is best depends on the model and the step count. To add a scheduler, add
a line to `VP`, to `FLOW` or to both.

Sources: the docstrings of diffusers 0.42 (UniPC: order 2 with guidance and 3 without, bh1 for fewer than 10 steps);
Align Your Steps: Sabour et al., arXiv 2404.14507.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers.schedulers import AysSchedules

from diffusers_dssolver.config import is_flow

Options = dict[str, Any]
KARRAS: Options = {"use_karras_sigmas": True}
EXPONENTIAL: Options = {"use_exponential_sigmas": True}
LOG_SNR: Options = {"use_lu_lambdas": True}
PLAIN: dict[str, Options] = {"": {}}
UNIPC = {**PLAIN, "bh1": {"solver_type": "bh1"}, "order 3": {"solver_order": 3}}
AS_FLOW: Options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ALIGNED = "Align Your Steps"
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012
}  # fmt: skip


@dataclass(frozen=True)
class Stock:
    """A scheduler of diffusers for one family.

    Attributes:
        cls: class name.
        options: of its configuration, in every spacing.
        spacings: more options, by name of the node spacing and variant.
        calls_per_step: network calls in a step; Heun's method makes two.
        aligned: whether it also takes a list of times, such as that of Align Your Steps.
    """

    cls: str
    options: Options
    spacings: Mapping[str, Options]
    calls_per_step: int = 1
    aligned: bool = False


@dataclass(frozen=True)
class Run:
    """A scheduler with a number of network calls.

    Attributes:
        name: of the solver or stock scheduler.
        spacing: node spacing and variant; of a searched solver, whether its table was searched or derived.
        steps: the pipeline's `num_inference_steps`.
        searched: whether it is a searched solver.
        configuration: class and options, for the reader of a table.
        call: further arguments of the pipeline's call.
    """

    name: str
    nfe: int
    spacing: str
    scheduler: Any
    steps: int
    searched: bool
    configuration: str
    call: Options = field(default_factory=dict)

    @property
    def facts(self) -> list[Any]:
        """What its samples depend on, plain data; the same in every process. Keys with an underscore are diffusers'
        notes, one of which lists names in an order that differs between processes."""
        config = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_") and k != "provenance"}
        return [type(self.scheduler).__name__, config, self.steps, self.call]


def _vp(
    cls: str, log_snr: Options, calls_per_step: int = 1, aligned: bool = False, variants: Any = PLAIN, **options: Any
) -> Stock:
    uniform = {"trailing": {"timestep_spacing": "trailing"}, "linspace": {"timestep_spacing": "linspace"}}
    spacings = _varied({**uniform, "karras": KARRAS, "log-SNR": log_snr}, variants)
    return Stock(cls, options, spacings, calls_per_step, aligned)


def _flow(
    cls: str, spacings: Mapping[str, Options], calls_per_step: int = 1, variants: Any = PLAIN, **options: Any
) -> Stock:
    return Stock(cls, options, _varied({"uniform": {}, **spacings}, variants), calls_per_step)


def _varied(spacings: Mapping[str, Options], variants: Mapping[str, Options]) -> dict[str, Options]:
    """Every spacing in every variant, named "spacing, variant"."""
    return {
        ", ".join(filter(None, (spacing, variant))): {**options, **more}
        for variant, more in variants.items()
        for spacing, options in spacings.items()
    }


VP: dict[str, Stock] = {
    "unipc": _vp("UniPCMultistepScheduler", EXPONENTIAL, variants=UNIPC, solver_order=2),
    "dpmpp_2m": _vp("DPMSolverMultistepScheduler", LOG_SNR, aligned=True, algorithm_type="dpmsolver++", solver_order=2),
    "dpmpp_3m": _vp("DPMSolverMultistepScheduler", LOG_SNR, aligned=True, algorithm_type="dpmsolver++", solver_order=3),
    "deis": _vp("DEISMultistepScheduler", EXPONENTIAL, solver_order=2),
    "heun": _vp("HeunDiscreteScheduler", EXPONENTIAL, 2),
    "euler": _vp("EulerDiscreteScheduler", EXPONENTIAL, aligned=True),
}
FLOW: dict[str, Stock] = {
    "unipc": _flow("UniPCMultistepScheduler", {"karras": KARRAS}, variants=UNIPC, solver_order=2),
    "dpmpp_2m": _flow("DPMSolverMultistepScheduler", {"karras": KARRAS, "log-SNR": LOG_SNR}, solver_order=2),
    "dpmpp_3m": _flow("DPMSolverMultistepScheduler", {"karras": KARRAS, "log-SNR": LOG_SNR}, solver_order=3),
    "deis": _flow("DEISMultistepScheduler", {"karras": KARRAS}, solver_order=2),
    "heun": _flow("FlowMatchHeunDiscreteScheduler", {}, 2),
    "euler": _flow("FlowMatchEulerDiscreteScheduler", {"karras": KARRAS, "log-SNR": EXPONENTIAL}),
}


def family(model_config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Stock]:
    """Stock schedulers of these names.

    Args:
        model_config: configuration of the model's own scheduler.

    Raises:
        ValueError: a name is unknown.
    """
    known = FLOW if is_flow(model_config) else VP
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"scheduler {missing[0]!r} is unknown; known: {', '.join(known)}")
    return {name: known[name] for name in names}


def configured(cls: Any, model_config: Mapping[str, Any], **options: Any) -> Any:
    """A scheduler of this class for a model, by its scheduler's configuration; on a flow model those that serve vp
    models too are told that it is one, and its shift. `options` go over both."""
    if is_flow(model_config) and "use_flow_sigmas" in inspect.signature(cls.__init__).parameters:
        shift = model_config.get("shift", model_config.get("flow_shift", 1.0))
        options = {**AS_FLOW, "flow_shift": shift, **options}
    return cls.from_config(model_config, **options)


def runs(name: str, stock: Stock, nfe: int, model_config: Mapping[str, Any], pipe: Any, accepted: Any) -> Iterator[Run]:
    """All runs of one scheduler with `nfe` network calls.

    Args:
        model_config: configuration of the model's own scheduler.
        pipe: the pipeline; its class tells which list of times is the model's.
        accepted: arguments that its call takes.
    """
    cls = getattr(diffusers, stock.cls)
    steps = nfe if stock.calls_per_step == 1 else (nfe + 1) // 2  # the last step of Heun's method is a single call
    for spacing, options in stock.spacings.items():
        given = {**stock.options, **options}
        scheduler = configured(cls, model_config, **given)
        yield Run(name, nfe, spacing, scheduler, steps, False, _described(stock.cls, given))
    times = aligned_times(pipe, model_config)
    if stock.aligned and len(times) == nfe and "timesteps" in accepted:
        scheduler = configured(cls, model_config, **stock.options)
        text = _described(stock.cls, {**stock.options, "timesteps": ALIGNED})
        yield Run(name, nfe, ALIGNED, scheduler, steps, False, text, {"timesteps": times})


def aligned_times(pipe: Any, model_config: Mapping[str, Any]) -> list[int]:
    """Times of Align Your Steps that diffusers ships for this model; empty where there are none."""
    if any(model_config.get(key) != value for key, value in STABLE_DIFFUSION.items()):
        return []
    kind = "StableDiffusionXL" if "StableDiffusionXL" in type(pipe).__name__ else "StableDiffusion"
    return list(AysSchedules[f"{kind}Timesteps"])


def _described(cls: str, options: Options) -> str:
    return f"{cls}({', '.join(f'{key}={value}' for key, value in options.items())})"
