"""Tables for step counts that were not searched, so that a user finds one at each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffusers_dssolver.derive import from_neighbours
from diffusers_dssolver.solver import SolverSpec

from ..pipeline.plan import Plan
from ..settings import SearchConfig
from .check import Entry, checked, classical
from .closed_form import Fits, closed_form, fitted, validated
from .gauss_newton import polished
from .log import Log
from .prior import starts
from .problem import Candidate, Problem, comparable

SOLVER_KEYS = ("nodes", "timesteps", "coefficients")  # of an entry: the solver alone


def fill(problem: Problem, nfe: int, settings: SearchConfig, searched: Mapping[int, Entry], log: Log) -> Entry:
    """The best on held-out samples of three solvers: a fitted one, the one that the scheduler derives from its
    neighbours, and the best classical one. With no `starts`, the fitted one, unless a check prefers the classical.

    Args:
        searched: entries of the step counts that were searched.
    """
    if not settings.starts:
        return judged(problem, _near(problem, nfe, settings, log), settings)
    choices = {
        "closed_form": entry_of(_fitted(problem, nfe, settings, searched, log)),
        "derived": derived(problem, nfe, searched),
        "classical": classical(problem, nfe)[0],
    }
    errors = {name: entry["validation_mse"] for name, entry in choices.items()}
    source = min(errors, key=lambda name: comparable(errors[name]))
    rejected = {name: error for name, error in errors.items() if name != source}
    return {**choices[source], "source": source, "rejected": rejected, "classical_mse": errors["classical"]}


def _near(problem: Problem, nfe: int, settings: SearchConfig, log: Log) -> Candidate:
    """Rows fitted to the trial samples, on the warp of the nearest step count. Few calls are searched like those that
    were asked for."""
    if nfe <= settings.fill_polish_nfe:
        return closed_form(problem, nfe, settings, log)
    return Fits(problem, nfe, log)(starts(problem.student.path, nfe, problem.known)[0], settings.ridge, True)


def judged(problem: Problem, found: Candidate, settings: SearchConfig) -> Entry:
    """What stands in the state of a solver that was found, after the last check."""
    return checked(problem, entry_of(found), found.plan, found.errors, thorough=bool(settings.starts))


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
    return polished(problem, found, settings, log)


def derived(problem: Problem, nfe: int, searched: Mapping[int, Entry]) -> Entry:
    """What the scheduler makes of the searched tables at a step count without one."""
    specs = {n: SolverSpec.from_dict(solver_of(entry)) for n, entry in searched.items()}
    spec = from_neighbours(specs, nfe, problem.student.path)
    return {**spec.to_dict(), "validation_mse": problem.score(Plan.of(spec))}


def solver_of(entry: Entry) -> Entry:
    """The solver alone, as it is published."""
    return {k: entry[k] for k in SOLVER_KEYS if k in entry}


def entry_of(found: Candidate) -> Entry:
    """A fitted solver as it stands in the state."""
    how = {"warp": list(found.step_warp), "ridge": found.ridge, "validation_mse": found.validation_mse}
    return {**found.spec.to_dict(), **how}
