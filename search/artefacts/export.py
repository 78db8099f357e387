"""The `export` command: a solver for programs other than diffusers.

`sigmas` prints the noise levels of one step count, for programs that take a list of them (ComfyUI's sampler nodes, the
`sigmas` argument of diffusers' flow pipelines). `kdiffusion` writes the whole solver as a Python file
(`sample_dssolver`).
"""

from __future__ import annotations

import pathlib
from pprint import pformat
from typing import Any

import torch

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.config import own_schedule
from diffusers_dssolver.paths import FlowPath, Path

from ..console import warn
from ..settings import ExportConfig
from ..storage import write_text
from .read import load_solver

TEMPLATE = "sample_dssolver.py"
FILLED = "# FILLED by"


def export(config: ExportConfig) -> None:
    """Print noise levels, or write a file.

    Raises:
        ValueError: the solver, the step count or the file is at fault; nothing is written.
    """
    scheduler = load_solver(config.solver, guidance_scale=config.guidance_scale)
    if config.format == "sigmas":
        nfe = config.nfe[0] if len(config.nfe) == 1 else None
        if nfe is None:
            raise ValueError(f"nfe is {config.nfe}; give one step count for sigmas")
        print(", ".join(f"{sigma:.9g}" for sigma in levels(scheduler, specs(scheduler, [nfe])[nfe])["sigmas"]))
        warn(
            "nodes only: the searched weights, and the times that the network is fed, are lost; whatever runs on these "
            "noise levels is not the solver that was measured (kdiffusion keeps all of it)"
        )
        return
    file = pathlib.Path(config.output_file)
    if file.exists() and FILLED not in file.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{file} is there and was not written by export; choose another --output_file")
    write_text(file, source(scheduler, config.nfe))
    print(f"written to {file}: sample_dssolver, sigmas_for")


def specs(scheduler: DSSolverScheduler, nfe: list[int]) -> dict[int, SolverSpec]:
    """The tables of these step counts, or of all if none is given."""
    if missing := sorted(set(nfe) - set(scheduler.tables)):
        raise ValueError(
            f"no table for {missing[0]} steps; there are tables for {', '.join(map(str, scheduler.tables))}"
        )
    return {n: scheduler.solvers[n] for n in sorted(nfe or scheduler.tables)}


def levels(scheduler: DSSolverScheduler, spec: SolverSpec) -> dict[str, Any]:
    """Noise levels: the N+1 `sigmas` of a table and the N that the network is `fed`; sigma of flow, sigma / alpha of
    others. Of a table that is carried over, also the solver's `own`, the `scales` of its states over the file's, and
    the `factor` of its data."""
    path, course = scheduler.path, scheduler.course(spec.nfe)

    def of(path: Path, nodes: torch.Tensor) -> torch.Tensor:
        alpha, sigma = path.alpha_sigma(nodes)
        return sigma if isinstance(path, FlowPath) else sigma / alpha

    fed = course.nodes[:-1] if spec.timesteps is None else path.node(course.times)
    found = {"sigmas": of(path, course.nodes).tolist(), "fed": of(path, fed).tolist()}
    if course.change is None:
        return found
    change, (alpha, sigma) = course.change, path.alpha_sigma(course.nodes)
    scales = change.scales(alpha, sigma)
    if not isinstance(path, FlowPath):  # the file's states are over alpha
        scales = scales * alpha
    if not isinstance(change.path, FlowPath):
        scales = scales / change.path.alpha_sigma(change.nodes)[0]
    own = of(change.path, change.nodes).tolist()
    return {**found, "own": own, "scales": scales.tolist(), "factor": change.factor}


def source(scheduler: DSSolverScheduler, nfe: list[int]) -> str:
    """The Python file with the tables of these step counts."""
    if scheduler.config.mean_decay is not None:
        raise ValueError(
            f"mean_decay is {scheduler.config.mean_decay}, which this file cannot do; take it out of the solver's file"
        )
    prediction, home = scheduler.config.prediction_type, own_schedule(scheduler.config)
    solver: dict[str, Any] = {
        "prediction": "flow" if isinstance(scheduler.path, FlowPath) else prediction,
        "quantity": "velocity" if home["prediction_type"] == "flow_prediction" else "denoised",
        "tables": {
            n: {**levels(scheduler, spec), "coefficients": [list(row) for row in spec.coefficients]}
            for n, spec in specs(scheduler, nfe).items()
        },
    }
    lines = (pathlib.Path(__file__).parent / TEMPLATE).read_text(encoding="utf-8").splitlines()
    [place] = [number for number, line in enumerate(lines) if FILLED in line]
    lines[place] = (
        f"{FILLED} `python -m dssolver_search export`\nSOLVER = {pformat(solver, width=110, sort_dicts=False)}"
    )
    return "\n".join(lines) + "\n"
