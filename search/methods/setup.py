"""What a search works with: a model, its teacher, its samples and its processes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..console import say
from ..images.networks import load_feature_network
from ..pipeline.loading import load_pipeline
from ..pipeline.prompts import prompts_of
from ..pipeline.sampler import Sampler
from ..pipeline.student import Student
from ..processes import reduced
from ..settings import GROUPS, PERCEPTUAL, SearchConfig
from ..teacher.ends import check_end
from ..teacher.trajectories import Teacher, teacher_trajectory
from .parameters import PARAMETRISATIONS
from .perceptual import MOST_CALLS, Perceptual
from .preflight import Preflight
from .problem import Problem, Samples

# settings that change neither what a solver is fitted to nor how
NOT_IN_KEY = ("nfe", "output_dir", "batch_size", "fill_nfe", "resume_from_checkpoint")
# settings that are gone or came later, at their defaults: folders of searches that do not use them keep their keys
GONE = {"guidance_scales": [], "teacher_scheduler": "", "optimizer": "lbfgs"}
LATER = {"parametrisation": "corrections", "effort": "full", "num_polish_samples": 64}


class Setup:
    """One model and what it is run with; the same in every process.

    Attributes:
        key: of the search; another model or another setting gives another one.
        differentiable: groups of a solver's numbers that get gradients.
        perceptual: the objective on images, if the search has it.

    Raises:
        ValueError: the model or a setting is at fault; one line.
    """

    def __init__(self, settings: SearchConfig, accelerator: Accelerator) -> None:
        self.settings, self.accelerator, self.main = settings, accelerator, accelerator.is_main_process
        device = accelerator.device
        pipe = load_pipeline(settings.pretrained_model_name_or_path, settings.dtype, device, settings.revision)
        if pipe.dtype == torch.float16:
            self.say("float16 overflows at 65 504, gradients of times are percents off; safer: --dtype bfloat16")
        self.sampler = Sampler(pipe, settings.call_arguments, prompts_of(settings), settings.seed)
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
        told = asdict(settings).items()
        made_of: list[Any] = [{k: v for k, v in told if k not in NOT_IN_KEY and LATER.get(k) != v} | GONE]
        made_of += [self.sampler.fingerprint()] + ([self.perceptual.network.digest] if self.perceptual else [])
        self.key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    def say(self, line: str) -> None:
        """One line to the user, whatever the number of processes."""
        if self.main:
            say(line)

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
        if self.main:
            self.sampler.network_evaluations += count

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
        size, cache = self.settings.batch_size, self.folder / "cache"
        found = teacher_trajectory(self.student, self.teacher, share, split, size, cache, self.main)
        self.sampler.network_evaluations = before + found.network_evaluations
        return Samples(split, share, found)

    def problem(self) -> Problem:
        """What every method is given; the teacher's trajectories are made or read."""
        settings = self.settings
        samples = {split: self.samples(split, count) for split, count in splits(settings).items()}
        return Problem(
            self.student, samples.get("train", samples["validation"]), samples["validation"],
            len(self.share(range(settings.num_trial_samples))), self.reduce, settings.batch_size, self.share,
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
