"""The Python interface: the pipeline in your hands searched, compared and evaluated.

    found = search(pipe, nfe=[5, 8], prompts=prompts, guidance_scale=4.0, height=1024, width=1024)
    found.apply(pipe)

The pipeline is what it was before each of these calls, however it ends, until a solver is applied to it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from accelerate import Accelerator
from PIL import Image

from diffusers_dssolver import DSSolverScheduler

from .artefacts.publish import sent
from .console import warn
from .measure.compare import Compared, Comparison, carried_out
from .measure.evaluate import Evaluation, table
from .measure.pictures import as_html, as_uint8, row
from .methods.record import SCHEDULER, Record
from .methods.search import carry_out
from .methods.setup import Callback, Setup
from .pipeline.fingerprint import is_plain
from .pipeline.loading import load_pipeline
from .pipeline.model import SEARCHED, Model, fitted, searched_guidance
from .pipeline.prompts import prompts_of
from .pipeline.sampler import Conditions, arguments_of, own_guidance
from .processes import from_main
from .settings import CompareConfig, EvaluateConfig, ModelConfig, PublishConfig, SearchConfig, made
from .storage import write_text

__all__ = ["Found", "compare", "evaluate", "load_pipeline", "search"]
C = TypeVar("C", bound=ModelConfig)
OF_LOADING = ("pretrained_model_name_or_path", "revision", "dtype")  # settings that a pipeline in hand has decided
PICTURES = 4  # of a search that is shown
SPLIT = "picture"  # of their noise
Solver = Any  # a Found, a DSSolverScheduler, or the name of a folder, repository or published solver


def search(
    pipe: Any,
    *,
    prompts: str | Sequence[str] | None = None,
    conditions: Conditions | None = None,
    output_dir: str | Path | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    **arguments: Any,
) -> Found:
    """Search solvers for a pipeline as it is: with its adapters, quantised weights and offloading.

    Args:
        pipe: any diffusers pipeline, on its device. Afterwards it is as it was.
        prompts: sample i gets prompt i modulo their number.
        conditions: what else is chosen sample by sample: a function, indices -> arguments of the pipeline's call; or
            lists by argument (pictures, embeddings, class labels), one entry a sample.
        output_dir: folder for the result; a killed search goes on from there. None: nothing is written.
        callback: called after each stage with its name and figures.
        progress: show progress bars.
        arguments: settings of the command `search` (`nfe`, `guidance_scale`, `budget`, `seed`, ..); all others are
            arguments of the pipeline's call (`height`, ..).

    Returns:
        what was found; after Ctrl-C what is finished.

    Raises:
        ValueError: an argument, the pipeline or the folder is at fault; one line.
        KeyboardInterrupt: Ctrl-C, before any solver was finished.
    """
    settings, model = _given(SearchConfig, pipe, prompts, conditions, output_dir, arguments)
    with model.borrowed():
        record = Record(Setup(settings, Accelerator(), model, callback, progress))
        try:
            carry_out(record)
        except KeyboardInterrupt:
            if not record.state["solvers"]:
                raise
            finished = ", ".join(sorted(record.state["solvers"], key=int))
            warn(f"interrupted; solvers for {finished} calls are finished")
        return Found(record)


def compare(
    pipe: Any,
    solvers: Solver | Sequence[Solver] | Mapping[str, Solver] = (),
    *,
    prompts: str | Sequence[str] | None = None,
    conditions: Conditions | None = None,
    output_dir: str | Path | None = None,
    **arguments: Any,
) -> Compared:
    """Measure solvers beside diffusers' own schedulers, on the same seeds, against converged runs of the pipeline.

    Args:
        solvers: one or several: what `search` returned, schedulers, or names of folders, repositories or published
            solvers; a dictionary names them.
        prompts, conditions: as for `search`.
        output_dir: folder for figures and pictures; a killed comparison goes on from there. None: nothing is kept.
        arguments: settings of the command `compare` (`nfe`, `schedulers`, `num_samples`, ..); all others are arguments
            of the pipeline's call.

    Raises:
        ValueError: an argument, the pipeline or a solver is at fault; one line.
    """
    named = _named(solvers)
    arguments = _with_counts(arguments, named)
    settings, model = _given(CompareConfig, pipe, prompts, conditions, output_dir, arguments)
    with model.borrowed(), _kept_in(settings) as (kept, accelerator):
        found = carried_out(Comparison(kept, accelerator, model, _schedulers(named)))
    found = dataclasses.replace(found, config=settings)
    if output_dir and accelerator.is_main_process:
        found.save(output_dir)
    return found


def evaluate(
    pipe: Any,
    solvers: Solver | Sequence[Solver] | Mapping[str, Solver] = (),
    *,
    reference: str | Path,
    prompts: str | Sequence[str] | None = None,
    conditions: Conditions | None = None,
    output_dir: str | Path | None = None,
    **arguments: Any,
) -> Evaluated:
    """Measure how far images of solvers and of diffusers' own schedulers are from real ones.

    Args:
        solvers: as for `compare`.
        reference: real images, or their statistics, as of the command `evaluate`.
        prompts, conditions, output_dir: as for `compare`.
        arguments: settings of the command `evaluate` (`nfe`, `num_images`, `extractor`, ..); all others are arguments
            of the pipeline's call.

    Raises:
        ValueError: an argument, the pipeline, a solver, a network or the real images are at fault; one line.
    """
    named = _named(solvers)
    arguments = _with_counts({**arguments, "reference": str(reference)}, named)
    settings, model = _given(EvaluateConfig, pipe, prompts, conditions, output_dir, arguments)
    with model.borrowed(), _kept_in(settings) as (kept, accelerator):
        return Evaluated(Evaluation(kept, accelerator, model, _schedulers(named))())


class Found:
    """What a search found. A notebook shows its table and a row of images, a terminal its table.

    Attributes:
        scheduler: holds the solvers.
        table: by step count, the held-out error of the best classical solver and of the one found.
        nfe: step counts that were searched.
        folder: of the result, if it has one.
        left_out: what a budget made smaller or left out.
    """

    def __init__(self, record: Record) -> None:
        setup = record.setup
        self.scheduler: DSSolverScheduler = record.scheduler()
        self.table, self.left_out, self.folder = record.table().strip("\n"), list(setup.left_out), setup.folder
        self.nfe = sorted(record.entries("searched"))
        self._settings, self._model = setup.settings, setup.model
        self._replaced: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._pictures: Image.Image | None = None

    @property
    def name(self) -> str:
        """In tables: that of the folder."""
        return self.folder.resolve().name if self.folder else SEARCHED

    def apply(self, pipe: Any = None) -> None:
        """Put the solvers into a pipeline; into the one that was searched, if none is given.

        Raises:
            ValueError: they belong to another noise schedule.
        """
        pipe = self._model.pipe if pipe is None else pipe
        solver = fitted(pipe.scheduler.config, self.scheduler)
        if pipe not in self._replaced:
            self._replaced[pipe] = pipe.scheduler
        pipe.scheduler = solver
        searched, own = searched_guidance(self.scheduler), own_guidance(pipe)
        if searched is not None and own is not None and searched != own:
            told = f"searched at guidance scale {searched:g}, this pipeline's default is {own:g}"
            warn(f"{told}; call it with guidance_scale={searched:g}")

    def restore(self, pipe: Any = None) -> None:
        """Put back the scheduler that a pipeline had before `apply`.

        Raises:
            ValueError: the solvers were not applied to it.
        """
        pipe = self._model.pipe if pipe is None else pipe
        if pipe not in self._replaced:
            raise ValueError(f"these solvers were not applied to this {type(pipe).__name__}: nothing to restore")
        pipe.scheduler = self._replaced.pop(pipe)

    def compare(self, **arguments: Any) -> Compared:
        """`compare` of the pipeline and the calls that were searched; arguments go over them."""
        settings, model = self._settings, self._model
        same = {name: getattr(settings, name) for name in ("guidance_scale", "seed", "batch_size")}
        same |= {"prompts": list(model.prompts) or None, "conditions": model.conditions}
        given = {**same, **settings.call, **model.call, **arguments}
        with self._as_searched():
            return compare(model.pipe, given.pop("solvers", self), **given)

    def picture(self) -> Image.Image:
        """A row of images of the pipeline with the largest step count that was searched; made once."""
        if self._pictures is None:
            with self._as_searched(), self._model.borrowed():
                sampler = self._model.sampler(self._settings)
                solver = fitted(self._model.pipe.scheduler.config, self.scheduler)
                with sampler.using(solver):
                    output = sampler(range(PICTURES), SPLIT, max(self.nfe or self.scheduler.tables))
            self._pictures = row([as_uint8(image).numpy() for image in output[0]])
        return self._pictures

    def save(self, folder: str | Path) -> None:
        """Write the solvers for `DSSolverScheduler.from_pretrained`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder) / SCHEDULER, self.scheduler.to_json_string())
        self.folder = self.folder or Path(folder)

    def push_to_hub(
        self, repo_id: str, *, comparison: Compared | None = None, private: bool = False, **options: Any
    ) -> str:
        """Send the solvers and their card to the Hub; what was sent, in words.

        Args:
            repo_id: org/name; made if there is none.
            comparison: figures and pictures for the card.
            private: make a new repository private.
            options: of the command `publish` (`tag`, `license`, `dry_run`, `force`).

        Raises:
            ValueError: the Hub or the repository refuses; nothing was committed.
        """
        with TemporaryDirectory() as folder:
            solver, compared = self.folder or Path(folder) / SEARCHED, Path(folder) / "comparison"
            if not self.folder:
                solver.mkdir()
                write_text(solver / SCHEDULER, self.scheduler.to_json_string())
            if comparison:
                comparison.save(compared)
                options["comparison"] = str(compared)
            config = {"solver": str(solver), "repo_id": repo_id, "private": private, **options}
            return sent(made(PublishConfig, config))

    @contextmanager
    def _as_searched(self) -> Iterator[None]:
        """The pipeline with the scheduler that it was searched with."""
        pipe = self._model.pipe
        before, pipe.scheduler = pipe.scheduler, self._replaced.get(pipe, pipe.scheduler)
        try:
            yield
        finally:
            pipe.scheduler = before

    def __repr__(self) -> str:
        return self.table

    def _repr_html_(self) -> str:
        try:
            return as_html(self.table, self.picture())
        except Exception as error:  # whatever a pipeline raises; the table is shown all the same
            return as_html(f"{self.table}\n\nno images: {' '.join(str(error).split())}")


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluated:
    """What an evaluation found; a process other than the main one has an empty record.

    Attributes:
        record: settings, data and metrics, as evaluation.json has them.
    """

    record: dict[str, Any]

    @property
    def table(self) -> str:
        """A block per metric, schedulers by rows and NFE by columns."""
        return table(self.record) if self.record else ""

    def __repr__(self) -> str:
        return self.table

    def _repr_html_(self) -> str:
        return as_html(self.table)


