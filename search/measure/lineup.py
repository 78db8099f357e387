"""What `compare` and `evaluate` run on a model: searched solvers, diffusers' own schedulers, and the model itself.

Every run goes through the pipeline's own call. Network calls are counted, not assumed; noise and conditions of a sample
follow from its index, so it does not matter which process runs it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_dssolver import DSSolverScheduler

from ..console import warn
from ..pipeline.model import Model, fitted, searched_guidance, section
from ..pipeline.recorder import Recorder
from ..settings import CompareConfig, EvaluateConfig
from ..storage import Kept, kept
from ..teacher.ends import model_itself
from .baselines import Run, family, runs
from .pictures import as_uint8

LONG_WAIT = InitProcessGroupKwargs(timeout=timedelta(days=1))  # for the slowest process; the default is minutes
VERSIONS = {"diffusers": diffusers.__version__, "torch": torch.__version__}
Solvers = Mapping[str, str | DSSolverScheduler]
Task = tuple[Path, Callable[[], Kept]]  # a file, and how its contents are made


@dataclass(frozen=True)
class Sampled:
    """Samples of one run.

    Attributes:
        final: final states (n, ...) on the CPU, in float32 or the pipeline's float64.
        images: images (n, H, W, C) or frames (n, F, H, W, C), uint8.
        calls: network calls per sample; a guided pair counts as one.
        seconds: per sample, decoding included.
    """

    final: Tensor
    images: Tensor
    calls: float
    seconds: float


class Lineup:
    """A model and the schedulers that run on it.

    Args:
        config: the model, searched solvers and the names of stock schedulers.
        split: of the noise.
        converged_end: `teacher_end` of the converged runs; a solver searched with another one is named. None: there
            are no converged runs.
        model: the pipeline; None: the one that the settings name is loaded.
        solvers: searched solvers by name, schedulers or their sources; None: those that the settings name.

    Attributes:
        model_config: configuration of the model's own scheduler.
        searched, stock: by name.

    Raises:
        ValueError: the model, a solver or a scheduler is at fault.
    """

    def __init__(
        self,
        config: CompareConfig | EvaluateConfig,
        split: str,
        accelerator: Accelerator,
        converged_end: float | None = None,
        model: Model | None = None,
        solvers: Solvers | None = None,
    ) -> None:
        self.split, self.talks = split, accelerator.is_main_process
        self._single_call: float | None = None
        model = model or Model.loaded(config, accelerator.device)
        self.sampler = model.sampler(config)
        self.model_config = model.pipe.scheduler.config
        if solvers is None:
            solvers = {solver_name(source): source for source in config.solver}
        self.searched = {name: self._searched(name, solver, converged_end) for name, solver in solvers.items()}
        self.stock = family(self.model_config, config.schedulers)

    def _searched(self, name: str, solver: str | DSSolverScheduler, converged_end: float | None) -> Any:
        """A searched solver, for the guidance of these runs."""
        scheduler, guidance = fitted(self.model_config, solver), self.sampler.guidance_scale
        name = solver if isinstance(solver, str) else name
        if scheduler.config.guidance_solvers and isinstance(guidance, (int, float)):
            return DSSolverScheduler.from_config(scheduler.config, guidance_scale=float(guidance))
        if (told := searched_guidance(scheduler, guidance)) != guidance:
            self._warn(f"{name} was searched at guidance scale {told}, this run is at {guidance}")
        teacher = section(scheduler, "teacher")
        if teacher and converged_end is not None and (end := teacher.get("end", 0.0)) != converged_end:
            self._warn(f"{name} was searched with teacher_end {end}, this reference_end is {converged_end}")
        return scheduler

    def _warn(self, line: str) -> None:
        if self.talks:
            warn(line)

    # --- runs --------------------------------------------------------------------------------------------------------

    def runs(self, nfe: int) -> Iterator[Run]:
        """All runs with so many network calls: every searched solver, every stock scheduler in all its spacings."""
        for name, scheduler in self.searched.items():
            kind = "searched" if nfe in scheduler.tables else "derived"
            yield Run(name, nfe, kind, scheduler, nfe, True, f"DSSolverScheduler, {kind} table")
        for name, stock in self.stock.items():
            yield from runs(name, stock, nfe, self.model_config, self.sampler.pipe, self.sampler.accepted)

    def sample(self, scheduler: Any, steps: int, indices: Sequence[int], **call: Any) -> Sampled:
        """One call of the pipeline on these samples.

        Args:
            call: further arguments of the pipeline's call.
        """
        single = self._evaluations_per_call(indices)  # before the clock starts: its run is the warm-up
        before, began = self.sampler.network_evaluations, time.perf_counter()
        with self.sampler.using(scheduler), Recorder(all_states=False).watching(scheduler) as recorder:
            output = self.sampler(indices, self.split, steps, **call)
        n, seconds = len(indices), time.perf_counter() - began
        calls = (self.sampler.network_evaluations - before) / n / single
        images = torch.stack([as_uint8(picture) for picture in output[0]])
        final = recorder.states[-1]
        final = final[:n].to("cpu", torch.promote_types(final.dtype, torch.float32))
        return Sampled(final, images, calls, seconds / n)

    def _evaluations_per_call(self, indices: Sequence[int]) -> float:
        """Network evaluations of one sample in one network call: two where guidance doubles the batch or calls twice.
        Measured once, in a run of two steps that does not count."""
        if self._single_call is None:
            before, calls = self.sampler.network_evaluations, self.sampler.network_calls
            with self.sampler.using(model_itself(self.model_config)):
                self.sampler(indices, self.split, 2)
            self._single_call = (self.sampler.network_evaluations - before) / len(indices) / 2
            self.sampler.network_evaluations, self.sampler.network_calls = before, calls
        return self._single_call

    # --- files -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _model(self) -> list[Any]:
        return [self.sampler.fingerprint(), str(self.sampler.pipe.dtype), VERSIONS, self.split]

    def digest(self, *facts: Any) -> str:
        """Name of a file whose contents depend on the model, its call, and these facts."""
        text = json.dumps([self._model, *facts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def share(accelerator: Accelerator, tasks: Iterable[Task], title: str) -> list[Path]:
    """The files of all tasks, in order. Each process makes every n-th file that does not exist; n processes together
    make all of them."""
    files = []
    for number, (file, make) in enumerate(tqdm(tasks, title, disable=not accelerator.is_main_process)):
        if number % accelerator.num_processes == accelerator.process_index:
            kept(file, make)
        files.append(file)
    return files


def batches(count: int, size: int) -> list[range]:
    """Indices of `count` samples, `size` at a time."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def solver_name(source: str) -> str:
    """Name of a solver in tables: that of its folder, or its repository."""
    return Path(source).resolve().name if Path(source).is_dir() else source
