"""Checks of what a `scheduler_config.json` says.

Configurations are untrusted data: a failed check is a ValueError that names the key, its value and what is accepted. A
"full" configuration holds every key of `DSSolverScheduler.__init__`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .derive import MAX_FACTOR, MIN_FACTOR, Shift, at_guidance
from .paths import MAX_TRAIN_TIMESTEPS, PREDICTION_TYPES, ContinuousVPPath, FlowPath, Path, VPPath, make_betas
from .solver import MAX_NFE, SolverSpec, short

logger = logging.getLogger(__name__)

CLASSICAL = "classical"
OLD_KEYS = ("interpolate_corrections",)
SHIFT_KEYS = ("shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
BETA_KEYS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale")
SCHEDULE_KEYS = ("num_train_timesteps", "prediction_type", "invert_sigmas", *BETA_KEYS, *SHIFT_KEYS)
ARTEFACT_KEYS = ("solvers", "guidance_solvers", "provenance", "mean_decay")
OWN_KEYS = (*SCHEDULE_KEYS, "continuous_time")  # of `carried_from`, with "source"
BOOLEAN_KEYS = (
    "rescale_betas_zero_snr", "continuous_time", "use_dynamic_shifting", "invert_sigmas", "strict", "thresholding"
)  # fmt: skip
LARGE = 1e9
MAX_SCALES = 100
FACTORS = (MIN_FACTOR, MAX_FACTOR)
BELOW_ONE = (0.0, 1 - 1e-6)


class Brief(dict):
    """A dict with a short repr: diffusers prints keys that a class does not know, tables included."""

    def __repr__(self) -> str:
        return f"<{len(self)} entries: {', '.join(map(str, self))}>"


def check_keys(config: Mapping[str, Any]) -> None:
    """Check what diffusers' handling of configurations takes for granted."""
    for key in config:
        if not isinstance(key, str) or hasattr(dict, key):  # keys become attributes of a dict
            raise ValueError(f"the key {str(key)[:60]!r} cannot stand in a scheduler's configuration; remove it")
    defaults = config.get("_use_default_values", [])
    if not isinstance(defaults, list) or not all(isinstance(key, str) for key in defaults):
        raise ValueError(f"_use_default_values is {short(defaults)}; it must be a list of keys")
    name = config.get("_class_name", "")
    if name and not (isinstance(name, str) and name.isidentifier() and name.endswith("Scheduler")):
        raise ValueError(f"_class_name is {short(name)}; it must be the name of a scheduler class")


@dataclass(frozen=True)
class Checked:
    """What a full configuration says.

    Args:
        path: the model's path.
        own: the path that the solvers belong to.
        solvers: tables by NFE, at the guidance scale of the configuration.
        searched_shifts: resolution shifts contained in their nodes, `read_shifts`.
        entries: keys whose values must be replaced, so that the configuration is plain JSON of its own.
    """

    path: Path
    own: Path
    solvers: dict[int, SolverSpec]
    searched_shifts: dict[int | None, Shift]
    entries: dict[str, Any]


def check(config: Mapping[str, Any]) -> Checked:
    """Check a full configuration.

    Raises:
        ValueError: naming the key, its value and what is accepted.
    """
    entries: dict[str, Any] = {"use_flow_sigmas": config["prediction_type"] == "flow_prediction"}
    if hasattr(config["trained_betas"], "tolist"):
        entries["trained_betas"] = config["trained_betas"].tolist()
    if "_use_default_values" in config:
        # diffusers passes none of these keys on; other classes need the noise schedule, and ours that it is classical
        entries["_use_default_values"] = sorted(
            {*config["_use_default_values"]} - {"use_flow_sigmas", "solvers", *SCHEDULE_KEYS}
        )
    home = own_schedule(config)
    check_options(config, home)
    path = make_path({**config, **entries})
    own = path if config["carried_from"] is None else make_path(home)
    solvers = read_solvers(config["solvers"], own)
    shifts = read_shifts(config["searched_shift"])
    if shifts and (missing := [] if None in shifts else sorted(set(solvers) - set(shifts))):
        raise ValueError(f"searched_shift has no entry for {missing[0]} steps, of which there is a table")
    if solvers:
        entries["solvers"] = _plain(solvers)
    if by_scale := read_guidance_solvers(config["guidance_solvers"], own):
        entries["guidance_solvers"] = Brief({str(scale): _plain(specs) for scale, specs in by_scale.items()})
        if config["guidance_scale"] is not None:
            solvers = at_guidance(by_scale, config["guidance_scale"], own)
    if isinstance(config["provenance"], dict):
        entries["provenance"] = Brief(config["provenance"])
    return Checked(path, own, solvers, shifts, entries)