# --- arguments --------------------------------------------------------------------------------------------------------


def _given(
    cls: type[C],
    pipe: Any,
    prompts: str | Sequence[str] | None,
    conditions: Conditions | None,
    output_dir: str | Path | None,
    arguments: Mapping[str, Any],
) -> tuple[C, Model]:
    """Settings and model of a call; each of the arguments is a setting, or an argument of the pipeline's own call."""
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise ValueError(f"{pipe!r} is no pipeline; load one, DiffusionPipeline.from_pretrained(..), and give that")
    settings = {entry.name for entry in dataclasses.fields(cls)} - {"output_dir"}
    if held := sorted(set(arguments) & set(OF_LOADING)):
        raise ValueError(f"{held[0]} is for commands, which load a pipeline; this one is loaded: leave {held[0]} out")
    accepted, command = arguments_of(pipe), cls.__name__.removesuffix("Config").lower()
    for name in arguments:
        if name not in settings and name not in accepted:
            near = difflib.get_close_matches(name, {**dict.fromkeys(settings), **accepted}, 2)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"{name!r} is neither a setting of {command} nor an argument of {type(pipe).__name__}{meant} Settings: "
                f"{', '.join(sorted(settings - set(OF_LOADING)))}. Arguments: {', '.join(accepted)}"
            )
    values = {k: v for k, v in arguments.items() if k in settings and v is not None}
    call = {k: v for k, v in arguments.items() if k not in settings}
    values["call"] = {**values.get("call", {}), **{k: v for k, v in call.items() if is_plain(v)}}
    if "budget" in values:
        values["budget"] = str(values["budget"])
    name = getattr(pipe, "name_or_path", None) or getattr(pipe, "_pretrained_model_name_or_path", None)
    whose = {"pretrained_model_name_or_path": str(name or type(pipe).__name__), "output_dir": str(output_dir or "")}
    config = made(cls, {**values, **whose})
    if prompts is not None and not len(prompts):
        raise ValueError("prompts is empty; give at least one")
    texts = prompts_of(config) if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"prompts holds {type(wrong[0]).__name__}, not text")
    return config, Model(pipe, {k: v for k, v in call.items() if not is_plain(v)}, texts, conditions)


