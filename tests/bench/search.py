"""`make bench-search`: what a search costs and brings, beside the paper's recipe and diffusers' own schedulers.

On the embedded models, for each seed: `closed_form` with effort full (the default one is in `tests.bench.quick`), going
on by `--method gradient` for the first --gradient-seeds, and `--method paper` for the first --paper-seeds (Algorithm 1
and 2, fewer samples than the paper's). Whenever a run improves on itself its solver is tried on test samples that no
search has seen; that is not counted in its network evaluations, the teacher is. Every finished run is kept under
--output, so that a killed benchmark goes on. Prints tables, draws curves.png, writes bench_search.json. `--ablation`
measures what each choice of the thorough search brings, `--memory` the peak memory of a polish and of a gradient at
several step counts, `--precision` what bfloat16 costs; `--update` puts the tables into their documents and what they
are made of into search/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.solver import SolverSpec
from dssolver_search.measure.compare import Comparison
from dssolver_search.measure.pictures import COLOURS
from dssolver_search.methods import closed_form, paper
from dssolver_search.methods import search as run_module
from dssolver_search.methods.fill import solver_of
from dssolver_search.methods.gauss_newton import Polish, parametrised, polish
from dssolver_search.methods.gradient import Descent
from dssolver_search.methods.log import Log
from dssolver_search.methods.objective import OBJECTIVES
from dssolver_search.methods.problem import Candidate, Problem, Samples
from dssolver_search.methods.setup import Setup
from dssolver_search.pipeline.loading import load_pipeline
from dssolver_search.pipeline.plan import Plan
from dssolver_search.pipeline.sampler import Sampler
from dssolver_search.pipeline.student import Student
from dssolver_search.settings import CompareConfig, SearchConfig
from dssolver_search.teacher.ends import even_nodes
from dssolver_search.teacher.trajectories import Teacher, TeacherTrajectory, teacher_trajectory
from tests import documents
from tests.allocations import Allocations

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "search" / "results"
FAMILIES, NFES, SEEDS = ("flow", "vp"), (5, 6, 8, 10), (0, 1, 2)
METHODS = ("paper", "closed_form", "gradient")
GUIDANCE, TEST_SAMPLES, REFERENCE_STEPS = 1.5, 64, 400
PAPER = {"num_generated_samples": 512, "train_batch_size": 4, "validation_steps": 16}  # the paper: 50 000
PAPER_SAMPLES = 50_000
BETTER = 0.95  # of the training error: an improvement that is worth a look at the test samples
SETTINGS: dict[str, dict[str, Any]] = {
    "one start": {},
    "two starts": {"starts": 2},
    "four starts": {"starts": 4},
    "no polish": {"polish": 0},
    "polish 1": {"polish": 1},
    "polish 4": {"polish": 4},
    "nodes: uniform in t": {"trials": 1},
    "nodes: uniform in log-SNR": {"trials": 1, "start": "log-SNR"},
    "nodes: Karras": {"trials": 1, "start": "karras"},
    "nodes: quadratic": {"trials": 1, "start": "quadratic"},
    "nodes: cosine": {"trials": 1, "start": "cosine"},
    "15 trials": {"trials": 15},
    "100 trials": {"trials": 100},
    "polish without times t'": {"search_over": ["nodes", "coefficients"]},
    "polish without nodes": {"search_over": ["coefficients", "times"]},
    "polish of coefficients alone": {"search_over": ["coefficients"]},
    "16 samples": {"num_train_samples": 16, "num_trial_samples": 16},
    "32 samples": {"num_train_samples": 32},
    "128 samples": {"num_train_samples": 128},
    "teacher: Euler, 100 steps": {"teacher_steps": 100, "teacher_order": 1},
    "teacher: order 3, 50 steps": {"teacher_steps": 50},
    "gradient, 20 calls of L-BFGS": {"method": "gradient"},
    "the same, mixed objective": {"method": "gradient", "objective": "mixed"},
    "gradient without polish": {"method": "gradient", "polish": 0},
}
ABLATED = (("flow", 5), ("vp", 5))


class Test:
    """Samples that no search sees, through the scheduler that a user would load."""

    __test__ = False

    def __init__(self, family: str, folder: Path) -> None:
        self.config = CompareConfig(
            pretrained_model_name_or_path=str(model(family)), output_dir=str(folder), nfe=list(NFES),
            guidance_scale=GUIDANCE, num_samples=TEST_SAMPLES, reference_steps=REFERENCE_STEPS,
        )  # fmt: skip
        self.comparison, self.file = Comparison(self.config), folder / f"test-{family}.pt"
        if self.file.exists():
            stored = torch.load(self.file, weights_only=True)
        else:
            final, _, uncertainty = self.comparison.converged()
            stored = {"final": final, "uncertainty": uncertainty}
            torch.save(stored, self.file)
        self.wanted, self.uncertainty = stored["final"], stored["uncertainty"]

    def error(self, scheduler: Any, steps: int) -> float:
        mse = (self.comparison.sample(scheduler, steps).final - self.wanted).square().mean().item()
        return mse if math.isfinite(mse) else math.inf

    def of(self, spec: SolverSpec) -> float:
        """Final-state mse of one solver."""
        config = self.comparison.lineup.model_config
        return self.error(DSSolverScheduler.from_config(config, solvers={str(spec.nfe): spec.to_dict()}), spec.nfe)

    def stock(self, nfe: int) -> dict[str, Any]:
        """The best of diffusers' own, each in every spacing it offers."""
        runs = self.comparison.lineup.runs(nfe)
        tried = [(self.error(run.scheduler, run.steps), f"{run.name} ({run.spacing})") for run in runs]
        return dict(zip(("mse", "scheduler"), min(tried), strict=True))


