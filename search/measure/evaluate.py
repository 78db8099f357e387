"""The `evaluate` command: how far images of searched and stock schedulers are from real ones, and what they cost.

Every process samples its share of the shards (`generate`) and keeps their features beside them; the main process
computes the metrics (`images.metrics`) from all files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..console import metric_name
from ..images.features import Clip, load_extractor
from ..images.metrics import bound, with_intervals
from ..images.real_images import Opener, Statistics, open_real_images
from ..pipeline.model import Model
from ..processes import launched
from ..settings import EvaluateConfig
from ..storage import Kept, read_tensors, remove_partial_files, write_text
from .baselines import Run
from .generate import Generation
from .lineup import LONG_WAIT, VERSIONS, Solvers, Task, share
from .results import aligned

SHARDS, STATISTICS, RESULTS = "shards", "reference.safetensors", "evaluation.json"


class Evaluation:
    """One run of the command, the same in every process; the main one computes the metrics.

    Everything is loaded and checked first; nothing is written if anything is at fault.

    Args:
        model, solvers: as a `Lineup` takes them.

    Raises:
        ValueError: a setting, the model, a solver, a network or the real images are at fault.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        accelerator: Accelerator | None = None,
        model: Model | None = None,
        solvers: Solvers | None = None,
    ) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.accelerator = accelerator or Accelerator()
        self.main, device = self.accelerator.is_main_process, self.accelerator.device
        with self.accelerator.local_main_process_first():  # it downloads what is absent
            self.extractor = load_extractor(config.extractor, device, self.main)
        self.clip = Clip(config.clip, device) if config.clip else None
        self._check_count(config.num_images, "num_images")
        self.real = open_real_images(config, self.extractor)
        if isinstance(self.real, Statistics) and self.real.n is not None:
            self._check_count(self.real.n, "the number of reference images")
        self.generation = Generation(config, self.folder / SHARDS, self.accelerator, model, solvers)
        if self.clip:
            self.generation.prompts([0])

    def _check_count(self, count: int, what: str) -> None:
        size, name = self.extractor.dimension, self.extractor.name
        if count < size and not self.config.allow_few_images:
            raise ValueError(
                f"{what} is {count}, fewer than the {size} features of {name}, which biases the distance; give more, "
                "or --allow_few_images"
            )

    def __call__(self) -> dict[str, Any]:
        """The whole run: the record, in the main process; in others it is empty.

        Raises:
            ValueError: a real image or a scheduler is at fault; one line.
        """
        for folder in (self.folder / SHARDS).glob("*/") if self.main else ():
            remove_partial_files(folder)
        real = share(self.accelerator, self._real_tasks(), "real images")
        made = share(self.accelerator, list(self._made_tasks()), "images")
        self.accelerator.wait_for_everyone()
        return self._written(real, made) if self.main else {}

    # --- features: by every process ----------------------------------------------------------------------------------

    def _real_tasks(self) -> Iterator[Task]:
        """Features of the real images, a batch each; none if their statistics are given."""
        if isinstance(self.real, Statistics):
            return
        folder, count = self.folder / SHARDS / self.real.key, 0
        for batch in self.real.batches(self.config.batch_size):
            name = f"{count:06}-{count + len(batch) - 1:06}.{self.extractor.sha256[:8]}.safetensors"
            yield folder / name, partial(self._real_features, batch)
            count += len(batch)
        self._check_count(count, "the number of reference images")

    def _real_features(self, batch: Sequence[Opener]) -> Kept:
        return self.extractor([opened() for opened in batch]), {}

    def _made_tasks(self) -> Iterator[Task]:
        """Features of all shards, run by run."""
        networks = [self.extractor, *([self.clip] if self.clip else [])]
        suffix = f".{'-'.join(network.sha256[:8] for network in networks)}.safetensors"
        for run in self.generation.runs:
            for indices in self.generation.shards:
                file = self.generation.file(run, indices).with_suffix(suffix)
                yield file, partial(self._features, run, indices)

    def _features(self, run: Run, indices: range) -> Kept:
        """What the networks say of one shard."""
        shard, facts = self.generation.images(run, indices)
        images = list(shard.numpy())
        found = self.extractor(images)
        if self.clip:
            found["clip"] = self.clip.scores(images, self.generation.prompts(indices))
        return found, facts

    # --- metrics: by the main process --------------------------------------------------------------------------------

    def _written(self, real: Sequence[Path], made: Sequence[Path]) -> dict[str, Any]:
        statistics, config, count = self._statistics(real), self.config, len(self.generation.shards)
        metrics = bound(statistics, config.num_images)
        results = []
        for k, run in enumerate(tqdm(self.generation.runs, "metrics", unit="run")):
            tensors, facts = gathered(made[k * count : (k + 1) * count])
            found: dict[str, Any] = {}
            for name, rows, values in metrics:
                if name in tensors:
                    found |= with_intervals(values, tensors[name][:rows], config.subsets, config.seed)
            results.append({
                "scheduler": run.name, "nfe": run.nfe, "spacing": run.spacing or None, "calls": round(facts["calls"]),
                "n": len(tensors["features"]), "seconds_per_image": facts["seconds"], "metrics": found,
            })  # fmt: skip
        clean_fid = {"clean-fid": version("clean-fid")} if self.extractor.name == "inception" else {}
        record = {
            "settings": asdict(config),
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "data": {"name": statistics.name, "n": statistics.n},
            "versions": VERSIONS | clean_fid,
            "results": results,
        }
        if self.clip:
            record |= {"clip": self.clip.name, "clip_sha256": self.clip.sha256}
        write_text(self.folder / RESULTS, json.dumps(record, indent=1, allow_nan=False) + "\n")
        return record

    def _statistics(self, files: Sequence[Path]) -> Statistics:
        """Of the real images; written, unless they were given."""
        if isinstance(self.real, Statistics):
            return self.real
        found = Statistics.of(gathered(files)[0]["features"], self.real.name)
        found.write(self.folder / STATISTICS, self.extractor)
        return found


