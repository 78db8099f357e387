"""Which solver fits which model: noise schedules compared, and the arguments that carry a solver over.

Functions of configurations only. A "full" configuration holds every key of `DSSolverScheduler.__init__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import ARTEFACT_KEYS, BETA_KEYS, OWN_KEYS, SCHEDULE_KEYS, SHIFT_KEYS, is_flow, own_schedule
from .solver import short

SEARCH_COMMAND = "python -m dssolver_search search --pretrained_model_name_or_path MODEL --nfe 5 8 --output_dir OUT"
BETA_NAMES = {"beta_start", "beta_end", "beta_schedule"}
EDM = "this model is sampled in EDM noise levels, which are neither flow nor vp"
# keys of samplers that are not an ODE from noise to data, with the value at which they are
OTHER_WORLDS = {
    "sigma_data": (None, EDM),
    "timestep_type": ("discrete", EDM),
    "stages": (None, "this model is sampled in stages of rising resolution"),
    "scale_factors": (None, "this model is sampled in stages of rising resolution"),
    "num_policy_substeps": (None, "this model predicts a policy of many substeps, not one velocity"),
}
# what marks a distilled model in the configuration of its scheduler
DISTILLED: dict[str, dict[str, Any]] = {
    "LCM or TCD": {"original_inference_steps": ...},
    "flow LCM": {"upscale_mode": ...},
    "stochastic_sampling": {"stochastic_sampling": True},
    "a flow map": {"_class_name": "FlowMapEulerDiscreteScheduler"},
    "Turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
}
Config = Mapping[str, Any]


def model_facts(config: Config) -> dict[str, Any]:
    """Arguments that describe the noise schedule of any scheduler's configuration.

    diffusers drops a key that is at the default of the old class; the noise schedule must survive, so it is listed.

    Raises:
        ValueError: for a schedule that is neither flow nor vp, or that the configuration does not tell.
    """
    for key, (known, reason) in OTHER_WORLDS.items():
        if config.get(key, known) != known:
            raise ValueError(f"{key} is {short(config[key])}: {reason}; keep its own scheduler")
    facts = {key: config[key] for key in SCHEDULE_KEYS if key in config}
    flow = is_flow(config)
    if not flow and "solvers" not in config and config.get("trained_betas") is None and not BETA_NAMES & set(config):
        name = config.get("_class_name") or "this configuration"
        keys = ", ".join(sorted(str(key) for key in config if not str(key).startswith("_"))) or "none"
        raise ValueError(
            f"{name} has neither betas nor a flow shift (its keys: {keys}),"
            " so the noise schedule is unknown; keep its own scheduler, or name the schedule: beta_schedule=..., or "
            'prediction_type="flow_prediction" and shift=...'
        )
    if flow:
        facts["prediction_type"] = "flow_prediction"
        if "shift" not in config and config.get("flow_shift") is not None:  # the name in UniPC and DPMSolver
            facts["shift"] = config["flow_shift"]
    return facts


def distilled(config: Config) -> str | None:
    """A warning, if a scheduler's configuration is that of a model whose few-step sampler is part of it."""
    if "solvers" in config:  # ours, with keys of another class carried along
        return None
    for kind, marks in DISTILLED.items():
        if all(key in config and value in (..., config[key]) for key, value in marks.items()):
            return (
                f"this scheduler's configuration is that of a distilled model ({kind}), whose own sampler is part of "
                "it: keep that sampler; solvers of the ODE are for the model before its distillation"
            )
    return None


def fill(config: Config, defaults: Config) -> dict[str, Any]:
    """The full form of any scheduler's configuration: its own values, else our defaults."""
    full = {key: config.get(key, default) for key, default in defaults.items()}
    return {**full, "prediction_type": "flow_prediction"} if is_flow(config) else full


def carry_over(
    model: Config, name: str, artefact: Config, published: Mapping[str, Config]
) -> tuple[dict[str, Any], str | None]:
    """Arguments that put the solvers of one full configuration on the model of another, and what to tell of them.

    On another noise schedule they are carried over by noise level (`carry.py`), unless the model's configuration is
    strict.

    Args:
        name: of the artefact, for the message.
        published: full configurations by name, for the remedy.

    Raises:
        ValueError: if the noise schedules differ and the configuration is strict.
    """
    home, reason = own_schedule(artefact), mismatch(model, artefact)
    taken = {key: artefact[key] for key in ARTEFACT_KEYS} | {"searched_shift": searched_at(artefact)}
    if reason is None:
        return {**taken, "continuous_time": home["continuous_time"], "carried_from": None}, None
    if model["strict"]:
        ways = remedy(model, published)
        raise ValueError(f"solver {name!r} {reason}; {ways}, or leave strict out to carry it over by noise level")
    source = Path(name).name if Path(name).exists() else name
    origin = artefact["carried_from"] or {"source": source, **{key: home[key] for key in OWN_KEYS}}
    return {**taken, "carried_from": origin}, (
        f"solver {source!r} was searched on another noise schedule ({schedule(home)}) than this model's "
        f"({schedule(model)}): it is carried over by noise level, which nobody measured here"
    )