class Watched:
    """Follows a search's progress on the test samples."""

    def __init__(self, test: Test) -> None:
        self.test, self.points = test, []

    def __call__(self, config: SearchConfig) -> None:
        """The search, watched."""
        methods = {name: self._followed(method) for name, method in run_module.METHODS.items()}
        with mock.patch.object(run_module, "METHODS", methods):
            run_module.search(config)

    def _followed(self, method: run_module.Method) -> run_module.Method:
        def run(problem: Problem, nfe: int, config: SearchConfig, log: Log) -> Any:
            trial, stage = log.trial, log.stage

            def tried(candidate: Candidate) -> None:
                trial(candidate)
                if candidate.train_mse < BETTER * self.reached:
                    self.reached = candidate.train_mse
                    self._point(log, "closed_form", candidate.spec)

            def ended(name: str, candidate: Candidate, **figures: float) -> None:
                stage(name, candidate, **figures)
                self._point(log, name, candidate.spec)

            self._begin(log)
            with mock.patch.multiple(log, trial=tried, stage=ended):
                if config.method != "paper":
                    return method(problem, nfe, config, log)
                with mock.patch.object(problem, "score", self._scored(problem, log)):
                    found = method(problem, nfe, config, log)
            self._point(log, "paper", SolverSpec.from_dict(solver_of(found)))
            return found

        return run

    def _scored(self, problem: Problem, log: Log) -> Callable[[Plan], float]:
        score = problem.score

        def followed(plan: Plan) -> float:
            error = score(plan)
            if plan.rows is not None and error < self.reached:
                self.reached = error
                self._point(log, "paper", problem.student.spec(plan))
            return error

        return followed

    def _begin(self, log: Log) -> None:
        """Of one NFE: what was spent on the others is not its own; the teacher is everybody's."""
        if not self.points:
            self.by_teacher = log.evaluations()
        self.spent_before, self.reached = log.evaluations() - self.by_teacher, math.inf
        self.began, self.testing = time.perf_counter(), 0.0

    def _point(self, log: Log, stage: str, spec: SolverSpec) -> None:
        point = {
            "nfe": spec.nfe,
            "stage": stage,
            "network_evaluations": log.evaluations() - self.spent_before,
        }
        seconds = time.perf_counter() - self.began - self.testing
        self.points.append({**point, "test_mse": self.test.of(spec), "seconds": seconds})
        self.testing = time.perf_counter() - self.began - seconds