def _named(solvers: Solver | Sequence[Solver] | Mapping[str, Solver]) -> dict[str, Solver]:
    """Solvers by name; those without one are numbered."""
    if isinstance(solvers, Mapping):
        return dict(solvers)
    several = [solvers] if isinstance(solvers, (str, Path, Found, DSSolverScheduler)) else list(solvers)
    found: dict[str, Solver] = {}
    for solver in several:
        if isinstance(solver, (str, Path)):
            name = Path(solver).resolve().name if Path(solver).is_dir() else str(solver)
        else:
            name = solver.name if isinstance(solver, Found) else SEARCHED
        found[name if name not in found else f"{name} {len(found) + 1}"] = solver
    return found


def _schedulers(named: Mapping[str, Solver]) -> dict[str, Any]:
    return {
        name: solver.scheduler if isinstance(solver, Found) else str(solver) if isinstance(solver, Path) else solver
        for name, solver in named.items()
    }


def _with_counts(arguments: Mapping[str, Any], named: Mapping[str, Solver]) -> dict[str, Any]:
    """Arguments with the names of solvers, and the step counts of what was found where none are given."""
    counts = sorted({nfe for solver in named.values() if isinstance(solver, Found) for nfe in solver.nfe})
    return {**({"nfe": counts} if counts else {}), **arguments, "solver": list(named)}


@contextmanager
def _kept_in(settings: C) -> Iterator[tuple[C, Accelerator]]:
    """Settings with a folder that all processes share; it is removed again if none was asked for."""
    accelerator = Accelerator()
    mine = accelerator.is_main_process and not settings.output_dir
    with TemporaryDirectory() if mine else nullcontext(settings.output_dir) as folder:
        yield dataclasses.replace(settings, output_dir=from_main(accelerator, folder)), accelerator
        accelerator.wait_for_everyone()
