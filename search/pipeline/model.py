"""A pipeline in hand, and what is chosen for its calls besides the settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers_dssolver import DSSolverScheduler

from ..settings import ModelConfig
from .loading import borrowed, load_pipeline
from .prompts import prompts_of
from .sampler import Conditions, Sampler

SEARCHED = "searched"  # name of a solver that has no folder


@dataclass(frozen=True, eq=False)
class Model:
    """A pipeline and its calls.

    Attributes:
        pipe: the pipeline.
        call: arguments of its call that stand in no settings, such as pictures.
        prompts, conditions: as a `Sampler` takes them.
    """

    pipe: Any
    call: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    conditions: Conditions | None = None
    _samplers: list[Sampler] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def loaded(cls, settings: ModelConfig, device: Any) -> Model:
        """The pipeline and the prompts that settings name. Raises ValueError for one that cannot be loaded."""
        name, dtype, revision = settings.pretrained_model_name_or_path, settings.dtype, settings.revision
        return cls(load_pipeline(name, dtype, device, revision), prompts=prompts_of(settings))

    def sampler(self, settings: ModelConfig) -> Sampler:
        """The pipeline with the call of the settings. Raises ValueError for arguments that it does not take."""
        call = {**settings.call_arguments, **self.call}
        self._samplers.append(Sampler(self.pipe, call, self.prompts, settings.seed, self.conditions))
        return self._samplers[-1]

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """The pipeline frozen; afterwards it is as it was, and no sampler counts any more."""
        try:
            with borrowed(self.pipe):
                yield
        finally:
            while self._samplers:
                self._samplers.pop().close()


def fitted(model_config: Mapping[str, Any], solver: str | DSSolverScheduler) -> DSSolverScheduler:
    """A solver on a model, by its scheduler's configuration.

    Args:
        solver: a folder, Hub id or published name; or a scheduler that holds it.

    Raises:
        ValueError: the solver cannot be read.
    """
    if isinstance(solver, str):
        return DSSolverScheduler.from_config(model_config, solvers=solver)
    with TemporaryDirectory() as folder:
        file = Path(folder) / SEARCHED
        solver.save_pretrained(file)
        try:
            return DSSolverScheduler.from_config(model_config, solvers=str(file))
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), SEARCHED)) from None


def searched_guidance(solver: DSSolverScheduler, otherwise: float | None = None) -> float | None:
    """The guidance scale that a solver was searched at."""
    provenance = solver.config.provenance
    told = provenance.get("guidance_scale") if isinstance(provenance, Mapping) else None
    return section(solver, "call").get("guidance_scale", otherwise) if told is None else told


def section(solver: DSSolverScheduler, name: str) -> Mapping[str, Any]:
    """Part of a solver's provenance; empty if the file holds something else there."""
    provenance = solver.config.provenance
    found = provenance.get(name) if isinstance(provenance, Mapping) else None
    return found if isinstance(found, Mapping) else {}
