"""`DSSolverScheduler`: searched solvers as a diffusers scheduler. The one file that knows its calling contract."""

from __future__ import annotations

import inspect
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

from .config import (
    ARTEFACT_KEYS,
    CLASSICAL,
    SCHEDULE_KEYS,
    Brief,
    check_keys,
    check_options,
    is_flow,
    make_path,
    mismatch,
    read_guidance_solvers,
    read_shift,
    read_solvers,
    searched_at,
)  # fmt: skip
from .derive import Shift, at_guidance, classical, dynamic_shift, from_neighbours, reshifted, uniform_nodes, warp
from .grids import TOLERANCE, is_default
from .paths import FlowPath, Path, VPPath
from .published import published_config, published_solvers
from .solver import MAX_NFE, SolverSpec, fold
from .step import Scalar, decayed_mean, split_mean, step, weighted_sum

logger = logging.get_logger(__name__)

SEARCH_COMMAND = "python -m dssolver_search search --pretrained_model_name_or_path MODEL --nfe 5 8 --output_dir OUT"
LEARNED_VARIANCE = ("learned", "learned_range")


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
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr,
            snr_shift_scale: the noise schedule of vp models, as diffusers' own schedulers read it.
        prediction_type: "epsilon", "v_prediction", "sample" (vp), or "flow_prediction" (flow: velocity = noise - data).
        continuous_time: alpha and sigma of vp from the continuous formula (as the published DiT solvers need).
        shift, use_dynamic_shifting, time_shift_type, shift_terminal, invert_sigmas, base_shift, max_shift,
            base_image_seq_len, max_image_seq_len: resolution shift of flow models, as in FlowMatchEulerDiscrete.
        searched_shift: {"factor": e, "terminal": number or null}, the shift that is contained in the nodes of
            `solvers`: where the model's own differs, tables are warped. None: they are used as they are.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the predicted data (vp).
        variance_type: "learned" or "learned_range": the network's output has variances behind the prediction.
        use_flow_sigmas: kept for pipelines that read it.
        solvers: {"8": {"nodes": [9 numbers], "timesteps": [8, optional], "coefficients": [[1.0], ...]}, ...}, or
            "classical": derived solvers only, Adams-Bashforth 2 (flow) and DPM-Solver++(2M) (vp) on uniform nodes.
        guidance_solvers: solvers by guidance scale, {"1.5": {"8": {...}, ...}, "4.0": {...}}, for the same step counts.
        guidance_scale: that of the coming runs, which a scheduler is not told by pipelines: `guidance_solvers` of the
            scales around it, blended, take the place of `solvers`; beyond all scales those of the nearest.
        provenance: how the solvers were found; data, not interpreted.
        strict: raise for a step count that has no table.
        interpolate_corrections: between two tables, derived solvers take over what both learned beside the nodes; set
            by a search that measured it to help.
        history_length: at most this many model outputs are held, 1 or more (longer rows are folded); None: all that
            the solver uses.
        mean_decay: of flow models, 0 to 1: rows weigh velocities without their means (`step.split_mean`), in whose
            place comes the average of the means so far, that of k steps ago with weight mean_decay^k (0: the newest,
            1: all alike). Against grid artefacts of solvers searched on another model, such as ImageNet's on FLUX
            (Sec. 7.1). It belongs to the tables: `from_config` with other `solvers` leaves it behind. None: off.

    Raises:
        ValueError: naming the key, its value and what is accepted.

    Paper: Alg. 1, Eq. (16) and (19), arXiv 2505.21114.
    """

    _compatibles = [
        *(e.name for e in KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"),
        "FlowMatchEulerDiscreteScheduler",
    ]
    order = 1
    init_noise_sigma = 1.0
    last_sample = None  # a name of UniPC's that ChronoEdit reads: no step looks at an earlier sample
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
        snr_shift_scale: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        searched_shift: dict[str, float | None] | None = None,
        interpolate_corrections: bool = False,
        history_length: int | None = None,
        guidance_solvers: dict[str, dict[str, dict[str, list]]] | None = None,
        guidance_scale: float | None = None,
        mean_decay: float | None = None,
    ) -> None:
        if isinstance(trained_betas, np.ndarray):
            self.register_to_config(trained_betas=trained_betas.tolist())
        self.register_to_config(use_flow_sigmas=prediction_type == "flow_prediction")
        if "_use_default_values" in self.config:
            # diffusers does not tell other classes of these; of the noise schedule they shall hear
            unsaid = sorted(set(self.config["_use_default_values"]) - {"use_flow_sigmas", *SCHEDULE_KEYS})
            self.register_to_config(_use_default_values=unsaid)
        check_options(self.config)
        self._path = make_path(self.config)
        self._solvers = read_solvers(solvers, self._path)
        self._searched = read_shift(searched_shift)
        if self._solvers:  # plain lists under text keys, and no list of the caller's
            self.register_to_config(solvers=_plain(self._solvers))
        if by_scale := read_guidance_solvers(guidance_solvers, self._path):
            told = Brief({str(scale): _plain(specs) for scale, specs in by_scale.items()})
            self.register_to_config(guidance_solvers=told)
            if guidance_scale is not None:
                self._solvers = at_guidance(by_scale, guidance_scale, self._path)
        if isinstance(provenance, dict):
            self.register_to_config(provenance=Brief(provenance))
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
        check_keys(config)
        known = cls._get_init_keys(cls) - {"self"}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"{cls.__name__} has no argument {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        for key, known_value in (("sigma_data", None), ("timestep_type", "discrete")):
            if config.get(key, known_value) != known_value:
                raise ValueError(
                    f"{key} is {config[key]!r}: this model is sampled in EDM noise levels, which are neither flow nor "
                    f"vp and which {cls.__name__} does not know; keep its own scheduler"
                )
        # diffusers drops what is another class's default on conversion; of a noise schedule it is a fact of the model
        facts = {key: config[key] for key in SCHEDULE_KEYS if key in config}
        if is_flow(config):
            facts["prediction_type"] = "flow_prediction"
            if "shift" not in config and config.get("flow_shift") is not None:  # UniPC and DPMSolver call it so
                facts["shift"] = config["flow_shift"]
        defaults = config.get("_use_default_values", [])
        given = {**{k: v for k, v in config.items() if k not in defaults}, **facts, **kwargs}
        source, asked = given.get("solvers"), {key: kwargs[key] for key in kwargs if key == "mean_decay"}
        if source is None:
            kwargs |= _matching_published(given) | asked
        elif isinstance(source, str) and source != CLASSICAL and "solvers" in kwargs:  # a file cannot send us elsewhere
            kwargs |= _matching(given, source, cls._load_artefact(source)) | asked
        elif "solvers" in kwargs:
            kwargs.setdefault("mean_decay", None)
        return super().from_config(dict(config), return_unused_kwargs=return_unused_kwargs, **{**facts, **kwargs})

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
        check_keys(config)
        return loaded

    @classmethod
    def _load_artefact(cls, source: str) -> dict[str, Any]:
        """A solver's full configuration, checked."""
        config = published_config(source) if source in published_solvers() else dict(cls.load_config(source))
        if "solvers" not in config:
            raise ValueError(f"{source!r} is a scheduler configuration without solvers")
        if not isinstance(config["solvers"], Mapping):
            raise ValueError(f"{source!r} has no tables; pass solvers={CLASSICAL!r} for classical rows")
        return dict(DSSolverScheduler.from_config(config).config)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """As in diffusers, with the solver's own card in place of an empty one; a card that is there is replaced."""
        from .card import push  # the Hub's client and the pipelines: slow to import

        message = commit_message or "Upload scheduler"
        return push(
            self, repo_id, private, token, commit_message=message, create_pr=create_pr, path_in_repo=subfolder
        )  # fmt: skip

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
            timesteps: N times of the user's own, noisiest first: classical rows on exactly these.
            sigmas: flow only; N falling sigmas of the user's own: shifted as diffusers does it, with classical rows.
                Of a grid that some pipeline passes by default (`grids.default_grids`) only the length counts.
                With both `timesteps` and `sigmas` the network is fed times without the shift (CogView4).
            mu: flow only; the resolution shift that a pipeline computed, used when the configuration has
                `use_dynamic_shifting`, and remembered for later calls without it.

        Raises:
            ValueError: for no or contradicting arguments, grids that do not fall, flow arguments on a vp solver, or
                with `strict` a step count that has no table.
        """
        if (sigmas is not None or mu is not None) and not isinstance(self._path, FlowPath):
            name = "sigmas" if sigmas is not None else "mu"
            raise ValueError(
                f"{name} given to a vp solver ({self.config.prediction_type}): this is a flow model; load a flow solver"
            )
        before = self._mu
        try:
            if mu is not None:
                self._mu = float(mu)
            spec = self._spec(num_inference_steps, timesteps, sigmas)
            self._install(spec, device)
        except ValueError:
            self._mu = before
            raise
        self.num_inference_steps = spec.nfe

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
        **stochastic: Any,
    ) -> DSSolverSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the solver. Without host synchronisation when `timestep` is an element of `self.timesteps`.

        Args:
            model_output: the network's output at (sample, timestep), any shape.
            timestep: an element of `self.timesteps` (or its number).
            sample: the current state, same shape.
            generator: accepted for pipelines that pass one; the solver is deterministic.
            return_dict: False for the tuple (prev_sample, pred_original_sample).
            per_token_timesteps: given by pipelines that hold some tokens back (LTX-condition) and keep the result of
                those at `timestep` only, which is what is computed. As in FlowMatchEulerDiscrete it changes the
                sign of model_output (data minus noise) and the result is not cast.
            stochastic: what DDIMPipeline passes unasked: `eta`, which must be 0, and `use_clipped_model_output`.

        Returns:
            prev_sample in the dtype of model_output; the arithmetic is at least float32.

        Raises:
            ValueError: if the shapes differ, or all steps were taken.
        """
        for key, value in stochastic.items():
            if key not in ("eta", "use_clipped_model_output"):
                raise TypeError(f"{type(self).__name__}.step() has no argument {key!r}")
            if key == "eta" and value:
                raise ValueError(f"eta is {value}; this solver is deterministic, leave eta at 0")
        if self.config.variance_type in LEARNED_VARIANCE and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}; they must be equal"
            )
        index = self._locate(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        alpha, sigma = self._alphas[index], self._sigmas[index]
        p, q = self._path.quantity_weights(alpha, sigma, self.config.prediction_type)
        d = _in_dtype_of(x, model_output, p, q if per_token_timesteps is None else -q)
        if self.config.thresholding:
            d = self._thresholded(d)
        self._remember(index, d)
        row = self._row(index, x)
        history = self._history[-len(row) :]
        if self._means:
            history, row = [*history, decayed_mean(self._means, self.config.mean_decay)], [*row, 1.0]
        x_next = step(x, history, row, self._a[index], self._b[index])
        p, q = self._path.denoised_weights(alpha, sigma)
        dtype = model_output.dtype if per_token_timesteps is None else x.dtype
        prev_sample, denoised = x_next.to(dtype), _in_dtype_of(x, d, p, q).to(dtype)
        self._step_index = index + 1
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
    def path(self) -> Path:
        """Noise schedule of the model."""
        return self._path

    @property
    def solvers(self) -> dict[int, SolverSpec]:
        """Checked tables by step count."""
        return dict(self._solvers)

    @property
    def tables(self) -> tuple[int, ...]:
        """Step counts that have a searched table, rising."""
        return tuple(sorted(self._solvers))

    @property
    def model_outputs(self) -> list[Tensor]:
        """The history, newest last, without the means under `mean_decay`; what a pipeline puts in the place of an entry
        (ChronoEdit) is used."""
        return self._history

    @property
    def betas(self) -> Tensor:
        """(T,) float32, of vp models only, or `trained_betas`."""
        given = self.config.trained_betas
        return torch.tensor(given or self._vp_path("betas").betas, dtype=torch.float32)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32, of vp models only."""
        path = self._vp_path("alphas_cumprod")
        alpha, _ = path.alpha_sigma(path.node(torch.arange(path.num_train_timesteps)))
        return alpha.square().to(torch.float32)

    def _vp_path(self, name: str) -> VPPath:
        if not isinstance(self._path, VPPath):
            raise AttributeError(f"'{type(self).__name__}' object of a flow model has no attribute '{name}'")
        return self._path

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

    def _spec(self, nfe: int | None, timesteps: Any, sigmas: Any) -> SolverSpec:
        """The solver for what `set_timesteps` was given."""
        if timesteps is not None and sigmas is not None:
            spec = self._spec_for_both(_floats("timesteps", timesteps), _floats("sigmas", sigmas))
        elif timesteps is not None:
            spec = self._spec_for_timesteps(_floats("timesteps", timesteps))
        elif sigmas is not None:
            spec = self._spec_for_sigmas(_floats("sigmas", sigmas))
        else:
            spec = self._spec_for_count(nfe)
        if nfe is not None and nfe != spec.nfe:
            raise ValueError(f"num_inference_steps is {nfe}, but the schedule given has {spec.nfe} entries")
        return spec

    def _spec_for_count(self, nfe: int | None) -> SolverSpec:
        if isinstance(nfe, bool) or not isinstance(nfe, (int, np.integer)) or not 1 <= nfe <= MAX_NFE:
            raise ValueError(f"num_inference_steps is {nfe!r}; it must be a whole number from 1 to {MAX_NFE}")
        if not self._solvers and not self.config.strict:
            return self._classical(uniform_nodes(nfe, self._path))
        spec = self._solvers.get(nfe)
        if spec is None:
            if self.config.strict:
                raise ValueError(
                    f"no table for {nfe} steps (there are tables for: {self._table_names()}); use one of them or "
                    "strict=False"
                )
            self._say_once(
                nfe,
                f"no table for {nfe} steps (there are tables for: {self._table_names()}): using a solver derived "
                "from them",
            )
            spec = from_neighbours(self._solvers, nfe, self._path, self.config.interpolate_corrections)
        if self._searched is not None and isinstance(self._path, FlowPath):
            spec = reshifted(spec, self._searched, self._shift(), self._path)
        return spec

    def _spec_for_sigmas(self, sigmas: list[float]) -> SolverSpec:
        if is_default(sigmas, self.config.num_train_timesteps):
            return self._spec_for_count(len(sigmas))
        if sigmas[0] < sigmas[-1]:
            raise ValueError(
                f"sigmas rise from {sigmas[0]} to {sigmas[-1]}: a ramp of EDM noise levels (Cosmos 2), which are "
                f"neither flow nor vp and which {type(self).__name__} does not know; keep the pipeline's own scheduler"
            )
        self._announce_own_grid(len(sigmas))
        return self._classical(self._ended("sigmas", sigmas))

    def _spec_for_timesteps(self, timesteps: list[float]) -> SolverSpec:
        nodes = self._path.node(torch.tensor(timesteps, dtype=torch.float64)).tolist()
        if isinstance(self._path, FlowPath) and is_default(nodes, self.config.num_train_timesteps):
            return self._spec_for_count(len(nodes))
        if len(timesteps) in self._solvers:
            own = self._spec_for_count(len(timesteps))
            tolerance = TOLERANCE * self.config.num_train_timesteps
            if all(abs(a - b) <= tolerance for a, b in zip(timesteps, self._times(own).tolist(), strict=True)):
                return own
        self._announce_own_grid(len(timesteps))
        return classical(self._ended("timesteps", nodes), self._path)

    def _spec_for_both(self, timesteps: list[float], sigmas: list[float]) -> SolverSpec:
        """Sigmas are shifted, times are not: the network counts its time before the shift."""
        if len(timesteps) != len(sigmas):
            raise ValueError(
                f"timesteps has {len(timesteps)} entries, sigmas {len(sigmas)}; given together they must be as many"
            )
        spec = self._spec_for_sigmas(sigmas)
        if is_default(sigmas, self.config.num_train_timesteps):
            unshifted = warp(torch.tensor(spec.nodes[:-1], dtype=torch.float64), 1 / self._shift().factor)
            timesteps = self._path.timestep(unshifted).tolist()
        return SolverSpec(spec.nodes, spec.coefficients, tuple(timesteps))

    def _classical(self, nodes: Sequence[float]) -> SolverSpec:
        if isinstance(self._path, FlowPath):
            nodes = self._shift()(nodes)
        return classical(nodes, self._path, stretched=bool(self.config.shift_terminal))

    def _shift(self) -> Shift:
        config = self.config
        if not config.use_dynamic_shifting:
            return Shift(config.shift, config.shift_terminal)
        mu = self._mu if self._mu is not None else config.base_shift or 0.0
        return Shift(dynamic_shift(mu, config.time_shift_type), config.shift_terminal)

    def _ended(self, name: str, nodes: list[float]) -> tuple[float, ...]:
        if nodes[-1] == 0:
            raise ValueError(f"{name} ends at clean data, where no network call is made; leave that last entry out")
        return (*nodes, 0.0)

    def _table_names(self) -> str:
        return ", ".join(str(n) for n in self.tables) or "none"

    def _announce_own_grid(self, nfe: int) -> None:
        if self._solvers:
            self._say_once(
                -nfe,
                f"the {nfe} noise levels given are no default of a pipeline: using classical rows on them; for a "
                "searched solver pass num_inference_steps only",
            )

    def _say_once(self, key: int, message: str) -> None:
        if key not in self._announced:
            self._announced.add(key)
            logger.warning(message)

    def _times(self, spec: SolverSpec) -> Tensor:
        """(N,) float64: what the network is fed."""
        if spec.timesteps is None:
            return self._path.timestep(torch.tensor(spec.nodes[:-1], dtype=torch.float64))
        return torch.tensor(spec.timesteps, dtype=torch.float64)

    def _install(self, spec: SolverSpec, device: str | torch.device | None = None) -> None:
        nodes = torch.tensor(spec.nodes, dtype=torch.float64)
        self._install_tensors(nodes, self._times(spec), spec.coefficients, device)

    def _install_tensors(
        self, nodes: Tensor, times: Tensor, rows: Sequence[Sequence[Scalar]], device: str | torch.device | None
    ) -> None:
        """Make a solver with nodes (N+1,) and times (N,), float64 on the CPU, the one of the coming run."""
        alphas, sigmas = self._path.alpha_sigma(nodes)
        self._a, self._b = (_scalars(factor) for factor in self._path.transition(alphas, sigmas))
        self._alphas, self._sigmas = _scalars(alphas), _scalars(sigmas)
        longest = self.config.history_length or len(rows)
        self._rows = [fold(row, min(longest, len(row))) for row in map(_without_leading_zeros, rows)]
        self._needed = _history_needed(self._rows)
        self.timesteps = times.to(torch.float32).to(device)
        ratio = nodes if isinstance(self._path, FlowPath) else sigmas / alphas
        self.sigmas = (1 - ratio if self.config.invert_sigmas else ratio).to(torch.float32)
        self._history: list[Tensor] = []
        self._means: list[Tensor] = []  # of every step since the history began, if they are kept apart
        self._step_index = None
        self._begin_index = None

    def _locate(self, timestep: int | float | Tensor) -> int:
        """Index of this step. An element of `self.timesteps` is known by its place in memory, so nothing is read back
        from the device; else the running count decides, and at its start the announced index or the nearest time.
        Under torch.compile, which knows no places, a start that was not announced must be the first time."""
        index = None
        compiling = torch.compiler.is_compiling()
        if (
            not compiling
            and isinstance(timestep, Tensor)
            and timestep.device == self.timesteps.device
            and timestep.dtype == self.timesteps.dtype
        ):
            offset, rest = divmod(timestep.data_ptr() - self.timesteps.data_ptr(), self.timesteps.element_size())
            index = offset if rest == 0 and 0 <= offset < len(self.timesteps) else None
        if index is None:
            index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None and compiling:
            index = 0
            at_start = torch.as_tensor(timestep).to(self.timesteps) == self.timesteps[0]
            torch._assert_async(at_start, "a compiled run that starts in the middle needs set_begin_index before it")
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
            newest, last = self._history[-1], self._last_index
            if index not in (last, last + 1) or newest.shape != d.shape or newest.device != d.device:
                self._history.clear()
                self._means.clear()
            elif index == last:
                self._history.pop()
                del self._means[-1:]
        if self.config.mean_decay is not None:
            d, mean = split_mean(d)
            self._means.append(mean)
        self._history.append(d)
        del self._history[: -self._needed[index]]
        self._last_index = index

    def _row(self, index: int, x: Tensor) -> Sequence[Scalar]:
        """Weights c_ij of the newest quantities, folded where the history is shorter than the row."""
        row = self._rows[index]
        return row if len(row) <= len(self._history) else fold(row, len(self._history))

    def _thresholded(self, d: Tensor) -> Tensor:
        """Predicted data (B, ...) clamped per sample to its own quantile s, and divided by s: Saharia et al., arXiv
        2205.11487, Sec. 2.3."""
        s = torch.quantile(d.flatten(1).abs(), self.config.dynamic_thresholding_ratio, dim=1)
        s = s.clamp(min=1, max=self.config.sample_max_value).reshape(-1, *[1] * (d.ndim - 1))
        return torch.clamp(d, -s, s) / s


def _in_dtype_of(x: Tensor, other: Tensor, p: Scalar, q: Scalar) -> Tensor:
    """p x + q other in the dtype of x, always memory of its own."""
    if isinstance(p, float) and p == 0.0:
        return other.to(x.dtype, copy=True) if q == 1.0 else weighted_sum([(q, other.to(x.dtype))])
    return weighted_sum([(p, x), (q, other)])


def _plain(specs: Mapping[int, SolverSpec]) -> Brief:
    return Brief({str(nfe): spec.to_dict() for nfe, spec in specs.items()})


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Any scheduler's configuration with every key of ours: its own values, else our defaults."""
    arguments = inspect.signature(DSSolverScheduler.__init__).parameters
    full = {key: config.get(key, argument.default) for key, argument in arguments.items() if key != "self"}
    return {**full, "prediction_type": "flow_prediction"} if is_flow(config) else full


def _matching(model: Mapping[str, Any], name: str, artefact: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that put this artefact's solvers on the model's configuration; ValueError if its noise schedule is
    another, with the remedy."""
    reason = mismatch(_filled(model), artefact)
    if reason is not None:
        raise ValueError(f"solver {name!r} {reason}; {_remedy(model)}")
    return {key: artefact[key] for key in ARTEFACT_KEYS} | {"searched_shift": searched_at(artefact)}


def _matching_published(model: Mapping[str, Any]) -> dict[str, Any]:
    artefacts = {name: _filled(published_config(name)) for name in published_solvers()}
    reasons = {name: mismatch(_filled(model), artefact) for name, artefact in artefacts.items()}
    for name, reason in reasons.items():
        if reason is None:
            logger.info(f"using the published solver {name!r}")
            return _matching(model, name, artefacts[name])
    told = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
    raise ValueError(f"no published solver fits this noise schedule ({told}); {_remedy(model)}")


def _remedy(model: Mapping[str, Any]) -> str:
    full = _filled(model)
    fitting = [name for name in published_solvers() if mismatch(full, _filled(published_config(name))) is None]
    use = f"use {' or '.join(map(repr, fitting))}, which fits, " if fitting else ""
    return f'{use}search one for this model ({SEARCH_COMMAND}) or use solvers="classical"'


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
