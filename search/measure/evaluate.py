"""The `evaluate` command: how far the images of searched and stock schedulers are from real ones, and what they cost.

Every process samples the shards of its share (`generate`) and keeps their features beside them; the main one computes
the figures from the files of all. Nothing here knows what a scheduler does or how it was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from tqdm.auto import tqdm

from ..console import metric_name
from ..images.features import Clip, load_extractor
from ..images.metrics import (
    FrechetDistance,
    KernelDistance,
    Metric,
    PrecisionRecall,
    clip_score,
    inception_score,
    with_intervals,
)
from ..images.real_images import Opener, Statistics, open_reference
from ..settings import EvaluateConfig
from ..storage import Kept, kept, read_tensors, remove_partial_files, write_text
from .baselines import Run
from .generate import Generation
from .results import aligned

SHARDS, STATISTICS, RESULTS = "shards", "reference.safetensors", "evaluation.json"
LONGEST_WAIT = timedelta(days=1)  # of a process for the slowest one; the usual limit is minutes


class Evaluation:
    """One run of the command, in every process alike; the figures are the main one's."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
        self.main = self.accelerator.is_main_process
        try:
            self._open()
        except ValueError:
            self.accelerator.end_training()  # every process raises it
            raise

    def _open(self) -> None:
        """Load and check everything; nothing is written if anything is at fault."""
        config, device = self.config, self.accelerator.device
        with self.accelerator.local_main_process_first():  # it fetches what is absent
            self.extractor = load_extractor(config.extractor, device, self.main)
        self.clip = Clip(config.clip, device) if config.clip else None
        self._check_count(config.num_images, "num_images")
        self.reference = open_reference(config, self.extractor)
        if isinstance(self.reference, Statistics) and self.reference.n is not None:
            self._check_count(self.reference.n, "the number of reference images")
        self.generation = Generation(config, self.folder / SHARDS, self.main)
        if self.clip:
            self.generation.prompts([0])

    def _check_count(self, count: int, what: str) -> None:
        size, name = self.extractor.dimension, self.extractor.name
        if count < size and not self.config.allow_few_images:
            raise ValueError(
                f"{what} is {count}, fewer than the {size} features of {name}, which biases the distance; give more, "
                "or --allow_few_images"
            )

    def __call__(self) -> None:
        """The whole run.

        Raises:
            ValueError: a reference image or a scheduler is at fault; one line.
            KeyboardInterrupt: Ctrl-C, with a line that says how to go on.
        """
        try:
            for folder in (self.folder / SHARDS).glob("*/") if self.main else ():
                remove_partial_files(folder)
            real, made = self._real_files(), self._made_files()
            self.accelerator.wait_for_everyone()
            if self.main:
                self._conclude(real, made)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same command goes on from what {self.folder} holds") from None
        self.accelerator.end_training()

    # --- features: by every process ----------------------------------------------------------------------------------

    def _real_files(self) -> list[Path]:
        """Files with the features of the real images, this process's share of them made; none if they are known."""
        if isinstance(self.reference, Statistics):
            return []
        folder, files, count = self.folder / SHARDS / self.reference.key, [], 0
        batches = tqdm(self.reference.batches(self.config.batch_size), "real images", disable=not self.main)
        for number, batch in enumerate(batches):
            file = folder / f"{count:06}-{count + len(batch) - 1:06}.{self.extractor.sha256[:8]}.safetensors"
            if self._is_mine(number):
                kept(file, partial(self._real_described, batch))
            files.append(file)
            count += len(batch)
        self._check_count(count, "the number of reference images")
        return files

    def _real_described(self, batch: Sequence[Opener]) -> Kept:
        return self.extractor([opened() for opened in batch]), {}

    def _made_files(self) -> list[list[Path]]:
        """By run, the files with the features of its images, this process's share of them made."""
        networks = [self.extractor.sha256, *([self.clip.sha256] if self.clip else [])]
        suffix = f".{'-'.join(sha256[:8] for sha256 in networks)}.safetensors"
        shards = self.generation.shards
        tasks = [
            (self.generation.file(run, indices).with_suffix(suffix), run, indices)
            for run in self.generation.runs
            for indices in shards
        ]
        for number, (file, run, indices) in enumerate(tqdm(tasks, "images", unit="shard", disable=not self.main)):
            if self._is_mine(number):
                kept(file, partial(self._described, run, indices))
        files = [file for file, _, _ in tasks]
        return [files[first : first + len(shards)] for first in range(0, len(files), len(shards))]

    def _is_mine(self, number: int) -> bool:
        return number % self.accelerator.num_processes == self.accelerator.process_index

    def _described(self, run: Run, indices: range) -> Kept:
        """What is known of the images of one shard."""
        shard, facts = self.generation.images(run, indices)
        images = list(shard.numpy())
        found = self.extractor(images)
        if self.clip:
            found["clip"] = self.clip.scores(images, self.generation.prompts(indices))
        return found, facts

    # --- figures: by the main process --------------------------------------------------------------------------------

    def _conclude(self, real: Sequence[Path], made: Sequence[Sequence[Path]]) -> None:
        reference = self._statistics(real)
        metrics = self._metrics(reference)
        results = []
        for run, files in zip(self.generation.runs, tqdm(made, "figures", unit="run"), strict=True):
            tensors, facts = gathered(files)
            figures: dict[str, Any] = {}
            for name, count, metric in metrics:
                if name in tensors:
                    figures |= with_intervals(metric, tensors[name][:count], self.config.subsets, self.config.seed)
            results.append(
                {
                    "scheduler": run.name,
                    "nfe": run.nfe,
                    "spacing": run.spacing or None,
                    "calls": round(facts["calls"]),
                    "n": len(tensors["features"]),
                    "seconds_per_image": facts["seconds"],
                    "metrics": figures,
                }
            )
        packages = ["diffusers", "torch", *(["clean-fid"] if self.extractor.name == "inception" else [])]
        record = {
            "settings": asdict(self.config),
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "data": {"name": reference.name, "n": reference.n},
            "versions": {name: version(name) for name in packages},
            "results": results,
        }
        if self.clip:
            record |= {"clip": self.clip.name, "clip_sha256": self.clip.sha256}
        write_text(self.folder / RESULTS, json.dumps(record, indent=1, allow_nan=False) + "\n")
        print(table(record))
        print(f"written to {self.folder}: {RESULTS}" + (f", {STATISTICS}" if real else ""))

    def _statistics(self, files: Sequence[Path]) -> Statistics:
        if isinstance(self.reference, Statistics):
            return self.reference
        found = Statistics.of(gathered(files)[0]["features"], self.reference.name)
        found.write(self.folder / STATISTICS, self.extractor)
        return found

    def _metrics(self, reference: Statistics) -> list[tuple[str, int | None, Metric]]:
        """What is computed, from which tensor and how many of its images."""
        metrics: list[tuple[str, int | None, Metric]] = [
            ("features", None, FrechetDistance(reference.mean, reference.covariance)),
            ("logits", None, inception_score),
            ("clip", None, clip_score),
        ]
        if reference.features is not None:
            # as many of both, since more images make a finer manifold
            real = reference.features[: self.config.num_images]
            metrics += [("features", len(real), metric) for metric in (KernelDistance(real), PrecisionRecall(real))]
        return metrics


