"""What a search works with: a model, its teacher, its samples and its processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from ..console import say, warn
from ..images.networks import load_feature_network
from ..pipeline.memory import fitting
from ..pipeline.model import Model
from ..pipeline.student import Student
from ..processes import from_main, reduced
from ..settings import GROUPS, PERCEPTUAL, SearchConfig
from ..teacher.ends import check_end
from ..teacher.trajectories import Teacher, teacher_trajectory
from .budget import Budget, shrunk
from .parameters import PARAMETRISATIONS
from .perceptual import MOST_CALLS, Perceptual
from .preflight import Preflight
from .problem import Problem, Samples

# settings that change neither what a solver is fitted to nor how
NOT_IN_KEY = ("nfe", "output_dir", "batch_size", "fill_nfe", "resume_from_checkpoint")
# settings that are gone or came later, at their defaults: folders of searches that do not use them keep their keys
GONE = {"guidance_scales": [], "teacher_scheduler": "", "optimizer": "lbfgs"}
LATER = {"parametrisation": "corrections", "budget": "", "effort": "full", "num_polish_samples": 64}
DISTILLED = ("turbo", "lightning", "schnell", "lcm", "distilled")  # in names of models
T = TypeVar("T")
Callback = Callable[[dict[str, Any]], object]


class Setup:
    """One model and what it is run with; the same in every process.

    Args:
        model: the pipeline; None: the one that the settings name is loaded.
        callback: given each stage that the search ends, as plain data.
        progress: show progress bars.

    Attributes:
        folder: None: nothing is written.
        key: of the search; another model or another setting gives another one. Empty without a folder.
        batch_size: samples that run together; halved where they do not fit.
        differentiable: groups of a solver's numbers that get gradients.
        perceptual: the objective on images, if the search has it.

    Raises:
        ValueError: the model or a setting is at fault; one line.
    """

    def __init__(
        self,
        settings: SearchConfig,
        accelerator: Accelerator,
        model: Model | None = None,
        callback: Callback | None = None,
        progress: bool = True,
    ) -> None:
        self.settings, self.accelerator, self.main = settings, accelerator, accelerator.is_main_process
        self.callback, self.shows, self.batch_size = callback, progress and self.main, settings.batch_size
        self.budget, self.left_out = Budget(settings.budget), list[str]()
        self.recalled, self.reserved = 0, 0.0  # network evaluations of a killed run; those kept for what comes later
        self.model, device = model or Model.loaded(settings, accelerator.device), accelerator.device
        pipe = self.model.pipe
        if pipe.dtype == torch.float16:
            self.warn("float16 overflows at 65 504, gradients of times are percents off; safer: bfloat16")
        if any(word in Path(settings.pretrained_model_name_or_path).name.lower() for word in DISTILLED):
            name = settings.pretrained_model_name_or_path
            self.warn(f"{name} seems to be distilled for a few fixed steps, where its own scheduler may serve it best")
        self.sampler = self.model.sampler(settings)
        self.folder = Path(settings.output_dir) if settings.output_dir else None
        self.student = Student(self.sampler)
        check_end("teacher_end", settings.teacher_end, pipe.scheduler.config)
        warped = settings.effort == "quick" and settings.method != "paper"
        self.teacher = Teacher(settings.teacher_steps, settings.teacher_order, settings.teacher_end, warped)
        if settings.parametrisation not in PARAMETRISATIONS:
            known = " or ".join(PARAMETRISATIONS)
            raise ValueError(f"parametrisation is {settings.parametrisation!r}; it must be {known}")
        self.differentiable: tuple[str, ...] = GROUPS
        self.perceptual: Perceptual | None = None
        if settings.objective == PERCEPTUAL and settings.method == "gradient" and min(settings.nfe) <= MOST_CALLS:
            network = load_feature_network(str(settings.feature_network), device)
            self.perceptual = Perceptual(network, self.student)
        check_shares(settings, accelerator.num_processes)
        self.key = self._key() if self.folder else ""

    def _key(self) -> str:
        told = asdict(self.settings).items()
        made_of: list[Any] = [{k: v for k, v in told if k not in NOT_IN_KEY and LATER.get(k) != v} | GONE]
        made_of += [self.sampler.fingerprint()] + ([self.perceptual.network.digest] if self.perceptual else [])
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def say(self, line: str) -> None:
        """One line to the user, whatever the number of processes."""
        if self.main:
            say(line)

    def warn(self, line: str) -> None:
        """One line on what is not as it was asked for."""
        if self.main:
            warn(line)

    def share(self, indices: range) -> range:
        """Those of these global sample indices that this process runs."""
        return indices[self.accelerator.process_index :: self.accelerator.num_processes]

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return reduced(self.accelerator, tensor)

    def evaluations(self) -> int:
        """Network evaluations so far, over all processes."""
        return int(self.reduce(torch.tensor(self.sampler.network_evaluations)))

    def add_evaluations(self, count: int) -> None:
        """Count evaluations of a killed run whose results are kept."""
        self.recalled += count
        if self.main:
            self.sampler.network_evaluations += count

    def affords(self, evaluations: float) -> bool:
        """Whether so many more network evaluations fit into the budget; every process is told the same."""
        if not self.budget.text:
            return True
        left = self.budget.left(self.evaluations(), self.recalled) - self.reserved
        return from_main(self.accelerator, bool(evaluations <= left))

    def shrink(self, per_call: float, changed: dict[str, int] | None) -> dict[str, int]:
        """Fit the settings into the budget.

        Args:
            per_call: network evaluations of a sample in one step.
            changed: what a killed run of this search has changed; None: it is to be found.

        Returns:
            what is changed.
        """
        if changed is None:
            left = from_main(self.accelerator, self.budget.left(self.evaluations(), self.recalled))
            changed = shrunk(self.settings, left, per_call)
        self.left_out += [f"{name} {getattr(self.settings, name)} -> {value}" for name, value in changed.items()]
        self.settings = replace(self.settings, **changed)
        self.teacher = replace(self.teacher, steps=self.settings.teacher_steps)
        return changed

    def told_budget(self) -> str:
        """What the budget left out."""
        return f"budget {self.settings.budget}: left out or made smaller: {'; '.join(self.left_out)}"

    def fitting(self, work: Callable[[], T], most: int | None = None) -> T:
        """What some work gives; begun anew, with half as many samples together, wherever they do not fit into memory.

        Args:
            most: samples that the work runs together, if fewer than a batch.
        """
        before, first = self.sampler.network_evaluations, min(self.batch_size, most or self.batch_size)

        def with_so_many(samples: int) -> T:
            self.sampler.network_evaluations = before
            self.batch_size = self.batch_size if samples == first else samples
            return work()

        return fitting(with_so_many, first, self.accelerator.num_processes)

    def note(self, found: Preflight) -> None:
        """Note which groups get gradients.

        Raises:
            ValueError: the method cannot do without it.
        """
        method = self.settings.method
        if method != "closed_form" and found.verdict == "forward_only":
            raise ValueError(f"method {method} needs gradients ({found.reason}); closed_form does without")
        if method == "paper" and found.verdict == "coefficients":
            raise ValueError(f"method paper moves nodes ({found.reason}); closed_form and gradient do without")
        self.differentiable = found.differentiable

    def samples(self, split: str, count: int) -> Samples:
        """This process's share of a split, with the teacher's trajectories; those of a killed run are counted too."""
        share, before = self.share(range(count)), self.sampler.network_evaluations
        size, cache = self.batch_size, self.folder / "cache" if self.folder else None
        found = teacher_trajectory(self.student, self.teacher, share, split, size, cache, self.shows)
        self.sampler.network_evaluations = before + found.network_evaluations
        return Samples(split, share, found)

    def problem(self) -> Problem:
        """What every method is given; the teacher's trajectories are made or read."""
        settings, counts = self.settings, splits(self.settings)
        samples = {split: self.fitting(partial(self.samples, split, count)) for split, count in counts.items()}
        return Problem(
            self.student, samples.get("train", samples["validation"]), samples["validation"],
            len(self.share(range(settings.num_trial_samples))), self.reduce, self.batch_size, self.share,
            self.accelerator, self.differentiable, self.perceptual,
        )  # fmt: skip


def splits(settings: SearchConfig) -> dict[str, int]:
    """Samples with a teacher; method paper makes its own for training."""
    counts = {"train": settings.num_train_samples, "validation": settings.num_validation_samples}
    return {"validation": counts["validation"]} if settings.method == "paper" else counts


def check_shares(settings: SearchConfig, processes: int) -> None:
    """Raise ValueError if a process would get no sample."""
    counts = splits(settings)
    if "train" in counts:
        counts["trial"] = min(settings.num_trial_samples, settings.num_train_samples)
    for name, count in counts.items():
        if count < processes:
            raise ValueError(f"{count} {name} samples for {processes} processes; each needs one")
