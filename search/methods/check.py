"""The last check of a solver, against the best classical one on held-out samples: by the mean and by the 95th
percentile of their errors, since a few samples that go elsewhere carry a mean.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..pipeline.plan import Plan, warped_nodes
from .problem import Problem, comparable

Entry = dict[str, Any]  # a solver as it stands in the state: its numbers, and how they were found
TAIL = 0.95
FEW = 8  # held-out samples that a solver is first checked on
CLEAR = 2.0  # an advantage that no more samples are asked for


def classical(problem: Problem, nfe: int, orders: tuple[int, ...] = (1, 2, 3), few: int = 0) -> tuple[Entry, Tensor]:
    """The best classical solver on uniform nodes, and its errors on held-out samples; the first `few` of them, if that
    is not 0."""
    samples = problem.validation.below(few) if few else problem.validation
    tried = []
    for order in orders:
        plan = Plan(warped_nodes((0.0, 0.0, 0.0), nfe), order=order)
        errors = problem.each(samples, plan)
        tried.append(({"validation_mse": float(errors.mean()), **problem.student.spec(plan).to_dict()}, errors))
    return min(tried, key=lambda found: comparable(found[0]["validation_mse"]))


def checked(problem: Problem, entry: Entry, plan: Plan, errors: Tensor | None, thorough: bool) -> Entry:
    """The entry with what the check found, or that of the classical solver where it is better.

    Args:
        errors: of the plan on all held-out samples; None: to be found.
        thorough: use all held-out samples at once; False: the first `FEW`, and all where these leave a doubt.
    """
    for few in (0,) if thorough else (FEW, 0):
        samples = problem.validation.below(few) if few else problem.validation
        ours = (problem.each(samples, plan) if errors is None else errors)[: few or None]
        best, theirs = classical(problem, plan.nfe, (2,) if few else (1, 2, 3), few)
        ratios = [float(f(ours) / f(theirs)) for f in (Tensor.mean, _tail)]
        if few and max(ratios) * CLEAR < 1:
            break
    known = ours if errors is None else errors
    facts = {
        "validation_mse": float(known.mean()), "validation_tail": float(_tail(known)),
        "classical_mse": float(theirs.mean()), "classical_tail": float(_tail(theirs)),
        "held_out": len(known), "ratio": ratios[0],
    }  # fmt: skip
    if max(map(comparable, ratios)) <= 1:
        return {**entry, **facts}
    rejected = {"rejected": {entry.get("source", "closed_form"): facts["validation_mse"]}, "source": "classical"}
    theirs_alone = {"validation_mse": facts["classical_mse"], "validation_tail": facts["classical_tail"], "ratio": 1.0}
    how = {k: entry[k] for k in ("warp", "ridge") if k in entry}  # other step counts begin there
    return {**best, **how, **facts, **theirs_alone, **rejected}


def _tail(errors: Tensor) -> Tensor:
    return errors.quantile(TAIL)
