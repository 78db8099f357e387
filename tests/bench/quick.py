"""The default search beside the thorough one and the best of diffusers: evaluations and errors by model and step count.

    python -m tests.bench.quick [--output runs/bench-quick] [--models clothes-flow ..] [--seeds 0 1 2] [--efforts quick]
        [--pictures cifar10-test.parquet] [--set trials=1 --name one_trial]

Searches 5, 6, 8 and 10 calls and fills 3 to 20; then tries every table on test samples that no search has seen, against
100 warped teacher steps of order 3. The prior lacks what was found on the model that is measured. Kernel densities are
of the pictures of a parquet file, or of synthetic ones where none is given. What was run is kept under --output, so
that a killed benchmark goes on. `--set` changes settings of the search, for an ablation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from diffusers_dssolver import DSSolverScheduler
from dssolver_search.measure.lineup import Lineup
from dssolver_search.methods import prior
from dssolver_search.methods.search import search
from dssolver_search.pipeline.student import Student
from dssolver_search.settings import CompareConfig, SearchConfig
from dssolver_search.teacher.trajectories import Teacher, taught
from tests.kernel_density import from_parquet, pipeline_of, synthetic

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("clothes-flow", "clothes-vp", "density-flow", "density-vp")
NFES, FILLED, GUIDANCE, FEW, BATCH = (5, 6, 8, 10), range(3, 21), 1.5, 64, 32
Errors = dict[str, float]  # mean and 95th percentile of final-state mse over test samples


class Model:
    """A model, its test samples and their converged final states."""

    def __init__(self, name: str, folder: Path, samples: int, pictures: str | None) -> None:
        self.name, (data, self.kind), self.samples = name, name.split("-"), samples
        self.path = ROOT / "search" / "demo" / self.kind if data == "clothes" else folder / "models" / name
        if not self.path.exists():
            made = from_parquet(pictures) if pictures else synthetic(300, 8)
            pipeline_of(made, self.kind, classes=10).save_pretrained(self.path)
        config = CompareConfig(
            pretrained_model_name_or_path=str(self.path), output_dir=str(folder), guidance_scale=GUIDANCE
        )
        self.lineup = Lineup(config, "test", Accelerator())
        self.batches = [range(k, min(k + BATCH, samples)) for k in range(0, samples, BATCH)]
        file, student = folder / f"test-{name}-{samples}.pt", Student(self.lineup.sampler)
        if not file.exists():
            made = [taught(student, Teacher(100, 3, warped=True), batch, "test")[0][-1] for batch in self.batches]
            torch.save(torch.cat(made), file)
        self.wanted = torch.load(file, weights_only=True)

    def errors(self, scheduler: Any, steps: int, samples: int) -> Errors:
        parts = [self.lineup.sample(scheduler, steps, b).final for b in self.batches if b[0] < samples]
        found = (torch.cat(parts) - self.wanted[: sum(map(len, parts))]).square().flatten(1).mean(1)
        found = found.nan_to_num(torch.inf, torch.inf)
        return {"mean": found.mean().item(), "tail": found.quantile(0.95).item()}

    def stock(self, nfe: int) -> dict[str, Any]:
        """The best of diffusers' own: chosen on `FEW` samples by their mean, measured on all."""
        runs = {f"{r.name} ({r.spacing})": r for r in self.lineup.runs(nfe)}
        few = {name: self.errors(r.scheduler, r.steps, FEW)["mean"] for name, r in runs.items()}
        best = min(few, key=lambda name: few[name])
        return {"scheduler": best, **self.errors(runs[best].scheduler, runs[best].steps, self.samples)}

    def tables(self, folder: Path) -> dict[str, Errors]:
        """Of a searched artefact, by step count."""
        scheduler = DSSolverScheduler.from_config(self.lineup.model_config, solvers=str(folder))
        return {str(n): self.errors(scheduler, n, self.samples) for n in FILLED if n in scheduler.tables}


def kept(file: Path, make: Any) -> Any:
    if not file.exists():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def run(model: Model, folder: Path, seed: int, effort: str, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One search and its tables' errors."""
    out = folder / f"{model.name}-{seed}-{name}"
    others = {kind: {k: w for k, w in known.items() if k not in model.name} for kind, known in prior.WARPS.items()}
    with mock.patch.object(prior, "WARPS", others):
        where = {"pretrained_model_name_or_path": str(model.path), "output_dir": str(out), "seed": seed}
        search(SearchConfig(**where, nfe=list(NFES), guidance_scale=GUIDANCE, effort=effort, **changes))
    facts = json.loads((out / "scheduler_config.json").read_text())["provenance"]
    stages = {n: result.get("stages", []) for n, result in facts["results"].items()}
    return {"evaluations": facts["network_evaluations"], "stages": stages, "errors": model.tables(out)}


def table(found: dict[str, Any]) -> str:
    """Means over seeds of the mean error and the 95th percentile; the largest ratio of a seed to the best stock."""
    lines = [
        "| model | calls | best of diffusers: mean, 95 % | search | mean, 95 % | / diffusers: both | evaluations |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, record in found.items():
        for nfe, stock in record["stock"].items():
            for name, runs in record["runs"].items():
                here = [r["errors"][nfe] for r in runs]
                mean, tail = (statistics.fmean(e[k] for e in here) for k in ("mean", "tail"))
                worst = [max(e[k] for e in here) / stock[k] for k in ("mean", "tail")]
                spent = statistics.fmean(r["evaluations"] for r in runs) / 1000
                lines.append(
                    f"| {model} | {nfe} | {stock['mean']:.3g}, {stock['tail']:.3g} {stock['scheduler']} | {name} | "
                    f"{mean:.3g}, {tail:.3g} | {worst[0]:.2f}, {worst[1]:.2f} | {spent:.0f} k |"
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-quick"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--efforts", nargs="+", choices=("quick", "full"), default=("quick", "full"))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--pictures", help="parquet file of the kernel densities")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="settings of the search")
    parser.add_argument("--name", help="of a search with other settings")
    given = parser.parse_args(argv)
    given.output.mkdir(parents=True, exist_ok=True)
    changes = {k: json.loads(v) for k, _, v in (word.partition("=") for word in given.set)}
    found: dict[str, Any] = {}
    for name in given.models:
        model = Model(name, given.output, given.samples, given.pictures)
        stock = kept(given.output / f"stock-{name}.json", lambda m=model: {str(n): m.stock(n) for n in NFES})
        found[name] = {"stock": stock, "runs": {}}
        for effort in given.efforts:
            label = given.name or effort
            found[name]["runs"][label] = [
                kept(
                    given.output / f"{name}-{seed}-{label}.json",
                    lambda m=model, s=seed, e=effort, n=label: run(m, given.output, s, e, n, changes),
                )
                for seed in given.seeds
            ]
    print(table(found))


if __name__ == "__main__":
    main()