def first_fitting(model: Config, published: Mapping[str, Config]) -> str:
    """Name of the first published artefact whose noise schedule is the model's.

    Raises:
        ValueError: if none fits, with the reason of each.
    """
    reasons = {name: mismatch(model, artefact) for name, artefact in published.items()}
    for name, reason in reasons.items():
        if reason is None:
            return name
    told = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
    carry = f'carry one over by noise level, unmeasured here (solvers="{next(iter(published), "NAME")}")'
    search = f"search one for this model ({SEARCH_COMMAND})"
    raise ValueError(
        f'no published solver fits this noise schedule ({told}); {search}, {carry} or use solvers="classical"'
    )


def consistent(changes: Config, config: Config, tables: bool) -> dict[str, Any]:
    """Changes of a scheduler's configuration, with what follows from them.

    Args:
        config: the full configuration before.
        tables: whether it has solvers in use.

    Raises:
        ValueError: if the noise schedule changes to one for which the solvers were not searched.
    """
    changes = {key: value for key, value in changes.items() if key not in config or config[key] != value}
    if "solvers" in changes:
        changes.setdefault("carried_from", None)
    if changes.get("flow_shift") is not None:
        changes.setdefault("shift", changes["flow_shift"])
    elif "shift" in changes and "flow_shift" in config:
        changes["flow_shift"] = changes["shift"]
    if tables and "solvers" not in changes:
        at = searched_at(config)
        if at is not None and set(changes) & set(SHIFT_KEYS):
            changes.setdefault("searched_shift", at)
        reason = mismatch({**config, **changes}, config)
        if reason and config["carried_from"] is None:  # what was carried over is carried over anew
            raise ValueError(f"the solvers of this scheduler cannot follow: it {reason}; make one with from_config")
    return changes


def remedy(model: Config, published: Mapping[str, Config]) -> str:
    """The ways on for a model (full configuration) that was refused a solver."""
    fitting = [repr(name) for name, artefact in published.items() if mismatch(model, artefact) is None]
    use = f"use {' or '.join(fitting)}, which fits, " if fitting else ""
    return f'{use}search one for this model ({SEARCH_COMMAND}) or use solvers="classical"'


def mismatch(model: Config, solver: Config) -> str | None:
    """What differs between the noise schedules of the solvers of one full configuration and of the model of another;
    None if nothing does.

    Another resolution shift is no difference, provided that the shift at which they were searched is known.
    """
    home = own_schedule(solver)
    flow = [config["prediction_type"] == "flow_prediction" for config in (home, model)]
    if flow[0] != flow[1]:
        kinds = ["flow" if f else "vp" for f in flow]
        return f"is for {kinds[0]} models, this model is {kinds[1]}"
    ours, theirs = _validity(home), _validity(model)
    free = set(SHIFT_KEYS) if searched_at(solver) else set()
    tables = [solver["solvers"], *(solver["guidance_solvers"] or {}).values()]
    if not any("timesteps" in table for by_count in tables for table in by_count.values()):
        free.add("invert_sigmas")  # nodes are noise levels, whichever way the network counts its time
    for key in (key for key in theirs if key not in free):
        if ours[key] != theirs[key]:
            return f"was searched with {key} = {ours[key]!r}, this model has {theirs[key]!r}"
    return None


def searched_at(solver: Config) -> dict[str, Any] | None:
    """`searched_shift` of a full configuration: recorded, or its own constant shift."""
    home = own_schedule(solver)
    if solver["searched_shift"] is not None:
        return solver["searched_shift"]
    if home["prediction_type"] != "flow_prediction" or home["use_dynamic_shifting"]:
        return None
    return {"factor": home["shift"], "terminal": home["shift_terminal"]}


def schedule(config: Config) -> str:
    """The noise schedule of a configuration."""
    if is_flow(config):
        return (
            "flow, dynamic shift" if config.get("use_dynamic_shifting") else f"flow, shift {config.get('shift', 1):g}"
        )
    if config.get("trained_betas") is not None:
        return "vp, betas of its own"
    betas = f"{config.get('beta_start', 1e-4):g} to {config.get('beta_end', 0.02):g}"
    return f"vp, {config.get('beta_schedule', 'linear')} betas {betas}"


def _validity(config: Config) -> dict[str, Any]:
    """The keys of the noise schedule on which the validity of a solver depends."""
    if config["prediction_type"] == "flow_prediction":
        return {key: config[key] for key in ("num_train_timesteps", "invert_sigmas", *SHIFT_KEYS)}
    facts = {key: config[key] for key in ("num_train_timesteps", *BETA_KEYS)}
    if facts["trained_betas"] is not None:
        facts |= {"beta_schedule": "trained_betas", "beta_start": None, "beta_end": None}
    return facts