def evaluate(config: EvaluateConfig) -> None:
    """The command.

    Raises:
        ValueError: a setting, the model, a solver, a network or an image is at fault; one line.
        KeyboardInterrupt: Ctrl-C, with a line that says how to go on.
    """
    message = f"the same command goes on from what {config.output_dir} holds"
    with launched(lambda: message, LONG_WAIT) as accelerator:
        evaluation = Evaluation(config, accelerator)
        if record := evaluation():
            print(table(record))
            also = "" if isinstance(evaluation.real, Statistics) else f", {STATISTICS}"
            print(f"written to {config.output_dir}: {RESULTS}{also}")


def gathered(files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of these files, concatenated, and the mean of each of their facts over images."""
    parts = [read_tensors(file) for file in files]
    tensors = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    n = len(tensors["features"])
    facts = {name: sum(float(facts[name]) * len(part["features"]) for part, facts in parts) / n for name in parts[0][1]}
    return tensors, facts


def table(record: dict[str, Any]) -> str:
    """A block per metric, schedulers by rows and NFE by columns, with half of the 95 % interval; the last block is the
    seconds per image.

    Args:
        record: of an evaluation.json.
    """
    results, data = record["results"], record["data"]
    counts = list(dict.fromkeys(r["nfe"] for r in results))
    lines = [
        "",
        f"{results[0]['n']} images of each, against {data['n'] or 'an unknown number'} of {data['name']}; features of "
        f"{record['extractor']}; +- half of the 95 % interval",
    ]
    metrics = list(dict.fromkeys(name for r in results for name in r["metrics"]))
    blocks: dict[str, Callable[[dict[str, Any]], str]] = {
        metric_name(name, record["clip"] if name == "clip_score" else record["extractor"]): partial(_value, name)
        for name in metrics
    }
    blocks["seconds for an image"] = lambda r: f"{r['seconds_per_image']:.3g}"
    for title, cell in blocks.items():
        cells = {(r["scheduler"], r["nfe"]): cell(r) for r in results}
        rows = [["", *(f"NFE {nfe}" for nfe in counts)]]
        for name in dict.fromkeys(r["scheduler"] for r in results):
            rows.append([name, *(cells.get((name, nfe), "-") for nfe in counts)])
        lines += ["", title, "", *aligned(rows, 1)]
    return "\n".join(lines)


def _value(name: str, result: dict[str, Any]) -> str:
    entry = result["metrics"][name]
    if "interval" not in entry:
        return f"{entry['value']:.4g}"
    low, high = entry["interval"]
    return f"{entry['value']:.4g} +- {(high - low) / 2:.2g}"
