"""Tables for step counts that were not searched, so that a user finds one at each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusers_dssolver.derive import from_neighbours
from diffusers_dssolver.solver import SolverSpec

from ..pipeline.plan import Plan
from ..settings import SearchConfig
from .closed_form import IDENTITY, Fits, fitted, validated, warped_nodes
from .gauss_newton import parametrised, polish
from .log import Log
from .problem import Candidate, Problem, comparable

Entry = dict[str, Any]  # a solver as it stands in the state: its numbers, and how they were found

SOLVER_KEYS = ("nodes", "timesteps", "coefficients")  # of an entry: the solver alone


def fill(problem: Problem, nfe: int, settings: SearchConfig, searched: Mapping[int, Entry], log: Log) -> Entry:
    """The best on held-out samples of three solvers: a fitted one, the one that the scheduler derives from its
    neighbours, and the best classical one.

    Args:
        searched: entries of the step counts that were searched.
    """
    choices = {
        "closed_form": entry_of(_fitted(problem, nfe, settings, searched, log)),
        "derived": derived(problem, nfe, searched),
        "classical": classical(problem, nfe),
    }
    errors = {name: entry["validation_mse"] for name, entry in choices.items()}
    source = min(errors, key=lambda name: comparable(errors[name]))
    rejected = {name: error for name, error in errors.items() if name != source}
    return {**choices[source], "source": source, "rejected": rejected, "classical_mse": errors["classical"]}


def _fitted(problem: Problem, nfe: int, settings: SearchConfig, searched: Mapping[int, Entry], log: Log) -> Candidate:
    """Closed-form rows on a warp interpolated between the searched ones. Below them the warp is searched: fits are
    cheap there, and warps differ most. Polished if few calls make that cheap."""
    counts = sorted(searched)
    if nfe < counts[0]:
        found = fitted(problem, nfe, settings, log)
    else:
        warp = [float(np.interp(nfe, counts, [searched[n]["warp"][k] for n in counts])) for k in range(3)]
        nearest = min(counts, key=lambda n: abs(n - nfe))
        found = validated(problem, Fits(problem, nfe, log)(warp, searched[nearest]["ridge"]))
    if nfe > settings.fill_polish_nfe:
        return found
    numbers = parametrised(problem, found, settings.search_over, settings.parametrisation)
    return polish(problem, found, numbers, settings.polish)


def derived(problem: Problem, nfe: int, searched: Mapping[int, Entry]) -> Entry:
    """What the scheduler makes of the searched tables at a step count without one."""
    specs = {n: SolverSpec.from_dict(solver_of(entry)) for n, entry in searched.items()}
    spec = from_neighbours(specs, nfe, problem.student.path)
    return {**spec.to_dict(), "validation_mse": problem.score(Plan.of(spec))}


def classical(problem: Problem, nfe: int) -> Entry:
    """The best classical solver on uniform nodes, of order 1 to 3."""
    tried = []
    for order in (1, 2, 3):
        plan = Plan(warped_nodes(IDENTITY, nfe), order=order)
        tried.append({"validation_mse": problem.score(plan), **problem.student.spec(plan).to_dict()})
    return min(tried, key=lambda entry: comparable(entry["validation_mse"]))


def solver_of(entry: Entry) -> Entry:
    """The solver alone, as it is published."""
    return {k: entry[k] for k in SOLVER_KEYS if k in entry}


def entry_of(found: Candidate) -> Entry:
    """A fitted solver as it stands in the state."""
    how = {"warp": list(found.step_warp), "ridge": found.ridge, "validation_mse": found.validation_mse}
    return {**found.spec.to_dict(), **how}
