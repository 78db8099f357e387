"""The `compare` command: searched solvers beside diffusers' own schedulers, same seeds, conditions and guidance.

Each stock scheduler runs as its documentation configures it for the model's family (flow or vp) on every node spacing
it offers, and only its best spacing per NFE is shown. Calls of the network are counted, not assumed. Nothing here
knows how a solver was found.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.config import is_flow

from .config import CompareConfig
from .plots import comparison_picture, error_curves
from .sampling import Sampler, load_pipeline, prompts_of
from .stock import configured

Options = dict[str, Any]
KARRAS: Options = {"use_karras_sigmas": True}
EXPONENTIAL: Options = {"use_exponential_sigmas": True}
LOG_SNR: Options = {"use_lu_lambdas": True}


@dataclass(frozen=True)
class Stock:
    """A scheduler of diffusers for one family: class name, its fixed options, and node spacings by name."""

    cls: str
    options: Options
    spacings: Mapping[str, Options]
    calls_per_step: int = 1


def _vp(cls: str, log_snr: Options, calls_per_step: int = 1, **options: Any) -> Stock:
    uniform = {"trailing": {"timestep_spacing": "trailing"}, "linspace": {"timestep_spacing": "linspace"}}
    return Stock(cls, options, {**uniform, "karras": KARRAS, "log-SNR": log_snr}, calls_per_step)


def _flow(cls: str, spacings: Mapping[str, Options], calls_per_step: int = 1, **options: Any) -> Stock:
    return Stock(cls, options, {"uniform": {}, **spacings}, calls_per_step)


VP: dict[str, Stock] = {
    "unipc": _vp("UniPCMultistepScheduler", EXPONENTIAL, solver_order=2),
    "dpmpp_2m": _vp("DPMSolverMultistepScheduler", LOG_SNR, algorithm_type="dpmsolver++", solver_order=2),
    "dpmpp_3m": _vp("DPMSolverMultistepScheduler", LOG_SNR, algorithm_type="dpmsolver++", solver_order=3),
    "deis": _vp("DEISMultistepScheduler", EXPONENTIAL, solver_order=2),
    "heun": _vp("HeunDiscreteScheduler", EXPONENTIAL, 2),
    "euler": _vp("EulerDiscreteScheduler", EXPONENTIAL),
}
FLOW: dict[str, Stock] = {
    "unipc": _flow("UniPCMultistepScheduler", {"karras": KARRAS}, solver_order=2),
    "dpmpp_2m": _flow("DPMSolverMultistepScheduler", {"karras": KARRAS, "log-SNR": LOG_SNR}, solver_order=2),
    "dpmpp_3m": _flow("DPMSolverMultistepScheduler", {"karras": KARRAS, "log-SNR": LOG_SNR}, solver_order=3),
    "deis": _flow("DEISMultistepScheduler", {"karras": KARRAS}, solver_order=2),
    "heun": _flow("FlowMatchHeunDiscreteScheduler", {}, 2),
    "euler": _flow("FlowMatchEulerDiscreteScheduler", {"karras": KARRAS, "log-SNR": EXPONENTIAL}),
}


@dataclass
class Result:
    """One scheduler at one NFE on the test samples. `mse`, `psnr`: of final states against the converged reference."""

    scheduler: str
    nfe: int
    spacing: str
    calls: int
    mse: float
    psnr: float
    seconds: float
    searched: bool
    pictures: list[Any] = field(repr=False, default_factory=list)


class Comparison:
    """Runs schedulers through one pipeline on the same test samples."""

    def __init__(self, config: CompareConfig) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = load_pipeline(config.pretrained_model_name_or_path, config.dtype, device, config.revision)
        self.config, self.model_config = config, pipe.scheduler.config
        self.sampler = Sampler(pipe, config.call_arguments, prompts_of(config), config.seed)
        # every artefact is loaded, and its noise schedule checked, before anything is run
        self.ours = {_name(s): DSSolverScheduler.from_config(self.model_config, solvers=s) for s in config.solver}
        known = FLOW if is_flow(self.model_config) else VP
        if missing := [s for s in config.schedulers if s not in known]:
            raise ValueError(f"scheduler {missing[0]!r} is unknown; known: {', '.join(known)}")
        self.stock = {name: known[name] for name in config.schedulers}
        self.single_call = 1

    def sample(self, scheduler: Any, steps: int) -> tuple[Tensor, list[Any], float, float]:
        """Final states (n, ...), the first pictures, network evaluations per sample, and seconds per sample."""
        final: list[Tensor] = []
        take = scheduler.step

        @functools.wraps(take)
        def recording(*args: Any, **kwargs: Any) -> Any:
            result = take(*args, **kwargs)
            final[-1:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
            return result

        scheduler.step = recording
        states, pictures = [], []
        before, began = self.sampler.network_evaluations, time.perf_counter()
        try:
            with self.sampler.using(scheduler):
                for first in range(0, self.config.num_samples, self.config.batch_size):
                    batch = range(first, min(first + self.config.batch_size, self.config.num_samples))
                    final.clear()
                    output = self.sampler(batch, "test", steps)
                    states.append(final[0][: len(batch)].float().cpu())
                    pictures += list(output[0])[: self.config.num_pictures - len(pictures)]
        finally:
            del scheduler.step
        count = self.config.num_samples
        evaluations = (self.sampler.network_evaluations - before) / count
        return torch.cat(states), pictures, evaluations, (time.perf_counter() - began) / count

    def reference(self) -> tuple[Tensor, list[Any], float]:
        """Final states of many classical steps, their pictures, and the mse between them and half as many steps."""
        steps = self.config.reference_steps
        scheduler = DSSolverScheduler.from_config(self.model_config, solvers="classical")
        half = self.sample(scheduler, max(steps // 2, 1))[0]
        final, pictures, evaluations, _ = self.sample(scheduler, steps)
        self.single_call = max(
            round(evaluations / steps), 1
        )  # guidance in one doubled call, or two calls, counts double
        return final, pictures, (half - final).square().mean().item()

    def candidates(self, nfe: int) -> Iterator[tuple[str, str, Any, int, bool]]:
        """(name, spacing, scheduler, steps, searched) of every run at this NFE."""
        for name, scheduler in self.ours.items():
            kind = "searched" if nfe in scheduler.tables else "derived"
            yield name, kind, scheduler, nfe, True
        for name, stock in self.stock.items():
            steps = nfe if stock.calls_per_step == 1 else (nfe + 1) // 2  # Heun's last step is a single call
            cls = getattr(diffusers, stock.cls)
            for spacing, options in stock.spacings.items():
                yield name, spacing, configured(cls, self.model_config, **stock.options, **options), steps, False

    def run(self) -> tuple[list[Result], float, list[Any]]:
        """Every result, the best spacing of each stock scheduler per NFE; the reference's own error; its pictures."""
        wanted, reference_pictures, uncertainty = self.reference()
        span = (wanted.max() - wanted.min()).item()
        results: dict[tuple[str, int], Result] = {}
        runs = [(nfe, run) for nfe in self.config.nfe for run in self.candidates(nfe)]
        for nfe, (name, spacing, scheduler, steps, searched) in tqdm(runs, desc="compare", unit="run"):
            final, pictures, evaluations, seconds = self.sample(scheduler, steps)
            mse = (final - wanted).square().mean().item()
            if not math.isfinite(mse):
                mse = math.inf
            psnr = 10 * math.log10(span**2 / mse) if 0 < mse < math.inf else -math.inf
            calls = round(evaluations / self.single_call)
            result = Result(name, nfe, spacing, calls, mse, psnr, seconds, searched, pictures)
            if (name, nfe) not in results or mse < results[name, nfe].mse:
                results[name, nfe] = result
        return list(results.values()), uncertainty, reference_pictures


