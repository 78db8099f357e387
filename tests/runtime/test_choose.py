"""The parts behind the scheduler on their own: solver sets, artefacts, histories, and what an import costs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_dssolver import DSSolverScheduler, SolverSpec
from diffusers_dssolver.artefacts import carry_over, first_fitting, mismatch, model_facts
from diffusers_dssolver.choose import SolverSet
from diffusers_dssolver.config import _tell_old
from diffusers_dssolver.derive import Shift, classical, uniform_nodes, warp
from diffusers_dssolver.history import History
from diffusers_dssolver.paths import FlowPath, VPPath, make_betas
from tests.runtime.test_scheduler import make_flow, make_solvers, make_table

FLOW, VP = FlowPath(), VPPath(make_betas(1000, 0.0001, 0.02, "linear", None, False))
TABLES = {n: SolverSpec.from_dict(make_table(n)) for n in (4, 8)}


def same(chosen, spec, message=None):
    """Whether this solver was chosen for a model of its own path, with this message."""
    course, told = chosen
    return course.nodes.tolist() == [*spec.nodes] and course.rows == spec.coefficients and told == message


def test_a_set_chooses_tables_neighbours_and_classical_rows():
    tables = SolverSet(FLOW, TABLES)
    assert same(tables.choose(4), TABLES[4])
    course, message = tables.choose(6)
    assert (
        len(course.times) == 6
        and message == "no table for 6 steps (there are tables for: 4, 8): using a solver derived from them"
    )
    for path in (FLOW, VP):
        assert same(SolverSet(path).choose(6), classical(uniform_nodes(6, path), path))


def test_a_set_shifts_tables_from_where_they_were_searched():
    target = Shift(3.0)
    for shifts, factor in (({}, 1.0), ({None: Shift(2.0)}, 1.5), ({4: Shift(6.0), 8: Shift(1.0)}, 0.5)):
        course, _ = SolverSet(FLOW, TABLES, target, shifts).choose(4)
        wanted = warp(torch.tensor(TABLES[4].nodes, dtype=torch.float64), factor)
        torch.testing.assert_close(course.nodes, wanted, rtol=0, atol=1e-14)
        assert course.rows == TABLES[4].coefficients and (course.change is None) == (factor == 1.0)
    assert SolverSet(FLOW, shift=target).choose(4)[0].nodes.tolist() == [*target(uniform_nodes(4, FLOW))]
    own, _ = SolverSet(VP, TABLES, target, {None: Shift(2.0)}, own=FLOW).choose(4)  # vp has no shift
    assert own.change.factor == 1.0 and own.change.path == FLOW


def test_a_set_tells_of_grids_that_keep_its_tables_out():
    for given in ({"timesteps": [900, 500, 100]}, {"sigmas": [0.9, 0.5, 0.1]}):
        course, message = SolverSet(FLOW, TABLES).choose(**given)
        assert course.nodes.tolist() == [0.9, 0.5, 0.1, 0.0]
        assert "the 3 noise levels given are no default" in message
        assert SolverSet(FLOW).choose(**given)[1] is None


def test_artefacts_are_matched_without_a_scheduler():
    vp, flow = (dict(make(solvers=make_solvers(4)).config) for make in (DSSolverScheduler, make_flow))
    model = {**vp, "solvers": "classical", "beta_end": 0.012}
    assert mismatch(model, flow) == "is for flow models, this model is vp"
    assert mismatch(model, vp) == "was searched with beta_end = 0.02, this model has 0.012"
    published = {"a": flow, "b": vp}
    assert first_fitting({**model, "beta_end": 0.02}, published) == "b"
    with pytest.raises(ValueError, match=r"no published solver fits .*'a' is for flow models.*'b' was searched"):
        first_fitting(model, published)
    with pytest.raises(ValueError, match=r"solver 'b' was searched with beta_end.*search one for this model"):
        carry_over({**model, "strict": True}, "b", vp, published)
    taken, message = carry_over(model, "b", vp, published)
    assert taken["carried_from"]["source"] == "b" and taken["carried_from"]["beta_end"] == 0.02
    assert "carried over by noise level" in message and "continuous_time" not in taken
    taken, message = carry_over({**flow, "shift": 3.0}, "a", flow, published)
    assert taken["solvers"] == flow["solvers"] and taken["carried_from"] is message is None
    assert taken["searched_shift"] == {"factor": 1.0, "terminal": None}
    assert model_facts(FlowMatchEulerDiscreteScheduler(shift=3.0).config)["prediction_type"] == "flow_prediction"
    assert model_facts(DDIMScheduler().config)["prediction_type"] == "epsilon"


def test_a_history_of_its_own():
    rows = [[1.0], [0.0, 1.0], [0.25, 0.25, 0.5]]
    history = History(rows)
    assert history.needed == [1, 2, 3]  # the last row needs the outputs that the second passes over
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    history.add(0, a)
    history.add(1, b)
    twin = history.copy()
    history.add(2, c)
    assert [list(history.row(2)), len(twin.outputs)] == [rows[2], 2]
    history.add(2, a)  # again: replaced
    assert history.outputs[-1] is a and len(history.outputs) == 3
    history.add(1, b)  # a jump back: a new history
    assert history.outputs == [b] and history.row(2) == [1.0]
    assert History(rows, length=2).rows[2] == [0.5, 0.5]


def test_a_key_of_a_former_version_is_told_once_and_forgotten(caplog):
    _tell_old.cache_clear()
    old = {**make_flow(solvers=make_solvers(4)).config, "interpolate_corrections": True}
    with caplog.at_level(logging.WARNING, "diffusers_dssolver"):
        for _ in range(2):
            assert "interpolate_corrections" not in DSSolverScheduler.from_config(old).config
        DSSolverScheduler.from_config({**old, "interpolate_corrections": False})
    assert [r.message for r in caplog.records] == [
        "interpolate_corrections is a key of a former version; it is ignored"
    ]


def test_an_import_is_light_until_the_scheduler_is_asked_for():
    code = """
import sys
import diffusers_dssolver
from diffusers_dssolver.solver import SolverSpec
from diffusers_dssolver.published import published_solvers
assert diffusers_dssolver.published_solvers is published_solvers and diffusers_dssolver.SolverSpec is SolverSpec
print(*{"torch", "diffusers", "numpy", "transformers"} & set(sys.modules))
assert set(diffusers_dssolver.__all__) <= set(dir(diffusers_dssolver))
assert not hasattr(diffusers_dssolver, "nothing")
import diffusers.configuration_utils, diffusers.schedulers.scheduling_utils
before = set(sys.modules)
assert diffusers_dssolver.DSSolverScheduler.__module__ == "diffusers_dssolver"
print(*{m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n") == ["", "diffusers_dssolver", ""]
