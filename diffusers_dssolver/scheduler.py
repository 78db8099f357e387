"""`DSSolverScheduler`: searched solvers as a diffusers scheduler. The one file that knows its calling contract."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from torch import Tensor

from .derive import Shift, classical, dynamic_shift, from_neighbours, uniform_nodes
from .paths import MAX_TRAIN_TIMESTEPS, PREDICTION_TYPES, ContinuousVPPath, FlowPath, Path, VPPath, make_betas
from .published import published_config, published_solvers
from .solver import MAX_NFE, SolverSpec, fold
from .step import Scalar, step

logger = logging.get_logger(__name__)

CLASSICAL = "classical"
SEARCH_COMMAND = "python -m dssolver_search search --pretrained_model_name_or_path MODEL --nfe 5 8 --output_dir OUT"
GRID_TOLERANCE = 1e-4
FLOW_SCHEDULE_KEYS = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal", "invert_sigmas",
)  # fmt: skip


SCHEDULE_KEYS = (
    "prediction_type", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    *FLOW_SCHEDULE_KEYS,
)  # fmt: skip
BOOLEAN_KEYS = ("rescale_betas_zero_snr", "continuous_time", "use_dynamic_shifting", "invert_sigmas", "strict")


@dataclass
class DSSolverSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample: the state at the next node, shape of the sample.
        pred_original_sample: the data that this call's output predicts, same shape.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class SolverFileError(OSError, ValueError):
    """A solver file that is absent or is not JSON (an OSError for diffusers' own loaders, a ValueError for users)."""


class DSSolverScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own two bases disagree
    """Searched multistep solvers, drop-in for the deterministic schedulers of diffusers.

    A step count with a table in `solvers` uses it; any other gets a derived solver (and says so once). N steps are
    exactly N network calls. Rows for a history that is shorter than the table expects (image-to-image, restarts) are
    folded so that they still sum to 1.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise
            schedule of vp models, as diffusers' own schedulers read it.
        prediction_type: "epsilon", "v_prediction", "sample" (vp), or "flow_prediction" (flow: velocity = noise - data).
        continuous_time: alpha and sigma of vp from the continuous formula (as the published DiT solvers need).
        shift, use_dynamic_shifting, time_shift_type, shift_terminal, invert_sigmas, base_shift, max_shift,
            base_image_seq_len, max_image_seq_len: resolution shift of flow models, as in FlowMatchEulerDiscrete.
            They shape classical solvers; the nodes of a table are final and are never shifted.
        use_flow_sigmas, variance_type: kept for pipelines that read them.
        solvers: {"8": {"nodes": [9 numbers], "timesteps": [8, optional], "coefficients": [[1.0], ...]}, ...}, or
            "classical": derived solvers only, Adams-Bashforth 2 (flow) and DPM-Solver++(2M) (vp) on uniform nodes.
        provenance: how the solvers were found; data, not interpreted.
        strict: raise for a step count that has no table.

    Raises:
        ValueError: naming the key, its value and what is accepted.

    Paper: Alg. 1, Eq. (16) and (19), arXiv 2505.21114.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
    order = 1
    init_noise_sigma = 1.0
    config: Any  # a FrozenDict whose keys are attributes too
    _step_index: int | None
    _last_index: int

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        continuous_time: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        use_flow_sigmas: bool = False,
        variance_type: str | None = None,
        solvers: dict[str, dict[str, list]] | str = CLASSICAL,
        provenance: dict[str, Any] | None = None,
        strict: bool = False,
    ) -> None:
        if isinstance(trained_betas, np.ndarray):
            self.register_to_config(trained_betas=trained_betas.tolist())
        self.register_to_config(use_flow_sigmas=prediction_type == "flow_prediction")
        self._path = make_path(self.config)
        self._solvers = _read_solvers(solvers)
        if self._solvers:  # plain lists under text keys, and no list of the caller's
            self.register_to_config(solvers={str(n): spec.to_dict() for n, spec in self._solvers.items()})
        self._announced: set[int] = set()
        self._begin_index: int | None = None
        self._mu: float | None = None
        self.num_inference_steps: int | None = None
        nodes = torch.tensor(uniform_nodes(num_train_timesteps, self._path), dtype=torch.float64)
        self._install_tensors(nodes, self._path.timestep(nodes[:-1]), (), None)  # what there is before set_timesteps

    # --- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_published(cls, name: str, **kwargs: Any) -> DSSolverScheduler:
        """A solver that ships with the package (`published_solvers()`), offline.

        Raises:
            ValueError: for an unknown name.
        """
        return cls.from_config(published_config(name), **kwargs)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From any scheduler's configuration: flow or vp is inferred, and the solvers are those of

        - the configuration itself, if it has any;
        - `solvers="classical"`: none, every step count is derived;
        - `solvers="org/solver"`, a folder or a published name: that artefact, after its noise schedule was compared;
        - otherwise the first published artefact whose noise schedule is the model's.

        Raises:
            ValueError: if the artefact belongs to another noise schedule, if none fits, or for an unknown argument.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"config is {config!r}; pass a scheduler's configuration, such as pipe.scheduler.config")
        known = cls._get_init_keys(cls) - {"self"}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"{cls.__name__} has no argument {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        for key, neutral in (("snr_shift_scale", 1.0), ("sigma_data", None)):
            if config.get(key, neutral) != neutral:
                raise ValueError(
                    f"{key} is {config[key]!r}: this model's noise schedule is none that {cls.__name__} knows"
                )
        if is_flow(config):
            kwargs.setdefault("prediction_type", "flow_prediction")
            if "shift" not in config and config.get("flow_shift") is not None:  # UniPC and DPMSolver call it so
                kwargs.setdefault("shift", config["flow_shift"])
        # diffusers drops what is another class's default on conversion; of a noise schedule it is a fact of the model
        kwargs = {key: config[key] for key in SCHEDULE_KEYS if key in config} | kwargs
        defaults = config.get("_use_default_values", [])
        given = {**{k: v for k, v in config.items() if k not in defaults}, **kwargs}
        source = given.get("solvers")
        if source is None:
            kwargs |= _matching_published(given)
        elif isinstance(source, str) and source != CLASSICAL:
            kwargs |= _matching_artefact(given, source, cls._load_artefact(source))
        return super().from_config(dict(config), return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; a file that is absent or no JSON object raises `SolverFileError`."""
        try:
            loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        except (OSError, UnicodeDecodeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise SolverFileError(
                f"no solver could be read from {str(pretrained_model_name_or_path)!r}: {reason}"
            ) from error
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(config, dict):
            raise SolverFileError(
                f"{str(pretrained_model_name_or_path)!r} holds a {type(config).__name__}, not a JSON object"
            )
        return loaded

    @classmethod
    def _load_artefact(cls, source: str) -> dict[str, Any]:
        if source in published_solvers():
            return published_config(source)
        return dict(cls.load_config(source))

    # --- the run ---------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the solver for a run and forget the last run's history.

        Args:
            num_inference_steps: N, 1 to 1000; `len(self.timesteps)` will be N.
            device: where `self.timesteps` shall live.
            timesteps: N falling times of the user's own: classical rows on exactly these.
            sigmas: flow only; the uniform grid 1 .. 1/N that pipelines pass by default counts only by its length, any
                other falling grid is the user's own: shifted as diffusers does it, with classical rows.
            mu: flow only; the resolution shift that a pipeline computed. It acts on classical solvers when the
                configuration has `use_dynamic_shifting`, and is remembered for later calls without it.

        Raises:
            ValueError: for no or contradicting arguments, grids that do not fall, flow arguments on a vp solver, or
                with `strict` a step count that has no table.
        """
        if (sigmas is not None or mu is not None) and not isinstance(self._path, FlowPath):
            name = "sigmas" if sigmas is not None else "mu"
            raise ValueError(
                f"{name} given to a vp solver ({self.config.prediction_type}): this is a flow model; load a flow solver"
            )
        if mu is not None:
            self._mu = float(mu)
        if timesteps is not None:
            spec = self._spec_for_timesteps(_floats("timesteps", timesteps))
        elif sigmas is not None:
            spec = self._spec_for_sigmas(_floats("sigmas", sigmas))
        else:
            spec = self._spec_for_count(num_inference_steps)
        if num_inference_steps is not None and num_inference_steps != spec.nfe:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but the schedule given has {spec.nfe} entries"
            )
        self._install(spec, device)
        self.num_inference_steps = spec.nfe

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DSSolverSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the solver. Without host synchronisation when `timestep` is an element of `self.timesteps`.

        Args:
            model_output: the network's output at (sample, timestep), any shape.
            timestep: an element of `self.timesteps` (or its number).
            sample: the current state, same shape.
            generator: accepted for pipelines that pass one; the solver is deterministic.
            return_dict: False for the tuple (prev_sample, pred_original_sample).

        Returns:
            prev_sample in the dtype of model_output; the arithmetic is at least float32.

        Raises:
            ValueError: if the shapes differ, or all steps were taken.
        """
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}; they must be equal"
            )
        index = self._locate(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x, output = sample.to(dtype), model_output.to(dtype)
        alpha, sigma = self._alphas[index], self._sigmas[index]
        d = self._path.quantity(output, x, alpha, sigma, self.config.prediction_type)
        self._remember(index, d)
        row = self._row(index, x)
        x_next = step(x, self._history[-len(row) :], row, self._a[index], self._b[index])
        self._step_index = index + 1
        prev_sample, denoised = (
            x_next.to(model_output.dtype),
            self._path.denoised(d, x, alpha, sigma).to(model_output.dtype),
        )
        if not return_dict:
            return prev_sample, denoised
        return DSSolverSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | float | Tensor) -> Tensor:
        """alpha x + sigma noise at the given times (one, or one per sample), on or off the schedule; shapes (B, ..)."""
        times = torch.as_tensor(timesteps).detach().to("cpu", torch.float64).reshape(-1)
        factors = self._path.alpha_sigma(self._path.node(times))
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        alpha, sigma = (
            f.to(original_samples.device, dtype).reshape(-1, *[1] * (original_samples.ndim - 1)) for f in factors
        )
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: int | float | Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of the flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def scale_model_input(self, sample: Tensor, timestep: int | float | Tensor | None = None) -> Tensor:
        """The sample itself: neither path scales the network's input."""
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where in the schedule the next run starts (image-to-image)."""
        self._begin_index = begin_index

    @property
    def tables(self) -> tuple[int, ...]:
        """Step counts that have a searched table, rising."""
        return tuple(sorted(self._solvers))

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first one."""
        return self._step_index

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- inside ----------------------------------------------------------------------------------------------------

    def _spec_for_count(self, nfe: int | None) -> SolverSpec:
        if isinstance(nfe, bool) or not isinstance(nfe, (int, np.integer)) or not 1 <= nfe <= MAX_NFE:
            raise ValueError(f"num_inference_steps is {nfe!r}; it must be a whole number from 1 to {MAX_NFE}")
        if nfe in self._solvers:
            return self._solvers[nfe]
        tables = ", ".join(str(n) for n in sorted(self._solvers)) or "none"
        if self.config.strict:
            raise ValueError(
                f"no table for {nfe} steps (there are tables for: {tables}); use one of them or strict=False"
            )
        if not self._solvers:
            return self._classical(uniform_nodes(nfe, self._path))
        if nfe not in self._announced:
            self._announced.add(nfe)
            logger.warning(
                f"no table for {nfe} steps (there are tables for: {tables}): using a solver derived from them"
            )
        return from_neighbours(self._solvers, nfe, self._path)

    def _spec_for_sigmas(self, sigmas: list[float]) -> SolverSpec:
        nfe = len(sigmas)
        if all(abs(s - (nfe - i) / nfe) <= GRID_TOLERANCE for i, s in enumerate(sigmas)):  # false for NaN
            return self._spec_for_count(nfe)
        return self._classical((*sigmas, 0.0))

    def _spec_for_timesteps(self, timesteps: list[float]) -> SolverSpec:
        nodes = self._path.node(torch.tensor(timesteps, dtype=torch.float64)).tolist()
        own = self._solvers.get(len(timesteps))
        if own is not None:
            times = own.timesteps or self._path.timestep(torch.tensor(own.nodes[:-1], dtype=torch.float64)).tolist()
            tolerance = GRID_TOLERANCE * self.config.num_train_timesteps
            if all(abs(a - b) <= tolerance for a, b in zip(timesteps, times, strict=True)):
                return own
        return classical((*nodes, 0.0), self._path)

    def _classical(self, nodes: Sequence[float]) -> SolverSpec:
        if isinstance(self._path, FlowPath):
            nodes = self._shift()(nodes)
        return classical(nodes, self._path)

    def _shift(self) -> Shift:
        config = self.config
        if not config.use_dynamic_shifting:
            return Shift(config.shift, config.shift_terminal)
        mu = self._mu if self._mu is not None else config.base_shift or 0.0
        return Shift(dynamic_shift(mu, config.time_shift_type), config.shift_terminal)

    def _install(self, spec: SolverSpec, device: str | torch.device | None = None) -> None:
        nodes = torch.tensor(spec.nodes, dtype=torch.float64)
        times = (
            self._path.timestep(nodes[:-1])
            if spec.timesteps is None
            else torch.tensor(spec.timesteps, dtype=torch.float64)
        )
        self._install_tensors(nodes, times, spec.coefficients, device)

    def _install_tensors(
        self, nodes: Tensor, times: Tensor, rows: Sequence[Sequence[Scalar]], device: str | torch.device | None
    ) -> None:
        """Make a solver with nodes (N+1,) and times (N,), float64 on the CPU, the one of the coming run."""
        alphas, sigmas = self._path.alpha_sigma(nodes)
        self._a, self._b = (_scalars(factor) for factor in self._path.transition(alphas, sigmas))
        self._alphas, self._sigmas = _scalars(alphas), _scalars(sigmas)
        self._rows = [_without_leading_zeros(row) for row in rows]
        self._needed = _history_needed(self._rows)
        self.timesteps = times.to(torch.float32).to(device)
        ratio = nodes if isinstance(self._path, FlowPath) else sigmas / alphas
        self.sigmas = (1 - ratio if self.config.invert_sigmas else ratio).to(torch.float32)
        self._history: list[Tensor] = []
        self._step_index = None
        self._begin_index = None

    def _locate(self, timestep: int | float | Tensor) -> int:
        """Index of this step. An element of `self.timesteps` is known by its place in memory, so nothing is read back
        from the device; else the running count decides, and at its start the announced index or the nearest time."""
        index = None
        if (
            isinstance(timestep, Tensor)
            and timestep.device == self.timesteps.device
            and timestep.dtype == self.timesteps.dtype
        ):
            offset, rest = divmod(timestep.data_ptr() - self.timesteps.data_ptr(), self.timesteps.element_size())
            index = offset if rest == 0 and 0 <= offset < len(self.timesteps) else None
        if index is None:
            index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None:
            index = int((self.timesteps.detach().cpu() - float(timestep)).abs().argmin())
        if not self._rows:
            raise ValueError("set_timesteps was not called; call it before step")
        if index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps were taken; call set_timesteps before another run")
        return index

    def _remember(self, index: int, d: Tensor) -> None:
        """Append d to the history, newest last, and let go of what no later row uses. A jump or another shape starts a
        new history; the same index again replaces the last entry."""
        if self._history:
            last = self._last_index
            if index == last:
                self._history.pop()
            elif index != last + 1:
                self._history.clear()
            if self._history and (self._history[-1].shape != d.shape or self._history[-1].device != d.device):
                self._history.clear()
        self._history.append(d)
        del self._history[: -self._needed[index]]
        self._last_index = index

    def _row(self, index: int, x: Tensor) -> Sequence[Scalar]:
        """Weights c_ij of the newest quantities, folded where the history is shorter than the row."""
        row = self._rows[index]
        return row if len(row) <= len(self._history) else fold(row, len(self._history))