def evaluate(config: EvaluateConfig) -> None:
    """The command."""
    Evaluation(config)()


def gathered(files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of these files, one after the other, and the mean of each of their facts over images."""
    parts = [read_tensors(file) for file in files]
    tensors = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    n = len(tensors["features"])
    shares = [len(part["features"]) / n for part, _ in parts]
    means = {
        name: sum(float(facts[name]) * share for (_, facts), share in zip(parts, shares, strict=True))
        for name in parts[0][1]
    }
    return tensors, means


def table(record: dict[str, Any]) -> str:
    """A block for each figure, schedulers by rows and NFE by columns, with the half width of its interval; the last
    one is the seconds for an image."""
    results, data = record["results"], record["data"]
    counts = list(dict.fromkeys(r["nfe"] for r in results))
    lines = [
        "",
        f"{results[0]['n']} images of each, against {data['n'] or 'an unknown number'} of {data['name']}; features of "
        f"{record['extractor']}; +- half of the 95 % interval",
    ]
    metrics = list(dict.fromkeys(name for r in results for name in r["metrics"]))
    blocks: dict[str, Callable[[dict[str, Any]], str]] = {
        metric_name(name, record["clip"] if name == "clip_score" else record["extractor"]): partial(_figure, name)
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


def _figure(name: str, result: dict[str, Any]) -> str:
    entry = result["metrics"][name]
    if "interval" not in entry:
        return f"{entry['value']:.4g}"
    low, high = entry["interval"]
    return f"{entry['value']:.4g} +- {(high - low) / 2:.2g}"
