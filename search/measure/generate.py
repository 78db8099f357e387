"""Images of schedulers at step counts, for `evaluate`: sampled a shard at a time, each shard a file.

A shard is one batch of the pipeline. Its noise and conditions follow from the indices of its images, so that it does
not matter which process makes it, and its folder from all that its images depend on, so that a killed run finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..console import one_line, say, told_end
from ..settings import CompareConfig, EvaluateConfig, ModelConfig
from ..storage import Kept, kept
from ..teacher.trajectories import model_itself
from .baselines import Run
from .compare import Comparison
from .pictures import as_uint8

SPLIT = "evaluate"  # its noise is that of no search and no comparison
REFERENCE = "reference"  # how a run of many steps is called
MODEL_SETTINGS = [entry.name for entry in dataclasses.fields(ModelConfig)]


class Generation:
    """Samples images of every run through one pipeline.

    Args:
        config: settings; `config.batch_size` images make a shard.
        folder: for the shards.
        talks: whether to say which spacings are run.

    Attributes:
        runs: of all solvers and schedulers.

    Raises:
        ValueError: the model, a solver, a scheduler or the comparison is at fault.
    """

    def __init__(self, config: EvaluateConfig, folder: Path, talks: bool = True) -> None:
        model = {name: getattr(config, name) for name in MODEL_SETTINGS}
        self._comparison = Comparison(CompareConfig(**model, solver=config.solver, schedulers=config.schedulers))
        self.sampler, self.config, self.folder = self._comparison.sampler, config, folder
        best = best_spacings(config.comparison)
        self.runs = [run for nfe in config.nfe for run in self._chosen(nfe, best, talks)]
        steps, told = config.reference_steps, "DSSolverScheduler, classical"
        for end in dict.fromkeys(config.reference_ends) if steps else ():
            itself = model_itself(self._comparison.model_config, end)
            name = f"{REFERENCE}, from {end:g}" if end else REFERENCE
            self.runs.append(Run(name, steps, "", itself, steps, False, told + told_end(end)))

    def _chosen(self, nfe: int, best: dict[tuple[str, int], str], talks: bool) -> Iterator[Run]:
        """The searched solvers, and each stock scheduler in one spacing."""
        candidates: dict[str, list[Run]] = {}
        for run in self._comparison.candidates(nfe):
            candidates.setdefault(run.name, []).append(run)
        for name, runs in candidates.items():
            known = [run for run in runs if run.spacing == best.get((name, nfe))]
            yield (known or runs)[0]
            if talks and not runs[0].searched:
                why = "the comparison's best" if known else "the first of its spacings"
                say(f"{name} at {nfe} calls: {(known or runs)[0].spacing}, {why}")

    # --- shards ----------------------------------------------------------------------------------------------------

    @property
    def shards(self) -> list[range]:
        """Indices of the images of each."""
        n, size = self.config.num_images, self.config.batch_size
        return [range(first, min(first + size, n)) for first in range(0, n, size)]

    def file(self, run: Run, indices: range) -> Path:
        """Of one shard; named after all that its images depend on."""
        versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
        settings = {key: value for key, value in run.scheduler.config.items() if key != "provenance"}
        how = [type(run.scheduler).__name__, settings, run.steps, run.call, self.config.batch_size]
        text = json.dumps([self._model, versions, how], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / digest / f"{indices[0]:06}-{indices[-1]:06}.safetensors"

    @functools.cached_property
    def _model(self) -> list[Any]:
        return [self.sampler.fingerprint(range(self.config.num_images)), str(self.sampler.pipe.dtype)]

    def images(self, run: Run, indices: range) -> tuple[Tensor, dict[str, str]]:
        """One shard (n, H, W, 3) uint8, with the `seconds` and the `calls` of the network that one image took."""
        tensors, facts = kept(self.file(run, indices), lambda: self._sampled(run, indices))
        return tensors["images"], facts

    def _sampled(self, run: Run, indices: range) -> Kept:
        single_call = self._single_call  # its run is over before the clock starts
        before, began = self.sampler.network_evaluations, time.perf_counter()
        try:
            with self.sampler.using(run.scheduler):
                output = self.sampler(indices, SPLIT, run.steps, **run.call)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a scheduler of diffusers raises in a pipeline that is not for it
            raise ValueError(f"{run.name} ({run.spacing}) fails at {run.nfe} calls: {one_line(error)}") from error
        seconds = (time.perf_counter() - began) / len(indices)
        calls = (self.sampler.network_evaluations - before) / len(indices) / single_call
        images = torch.stack([as_uint8(picture) for picture in output])
        if len(images) != len(indices) or images.ndim != 4:
            name, shape = type(self.sampler.pipe).__name__, tuple(images.shape)
            raise ValueError(f"{name} gives {shape} for {len(indices)} samples; only one image for each is evaluated")
        return {"images": images.expand(-1, -1, -1, 3)}, {"seconds": repr(seconds), "calls": repr(calls)}

    @functools.cached_property
    def _single_call(self) -> float:
        """Evaluations of one image in one network call, two where guidance doubles it: from a run of two steps, which
        is the warm-up as well."""
        before, indices = self.sampler.network_evaluations, self.shards[0]
        with self.sampler.using(model_itself(self._comparison.model_config)):
            self.sampler(indices, SPLIT, 2)
        return (self.sampler.network_evaluations - before) / len(indices) / 2

    def prompts(self, indices: Sequence[int]) -> list[str]:
        """Of these images.

        Raises:
            ValueError: the pipeline takes none.
        """
        conditions = self.sampler.conditions(indices)
        if "prompt" not in conditions:
            raise ValueError(f"{type(self.sampler.pipe).__name__} takes no prompts; leave out clip")
        return conditions["prompt"]


def best_spacings(folder: str | None) -> dict[tuple[str, int], str]:
    """Of each scheduler at each NFE, from the comparison.json in a folder; none without a folder.

    Raises:
        ValueError: it cannot be read.
    """
    if folder is None:
        return {}
    file = Path(folder) / "comparison.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        return {(r["scheduler"], r["nfe"]): r["spacing"] for r in results}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"comparison {str(file)!r} cannot be read: {one_line(error)}") from error