def model(family: str) -> Path:
    return ROOT / "search" / "demo" / family


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What an earlier benchmark found, or else what is made now."""
    if not file.exists():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def searched(family: str, test: Test, folder: Path, nfes: Sequence[int], **settings: Any) -> dict[str, Any]:
    """One run of the search, or what is left of it from an earlier benchmark."""
    result = folder.with_suffix(".json")
    if result.exists():
        return json.loads(result.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    shared = folder.parent / f"cache-{family}"
    shared.mkdir(parents=True, exist_ok=True)
    shutil.copytree(shared, folder / "cache", copy_function=os.link)
    config = SearchConfig(
        pretrained_model_name_or_path=str(model(family)), output_dir=str(folder), nfe=list(nfes), fill_nfe=[],
        guidance_scale=GUIDANCE, effort="full", **settings,
    )  # fmt: skip
    began = time.perf_counter()
    search = Watched(test)
    search(config)
    record = {
        "family": family, "settings": settings, "points": search.points, "teacher": search.by_teacher,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    shutil.copytree(folder / "cache", shared, copy_function=_link_if_new, dirs_exist_ok=True)
    shutil.rmtree(folder)
    result.write_text(json.dumps(record))
    return record


def before_gradient(run: dict[str, Any]) -> dict[str, Any]:
    """The `closed_form` that a `gradient` run begins with, the same to the bit."""
    points = [p for p in run["points"] if p["stage"] != "gradient"]
    return {**run, "method": "closed_form", "points": points}


def _link_if_new(source: str, target: str) -> None:
    if not Path(target).exists():
        os.link(source, target)


class EulerMemo:
    """Makes the paper's teacher trajectories of the same samples once; counts them for every NFE as if made anew."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}
        self.real = paper.teacher_trajectory

    def __call__(self, student: Student, teacher: Teacher, indices: Any, *rest: Any, **more: Any) -> TeacherTrajectory:
        sampler = student.sampler
        key = (sampler.seed, type(student.path), tuple(indices), teacher)
        if key not in self.kept:
            with sampler.uncounted():
                made = self.real(student, teacher, indices, *rest, **more)
                self.kept[key] = made, sampler.network_evaluations
        made, cost = self.kept[key]
        sampler.network_evaluations += cost
        return made


def nodes_of(start: str, family: str, nfe: int) -> torch.Tensor:
    """Nodes of a known family, (nfe + 1,) from 1 to 0, at resolution shift 1."""
    u = torch.linspace(1, 0, nfe + 1, dtype=torch.float64)
    path = DSSolverScheduler.from_config(load_config(family), solvers="classical").path
    if start == "quadratic":
        return u**2
    if start == "cosine":
        return torch.sin(math.pi / 4 * u).square() * 2
    fine = torch.linspace(0.999, 1e-3, 4000, dtype=torch.float64)
    at = path.lambdas(fine)
    if start == "karras":  # sigma^(1/7) in even steps, sigma = exp(-lambda)
        at = -torch.exp(-at / 7)
    even = torch.linspace(float(at[0]), float(at[-1]), nfe + 1, dtype=torch.float64)
    right = torch.searchsorted(at, even).clamp(1, len(at) - 1)
    share = (even - at[right - 1]) / (at[right] - at[right - 1])
    nodes = torch.lerp(fine[right - 1], fine[right], share)
    nodes[0], nodes[-1] = 1.0, 0.0
    return nodes


def load_config(family: str) -> dict[str, Any]:
    return json.loads((model(family) / "scheduler" / "scheduler_config.json").read_text())


def with_nodes(start: str, family: str) -> Any:
    """The closed form with one trial, on these nodes."""
    return mock.patch.object(closed_form, "warped_nodes", lambda warp, nfe: nodes_of(start, family, nfe))


# --- tables and curves ------------------------------------------------------------------------------------------------


