"""`DSSolverScheduler`: searched solvers behind the calling contract of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging
from torch import Tensor

from .carry import Course
from .choose import SolverSet
from .config import CLASSICAL
from .derive import Shift, dynamic_shift, uniform_nodes
from .history import History
from .paths import FlowPath, Path, as_float64
from .solver import SolverSpec
from .step import Scalar, combine, scalars, step, threshold
from .training import NoiseSchedule

logger = logging.get_logger(__name__)

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


class DSSolverScheduler(NoiseSchedule):
    """Searched multistep solvers, a drop-in for the deterministic schedulers of diffusers.

    A step count with a table in `solvers` uses it; any other count gets a derived solver, and a warning once. N steps
    take exactly N network calls. A history shorter than a row expects (image-to-image, restarts) folds the row, so
    that its weights still sum to 1.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr,
            snr_shift_scale: noise schedule of vp models, as in diffusers' schedulers.
        prediction_type: "epsilon", "v_prediction", "sample" (vp), or "flow_prediction" (flow: velocity = noise - data).
        continuous_time: alpha and sigma of vp from the continuous formula, as the published DiT solvers need.
        shift, use_dynamic_shifting, time_shift_type, shift_terminal, invert_sigmas, base_shift, max_shift,
            base_image_seq_len, max_image_seq_len: resolution shift of flow models, as in FlowMatchEulerDiscrete.
        searched_shift: {"factor": e, "terminal": number or null}, the shift contained in the nodes of `solvers`, or one
            such entry by step count, {"5": {...}, ...}, for models whose shift depends on it (FLUX.2). Where the
            model's own shift differs, noise levels are multiplied by the ratio. None: nodes are used as they are.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of the predicted data (vp).
        variance_type: "learned" or "learned_range": the network's output has variances behind the prediction.
        use_flow_sigmas: follows from `prediction_type`; kept for the classes and pipelines that read it.
        solvers: {"8": {"nodes": [9 numbers], "timesteps": [8, optional], "coefficients": [[1.0], ...]}, ...}, or
            "classical": derived solvers only, Adams-Bashforth 2 (flow) and DPM-Solver++(2M) (vp) on uniform nodes.
        guidance_solvers: solvers by guidance scale, {"1.5": {"8": {...}, ...}, "4.0": {...}}, for the same step counts.
        guidance_scale: guidance scale of the coming runs, of which pipelines tell a scheduler nothing. The
            `guidance_solvers` of the scales around it, blended, replace `solvers`; outside all scales, the nearest.
        provenance: record of how the solvers were found; not interpreted.
        strict: raise for a step count that has no table.
        history_length: number of model outputs held at most, 1 or more; longer rows are folded. None: all that the
            solver uses.
        mean_decay: flow only, 0 to 1. Rows weigh velocities without their spatial means, which are replaced by the
            average of the means so far, the one of k steps ago with weight mean_decay^k. Against grid artefacts of
            solvers searched on another model, such as ImageNet's on FLUX (paper, Sec. 7.1). It belongs to the tables:
            `from_config` with other `solvers` drops it. None: off.
        carried_from: {"source": name, keys of a noise schedule}, the one that `solvers` belong to, where they were
            carried over by noise level from another than the model's. None: they belong to the model's.

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
    last_sample = None  # a name of UniPC's that ChronoEdit reads: no step uses an earlier sample
    config: Any  # a FrozenDict, whose keys are attributes too
    _step_index: int | None

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
        searched_shift: dict[str, Any] | None = None,
        history_length: int | None = None,
        guidance_solvers: dict[str, dict[str, dict[str, list]]] | None = None,
        guidance_scale: float | None = None,
        mean_decay: float | None = None,
        carried_from: dict[str, Any] | None = None,
    ) -> None:
        self._read_config()
        self._said: set[str] = set()
        self._mu: float | None = None
        self._reset()

    def _reset(self) -> None:
        """The training schedule, for readers before `set_timesteps`."""
        self.num_inference_steps = None
        self._moved = {}
        nodes = torch.tensor(uniform_nodes(self.config.num_train_timesteps, self._path), dtype=torch.float64)
        self._install(Course(nodes, self._path.timestep(nodes[:-1])))

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
            device: of `self.timesteps`.
            timesteps: N times of the user's own, noisiest first: classical rows on exactly these.
            sigmas: N falling noise levels of the user's own, with classical rows: of a flow model shifted as diffusers
                does it, of a vp model sigma/alpha, where a last 0 is no step. With tables, only the length counts of a
                grid that some pipeline passes by default (`grids.default_grids`).
                With both `timesteps` and `sigmas` the network is fed times without the shift (CogView4).
            mu: resolution shift computed by a pipeline, used when the configuration has `use_dynamic_shifting`, and
                remembered for later calls without it. It means nothing to a vp solver, which says so.

        Raises:
            ValueError: for no or contradicting arguments, grids that do not fall, `sigmas` with `mu` on a vp solver, or
                with `strict` a step count that has no table.
        """
        self._follow_config()
        flow = isinstance(self._path, FlowPath)
        if mu is not None and not flow:
            if sigmas is not None:
                raise ValueError("sigmas and mu given to a vp solver: this is a flow model; load a flow solver")
            self._tell("mu is a resolution shift of flow models and means nothing to this vp solver; it is passed over")
            mu = None
        grids = [None if grid is None else as_float64(grid).reshape(-1).tolist() for grid in (timesteps, sigmas)]
        before = self._mu
        try:
            if mu is not None:
                self._mu = float(mu)
            course, message = self._solver_set().choose(num_inference_steps, *grids)
        except ValueError:
            self._mu = before
            raise
        self._tell(message)
        # stock flow schedulers list clean data, where it is given, as a step; stock vp schedulers as the end
        given = grids[0] if sigmas is None else grids[1]
        n = len(course.times)
        listed = n if given is None or (sigmas is not None and not flow) else len(given)
        self._install(self._with_idle_step(course) if listed > n else course, device)
        self.num_inference_steps = listed

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
        """One step of the solver, without host synchronisation when `timestep` is an element of `self.timesteps`.

        Args:
            model_output: the network's output at (sample, timestep), any shape.
            timestep: an element of `self.timesteps`, or its number.
            sample: the current state, same shape.
            generator: accepted for pipelines that pass one; the solver is deterministic.
            return_dict: False for the tuple (prev_sample, pred_original_sample).
            per_token_timesteps: given by pipelines that hold some tokens back (LTX-condition) and keep only the result
                of the tokens at `timestep`, which is what is computed. As in FlowMatchEulerDiscrete, it changes the
                sign of model_output (data minus noise), and the result is not cast.
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
        self._follow()
        index = self._locate(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        d, to_data = self._quantity(index, x, model_output, negated=per_token_timesteps is not None)
        self._history.add(index, d)
        x_next = step(x, *self._history.terms(self._row(index, x)), self._a[index], self._b[index])
        dtype = model_output.dtype if per_token_timesteps is None else x.dtype
        prev_sample, data = x_next.to(dtype), combine(x, d, *to_data).to(dtype)
        self._step_index = index + 1
        return DSSolverSchedulerOutput(prev_sample, data) if return_dict else (prev_sample, data)

    def scale_model_input(self, sample: Tensor, timestep: int | float | Tensor | None = None) -> Tensor:
        """The sample itself: neither path scales the network's input."""
        return sample

    def set_shift(self, shift: float) -> None:
        """As in FlowMatchEulerDiscrete: another resolution shift, from the next `set_timesteps` on."""
        if not isinstance(self._path, FlowPath):
            raise ValueError("shift is of flow models; this one is vp")
        self.register_to_config(shift=shift)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where in the schedule the next run starts (image-to-image)."""
        self._begin_index = begin_index

    # --- what can be read ------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The model's path from noise to data."""
        return self._path

    @property
    def solvers(self) -> Mapping[int, SolverSpec]:
        """Searched solvers by step count, at the guidance scale of the configuration."""
        return self._solvers

    def course(self, nfe: int) -> Course:
        """How a step count is run at the shift of the configuration, or, where that is dynamic, at the one searched."""
        chosen = self._solver_set()
        if self.config.use_dynamic_shifting:
            chosen = replace(chosen, searched_shifts={})
        return chosen.choose(nfe)[0]

    @property
    def shift(self) -> float:
        """The resolution shift of the configuration (flow)."""
        return self.config.shift

    @property
    def tables(self) -> tuple[int, ...]:
        """Step counts that have a searched table, rising."""
        return tuple(sorted(self._solvers))

    @property
    def model_outputs(self) -> list[Tensor]:
        """The history, newest last, without means under `mean_decay`. Entries may be replaced (ChronoEdit)."""
        return self._history.outputs

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

    def _tell(self, message: str | None) -> None:
        """Warn, once."""
        if message and message not in self._said:
            self._said.add(message)
            logger.warning(message)

    def _solver_set(self) -> SolverSet:
        return SolverSet(self._path, self._solvers, self._shift(), self._searched, self.config.strict, self._own)

    def _shift(self) -> Shift:
        """The resolution shift of the coming run."""
        config = self.config
        if not isinstance(self._path, FlowPath):
            return Shift()
        if not config.use_dynamic_shifting:
            return Shift(config.shift, config.shift_terminal)
        mu = self._mu if self._mu is not None else config.base_shift or 0.0
        return Shift(dynamic_shift(mu, config.time_shift_type), config.shift_terminal)

    def _with_idle_step(self, course: Course) -> Course:
        """A last step more, at clean data, which changes nothing."""
        nodes, n = torch.cat([course.nodes, course.nodes[-1:]]), len(course.times)
        times = torch.cat([course.times, self._path.timestep(course.nodes[-1:])])
        return Course(nodes, times, [*course.rows, [0.0] * n + [1.0]])

    def _install(self, course: Course, device: str | torch.device | None = None) -> None:
        """Prepare a run."""
        alphas, sigmas = self._path.alpha_sigma(course.nodes)
        self._a, self._b = map(scalars, course.transition(self._path, alphas, sigmas))
        self._weights = course.weights(self._path, self.config.prediction_type, alphas, sigmas) if course.rows else []
        self._alphas, self._sigmas = scalars(alphas), scalars(sigmas)
        self._history = History(course.rows, self.config.history_length, self.config.mean_decay)
        self._course = course
        self._publish(course.times.to(torch.float32).to(device), self._path.level(course.nodes).to(torch.float32))
        self._step_index = None
        self._begin_index = None

    def _locate(self, timestep: int | float | Tensor) -> int:
        """Index of this step.

        An element of `self.timesteps` is known by its place in memory, so nothing is read back from the device.
        Otherwise the running count decides, and at its start the announced index or the nearest time. torch.compile
        knows no places: there, a start that was not announced must be the first time.
        """
        compiling = torch.compiler.is_compiling()
        index = None if compiling else _place(timestep, self.timesteps)
        if index is None:
            index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None and compiling:
            index = 0
            at_start = torch.as_tensor(timestep).to(self.timesteps) == self.timesteps[0]
            torch._assert_async(at_start, "a compiled run that starts in the middle needs set_begin_index before it")
        if index is None:
            index = self.index_for_timestep(timestep)
        if not self._history.rows:
            raise ValueError("set_timesteps was not called; call it before step")
        if index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps were taken; call set_timesteps before another run")
        return index

    def _quantity(self, index: int, x: Tensor, output: Tensor, negated: bool) -> tuple[Tensor, tuple[Scalar, Scalar]]:
        """The quantity d that the solver weighs at state x, and (u, v) of the predicted data u x + v d."""
        p, q, u, v = self._weights[index]
        d = combine(x, output, p, -q if negated else q)
        if self.config.thresholding:
            data = threshold(combine(x, d, u, v), self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
            d = combine(x, data, -u / v, 1 / v)
        return d, (u, v)

    def _row(self, index: int, x: Tensor) -> Sequence[Scalar]:
        """Weights of the newest quantities at step `index` from state x."""
        return self._history.row(index)


def _place(element: Any, vector: Tensor) -> int | None:
    """Index of a tensor that is a view of one entry of a vector, from its address; None for any other object."""
    if not isinstance(element, Tensor) or element.device != vector.device or element.dtype != vector.dtype:
        return None
    index, rest = divmod(element.data_ptr() - vector.data_ptr(), vector.element_size())
    return index if rest == 0 and 0 <= index < len(vector) else None


# Saved pipelines record this name; loading them then looks in the package, not in a file that may move.
DSSolverScheduler.__module__ = __name__.partition(".")[0]