def compare(config: CompareConfig) -> None:
    """Run the comparison; print the table, write comparison.json, comparison.png and error.png."""
    comparison = Comparison(config)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results, uncertainty, reference_pictures = comparison.run()
    print(table(results, config, uncertainty))
    record = {
        "settings": asdict(config),
        "reference": {"steps": config.reference_steps, "mse_against_half_the_steps": uncertainty},
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__},
        "results": [{k: v for k, v in asdict(r).items() if k != "pictures"} for r in results],
    }
    partial = folder / "comparison.json.tmp"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "comparison.json")
    comparison_picture(results, config, reference_pictures, folder / "comparison.png")
    error_curves(results, folder / "error.png")
    print(f"written to {folder}: comparison.json, comparison.png, error.png")


def table(results: list[Result], config: CompareConfig, uncertainty: float) -> str:
    """Final-state mse by scheduler (rows) and NFE (columns), the best stock one marked, and ours over it."""
    by = {(r.scheduler, r.nfe): r for r in results}
    names = list(dict.fromkeys(r.scheduler for r in results))
    best = {
        n: min((r for r in results if r.nfe == n and not r.searched), key=lambda r: r.mse, default=None)
        for n in config.nfe
    }
    searched = [name for name in names if by[name, config.nfe[0]].searched]
    rows = [["", *(f"NFE {n}" for n in config.nfe)]]
    for name in names:
        cells = []
        for n in config.nfe:
            r = by[name, n]
            calls = "" if r.calls == n else f", {r.calls} calls"
            cells.append(f"{r.mse:.3g} ({r.spacing}{calls})" + ("*" if r is best[n] else " "))
        rows.append([name, *cells])
    for name in searched:
        ratios = [f"{by[name, n].mse / b.mse:.2f} " if (b := best[n]) else "- " for n in config.nfe]
        rows.append([f"{name} / best *", *ratios])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["", f"final-state mse against {config.reference_steps} steps, {config.num_samples} test samples", ""]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    lines += [
        "",
        f"in brackets each scheduler's best node spacing; mse of the reference against half of them: {uncertainty:.1g}",
    ]
    return "\n".join(lines)


def _name(source: str) -> str:
    """How a solver is called in tables: the name of its folder or repository."""
    return Path(source).resolve().name if Path(source).is_dir() else source