def make_path(config: Mapping[str, Any]) -> Path:
    """The path that a configuration with diffusers' keys describes. Raises ValueError naming the key at fault."""
    for key in BOOLEAN_KEYS:
        if not isinstance(config[key], bool):
            raise ValueError(f"{key} is {config[key]!r}; it must be true or false")
    count, prediction = config["num_train_timesteps"], config["prediction_type"]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {count!r}; it must be a whole number from 1 to {MAX_TRAIN_TIMESTEPS}")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction!r}; known: {', '.join(PREDICTION_TYPES)}")
    if prediction == "flow_prediction":
        shift, kind = config["shift"], config["time_shift_type"]
        if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < 1e300:
            raise ValueError(f"shift is {shift!r}; it must be a positive number")
        for key, top in (("shift_terminal", 1.0), ("base_shift", 1e300)):
            value = config[key]
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < top
            ):
                raise ValueError(f"{key} is {value!r}; it must be a number from 0 to below {top:g}, or null")
        if kind not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type is {kind!r}; known: exponential, linear")
        return FlowPath(count, bool(config["invert_sigmas"]))
    trained = config["trained_betas"]
    if trained is not None and (not isinstance(trained, (list, tuple)) or len(trained) != count):
        raise ValueError(f"trained_betas must be a list of num_train_timesteps = {count} numbers")
    betas = make_betas(
        count,
        config["beta_start"],
        config["beta_end"],
        config["beta_schedule"],
        trained,
        config["rescale_betas_zero_snr"],
    )
    return ContinuousVPPath(betas) if config["continuous_time"] else VPPath(betas)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is a flow model's: it says so, or has a shift and no betas (FlowMatch classes)."""
    if "solvers" in config:  # ours, perhaps carried along by another class: it says what it is
        return config.get("prediction_type", "epsilon") == "flow_prediction"
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return True
    return "shift" in config and "beta_start" not in config


