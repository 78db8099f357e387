"""The surface of diffusers' schedulers beside ours: `python -m tests.runtime.surface` writes `surface.md`.

A row per attribute or method of the classes that `from_config` takes: the number of these classes that have it, and
"yes" or the reason why ours has not.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers.schedulers
from diffusers import ConfigMixin, SchedulerMixin

from diffusers_dssolver import DSSolverScheduler

TABLE = Path(__file__).with_name("surface.md")
NOISE = "noise of stochastic samplers; ours is deterministic"
INNER = """convert_model_output lower_order_nums predict_x0 timestep_list solver_p disable_corrector pndm_order counter
    cur_model_output cur_sample plms_timesteps prk_timesteps step_plms step_prk dt prev_derivative sample ets
    state_in_first_order derivatives get_lms_coefficient log_sigmas sigmas_interpol order_list get_order_list
    dpm_solver_first_order_update multistep_dpm_solver_second_order_update multistep_dpm_solver_third_order_update
    singlestep_dpm_solver_second_order_update singlestep_dpm_solver_third_order_update singlestep_dpm_solver_update
    deis_first_order_update multistep_deis_second_order_update multistep_deis_third_order_update
    multistep_uni_c_bh_update multistep_uni_p_bh_update get_coefficients_exponential_negative
    get_coefficients_exponential_positive get_coefficients_fn lagrange_polynomial_coefficient
    stochastic_adams_bashforth_update stochastic_adams_moulton_update is_scale_input_called custom_timesteps get_mult
    get_variables get_scalings_for_boundary_condition_discrete apply_shift set_scale_factors one"""
STOCHASTIC = "batch_step_no_noise eta undo_step tau_func sigmas_up sigmas_down"
OPTIONS = "use_karras_sigmas use_exponential_sigmas use_beta_sigmas variance_type"
REASONS = {
    **dict.fromkeys(INNER.split(), "inner working of that class's own sampler"),
    **dict.fromkeys(STOCHASTIC.split(), NOISE),
    **dict.fromkeys(OPTIONS.split(), "an option of that class, not a name of the interface"),
    "alpha_t": "square root of `alphas_cumprod`",
    "sigma_t": "square root of 1 - `alphas_cumprod`",
    "lambda_t": "log(alpha/sigma): `path.lambdas`",
    "initial_alpha_cumprod": "inversion starts at the data; ours ends there",
    "noisiest_timestep": "inversion starts at the data; ours ends there",
    "time_shift": "`set_timesteps(mu=...)` shifts; no pipeline calls it",
    "stretch_shift_to_terminal": "`set_timesteps` stretches; no pipeline calls it",
    # private names that pipelines and community code call
    "_get_variance": NOISE,
    "_threshold_sample": "`step` thresholds",
    "_convert_to_karras": "a grid of the user's own: `set_timesteps(sigmas=...)`",
    "_convert_to_exponential": "a grid of the user's own: `set_timesteps(sigmas=...)`",
    "_convert_to_beta": "a grid of the user's own: `set_timesteps(sigmas=...)`",
}
PRIVATE = (  # called or written by pipelines of diffusers, or by community pipelines
    "_step_index", "_begin_index", "_init_step_index", "_sigma_to_t", "_sigma_to_alpha_sigma_t", "_internal_dict",
    "_get_variance", "_threshold_sample", "_convert_to_karras", "_convert_to_exponential", "_convert_to_beta",
)  # fmt: skip


def taken() -> dict[str, Any]:
    """Schedulers of diffusers whose configuration `from_config` takes, by class name, after `set_timesteps`."""
    found = {}
    for name in sorted(dir(diffusers.schedulers)):
        cls = getattr(diffusers.schedulers, name)
        if not (name.endswith("Scheduler") and isinstance(cls, type)):
            continue
        try:
            scheduler = cls()
            DSSolverScheduler.from_config(scheduler.config, solvers="classical")
            scheduler.set_timesteps(4)
        except (TypeError, ValueError, ImportError, KeyError):
            continue
        found[name] = scheduler
    return found


def surface() -> dict[str, list[str]]:
    """Classes of diffusers by the public name that they have, and by the private ones that are used from outside."""
    common = {*dir(SchedulerMixin), *dir(ConfigMixin), *dir(object())} - {"_internal_dict"}
    names: dict[str, list[str]] = {}
    for cls, scheduler in taken().items():
        for name in set(dir(scheduler)) - common:
            if not name.startswith("_") or name in PRIVATE:
                names.setdefault(name, []).append(cls)
    return names


def ours() -> set[str]:
    """What a vp or a flow scheduler of ours has."""
    found: set[str] = set()
    for prediction_type in ("epsilon", "flow_prediction"):
        scheduler = DSSolverScheduler(prediction_type=prediction_type)
        scheduler.set_timesteps(4)
        found |= {name for name in dir(scheduler) if hasattr(scheduler, name)}
    return found


def render() -> str:
    """The table, most frequent names first."""
    names, have = surface(), ours()
    rows = ["| name | classes | ours |", "| --- | ---: | --- |"]
    for name in sorted(names, key=lambda n: (n.startswith("_"), -len(names[n]), n)):
        rows.append(f"| `{name}` | {len(names[name])} | {'yes' if name in have else REASONS.get(name, '?')} |")
    head = "Written by `python -m tests.runtime.surface` from diffusers' classes that `from_config` takes.\n"
    return "\n".join(["# The surface of diffusers' schedulers", "", head, *rows, ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    TABLE.write_text(render(), encoding="utf-8")
