"""Derived solvers: node curves, blends of tables, convergence, and the resolution shift of diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import CubicHermiteSpline

from diffusers_dssolver import SolverSpec
from diffusers_dssolver.derive import Shift, classical, dynamic_shift, from_neighbours, node_curve, uniform_nodes
from diffusers_dssolver.paths import ContinuousVPPath, FlowPath, VPPath, make_betas
from diffusers_dssolver.published import published_config
from tests.problems import GaussianProblem, convergence_order, integrate

BETAS = make_betas(1000, 1e-4, 0.02, "linear", None, False)
PATHS = {"flow": FlowPath(), "vp": VPPath(BETAS), "continuous": ContinuousVPPath(BETAS)}
FAMILY = {"flow": "flowdcn-b-2-256", "vp": "dit-xl-2-256", "continuous": "dit-xl-2-256"}


def tables(kind) -> dict[int, SolverSpec]:
    return {int(n): SolverSpec.from_dict(data) for n, data in published_config(FAMILY[kind])["solvers"].items()}


@st.composite
def falling_nodes(draw) -> list[float]:
    widths = draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12))
    return [*(np.cumsum(widths)[::-1] / sum(widths)).tolist(), 0.0]


# --- node curves ---------------------------------------------------------------------------------------------------


@given(falling_nodes())
def test_curve_passes_through_its_points(nodes):
    curve, n = node_curve(nodes), len(nodes) - 1
    assert [curve(i / n) for i in range(n + 1)] == pytest.approx(nodes, abs=1e-12)


@given(falling_nodes())
def test_curve_falls_everywhere(nodes):
    values = [node_curve(nodes)(u) for u in np.linspace(0, 1, 301)]
    assert max(np.diff(values)) < 1e-14


@given(falling_nodes())
def test_curve_is_the_cubic_of_fritsch_and_butland(nodes):
    """Harmonic means of the neighbouring slopes inside, the end slopes at the ends; scipy evaluates the cubic."""
    n = len(nodes) - 1
    slopes = np.diff(nodes) * n
    tangents = np.concatenate([slopes[:1], 2 / (1 / slopes[:-1] + 1 / slopes[1:]), slopes[-1:]])
    expected = CubicHermiteSpline(np.arange(n + 1) / n, nodes, tangents)
    for u in np.linspace(0, 1, 41):
        assert node_curve(nodes)(u) == pytest.approx(float(expected(u)), abs=1e-12)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("nfe", [1, 2, 7, 1000])
def test_uniform_nodes(kind, nfe):
    nodes = uniform_nodes(nfe, PATHS[kind])
    first = 0.999 if kind == "continuous" else 1.0
    np.testing.assert_allclose(nodes, np.linspace(first, 0, nfe + 1), atol=1e-15)
    assert nodes[-1] == 0


# --- other step counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 5, 30, 100, 1000])
def test_errors_of_the_network_do_not_grow_over_a_stretched_last_step(nfe):
    """The weights of a row, absolute, are how much it multiplies errors of the outputs: at most 2 for steps of one
    length in Adams-Bashforth 2, and over 100 in the last row of 1000 steps that end at .1."""
    nodes = Shift(1.0, 0.1)(uniform_nodes(nfe, PATHS["flow"]))
    spec = classical(nodes, PATHS["flow"], stretched=True)
    assert max(sum(map(abs, row)) for row in spec.coefficients) <= 3 + 1e-9
    plain = SolverSpec.adams_bashforth(nodes, 2)
    assert spec.coefficients[:-1] == plain.coefficients[:-1]
    assert (spec.coefficients[-1] == plain.coefficients[-1]) == (nfe < 30)


def test_classical_rows_are_those_of_the_path():
    nodes = (0.95, 0.7, 0.3, 0.1, 0.0)
    for order in (1, 2, 3):
        assert classical(nodes, PATHS["flow"], order) == SolverSpec.adams_bashforth(nodes, order)
        for kind in ("vp", "continuous"):
            lambdas = PATHS[kind].lambdas(torch.tensor(nodes, dtype=torch.float64)).tolist()
            assert classical(nodes, PATHS[kind], order) == SolverSpec.dpm_solver_pp(nodes, lambdas, order)
    assert classical(nodes, PATHS["flow"]) == SolverSpec.adams_bashforth(nodes, 2)
    assert classical(nodes, PATHS["vp"]) == classical(nodes, PATHS["vp"], 2)


@pytest.mark.parametrize("kind", PATHS)
def test_at_a_table_the_derived_nodes_are_its_nodes(kind):
    for nfe, spec in tables(kind).items():
        derived = from_neighbours(tables(kind), nfe, PATHS[kind])
        assert derived.nodes == pytest.approx(spec.nodes, abs=1e-12)
        assert derived == classical(derived.nodes, PATHS[kind])


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(
    ("nfe", "below", "above", "blend"),
    [(1, 5, 5, 0), (3, 5, 5, 0), (6, 5, 8, 1 / 3), (7, 5, 8, 2 / 3), (9, 8, 10, 0.5), (11, 10, 10, 0), (40, 10, 10, 0)],
)
def test_between_tables_the_curves_are_blended(kind, nfe, below, above, blend):
    own = {n: spec for n, spec in tables(kind).items() if n in (5, 8, 10)}
    low, high = node_curve(own[below].nodes), node_curve(own[above].nodes)
    expected = [(1 - blend) * low(i / nfe) + blend * high(i / nfe) for i in range(nfe + 1)]
    spec = from_neighbours(own, nfe, PATHS[kind])
    assert spec.nfe == nfe
    assert spec.nodes == pytest.approx(expected, abs=1e-12)
    assert spec.coefficients == classical(spec.nodes, PATHS[kind]).coefficients


@pytest.mark.parametrize("kind", PATHS)
def test_every_step_count_gives_a_solver(kind):
    for nfe in [*range(1, 60), 100, 1000]:
        assert from_neighbours(tables(kind), nfe, PATHS[kind]).nfe == nfe


def final_errors(kind, counts):
    path, errors = PATHS[kind], {}
    for nfe in counts:
        problem = GaussianProblem("flow" if kind == "flow" else "vp")
        spec = from_neighbours(tables(kind), nfe, path)
        alphas, sigmas = path.alpha_sigma(torch.tensor(spec.nodes, dtype=torch.float64))
        last = integrate(problem, alphas, sigmas, path.transition(alphas, sigmas), spec.coefficients, problem.start())
        ends = [(alphas[i].item(), sigmas[i].item()) for i in (0, -1)]
        errors[nfe] = (last - problem.exact(problem.start(), *ends)).norm().item()
        assert problem.evaluations == nfe
    return errors


@pytest.mark.parametrize("kind", PATHS)
def test_derived_solvers_converge_at_second_order(kind):
    errors = final_errors(kind, (48, 64, 96, 128, 192))
    assert convergence_order(errors) == pytest.approx(2, abs=0.3), errors
    assert errors[192] < 1e-3


# --- resolution shift ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [2, 8])
@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize(
    ("keys", "mu"),
    [
        ({"shift": 1.0}, None),
        ({"shift": 3.0}, None),
        ({"shift": 0.5}, None),
        ({"use_dynamic_shifting": True, "time_shift_type": "exponential"}, 0.5),
        ({"use_dynamic_shifting": True, "time_shift_type": "exponential"}, 1.15),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 0.5),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.15),
    ],
)
def test_shift_equals_diffusers(keys, mu, terminal, nfe):
    """diffusers computes in float32, hence 1e-6."""
    scheduler = FlowMatchEulerDiscreteScheduler(**keys, shift_terminal=terminal)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / nfe, nfe).tolist(), mu=mu)
    factor = keys["shift"] if mu is None else dynamic_shift(mu, keys["time_shift_type"])
    ours = Shift(factor, terminal)(uniform_nodes(nfe, PATHS["flow"]))
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)
    assert len(ours) == nfe + 1
    assert ours[-1] == 0
    if terminal:
        assert ours[-2] == pytest.approx(terminal, abs=1e-12)


def test_no_shift_changes_nothing():
    nodes = uniform_nodes(7, PATHS["flow"])
    assert Shift()(nodes) == pytest.approx(nodes, abs=1e-15)
    assert Shift(3.0, 0.1)((1.0, 0.0)) == (1.0, 0.0)  # one step: its only call is at sigma = 1


@pytest.mark.parametrize("factor", [0.1, 0.2, 1 / 3, 3.0])
def test_the_first_shifted_node_is_exactly_one(factor):
    """Not 1 + 2e-16, which no solver takes."""
    assert Shift(factor)((1.0, 0.5, 0.0))[0] == 1


@given(st.floats(0.05, 20), st.sampled_from([None, 0.02, 0.1]), st.integers(1, 50))
def test_shifted_nodes_are_a_valid_grid(factor, terminal, nfe):
    spec = SolverSpec.euler(Shift(factor, terminal)(uniform_nodes(nfe, PATHS["flow"])))
    assert spec.nodes[0] == pytest.approx(1, abs=1e-12)


def test_dynamic_shift_by_hand():
    assert dynamic_shift(1.15, "exponential") == pytest.approx(math.e**1.15, rel=1e-15)
    assert dynamic_shift(1.15, "linear") == 1.15