def check_same_schedule(model: Mapping[str, Any], solver: Mapping[str, Any], name: str) -> None:
    """Refuse a solver whose noise schedule is not the model's.

    Raises:
        ValueError: naming the first key that differs, both values and the remedy.
    """
    remedy = f'search one for this model ({SEARCH_COMMAND}) or use solvers="classical"'
    if is_flow(model) != is_flow(solver):
        kinds = ["flow" if is_flow(c) else "vp" for c in (solver, model)]
        raise ValueError(
            f"solver {name!r} is for {kinds[0]} models, this model is {kinds[1]}: it would be meaningless; {remedy}"
        )
    ours, theirs = _schedule(solver), _schedule(model)
    for key, value in theirs.items():
        if ours[key] != value:
            raise ValueError(
                f"solver {name!r} was searched with {key} = {ours[key]!r}, this model has {value!r}; {remedy}"
            )


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a solver's validity hangs on, with defaults filled in."""
    full = {**_defaults(), **{k: v for k, v in config.items() if k in _defaults()}}
    if is_flow(config):
        return {key: full[key] for key in FLOW_SCHEDULE_KEYS}
    keys = ["num_train_timesteps", "rescale_betas_zero_snr"]
    if full["trained_betas"] is not None:
        return {key: full[key] for key in [*keys, "trained_betas"]} | {"beta_schedule": "trained_betas"}
    return {key: full[key] for key in [*keys, "beta_schedule", "beta_start", "beta_end"]} | {"trained_betas": None}


