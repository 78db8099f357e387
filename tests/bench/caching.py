"""Caching at equal network calls: 50 steps of a stock scheduler, N of which call the network.

    python -m tests.bench.caching --model search/demo/flow --solver runs/flow --guidance_scale 1.5

What most people run today to save calls (TeaCache, arXiv 2411.19108, and its kin) keeps the steps of a scheduler and
skips calls of the network. Here N of the 50 steps call it, spread evenly; the others reuse its last output, or
extrapolate the last two linearly in time. The better of two choices of N steps is shown: with the last step among
them, and without it. Errors are of final states against the model's own converged ones: mean, and 95th percentile of
samples.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from dssolver_search.measure.compare import Comparison
from dssolver_search.pipeline.replay import patched
from dssolver_search.settings import CompareConfig

STEPS = 50
KINDS = {"output reused": False, "output extrapolated": True}


@contextmanager
def skipping(networks: list[nn.Module], called: Collection[int], linear: bool) -> Iterator[None]:
    """Call these networks in the steps `called`, the first among them, of every run of `STEPS` steps.

    Args:
        linear: extrapolate the last two outputs in time, where there are two; False: reuse the last.
    """

    def wrapped(forward: Any) -> Any:
        kept: list[tuple[Tensor, Tensor]] = []  # times (B,) and outputs, newest last
        step = -1

        @functools.wraps(forward)
        def skipped(*args: Any, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
            nonlocal step
            step = (step + 1) % STEPS
            if step == 0:
                kept.clear()
            if step in called:
                kept[:] = [*kept[-1:], (timestep, forward(*args, timestep=timestep, **kwargs)[0])]
            (before, older), (time, newest) = kept[0], kept[-1]
            if not linear or step in called or len(kept) == 1:
                return (newest,)
            share = (timestep - time) / (time - before)
            return (newest + (newest - older) * share.view(-1, *[1] * (newest.ndim - 1)),)

        return skipped

    with patched(networks, [wrapped(network.forward) for network in networks]):
        yield


def choices(calls: int) -> list[set[int]]:
    """Sets of `calls` steps out of `STEPS`, even, the first among them: up to the last step, or short of it."""
    ends = (STEPS - 1, STEPS - STEPS / calls)
    return [{round(k * end / max(calls - 1, 1)) for k in range(calls)} for end in ends]


def figures(errors: Tensor) -> tuple[float, float]:
    """Mean, and 95th percentile over samples, of squared errors (n, ...)."""
    each = errors.flatten(1).mean(1)
    return float(each.mean()), float(each.quantile(0.95))


def cached(comparison: Comparison, wanted: Tensor, calls: int) -> dict[str, tuple[float, float]]:
    """Errors of each kind of caching at so many network calls."""
    config = comparison.lineup.model_config
    if "beta_start" in config:
        scheduler: Any = DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing")
    else:
        scheduler = type(comparison.lineup.sampler.pipe.scheduler).from_config(config)
    found = {}
    for kind, linear in KINDS.items():
        tried = []
        for called in choices(calls):
            with skipping(comparison.lineup.sampler.denoisers, called, linear):
                made = comparison.sample(scheduler, STEPS).final
            tried.append(figures((made.double() - wanted.double()).square()))
        found[f"{STEPS} steps, {kind}"] = min(tried)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="class-conditional pipeline, Hub id or folder")
    parser.add_argument("--solver", default=None, help="searched solver")
    parser.add_argument("--guidance_scale", type=float, default=None)
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 6, 8, 10])
    parser.add_argument("--num_samples", type=int, default=64)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        comparison = Comparison(
            CompareConfig(
                pretrained_model_name_or_path=given.model, output_dir=folder, nfe=given.nfe,
                guidance_scale=given.guidance_scale, num_samples=given.num_samples,
                solver=[given.solver] if given.solver else [],
            )
        )  # fmt: skip
        wanted, _, _ = comparison.converged()
        print(f"{'calls':>5}  {'':36} {'mse':>9} {'95 %':>9}")
        for calls in given.nfe:
            lines = cached(comparison, wanted, calls)
            for run in comparison.lineup.runs(calls):
                error = figures((comparison.sample(run.scheduler, run.steps).final - wanted).double().square())
                lines[run.name] = min(lines.get(run.name, error), error)
            for name, (mse, tail) in lines.items():
                print(f"{calls:>5}  {name:36} {mse:9.2g} {tail:9.2g}", flush=True)


if __name__ == "__main__":
    main()
