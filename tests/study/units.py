"""What `make study` measures, one unit at a time: a reference, a search, one scheduler at one step count, the distance
of its images from real ones, a teacher's error, a refusal. Each is a JSON file of its own as soon as it is known, named
after all that it depends on, so that a killed study goes on and several processes share one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.solver import SolverSpec
from dssolver_search.console import say
from dssolver_search.images.features import of_network
from dssolver_search.images.metrics import FrechetDistance, with_intervals
from dssolver_search.images.real_images import read_statistics
from dssolver_search.measure.baselines import FLOW, STABLE_DIFFUSION, VP, Run
from dssolver_search.measure.compare import SPLIT, Comparison
from dssolver_search.measure.results import interval
from dssolver_search.methods.fill import solver_of
from dssolver_search.methods.search import search
from dssolver_search.pipeline.student import Student
from dssolver_search.settings import CompareConfig, SearchConfig
from dssolver_search.storage import Damaged, read_record, write_record
from dssolver_search.teacher.trajectories import Teacher, teacher_trajectory
from tests.bench import cost_model
from tests.study import models as study_models

RATES = {"small": 2700, "medium": 1100, "large": 570}  # guided calls of one sample a second on one core, roughly
REFERENCE, CLASSICAL, ADAMS = "reference", "classical", "adams-"
SCHEDULES = {"Stable Diffusion": STABLE_DIFFUSION}  # the paper's example of betas that a solver is not for


@dataclass(frozen=True)
class Budget:
    """Sizes of everything, chosen for three hours of one core (`--plan`).

    Attributes:
        nfe, sizes: step counts and models of finding 1; the other sizes are left to finding 2.
        few: step counts of findings 2, 3, 6 and 7, and of all distances.
        small: the model of findings 3 to 7, which would cost five times as much on the large one.
        guidance: of everything but finding 5.
        stock, adams: what finding 1 compares with; Adams of these orders on flow models only, since in the coordinate
            of a vp path its weights blow up.
        test_samples, reference_steps: of errors; no search has seen the samples.
        images, subsets: of a distance; 15 times as many as the features.
        lean: of all searches but those of finding 4: one start of the warp with 20 trials in place of four with 40, one
            iteration of the polish in place of two, none at 15 calls.
        teachers, orders: finding 3.
        samples, samples_nfe, sampled: finding 4; rows alone, without polish, the warp from at most 64 samples, teachers
            of 50 steps.
        scales, scales_nfe: finding 5.
        generated: samples of the paper's recipe in finding 7 (the paper: 50 000), in batches of 4.
        descent: calls of every gradient there.
        schedule: finding 6, one of `SCHEDULES`.
    """

    nfe: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 15)
    sizes: tuple[str, ...] = ("small", "medium", "large")
    few: tuple[int, ...] = (5, 8)
    small: str = "small"
    guidance: float = 1.5
    stock: tuple[str, ...] = ("unipc", "dpmpp_2m", "dpmpp_3m", "deis", "heun")
    adams: tuple[int, ...] = (2, 4)
    test_samples: int = 64
    reference_steps: int = 400
    images: int = 1000
    subsets: int = 50
    lean: dict[str, Any] = field(default_factory=lambda: {"starts": 1, "trials": 20, "polish": 1, "polish_nfe": 10})
    teachers: tuple[int, ...] = (25, 50, 100, 200)
    orders: tuple[int, ...] = (1, 2, 3)
    samples: tuple[int, ...] = (32, 128, 512, 2048, 4096)
    samples_nfe: int = 8
    sampled: dict[str, Any] = field(
        default_factory=lambda: {
            "starts": 1,
            "trials": 20,
            "polish": 0,
            "num_trial_samples": 64,
            "teacher_steps": 50,
        }
    )
    scales: tuple[float, ...] = (1.0, 1.5, 3.0, 5.0)
    scales_nfe: int = 5
    generated: int = 512
    descent: int = 10
    schedule: str = "Stable Diffusion"


@dataclass(frozen=True)
class Unit:
    """One thing to measure.

    Attributes:
        kind: which method of `Study` measures it.
        facts: that method's arguments; units among them are measured before it.
        weights: of the model.
        calls: guided network calls of one sample each, at most.
    """

    kind: str
    facts: dict[str, Any]
    weights: str
    calls: int

    @functools.cached_property
    def name(self) -> str:
        facts = {k: v.name if isinstance(v, Unit) else v for k, v in self.facts.items()}
        digest = hashlib.sha256(json.dumps([self.kind, facts, self.weights], sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{self.facts['model']}-{digest[:16]}"

    @property
    def needs(self) -> list[Unit]:
        return [value for value in self.facts.values() if isinstance(value, Unit)]

    @property
    def seconds(self) -> float:
        """Of one core, by `RATES`."""
        return self.calls / RATES[self.facts["model"].split("-")[0]]


class Study:
    """Makes units, knows which are wanted and measured, and measures them.

    Args:
        models: folder that `study_models` filled.
        output: folder for the units; references and searches under way lie beside them.
        seeds: of the searches.
    """

    def __init__(self, models: Path, output: Path, budget: Budget, seeds: Sequence[int]) -> None:
        self.models, self.output, self.budget, self.seeds = models, output, budget, list(seeds)
        os.environ[study_models.WHERE] = str(models)
        self.wanted: dict[str, Unit] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self.comparisons: dict[Any, tuple[Comparison, torch.Tensor, float]] = {}

    # --- units -------------------------------------------------------------------------------------------------------

    def of(self, unit: Unit) -> dict[str, Any] | None:
        """What was measured, or None; wanted from now on, after all that it needs."""
        for need in unit.needs:
            self.of(need)
        self.wanted.setdefault(unit.name, unit)
        return self.known(unit)

    def known(self, unit: Unit) -> dict[str, Any] | None:
        file = self._file(unit)
        if unit.name not in self._known and file.exists():
            try:
                self._known[unit.name] = read_record(file)
            except Damaged as error:
                say(f"{file} is damaged and made anew: {error}")
        return self._known.get(unit.name)

    def _file(self, unit: Unit) -> Path:
        return self.output / "units" / f"{unit.name}.json"

    def _unit(self, kind: str, calls: float, model: str, **facts: Any) -> Unit:
        return Unit(kind, {"model": model, **facts}, self.weights(model), round(calls))

    @functools.cache  # noqa: B019 (as long as the study)
    def weights(self, model: str) -> str:
        """Digest of a model's files."""
        files = sorted(f for f in study_models.folder(self.models, model).rglob("*") if f.is_file())
        return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()

    def converged(self, model: str, guidance: float, schedule: str | None = None) -> Unit:
        """The reference that errors are taken against: its variance, and its own error."""
        b = self.budget
        calls = b.test_samples * (b.reference_steps + b.reference_steps // 2)
        facts = {"samples": b.test_samples, "steps": b.reference_steps}
        return self._unit(REFERENCE, calls, model, guidance=guidance, schedule=schedule, **facts)

    def search(self, model: str, seed: int, nfe: Sequence[int], settings: Any, guidance: float | None = None) -> Unit:
        """One search; `settings` over the command's own."""
        facts = {"seed": seed, "nfe": list(nfe), "settings": settings, "guidance": self._guidance(guidance)}
        return self._unit("search", cost_model.busiest(cost_model.search(self._config(model, **facts))), model, **facts)

    def run(
        self, model: str, scheduler: str | Unit, nfe: int, guidance: float | None = None, schedule: str | None = None
    ) -> Unit:
        """The error of a scheduler by name, or of a search's solver; stock ones in their best spacing."""
        stock = (FLOW if model.endswith("flow") else VP).get(scheduler) if isinstance(scheduler, str) else None
        to = self.converged(model, self._guidance(guidance), schedule)
        calls = self.budget.test_samples * nfe * (len(stock.spacings) if stock else 1)
        return self._unit("run", calls, model, scheduler=scheduler, nfe=nfe, to=to)

    def distance(self, model: str, scheduler: str | Unit, nfe: int) -> Unit:
        """The Frechet distance of a scheduler's images from real ones; of "reference", that of the model itself."""
        b = self.budget
        run = self.run(model, CLASSICAL if scheduler == REFERENCE else scheduler, nfe)
        facts = {"images": b.images, "subsets": b.subsets, "classifier": self.weights(study_models.CLASSIFIER)}
        return self._unit("distance", b.images * nfe, model, run=run, **facts)

    def teacher(self, model: str, steps: int, order: int) -> Unit:
        """The error of a search's own reference."""
        to = self.converged(model, self.budget.guidance)
        return self._unit("teacher", self.budget.test_samples * steps, model, steps=steps, order=order, to=to)

    def refusal(self, model: str, search: Unit, schedule: str) -> Unit:
        """What the loader says of another noise schedule."""
        return self._unit("refusal", 0, model, search=search, schedule=schedule)

    def _guidance(self, given: float | None) -> float:
        return self.budget.guidance if given is None else given

    def _config(
        self, model: str, seed: int, nfe: Sequence[int], settings: Any, guidance: Any, folder: str = "none"
    ) -> SearchConfig:
        source = str(study_models.folder(self.models, model))
        return SearchConfig(
            pretrained_model_name_or_path=source, output_dir=folder, seed=seed, nfe=list(nfe), fill_nfe=[],
            guidance_scale=guidance, effort="full", **settings,
        )  # fmt: skip

    # --- work --------------------------------------------------------------------------------------------------------

    def work(self, share: tuple[int, int] = (0, 1)) -> int:
        """Measure what is wanted, the units k, k + n, .. of share (k, n); how many of them wait for other shares'."""
        mine = [u for i, u in enumerate(self.wanted.values()) if i % share[1] == share[0] and not self.known(u)]
        with tqdm(desc="study", total=round(sum(u.seconds for u in mine)), unit="core-s", smoothing=0) as bar:
            while ready := [u for u in mine if all(map(self.known, u.needs))]:
                for unit in ready:
                    bar.set_postfix_str(unit.name.rpartition("-")[0])
                    self._measure(unit)
                    bar.update(round(unit.seconds))
                mine = [u for u in mine if not self.known(u)]
        return len(mine)

    def _measure(self, unit: Unit) -> None:
        self._file(unit).parent.mkdir(parents=True, exist_ok=True)
        more = {"name": unit.name} if unit.kind == "search" else {}
        write_record(self._file(unit), getattr(self, f"_{unit.kind}")(**unit.facts, **more))
        if unit.kind == "search":
            self._clean(unit)

    def _clean(self, unit: Unit) -> None:
        """What a finished search leaves; its references too, after the last search that shares them."""
        shutil.rmtree(self.output / "searches" / unit.name)
        cache = self._cache(**unit.facts)
        sharing = [u for u in self.wanted.values() if u.kind == "search" and self._cache(**u.facts) == cache]
        if all(map(self.known, sharing)):
            shutil.rmtree(cache, ignore_errors=True)

    def _cache(self, model: str, seed: int, guidance: Any, **others: Any) -> Path:
        return self.output / "caches" / f"{model}-{seed}-{guidance}".replace(" ", "")

    def _search(self, name: str, **facts: Any) -> dict[str, Any]:
        folder, cache = self.output / "searches" / name, self._cache(**facts).absolute()
        for needed in (folder, cache):
            needed.mkdir(parents=True, exist_ok=True)
        if not (folder / "cache").exists():
            (folder / "cache").unlink(missing_ok=True)
            (folder / "cache").symlink_to(cache)
        state = search(self._config(**facts, folder=str(folder))).state
        return {
            "tables": {n: solver_of(entry) for n, entry in state["solvers"].items()},
            "network_evaluations": state["network_evaluations"],
        }  # fmt: skip

    def _reference(self, model: str, guidance: float, schedule: str | None, **_: Any) -> dict[str, Any]:
        comparison, _, variance = self._comparison(model, guidance, schedule)
        return {"variance": variance, "error": comparison.converged()[2] / variance}

    def _comparison(self, model: str, guidance: float, schedule: str | None) -> tuple[Comparison, torch.Tensor, float]:
        """With the reference's final states and their variance. On another schedule the network is told the time whose
        noise level, on its own, is the one at hand."""
        key, b = (model, guidance, schedule), self.budget
        if key not in self.comparisons:
            folder = self.output / "references" / f"{model}-{guidance}-{schedule}"
            config = CompareConfig(
                pretrained_model_name_or_path=str(study_models.folder(self.models, model)), output_dir=str(folder),
                guidance_scale=guidance, num_samples=b.test_samples, reference_steps=b.reference_steps,
                schedulers=list(b.stock), num_pictures=1,
            )  # fmt: skip
            comparison = Comparison(config)
            pipe = comparison.lineup.sampler.pipe
            if schedule is not None:
                own, pipe.scheduler = pipe.scheduler, on_schedule(pipe.scheduler, schedule)
                comparison.lineup.model_config = pipe.scheduler.config
                pipe.transformer.register_forward_pre_hook(Retimed(own, pipe.scheduler), with_kwargs=True)
            final = comparison.converged()[0]
            self.comparisons[key] = comparison, final, final.double().var().item()
        return self.comparisons[key]

    def _to(self, to: Unit) -> tuple[Comparison, torch.Tensor, float]:
        return self._comparison(to.facts["model"], to.facts["guidance"], to.facts["schedule"])

    def _run(self, scheduler: str | Unit, nfe: int, to: Unit, **_: Any) -> dict[str, Any]:
        comparison, final, variance = self._to(to)
        tried = []
        for run in self._runs(comparison, scheduler, nfe):
            made = comparison.sample(run.scheduler, run.steps, **run.call).final
            tried.append({**error_of(made, final, variance), "spacing": run.spacing})
        return min(tried, key=lambda found: math.inf if found["error"] is None else found["error"])

    def _runs(self, comparison: Comparison, scheduler: str | Unit, nfe: int) -> Iterable[Run]:
        config = comparison.lineup.model_config
        if isinstance(scheduler, Unit):
            table = self._needed(scheduler)["tables"][str(nfe)]
            made = DSSolverScheduler.from_config(config, solvers={str(nfe): table})
        elif scheduler.startswith(ADAMS):
            nodes = torch.linspace(1, 0, nfe + 1, dtype=torch.float64).tolist()
            spec = SolverSpec.adams_bashforth(nodes, int(scheduler.removeprefix(ADAMS)))
            made = DSSolverScheduler.from_config(config, solvers={str(nfe): spec.to_dict()})
        elif scheduler == CLASSICAL:
            made = DSSolverScheduler.from_config(config, solvers=CLASSICAL)
        else:
            return [run for run in comparison.lineup.runs(nfe) if run.name == scheduler]
        return [Run("", nfe, "", made, nfe, True, "")]

    def _needed(self, unit: Unit) -> dict[str, Any]:
        found = self.known(unit)
        assert found is not None
        return found

    def _distance(self, run: Unit, images: int, subsets: int, **_: Any) -> dict[str, Any]:
        extractor = of_network(study_models.classifier(), study_models.NAME)
        real = study_models.folder(self.models, study_models.CLASSIFIER) / "reference.safetensors"
        statistics = read_statistics(real, extractor)
        comparison = self._to(run.facts["to"])[0]
        spacing = self._needed(run)["spacing"]
        runs = self._runs(comparison, run.facts["scheduler"], run.facts["nfe"])
        chosen = next(found for found in runs if found.spacing == spacing)
        size, features = comparison.config.batch_size, []
        for first in range(0, images, size):
            batch = range(first, min(first + size, images))
            made = comparison.sample(chosen.scheduler, chosen.steps, batch, **chosen.call).images
            features.append(extractor(list(made.expand(-1, -1, -1, 3).numpy()))["features"])
        metric = FrechetDistance(statistics.mean, statistics.covariance)
        return with_intervals(metric, torch.cat(features), subsets, 0)["frechet_distance"] | {"name": extractor.name}

    def _teacher(self, steps: int, order: int, to: Unit, **_: Any) -> dict[str, Any]:
        comparison, final, variance = self._to(to)
        student, size = Student(comparison.lineup.sampler), comparison.config.batch_size
        made = teacher_trajectory(student, Teacher(steps, order), range(len(final)), SPLIT, size, progress=False)
        return error_of(made.final, final, variance)

    def _refusal(self, model: str, search: Unit, schedule: str) -> dict[str, Any]:
        own = self._comparison(model, self.budget.guidance, None)[0].lineup.sampler.pipe.scheduler
        with tempfile.TemporaryDirectory() as folder:
            artefact = DSSolverScheduler.from_config(own.config, solvers=self._needed(search)["tables"])
            artefact.save_pretrained(folder)
            try:
                DSSolverScheduler.from_config(on_schedule(own, schedule).config, solvers=folder, strict=True)
            except ValueError as error:
                return {"refused": True, "line": str(error).replace(folder, "SOLVER")}
        return {"refused": False, "line": ""}


def error_of(made: torch.Tensor, wanted: torch.Tensor, variance: float) -> dict[str, Any]:
    """Final-state mse over the reference's variance, and its 95 % interval by bootstrap over samples; None if it is not
    finite."""
    errors = (made.double() - wanted.double()).square().flatten(1).mean(1) / variance
    if not errors.isfinite().all():
        return {"error": None, "interval": None}
    return {"error": errors.mean().item(), "interval": interval(errors)}


def on_schedule(scheduler: Any, schedule: str) -> Any:
    """The scheduler with other betas."""
    return type(scheduler).from_config(scheduler.config, **SCHEDULES[schedule])


class Retimed:
    """Before a network that was trained on one vp schedule: its times of another become those of equal noise."""

    def __init__(self, own: Any, other: Any) -> None:
        self.own, self.other = (DSSolverScheduler.from_config(s.config, solvers=CLASSICAL).path for s in (own, other))
        self.grid = torch.arange(self.own.num_train_timesteps)
        self.levels = -self.own.lambdas(self.own.node(self.grid)).numpy()  # rising with time

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        times = kwargs["timestep"]
        levels = -self.other.lambdas(self.other.node(times.double().cpu())).numpy()
        own = torch.from_numpy(np.interp(levels, self.levels, self.grid.numpy()))
        return args, {**kwargs, "timestep": own.to(times.device, torch.float32)}