def _defaults() -> dict[str, Any]:
    from inspect import signature

    return {k: p.default for k, p in signature(DSSolverScheduler.__init__).parameters.items() if k != "self"}


def _matching_artefact(model: Mapping[str, Any], name: str, artefact: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that put this artefact's solvers on the model's configuration."""
    if "solvers" not in artefact:
        raise ValueError(f"{name!r} is a scheduler configuration without solvers")
    check_same_schedule(model, artefact, name)
    return {key: artefact[key] for key in ("solvers", "provenance", "continuous_time") if key in artefact}


def _matching_published(model: Mapping[str, Any]) -> dict[str, Any]:
    reasons = []
    for name in published_solvers():
        try:
            found = _matching_artefact(model, name, published_config(name))
        except ValueError as error:
            reasons.append(str(error).split("; search one")[0].split(": it would")[0])
            continue
        logger.info(f"using the published solver {name!r}")
        return found
    raise ValueError(
        f"no published solver fits this noise schedule ({'; '.join(reasons)}). Search one for this model "
        f'({SEARCH_COMMAND}) or use solvers="classical"'
    )


def _read_solvers(solvers: Any) -> dict[int, SolverSpec]:
    """Checked specs by NFE. Raises ValueError that starts with the key at fault."""
    if solvers == CLASSICAL:
        return {}
    if not isinstance(solvers, Mapping) or not solvers:
        raise ValueError(
            f'solvers must be a dict from step counts to solvers, or "classical", not {str(solvers)[:60]!r}'
        )
    specs = {}
    for key, value in solvers.items():
        text = str(key)
        if not (
            text.isascii()
            and text.isdigit()
            and len(text) <= 4
            and 1 <= int(text) <= MAX_NFE
            and text == str(int(text))
        ):
            raise ValueError(f"solvers[{text[:60]!r}]: the key must be a step count from 1 to {MAX_NFE}")
        try:
            spec = value if isinstance(value, SolverSpec) else SolverSpec.from_dict(value)
        except ValueError as error:
            raise ValueError(f"solvers[{text!r}]: {error}") from None
        if spec.nfe != int(text):
            raise ValueError(f"solvers[{text!r}] has {spec.nfe} steps; key and solver must agree")
        specs[spec.nfe] = spec
    return specs


def _floats(name: str, values: Sequence[float] | Tensor | np.ndarray) -> list[float]:
    numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu").reshape(-1).tolist()
    if not 1 <= len(numbers) <= MAX_NFE:
        raise ValueError(f"{name} has {len(numbers)} entries; 1 to {MAX_NFE} expected")
    return numbers


def _scalars(values: Tensor) -> list[Scalar]:
    """Plain floats, which cost no device traffic; live 0-dim tensors where a search differentiates in them."""
    return list(values.unbind()) if values.requires_grad else values.tolist()


def _without_leading_zeros(row: Sequence[Scalar]) -> Sequence[Scalar]:
    start = next((j for j, weight in enumerate(row) if isinstance(weight, Tensor) or weight != 0.0), len(row) - 1)
    return row[start:]


def _history_needed(rows: Sequence[Sequence[Scalar]]) -> list[int]:
    """How many of the newest quantities must be held at each step, for it and for the steps after it."""
    needed = [len(row) for row in rows]
    for i in reversed(range(len(needed) - 1)):
        needed[i] = max(needed[i], needed[i + 1] - 1)
    return needed


# Saved pipelines record this name; loading them then looks in the package, not in a file that may move.
DSSolverScheduler.__module__ = __name__.partition(".")[0]
