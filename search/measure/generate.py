"""Images for `evaluate`, a shard at a time. A shard is one call of the pipeline, kept as one file.

The folder of a file is named after all that its images depend on, so a killed run finds what it made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from ..console import one_line, say, told_end
from ..pipeline.memory import is_out_of_memory
from ..pipeline.model import Model
from ..settings import EvaluateConfig
from ..storage import Kept, kept
from ..teacher.ends import model_itself
from .baselines import Run
from .lineup import Lineup, Solvers, batches

SPLIT = "evaluate"  # neither searches nor comparisons draw this noise
ITSELF = "reference"  # name of the model's own run, in many steps


class Generation:
    """Images of a lineup.

    Args:
        folder: for the shards.
        model, solvers: as a `Lineup` takes them.

    Attributes:
        runs: searched solvers, each stock scheduler in one spacing, and the model itself.
        shards: indices of the images of each shard.

    Raises:
        ValueError: the model, a solver, a scheduler or the comparison is at fault.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        folder: Path,
        accelerator: Accelerator,
        model: Model | None = None,
        solvers: Solvers | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        self.lineup = Lineup(config, SPLIT, accelerator, model=model, solvers=solvers)
        self.sampler, self.talks = self.lineup.sampler, accelerator.is_main_process
        best = best_spacings(config.comparison)
        self.runs = [run for nfe in config.nfe for run in self._chosen(nfe, best)]
        self.runs += self._itself() if config.reference_steps else []
        self.shards = batches(config.num_images, config.batch_size)

    def _chosen(self, nfe: int, best: dict[tuple[str, int], str]) -> Iterator[Run]:
        """The searched solvers, and each stock scheduler in its best spacing, or the first if that is not known."""
        candidates: dict[str, list[Run]] = {}
        for run in self.lineup.runs(nfe):
            candidates.setdefault(run.name, []).append(run)
        for name, runs in candidates.items():
            known = [run for run in runs if run.spacing == best.get((name, nfe))]
            chosen = (known or runs)[0]
            yield chosen
            if self.talks and not chosen.searched:
                why = "the comparison's best" if known else "the first of its spacings"
                say(f"{name} at {nfe} calls: {chosen.spacing}, {why}")

    def _itself(self) -> Iterator[Run]:
        """The model in many steps, once for each end of its last step."""
        steps, configuration = self.config.reference_steps, "DSSolverScheduler, classical"
        for end in dict.fromkeys(self.config.reference_ends):
            name = f"{ITSELF}, from {end:g}" if end else ITSELF
            scheduler = model_itself(self.lineup.model_config, end)
            yield Run(name, steps, "", scheduler, steps, False, configuration + told_end(end))

    def file(self, run: Run, indices: range) -> Path:
        """Of one shard."""
        folder = self.folder / self.lineup.digest(run.facts, self.config.batch_size)[:16]
        return folder / f"{indices[0]:06}-{indices[-1]:06}.safetensors"

    def images(self, run: Run, indices: range) -> tuple[Tensor, dict[str, str]]:
        """One shard, (n, H, W, 3) uint8; of one image the `seconds` and network `calls`."""
        tensors, facts = kept(self.file(run, indices), lambda: self._sampled(run, indices))
        return tensors["images"], facts

    def _sampled(self, run: Run, indices: range) -> Kept:
        try:
            made = self.lineup.sample(run.scheduler, run.steps, indices, **run.call)
        except Exception as error:  # a scheduler of diffusers in a pipeline that is not made for it
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{run.name} ({run.spacing}) fails at {run.nfe} calls: {one_line(error)}") from error
        if len(made.images) != len(indices) or made.images.ndim != 4:
            name, shape = type(self.sampler.pipe).__name__, tuple(made.images.shape)
            raise ValueError(f"{name} gives {shape} for {len(indices)} samples; only one image for each is evaluated")
        return {"images": made.images.expand(-1, -1, -1, 3)}, {"seconds": repr(made.seconds), "calls": repr(made.calls)}

    def prompts(self, indices: Sequence[int]) -> list[str]:
        """Prompts of these images.

        Raises:
            ValueError: the pipeline takes none.
        """
        conditions = self.sampler.conditions(indices)
        if "prompt" not in conditions:
            raise ValueError(f"{type(self.sampler.pipe).__name__} takes no prompts; leave out clip")
        return conditions["prompt"]


def best_spacings(folder: str | None) -> dict[tuple[str, int], str]:
    """Best spacing by scheduler and NFE, from the comparison.json in a folder; empty without a folder.

    Raises:
        ValueError: the file cannot be read.
    """
    if folder is None:
        return {}
    file = Path(folder) / "comparison.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        return {(r["scheduler"], r["nfe"]): r["spacing"] for r in results}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"comparison {str(file)!r} cannot be read: {one_line(error)}") from error