def summary(runs: Sequence[dict[str, Any]], stock: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per family and NFE; medians over the seeds of each method."""
    rows = []
    for family in FAMILIES:
        mine = {m: [r for r in runs if (r["family"], r["method"]) == (family, m)] for m in METHODS}
        for nfe in NFES if mine["paper"] and mine["closed_form"] else ():
            row: dict[str, Any] = {"family": family, "nfe": nfe, **stock[family][str(nfe)]}
            paper, ours, descended = ends = [[_points(r, nfe) for r in mine[m]] for m in METHODS]
            row["paper"] = [p[-1]["test_mse"] for p in paper]
            row["closed_form"] = [p[-1]["test_mse"] for p in ours]
            row["gradient"] = [p[-1]["test_mse"] for p in descended]
            row["paper evaluations"] = _median(p[-1]["network_evaluations"] for p in paper)
            teacher = _median(r["teacher"] for r in mine["paper"])
            more = (row["paper evaluations"] - teacher) * PAPER_SAMPLES / PAPER["num_generated_samples"]
            row["paper evaluations, 50 000 samples"] = teacher + more
            row["closed_form evaluations"] = _median(p[-1]["network_evaluations"] for p in ours)
            if descended:
                row["gradient evaluations"] = _median(p[-1]["network_evaluations"] for p in descended)
            end = _median(row["paper"])
            as_good = [
                min((q["network_evaluations"] for q in p if q["test_mse"] <= end), default=math.inf) for p in ours
            ]
            row["evaluations until as good as paper"] = _median(as_good)
            row["seconds"] = {
                m: _median(p[-1]["seconds"] for p in points) for m, points in zip(METHODS, ends, strict=True) if points
            }
            rows.append(row)
    return rows


def _points(run: dict[str, Any], nfe: int) -> list[dict[str, Any]]:
    return [p for p in run["points"] if p["nfe"] == nfe]


def _median(values: Any) -> float:
    return statistics.median(values)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | NFE | best stock | `paper` | `closed_form` | `gradient` | closed_form / paper | / stock | "
        "evaluations: `paper` (50 000 samples) | `closed_form` | `gradient` | ours until as good as `paper` | of the "
        "recipe's |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        best = _median(r["closed_form"])
        until = r["evaluations until as good as paper"]
        lines.append(
            f"| {r['family']} | {r['nfe']} | {r['mse']:.3g} {r['scheduler']} | {_spread(r['paper'])} | "
            f"{_spread(r['closed_form'])} | {_spread(r['gradient'])} | {best / _median(r['paper']):.2f} | "
            f"{best / r['mse']:.2f} | {_thousands(r['paper evaluations'])} "
            f"({r['paper evaluations, 50 000 samples'] / 1e6:.1f} M) | {_thousands(r['closed_form evaluations'])} | "
            f"{_thousands(r.get('gradient evaluations'))} | {_thousands(until)} | "
            f"{until / r['paper evaluations, 50 000 samples']:.4f} |"
        )
    for family in FAMILIES:
        mine = [r for r in rows if r["family"] == family]
        if mine:
            ratio = [_median(r["closed_form"]) / r["mse"] for r in mine]
            seconds = {m: sum(r["seconds"][m] for r in mine) for m in METHODS if m in mine[0]["seconds"]}
            spent = ", ".join(f"`{m}` {s / 60:.1f} min" for m, s in seconds.items())
            mean = statistics.geometric_mean(ratio)
            lines += [
                "",
                f"{family}: `closed_form` / best stock, geometric mean {mean:.2f}; search of all four NFE without the "
                f"teacher: {spent}; seeds: " + ", ".join(f"`{m}` {len(mine[0][m])}" for m in METHODS),
            ]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """median (least to most)"""
    if not values:
        return "-"
    return f"{_median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else f"{values[0]:.3g}"


def _thousands(value: float | None) -> str:
    return "-" if value is None else "never" if value == math.inf else f"{value / 1000:.0f} k"


def curves(runs: Sequence[dict[str, Any]], stock: dict[str, Any], file: Path) -> None:
    """Test error against evaluations, one panel per model and NFE, one line per seed."""
    figure = Figure(figsize=(3.6 * len(NFES), 0.6 + 3.1 * len(stock)), dpi=110)
    axes = figure.subplots(len(stock), len(NFES), squeeze=False)
    for row, family in zip(axes, (f for f in FAMILIES if f in stock), strict=True):
        for axis, nfe in zip(row, NFES, strict=True):
            for run in (r for r in runs if r["family"] == family):
                points = _points(run, nfe)
                paper = run["method"] == "paper"
                colour, label = (COLOURS[5], "paper's recipe") if paper else (COLOURS[0], "ours")
                x, y = [p["network_evaluations"] / 1000 for p in points], [p["test_mse"] for p in points]
                axis.plot(x, y, color=colour, linewidth=1.5, label=label)
                for stage, marker in (("polish", "o"), ("gradient", "s")):
                    ends = [(a, b) for a, b, p in zip(x, y, points, strict=True) if p["stage"] == stage]
                    for a, b in ends:
                        axis.plot(a, b, marker, color=colour, markersize=6, label=f"ours, end of {stage}")
            best = stock[family][str(nfe)]
            axis.axhline(best["mse"], color="0.4", linestyle="--", linewidth=1, label="best of diffusers")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axis.set_title(f"{family}, {nfe} calls", fontsize=11)
            axis.grid(True, which="both", alpha=0.2)
            axis.tick_params(labelsize=8, which="both")
            if family == list(stock)[-1]:
                axis.set_xlabel("thousand network evaluations, teacher included", fontsize=8.5)
        row[0].set_ylabel("final-state mse, test samples", fontsize=8.5)
    drawn = {label: line for line, label in zip(*axes[0][0].get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="upper center", ncols=len(drawn), frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_size_inches()[1]))
    figure.savefig(file, facecolor="white")


# --- commands ---------------------------------------------------------------------------------------------------------


def bench(
    folder: Path,
    seeds: Sequence[int],
    families: Sequence[str],
    gradient_seeds: int,
    paper_seeds: int,
    update: bool,
) -> None:
    paper.teacher_trajectory = memo = EulerMemo()
    print(f"paper: {PAPER['num_generated_samples']} generated samples of its {PAPER_SAMPLES}")
    stock: dict[str, Any] = {}
    runs = []
    for seed in seeds:
        for family in families:
            test = Test(family, folder)
            if family not in stock:
                stock[family] = kept(folder / f"stock-{family}.json", lambda: {str(n): test.stock(n) for n in NFES})  # noqa: B023
            ours = "gradient" if seed in seeds[:gradient_seeds] else "closed_form"
            methods: list[tuple[str, dict[str, Any]]] = [(ours, {})]
            methods += [("paper", PAPER)] if seed in seeds[:paper_seeds] else []
            for method, more in methods:
                name = folder / f"{family}-{seed}-{method}"
                found = searched(family, test, name, NFES, method=method, seed=seed, **more)
                found = {**found, "seed": seed, "method": method}
                runs += [before_gradient(found), found] if method == "gradient" else [found]
            memo.kept.clear()
    rows = summary(runs, stock)
    record = {"stock": stock, "rows": rows, "runs": runs, "paper": PAPER, "test_samples": TEST_SAMPLES}
    (folder / "bench_search.json").write_text(json.dumps(record, indent=1) + "\n")
    curves(runs, stock, folder / "curves.png")
    print(table(rows))
    print(f"written to {folder}: bench_search.json, curves.png")
    if update:
        (RESULTS / "bench-search.json").write_text(json.dumps({"paper": PAPER, "rows": rows}, indent=1) + "\n")
        shutil.copyfile(folder / "curves.png", RESULTS / "bench-search.png")
        documents.put("bench", table(rows))


def ablation(folder: Path, seeds: Sequence[int], families: Sequence[str], update: bool, kept_only: bool) -> None:
    """A row per choice, each but for it a search from one start; a column per model and NFE: median test error and
    evaluations. `kept_only`: of what earlier runs measured on all these seeds, nothing is run."""
    measured: dict[str, dict[str, list[float]]] = {}
    columns = [(family, nfe) for family, nfe in ABLATED if family in families]
    tests = {family: Test(family, folder) for family, _ in columns}
    for name, settings in SETTINGS.items():
        for family, nfe in columns:
            found = []
            for seed in seeds:
                result = folder / f"ablation-{family}-{nfe}-{seed}-{name.replace(' ', '_').replace(',', '')}"
                if kept_only and not result.with_suffix(".json").exists():
                    continue
                change = {"starts": 1, **{k: v for k, v in settings.items() if k != "start"}}
                with with_nodes(settings["start"], family) if "start" in settings else nullcontext():
                    run = searched(family, tests[family], result, [nfe], seed=seed, **change)
                found.append(run["points"][-1])
            if len(found) < len(seeds):
                continue
            result = [_median(p[k] for p in found) for k in ("test_mse", "network_evaluations")]
            measured.setdefault(name, {})[f"{family}, {nfe} calls"] = result
            print(name, family, nfe, *result, flush=True)
    print(ablation_table(measured))
    if update:
        (RESULTS / "ablation.json").write_text(json.dumps(measured, indent=1) + "\n")
        documents.put("ablation", ablation_table(measured))


def ablation_table(measured: dict[str, dict[str, list[float]]]) -> str:
    """Test error and evaluations, and in brackets the error over the first row's."""
    first = next(iter(measured.values()))
    columns = list(first)

    def cell(column: str, error: float = math.nan, spent: float = math.nan) -> str:
        return f"{error:.3g} ({error / first[column][0]:.2f}), {_thousands(spent)}" if error == error else "-"

    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in measured.items():
        shown = [cell(column, *cells.get(column, ())) for column in columns]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def memory(family: str = "flow", samples: int = 8) -> None:
    """Peak of the bytes in tensors made by one polish iteration and by one gradient, networks left out."""
    torch.set_num_threads(1)
    print(f"peak bytes in tensors, {samples} guided samples, MiB: of one polish iteration, of one gradient")
    for nfe in (4, 8, 16):
        with tempfile.TemporaryDirectory() as output:
            config = SearchConfig(
                pretrained_model_name_or_path=str(model(family)), output_dir=output, nfe=[nfe], teacher_steps=nfe + 1,
                guidance_scale=GUIDANCE, num_train_samples=samples, num_validation_samples=2, num_trial_samples=2,
            )  # fmt: skip
            setup = Setup(config, Accelerator())
            problem = setup.problem()
            fitted = closed_form.fit(problem, nfe, closed_form.IDENTITY, 1e-4, problem.train)
            found = closed_form.validated(problem, fitted)
            newton = Polish(problem, found, parametrised(problem, found))
            descent = Descent(problem, found, parametrised(problem, found), OBJECTIVES["terminal"])
            peaks = []
            for run in (lambda p=newton: p.steps(torch.zeros(p.count, dtype=torch.float64)), descent.value):
                with Allocations() as used:
                    run()
                peaks.append(used.peak / 2**20)
            latent = problem.train.teacher.states[0].nbytes / 2**20
        print(f"  {nfe:2} calls: " + ", ".join(f"{p:.1f}" for p in peaks) + f"   (a state: {latent:.3f})", flush=True)


def precision(families: Sequence[str], nfe: int = 5, samples: int = 48) -> None:
    """bfloat16: how far teachers are from the converged float32 run, with states rounded and carried; and solvers
    searched in either dtype, run in bfloat16 on test samples."""
    for family in families:
        parts = {}
        for dtype in ("float32", "bfloat16"):
            parts[dtype] = Student(Sampler(load_pipeline(str(model(family)), dtype), {"guidance_scale": GUIDANCE}))

        def final(dtype: str, steps: int, kept: bool, parts: dict[str, Student] = parts) -> torch.Tensor:
            plan = Plan(even_nodes(steps), order=3, float32_states=kept)
            return parts[dtype].run(plan, range(8), "convergence").final.float()

        converged = final("float32", 200, False)
        for carried in (False, True):
            errors = [(final("bfloat16", n, carried) - converged).square().mean().item() for n in (25, 50, 100, 200)]
            shown = ", ".join(f"{e:.2g}" for e in errors)
            kind = "carried" if carried else "rounded"
            print(f"{family}: bfloat16 teacher of 25, 50, 100, 200 steps, states {kind}: {shown}", flush=True)
        in_bfloat16, teacher = parts["bfloat16"], Teacher(100)
        test = teacher_trajectory(in_bfloat16, teacher, range(samples), "test", samples, progress=False)
        for dtype, student in parts.items():
            splits = [
                Samples(split, range(n), teacher_trajectory(student, teacher, range(n), split, samples, progress=False))
                for split, n in (("train", samples), ("validation", samples // 2))
            ]
            problem = Problem(student, *splits, samples // 2)
            warped = closed_form.search_step_warp(closed_form.Fits(problem, nfe, Log()), 25, 1e-4)
            found = polish(problem, warped, parametrised(problem, warped), 1)
            run = in_bfloat16.run(Plan.of(found.spec), range(samples), "test")
            mse = (run.final - test.final).square().mean().item()
            print(f"{family}: {nfe} calls searched in {dtype}, run in bfloat16: {mse:.3g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-search"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    for method in ("gradient", "paper"):
        parser.add_argument(f"--{method}-seeds", type=int, default=len(SEEDS), help="so many of the seeds, with it")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--kept-only", action="store_true", help="--ablation: run nothing, show what was measured")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--precision", action="store_true")
    parser.add_argument("--update", action="store_true")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.memory:
        memory()
    elif given.precision:
        precision(given.families)
    elif given.ablation:
        ablation(given.output, given.seeds, given.families, given.update, given.kept_only)
    else:
        bench(given.output, given.seeds, given.families, given.gradient_seeds, given.paper_seeds, given.update)


if __name__ == "__main__":
    main()
