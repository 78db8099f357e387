"""The `compare` command: searched solvers beside diffusers' own schedulers, with equal noise, conditions and guidance.

Errors are taken against converged runs: many classical steps on the same samples. Of each stock scheduler the best
spacing per NFE is shown. What a batch gave is kept on disk, so that a killed comparison goes on; processes share the
batches.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..console import one_line, warn
from ..images.networks import distance, load_feature_network
from ..pipeline.memory import halved, is_out_of_memory
from ..pipeline.model import Model
from ..processes import launched
from ..settings import CompareConfig
from ..storage import Kept, kept, remove_partial_files, write_text
from ..teacher.ends import model_itself
from .baselines import Run
from .lineup import LONG_WAIT, VERSIONS, Lineup, Sampled, Solvers, Task, batches, share
from .pictures import as_html, comparison_picture, error_curves, strip
from .results import ERRORS, Result, details, interval, psnr, table

SPLIT = "test"  # no search draws this noise


class Comparison:
    """Runs of a lineup on the same test samples, and their errors against converged runs.

    Args:
        model, solvers: as a `Lineup` takes them.

    Raises:
        ValueError: a setting, the model or a solver is at fault; nothing was run.
    """

    def __init__(
        self,
        config: CompareConfig,
        accelerator: Accelerator | None = None,
        model: Model | None = None,
        solvers: Solvers | None = None,
    ) -> None:
        self.config, self.accelerator, self.batch_size = config, accelerator or Accelerator(), config.batch_size
        self.lineup = Lineup(config, SPLIT, self.accelerator, config.reference_end, model, solvers)
        model_itself(self.lineup.model_config, config.reference_end)  # raises if the model cannot end there
        device = self.accelerator.device
        self.features = load_feature_network(config.feature_network, device) if config.feature_network else None
        self.cache = Path(config.output_dir) / "cache"

    @functools.cached_property
    def itself(self) -> Any:
        """The scheduler of converged runs."""
        return model_itself(self.lineup.model_config, self.config.reference_end)

    @property
    def batches(self) -> list[range]:
        count = self.config.num_samples
        return batches(count, min(self.batch_size, -(-count // self.accelerator.num_processes)))

    def sample(self, scheduler: Any, steps: int, indices: Sequence[int] | None = None, **call: Any) -> Sampled:
        """These test samples, or all of them batch by batch."""
        if indices is not None:
            return self.lineup.sample(scheduler, steps, indices, **call)
        parts = [self.sample(scheduler, steps, batch, **call) for batch in self.batches]
        return Sampled(
            torch.cat([part.final for part in parts]),
            torch.cat([part.images for part in parts]),
            *(self._mean([getattr(part, name) for part in parts]) for name in ("calls", "seconds")),
        )

    def _mean(self, values: Sequence[float]) -> float:
        """Mean over samples, of one value a batch."""
        sizes = map(len, self.batches)
        return sum(value * size for value, size in zip(values, sizes, strict=True)) / self.config.num_samples

    # --- batches, kept on disk ---------------------------------------------------------------------------------------

    def _task(self, facts: Any, make: Any) -> Task:
        return self.cache / f"{self.lineup.digest(facts)}.safetensors", make

    def _converged(self, steps: int, batch: range) -> Task:
        """Final states and images of many steps."""

        def make() -> Kept:
            made = self.sample(self.itself, steps, batch)
            return {"final": made.final, "images": made.images}, {}

        return self._task(["converged", self.config.reference_end, steps, list(batch)], make)

    def _errors(self, run: Run, batch: range) -> Task:
        """Errors of each sample of a run, and its first images."""
        config = self.config

        def make() -> Kept:
            try:
                made = self.sample(run.scheduler, run.steps, batch, **run.call)
            except Exception as error:  # a scheduler of diffusers in a pipeline that is not made for it
                if run.searched or is_out_of_memory(error):
                    raise
                return {}, {"refused": one_line(error)}
            wanted, _ = kept(*self._converged(config.reference_steps, batch))
            parts = {"mse": _mse(made.final, wanted["final"]), "image_mse": _mse(made.images, wanted["images"], 255)}
            if self.features:
                parts["feature_distance"] = self._feature_distances(made.images, wanted["images"])
            parts["images"] = made.images[: max(config.num_pictures - batch[0], 0)]
            return parts, {"calls": repr(made.calls), "seconds": repr(made.seconds)}

        digest = self.features.digest if self.features else None
        facts = [run.facts, config.reference_end, config.reference_steps, config.num_pictures, digest, list(batch)]
        return self._task(facts, make)

    def _feature_distances(self, images: Tensor, wanted: Tensor) -> Tensor:
        """(n,), of images or frames in uint8, channels last."""
        assert self.features
        pair = [self.features(x.movedim(-1, -3).float() / 255) for x in (images, wanted)]
        return torch.stack(
            [distance(*([layer[k : k + 1] for layer in layers] for layers in pair)) for k in range(len(images))]
        )

    # --- the whole ---------------------------------------------------------------------------------------------------

    def converged(self) -> tuple[Tensor, Tensor, float]:
        """Final states and images of all samples, and the mse of their states against half as many steps."""
        whole, half = (
            [kept(*self._converged(steps, batch))[0] for batch in self.batches] for steps in reversed(self._steps)
        )
        final, images = (torch.cat([part[name] for part in whole]) for name in ("final", "images"))
        return final, images, _mse(torch.cat([part["final"] for part in half]), final).mean().item()

    @property
    def _steps(self) -> tuple[int, int]:
        steps = self.config.reference_steps
        return max(steps // 2, 1), steps

    def run(self) -> Compared:
        """The whole comparison; begun anew with half as many samples together wherever they do not fit into memory."""
        while True:
            try:
                return self._run()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            tried = min(self.batch_size, self.config.num_samples)
            self.batch_size = halved(tried, self.accelerator.num_processes)
            warn(f"{tried} samples do not fit into memory; {self.batch_size} run together from here on")

    def _run(self) -> Compared:
        every = [run for nfe in self.config.nfe for run in self.lineup.runs(nfe)]
        share(self.accelerator, [self._converged(n, batch) for n in self._steps for batch in self.batches], "converged")
        self.accelerator.wait_for_everyone()
        share(self.accelerator, [self._errors(run, batch) for run in every for batch in self.batches], "compare")
        self.accelerator.wait_for_everyone()
        final, images, uncertainty = self.converged()
        span = (final.max() - final.min()).item()
        results: dict[tuple[str, int], Result] = {}
        for run in every:
            result = self._result(run, span)
            if result and ((run.name, run.nfe) not in results or result.mse < results[run.name, run.nfe].mse):
                results[run.name, run.nfe] = result
        pictures = list(images[: self.config.num_pictures].numpy())
        return Compared(self.config, list(results.values()), uncertainty, pictures)

    def _result(self, run: Run, span: float) -> Result | None:
        """All batches of a run together; None if the pipeline and the scheduler do not go together."""
        parts, facts = zip(*(kept(*self._errors(run, batch)) for batch in self.batches), strict=True)
        if refused := next((f["refused"] for f in facts if "refused" in f), None):
            if self.accelerator.is_main_process:
                warn(f"{run.name} ({run.spacing}) cannot run at {run.nfe} calls and is left out: {refused}")
            return None
        samples = {name: torch.cat([p[name] for p in parts]) for name in ERRORS if name in parts[0]}
        errors = {name: values.mean().item() for name, values in samples.items()}
        finite = math.isfinite(errors["mse"])
        return Result(
            scheduler=run.name,
            nfe=run.nfe,
            spacing=run.spacing,
            calls=round(self._mean([float(f["calls"]) for f in facts])),
            mse=errors["mse"] if finite else math.inf,
            psnr=psnr(errors["mse"], span),
            seconds=self._mean([float(f["seconds"]) for f in facts]),
            searched=run.searched,
            mse_interval=interval(samples["mse"]) if finite else None,
            image_mse=errors["image_mse"],
            image_psnr=psnr(errors["image_mse"], 1.0),
            feature_distance=errors.get("feature_distance"),
            configuration=run.configuration,
            pictures=list(torch.cat([p["images"] for p in parts]).numpy()),
        )


@dataclass(frozen=True, eq=False)
class Compared:
    """What a comparison found. A notebook shows its table and picture.

    Attributes:
        results: of each scheduler at each NFE, of stock ones those of their best spacing.
        uncertainty: mse between converged runs and half as many steps.
        converged: their images.
    """

    config: CompareConfig
    results: list[Result]
    uncertainty: float
    converged: list[np.ndarray]

    @property
    def table(self) -> str:
        """Final-state mse by scheduler and NFE."""
        return table(self.results, self.config, self.uncertainty)

    @property
    def details(self) -> str:
        """Everything that was measured."""
        return details(self.results)

    def picture(self) -> Image.Image:
        """The same samples through every scheduler."""
        file = io.BytesIO()
        comparison_picture(self.results, self.config, self.converged, file)
        return Image.open(file)

    def save(self, folder: str | Path) -> None:
        """Write comparison.json, comparison.png, error.png and pictures/."""
        folder, config = Path(folder), self.config
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        Image.fromarray(strip(self.converged)).save(folder / "pictures" / "reference.png")
        for result in self.results:
            result.picture = f"pictures/{result.scheduler.replace('/', '--')}-{result.nfe}.png"
            Image.fromarray(strip(result.pictures)).save(folder / result.picture)
        end = {"end": config.reference_end} if config.reference_end else {}
        record = {
            "settings": asdict(config),
            "reference": {"steps": config.reference_steps, "mse_against_half_the_steps": self.uncertainty, **end},
            "versions": VERSIONS,
            "results": [result.plain() for result in self.results],
        }
        write_text(folder / "comparison.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        comparison_picture(self.results, config, self.converged, folder / "comparison.png")
        error_curves(self.results, folder / "error.png")

    def __repr__(self) -> str:
        return self.table

    def _repr_html_(self) -> str:
        return as_html(self.table, self.picture())


def compare(config: CompareConfig) -> None:
    """Run the comparison; print the tables, write comparison.json, comparison.png, error.png and pictures/.

    Raises:
        ValueError: a setting, the model or a solver is at fault; one line, and nothing is written.
        KeyboardInterrupt: Ctrl-C, with a line that says how to go on.
    """
    folder = config.output_dir
    with launched(lambda: f"the same command goes on from what {folder} holds", LONG_WAIT) as accelerator:
        found = carried_out(Comparison(config, accelerator))
        if accelerator.is_main_process:
            print(found.details)
            print(found.table)
            found.save(folder)
            print(f"written to {folder}: comparison.json, comparison.png, error.png, pictures/")


def carried_out(comparison: Comparison) -> Compared:
    """What a comparison finds, after a clean-up of its folder."""
    if comparison.cache.is_dir():
        remove_partial_files(comparison.cache)
    return comparison.run()


def _mse(a: Tensor, b: Tensor, peak: float = 1.0) -> Tensor:
    """(n,) mean squared difference of each sample, float64, of values up to `peak`."""
    return torch.stack([(x.double() - y.double()).div(peak).square().mean() for x, y in zip(a, b, strict=True)])
