"""The `compare` command: searched solvers beside diffusers' own schedulers, same seeds, conditions and guidance.

Every scheduler of `baselines` runs in every spacing it offers, and only its best per NFE is shown. Calls of the network
are counted, not assumed. What each batch of samples gave is kept on disk, so that a killed comparison goes on, and the
batches are shared by all processes. Nothing here knows how a solver was found.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_dssolver import DSSolverScheduler

from ..console import one_line, say
from ..images.networks import distance, load_feature_network
from ..pipeline.loading import load_pipeline
from ..pipeline.prompts import prompts_of
from ..pipeline.sampler import Sampler
from ..settings import CompareConfig
from ..storage import Kept, kept, remove_partial_files, write_text
from ..teacher.ends import model_itself
from .baselines import Run, family, runs
from .pictures import as_uint8, comparison_picture, error_curves, strip
from .results import ERRORS, Result, _name, _plain, details, interval, psnr, table

SPLIT = "test"  # of all noise: no search draws from it


@dataclass(frozen=True)
class Sampled:
    """What one run gave: final states (n, ...), images (n, H, W, C) or frames (n, F, H, W, C) uint8, and of one sample
    the network evaluations and seconds."""

    final: Tensor
    images: Tensor
    evaluations: float
    seconds: float


class Comparison:
    """Runs schedulers through one pipeline on the same test samples."""

    def __init__(self, config: CompareConfig) -> None:
        self.config, self.accelerator = config, Accelerator()
        device = self.accelerator.device
        pipe = load_pipeline(config.pretrained_model_name_or_path, config.dtype, device, config.revision)
        self.model_config = pipe.scheduler.config
        self.sampler = Sampler(pipe, config.call_arguments, prompts_of(config), config.seed)
        # every artefact is loaded, and its noise schedule checked, before anything is run
        self.itself = model_itself(self.model_config, config.reference_end)
        self.ours = {_name(source): self._ours(source) for source in config.solver}
        self.stock = family(self.model_config, config.schedulers)
        self.features = load_feature_network(config.feature_network, device) if config.feature_network else None
        self.cache = Path(config.output_dir) / "cache"
        self.single_call = 1

    def _ours(self, source: str) -> Any:
        """A searched solver, for the guidance of this run."""
        scheduler = DSSolverScheduler.from_config(self.model_config, solvers=source)
        default = getattr(self.sampler.accepted.get("guidance_scale"), "default", None)
        guidance = self.config.call_arguments.get("guidance_scale", default)
        if scheduler.config.guidance_solvers and isinstance(guidance, (int, float)):
            return DSSolverScheduler.from_config(scheduler.config, guidance_scale=float(guidance))
        provenance = scheduler.config.provenance  # of a file: it may be anything
        call = provenance.get("call") if isinstance(provenance, dict) else None
        told = call.get("guidance_scale", guidance) if isinstance(call, dict) else guidance
        if told != guidance and self.accelerator.is_main_process:
            say(f"{source} was searched at guidance scale {told}, this run is at {guidance}")
        teacher = provenance.get("teacher") if isinstance(provenance, dict) else None
        end = teacher.get("end", 0.0) if isinstance(teacher, dict) else self.config.reference_end
        if end != self.config.reference_end and self.accelerator.is_main_process:
            say(f"{source} was searched with teacher_end {end}, this reference_end is {self.config.reference_end}")
        return scheduler

    # --- what runs -------------------------------------------------------------------------------------------------

    def candidates(self, nfe: int) -> Iterator[Run]:
        """Every run at this NFE."""
        for name, scheduler in self.ours.items():
            kind = "searched" if nfe in scheduler.tables else "derived"
            yield Run(name, nfe, kind, scheduler, nfe, True, f"DSSolverScheduler, {kind} table")
        for name, stock in self.stock.items():
            yield from runs(name, stock, nfe, self.model_config, self.sampler.pipe, self.sampler.accepted)

    def sample(self, scheduler: Any, steps: int, batch: Sequence[int] | None = None, **call: Any) -> Sampled:
        """One run on these test samples, or on all of them batch by batch."""
        if batch is None:
            parts = [self.sample(scheduler, steps, b, **call) for b in self._batches()]
            count = self.config.num_samples
            shares = [len(part.final) / count for part in parts]
            return Sampled(
                torch.cat([part.final for part in parts]),
                torch.cat([part.images for part in parts]),
                sum(part.evaluations * share for part, share in zip(parts, shares, strict=True)),
                sum(part.seconds * share for part, share in zip(parts, shares, strict=True)),
            )
        final: list[Tensor] = []
        take = scheduler.step

        @functools.wraps(take)
        def recording(*args: Any, **kwargs: Any) -> Any:
            result = take(*args, **kwargs)
            final[-1:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
            return result

        scheduler.step = recording
        before, began = self.sampler.network_evaluations, time.perf_counter()
        try:
            with self.sampler.using(scheduler):
                output = self.sampler(batch, SPLIT, steps, **call)
        finally:
            del scheduler.step
        seconds = (time.perf_counter() - began) / len(batch)
        evaluations = (self.sampler.network_evaluations - before) / len(batch)
        images = torch.stack([as_uint8(picture) for picture in output[0]])
        return Sampled(final[0][: len(batch)].float().cpu(), images, evaluations, seconds)

    def _batches(self) -> list[range]:
        count = self.config.num_samples
        size = min(self.config.batch_size, -(-count // self.accelerator.num_processes))
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    # --- what is kept ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def key(self) -> list[Any]:
        """What every run depends on."""
        versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
        return [self.sampler.fingerprint(range(self.config.num_samples)), str(self.sampler.pipe.dtype), versions]

    def _kept(self, facts: Sequence[Any], make: Callable[[], Kept]) -> Kept:
        """What a batch of a run gave: from disk, where it was made before."""
        text = json.dumps([self.key, *facts], sort_keys=True, default=str)
        file = self.cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        return kept(file, make)

    def _reference(self, steps: int, batch: range) -> Kept:
        """Final states and images of the model itself."""

        def make() -> Kept:
            made = self.sample(self.itself, steps, batch)
            return {"final": made.final, "images": made.images}, {"evaluations": repr(made.evaluations)}

        return self._kept(["reference", *self._against(steps), list(batch)], make)

    def _against(self, steps: int) -> list[Any]:
        """What a reference of so many steps depends on beside `key`."""
        return [steps, *([self.config.reference_end] if self.config.reference_end else [])]

    def _errors(self, run: Run, batch: range) -> Kept:
        """How far each sample of a run is from the reference, and its first images."""

        def make() -> Kept:
            try:
                made = self.sample(run.scheduler, run.steps, batch, **run.call)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a scheduler of diffusers raises in a pipeline that is not for it
                if run.searched:
                    raise
                return {}, {"refused": one_line(error)}
            wanted, _ = self._reference(self.config.reference_steps, batch)
            parts = {"mse": _mse(made.final, wanted["final"]), "image_mse": _mse(made.images, wanted["images"], 255)}
            if self.features:
                pair = [self.features(_for_features(i)) for i in (made.images, wanted["images"])]
                parts["feature_distance"] = torch.stack(
                    [
                        distance([f[k : k + 1] for f in pair[0]], [w[k : k + 1] for w in pair[1]])
                        for k in range(len(batch))
                    ]
                )
            shown = max(self.config.num_pictures - batch[0], 0)
            parts["images"] = made.images[:shown]
            return parts, {"evaluations": repr(made.evaluations), "seconds": repr(made.seconds)}

        digest = self.features.digest if self.features else None
        how = [type(run.scheduler).__name__, dict(run.scheduler.config), run.steps, run.call]
        against = self._against(self.config.reference_steps)
        return self._kept([how, *against, self.config.num_pictures, digest, list(batch)], make)

    # --- the whole -------------------------------------------------------------------------------------------------

    def reference(self) -> tuple[Tensor, Tensor, float]:
        """Final states and images of many classical steps on all samples, and the mse between them and half as many
        steps."""
        steps = self.config.reference_steps
        parts, metadata = zip(*(self._reference(steps, batch) for batch in self._batches()), strict=True)
        half = torch.cat([self._reference(max(steps // 2, 1), batch)[0]["final"] for batch in self._batches()])
        # guidance in one doubled call, or two calls, counts double
        self.single_call = max(round(float(metadata[0]["evaluations"]) / steps), 1)
        final = torch.cat([part["final"] for part in parts])
        return final, torch.cat([part["images"] for part in parts]), (half - final).square().mean().item()

    def run(self) -> tuple[list[Result], float, list[np.ndarray]]:
        """Every result, the best spacing of each stock scheduler per NFE; the reference's own error; its pictures."""
        steps = self.config.reference_steps
        halves = [max(steps // 2, 1), steps]
        every = [run for nfe in self.config.nfe for run in self.candidates(nfe)]
        self._share("reference", [(self._reference, n, batch) for n in halves for batch in self._batches()])
        self._share("compare", [(self._errors, run, batch) for run in every for batch in self._batches()])
        final, images, uncertainty = self.reference()
        span = (final.max() - final.min()).item()
        results: dict[tuple[str, int], Result] = {}
        for run in every:
            result = self._result(run, span)
            if result and ((run.name, run.nfe) not in results or result.mse < results[run.name, run.nfe].mse):
                results[run.name, run.nfe] = result
        return list(results.values()), uncertainty, list(images[: self.config.num_pictures].numpy())

    def _share(self, title: str, tasks: Sequence[tuple[Callable, Any, range]]) -> None:
        """Every process does its share; none goes on before all are done."""
        mine = tasks[self.accelerator.process_index :: self.accelerator.num_processes]
        for make, what, batch in tqdm(mine, desc=title, unit="run", disable=not self.accelerator.is_main_process):
            make(what, batch)
        self.accelerator.wait_for_everyone()

    def _result(self, run: Run, span: float) -> Result | None:
        """All batches of a run together; None if the pipeline and the scheduler do not go together."""
        parts, metadata = zip(*(self._errors(run, batch) for batch in self._batches()), strict=True)
        if refused := next((m["refused"] for m in metadata if "refused" in m), None):
            if self.accelerator.is_main_process:
                say(f"{run.name} ({run.spacing}) cannot run at {run.nfe} calls and is left out: {refused}")
            return None
        samples = {name: torch.cat([p[name] for p in parts]).double() for name in ERRORS if name in parts[0]}
        errors = {name: values.mean().item() for name, values in samples.items()}
        shares = [len(p["mse"]) / self.config.num_samples for p in parts]
        evaluations, seconds = (
            sum(float(m[key]) * share for m, share in zip(metadata, shares, strict=True))
            for key in ("evaluations", "seconds")
        )
        finite = math.isfinite(errors["mse"])
        return Result(
            run.name, run.nfe, run.spacing, round(evaluations / self.single_call),
            errors["mse"] if finite else math.inf, psnr(errors["mse"], span), seconds, run.searched,
            interval(samples["mse"]) if finite else None,
            errors["image_mse"], psnr(errors["image_mse"], 1.0), errors.get("feature_distance"), run.configuration,
            pictures=list(torch.cat([p["images"] for p in parts]).numpy()),
        )  # fmt: skip


def compare(config: CompareConfig) -> None:
    """Run the comparison; print the tables, write comparison.json, comparison.png, error.png and pictures/.

    Raises:
        ValueError: a setting, the model or a solver is at fault; one line, and nothing is written.
    """
    comparison = Comparison(config)
    folder = Path(config.output_dir)
    if comparison.cache.is_dir():
        remove_partial_files(comparison.cache)
    try:
        results, uncertainty, reference_pictures = comparison.run()
        if comparison.accelerator.is_main_process:
            _write(folder, config, results, uncertainty, reference_pictures)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on from what {folder} holds") from None
    comparison.accelerator.end_training()


def _write(
    folder: Path, config: CompareConfig, results: list[Result], uncertainty: float, reference: list[np.ndarray]
) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    Image.fromarray(strip(reference)).save(folder / "pictures" / "reference.png")
    for result in results:
        result.picture = f"pictures/{result.scheduler.replace('/', '--')}-{result.nfe}.png"
        Image.fromarray(strip(result.pictures)).save(folder / result.picture)
    print(details(results))
    print(table(results, config, uncertainty))
    record = {
        "settings": asdict(config),
        "reference": {
            "steps": config.reference_steps,
            "mse_against_half_the_steps": uncertainty,
            **({"end": config.reference_end} if config.reference_end else {}),
        },
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__},
        "results": [_plain(result) for result in results],
    }
    write_text(folder / "comparison.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    comparison_picture(results, config, reference, folder / "comparison.png")
    error_curves(results, folder / "error.png")
    print(f"written to {folder}: comparison.json, comparison.png, error.png, pictures/")


def _mse(a: Tensor, b: Tensor, peak: float = 1.0) -> Tensor:
    """(n,) mean squared difference of each sample, of values up to `peak`."""
    return (a.float() - b.float()).div(peak).square().flatten(1).mean(1)


def _for_features(images: Tensor) -> Tensor:
    """(n, [F,] H, W, C) uint8 -> (n, [F,] C, H, W) in [0, 1]."""
    return images.movedim(-1, -3).float() / 255