def own_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """A full configuration with the noise schedule that its solvers belong to, for that of the model."""
    carried = config["carried_from"]
    if carried is None:
        return dict(config)
    if not isinstance(carried, Mapping) or not {"source", "prediction_type"} <= set(carried) <= {*OWN_KEYS, "source"}:
        raise ValueError(
            f"carried_from is {short(carried)}; it must have source and prediction_type, with other keys of the noise "
            "schedule, or be null"
        )
    for key in set(BOOLEAN_KEYS) & set(carried):
        _check_boolean(f"carried_from: {key}", carried[key])
    return {**config, **{key: value for key, value in carried.items() if key != "source"}}


def without_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without keys of former versions; one that asked for something is told, once."""
    for key in OLD_KEYS:
        if config.get(key):
            _tell_old(key)
    return {key: value for key, value in config.items() if key not in OLD_KEYS}


@functools.cache
def _tell_old(key: str) -> None:
    logger.warning(f"{key} is a key of a former version; it is ignored")


def check_options(config: Mapping[str, Any], home: Mapping[str, Any]) -> None:
    """Check a full configuration except for its noise schedule and its solvers; `home`: `own_schedule`."""
    for key in BOOLEAN_KEYS:
        _check_boolean(key, config[key])
    if config["history_length"] is not None:
        _check_whole("history_length", config["history_length"], LARGE)
    for key in ("base_image_seq_len", "max_image_seq_len", "max_shift", "base_shift"):
        _check_number(key, config[key], (0, LARGE), optional=True)
    _check_number("guidance_scale", config["guidance_scale"], (-LARGE, LARGE), optional=True)
    if config["guidance_scale"] is not None and not config["guidance_solvers"]:
        raise ValueError(
            f"guidance_scale is {config['guidance_scale']}, but these solvers have no tables by guidance "
            "(guidance_solvers); leave guidance_scale out"
        )
    _check_number("dynamic_thresholding_ratio", config["dynamic_thresholding_ratio"], (0, 1))
    _check_number("sample_max_value", config["sample_max_value"], (1, LARGE))
    if config["thresholding"] and config["prediction_type"] == "flow_prediction":
        raise ValueError("thresholding is for vp models; on a flow model leave it false")
    _check_number("mean_decay", config["mean_decay"], (0, 1), optional=True)
    if config["mean_decay"] is not None and home["prediction_type"] != "flow_prediction":
        raise ValueError(f"mean_decay is {config['mean_decay']}, but it is for flow solvers; with others leave it out")


def make_path(config: Mapping[str, Any]) -> Path:
    """The path that a full configuration describes."""
    count, prediction = config["num_train_timesteps"], config["prediction_type"]
    _check_whole("num_train_timesteps", count, MAX_TRAIN_TIMESTEPS)
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {short(prediction)}; known: {', '.join(PREDICTION_TYPES)}")
    if prediction == "flow_prediction":
        _check_number("shift", config["shift"], FACTORS)
        _check_number("shift_terminal", config["shift_terminal"], BELOW_ONE, optional=True)
        if config["time_shift_type"] not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type is {short(config['time_shift_type'])}; known: exponential, linear")
        return FlowPath(count, config["invert_sigmas"])
    trained, scale = config["trained_betas"], config["snr_shift_scale"]
    if trained is not None and (not isinstance(trained, (list, tuple)) or not 1 <= len(trained) <= MAX_TRAIN_TIMESTEPS):
        raise ValueError(f"trained_betas must be a list of 1 to {MAX_TRAIN_TIMESTEPS} numbers")
    _check_number("snr_shift_scale", scale, FACTORS)
    rescale = config["rescale_betas_zero_snr"]
    betas = make_betas(
        count, config["beta_start"], config["beta_end"], config["beta_schedule"], trained, rescale, scale
    )
    if not config["continuous_time"]:
        return VPPath(betas)
    if scale != 1 or rescale:
        raise ValueError("continuous_time goes with plain betas: neither snr_shift_scale nor rescale_betas_zero_snr")
    return ContinuousVPPath(betas)


def read_shifts(value: Any) -> dict[int | None, Shift]:
    """The shifts that `searched_shift` of a configuration describes: by step count, or under None one for all."""
    if value is None:
        return {}
    if isinstance(value, Mapping) and 1 <= len(value) <= MAX_NFE and "factor" not in value:
        return {_count("searched_shift", key): _read_shift(f"searched_shift[{key!r}]", v) for key, v in value.items()}
    return {None: _read_shift("searched_shift", value)}


def _read_shift(name: str, value: Any) -> Shift:
    if not isinstance(value, Mapping) or set(value) != {"factor", "terminal"}:
        raise ValueError(f"{name} is {short(value)}; it must have the keys factor and terminal, or be null")
    _check_number(f"{name}: factor", value["factor"], FACTORS)
    _check_number(f"{name}: terminal", value["terminal"], BELOW_ONE, optional=True)
    return Shift(float(value["factor"]), value["terminal"])


def read_solvers(solvers: Any, path: Path) -> dict[int, SolverSpec]:
    """Checked solvers by NFE, from `solvers` of a configuration."""
    if isinstance(solvers, str) and solvers == CLASSICAL:
        return {}
    if not isinstance(solvers, Mapping) or not solvers:
        raise ValueError(f'solvers must be a dict from step counts to solvers, or "classical", not {short(solvers)}')
    rises = isinstance(path, FlowPath) and path.inverted
    specs = {}
    for key, value in solvers.items():
        count = _count("solvers", key)
        try:
            spec = value if isinstance(value, SolverSpec) else SolverSpec.from_dict(value)
        except ValueError as error:
            raise ValueError(f"solvers['{count}']: {error}") from None
        if spec.nfe != count:
            raise ValueError(f"solvers['{count}'] has {spec.nfe} steps; key and solver must agree")
        if spec.timesteps is not None and spec.nfe > 1 and spec.rising != rises:
            raise ValueError(f"solvers['{count}']: timesteps must {'rise' if rises else 'fall'} for this model")
        specs[spec.nfe] = spec
    return specs


def read_guidance_solvers(by_scale: Any, path: Path) -> dict[float, dict[int, SolverSpec]]:
    """Checked solvers by guidance scale (rising) and NFE, from `guidance_solvers` of a configuration."""
    if by_scale is None:
        return {}
    if not isinstance(by_scale, Mapping) or not 1 <= len(by_scale) <= MAX_SCALES:
        kind = f"a dict from 1 to {MAX_SCALES} guidance scales to solvers"
        raise ValueError(f"guidance_solvers must be {kind}, not {short(by_scale)}")
    found: dict[float, dict[int, SolverSpec]] = {}
    for key, solvers in by_scale.items():
        name = f"guidance_solvers[{str(key)[:60]!r}]"
        try:
            scale = float(key)
        except (TypeError, ValueError, OverflowError):
            scale = math.nan
        if not abs(scale) <= LARGE or scale in found:
            raise ValueError(f"{name}: the key must be a guidance scale, each one once")
        if not isinstance(solvers, Mapping):
            raise ValueError(f"{name} is {short(solvers)}; it must be a dict from step counts to solvers")
        try:
            found[scale] = read_solvers(solvers, path)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    counts = [sorted(specs) for specs in found.values()]
    if any(other != counts[0] for other in counts):
        raise ValueError("guidance_solvers: every guidance scale must have tables for the same step counts")
    return dict(sorted(found.items()))


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether any scheduler's configuration is a flow model's: it says so, or has a shift and no betas (FlowMatch)."""
    if "solvers" in config:  # ours, perhaps carried along by another class; it names its prediction type
        return config.get("prediction_type", "epsilon") == "flow_prediction"
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return True
    return "shift" in config and "beta_start" not in config


def _plain(specs: Mapping[int, SolverSpec]) -> Brief:
    return Brief({str(nfe): spec.to_dict() for nfe, spec in specs.items()})


def _count(name: str, key: Any) -> int:
    """The step count that a key says."""
    text = str(key)
    if text.isascii() and text.isdigit() and len(text) <= 4 and text == str(int(text)) and 1 <= int(text) <= MAX_NFE:
        return int(text)
    raise ValueError(f"{name}[{text[:60]!r}]: the key must be a step count from 1 to {MAX_NFE}")


def _check_boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {short(value)}; it must be true or false")


def _check_number(name: str, value: Any, between: tuple[float, float], optional: bool = False) -> None:
    if value is None and optional:
        return
    low, high = between
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        null = ", or null" if optional else ""
        raise ValueError(f"{name} is {short(value)}; it must be a number from {low:g} to {high:g}{null}")


def _check_whole(name: str, value: Any, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name} is {short(value)}; it must be a whole number from 1 to {high:g}")
