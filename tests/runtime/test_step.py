"""The one step: exact for a constant quantity, of the order it claims, differentiable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from diffusers_dssolver.paths import FlowPath, VPPath, make_betas
from diffusers_dssolver.solver import adams_bashforth_rows, dpm_solver_pp_rows
from diffusers_dssolver.step import step
from tests.problems import GaussianProblem, convergence_order, integrate, rollout, specs

VP = VPPath(make_betas(1000, 1e-4, 0.02, "linear", None, False))
FLOW = FlowPath()
GRIDS = {"even": lambda u: u, "uneven": lambda u: math.expm1(1.2 * u) / math.expm1(1.2)}
COUNTS = (48, 64, 96, 128, 192)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def states_for_constant(spec, path, d, x):
    nodes = double(*spec.nodes)
    alphas, sigmas = path.alpha_sigma(nodes)
    a, b = path.transition(alphas, sigmas)
    states = rollout(lambda x, t: d, x, spec.nodes[:-1], zip(a.tolist(), b.tolist(), strict=True), spec.coefficients)
    return states, alphas, sigmas


@given(specs())
def test_constant_velocity_is_integrated_exactly(spec):
    d, x = double(0.7, -1.9), double(0.2, 1.1)
    states, _, sigmas = states_for_constant(spec, FLOW, d, x)
    assert len(states) == spec.nfe + 1
    for state, sigma in zip(states, sigmas, strict=True):
        torch.testing.assert_close(state, x + (sigma - sigmas[0]) * d, rtol=0, atol=1e-11)


@given(specs())
def test_constant_denoised_is_integrated_exactly(spec):
    d, x = double(0.7, -1.9), double(0.2, 1.1)
    states, alphas, sigmas = states_for_constant(spec, VP, d, x)
    noise = (x - alphas[0] * d) / sigmas[0]  # x = alpha d + sigma noise with the same noise all along
    for state, alpha, sigma in zip(states, alphas, sigmas, strict=True):
        torch.testing.assert_close(
            state, alpha * d + sigma * noise, rtol=0, atol=1e-11 * (1 + noise.abs().max().item())
        )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_adams_bashforth(order, grid):
    """From sigma = 1 to 0.2, not to 0: there the leading error term of the even grid nearly cancels."""
    errors = {}
    for n in COUNTS:
        problem = GaussianProblem("flow")
        sigmas = double(*(0.2 + 0.8 * GRIDS[grid](1 - i / n) for i in range(n + 1)))
        alphas = 1 - sigmas
        rows = adams_bashforth_rows(sigmas.tolist(), order)
        last = integrate(problem, alphas, sigmas, FLOW.transition(alphas, sigmas), rows, problem.start(), order - 1)
        errors[n] = (last - problem.exact(problem.start(), (0.0, 1.0), (0.8, 0.2))).norm().item()
        assert problem.evaluations == n
    assert convergence_order(errors) == pytest.approx(order, abs=0.15), errors


def dpm_errors(order, grid, counts):
    """Final errors between two finite log-SNRs, so without the first-order last step (N >= 15 and no sigma = 0)."""
    errors = {}
    for n in counts:
        problem = GaussianProblem("vp")
        lambdas = double(*(-2 + 3 * GRIDS[grid](i / n) for i in range(n + 1)))
        alphas, sigmas = torch.rsqrt(1 + torch.exp(-2 * lambdas)), torch.rsqrt(1 + torch.exp(2 * lambdas))
        rows = dpm_solver_pp_rows(lambdas.tolist(), order)
        last = integrate(problem, alphas, sigmas, VP.transition(alphas, sigmas), rows, problem.start(), order - 1)
        ends = [(alphas[i].item(), sigmas[i].item()) for i in (0, -1)]
        errors[n] = (last - problem.exact(problem.start(), *ends)).norm().item()
        assert problem.evaluations == n
    return errors


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [1, 2])
def test_order_of_dpm_solver_pp(order, grid):
    errors = dpm_errors(order, grid, COUNTS)
    assert convergence_order(errors) == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize("grid", GRIDS)
def test_dpm_solver_pp_3m_is_second_order_but_better_than_2m(grid):
    """3M as diffusers and its authors compute it is of order 2: its second difference D2 is f''/2 h^2, while the
    formula needs f'' h^2 (the singlestep solver has that factor 2). Its error is smaller than 2M's all the same."""
    errors = dpm_errors(3, grid, (192, 256, 384, 512))
    assert convergence_order(errors) == pytest.approx(2, abs=0.15), errors
    assert errors[192] < 0.8 * dpm_errors(2, grid, [192])[192]


def test_step_by_hand():
    x, history = double(2.0), [double(1.0), double(10.0)]
    assert step(x, history, [-0.5, 1.5], 0.25, -2.0).item() == 0.25 * 2 - 2 * (-0.5 * 1 + 1.5 * 10)


def test_weights_that_are_exactly_zero_are_not_read():
    result = step(double(1.0), [double(math.nan), double(3.0)], [0.0, 1.0], 1.0, 1.0)
    assert result.item() == 4


def test_zero_weights_that_are_tensors_get_their_gradient():
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    step(double(1.0), [double(5.0)], [weight], 1.0, 2.0).sum().backward()
    assert weight.grad.item() == 10


@pytest.mark.parametrize("length", [1, 3])
def test_row_and_history_must_be_as_many(length):
    with pytest.raises(ValueError, match=f"row of {length} weights for a history of 2"):
        step(double(1.0), [double(1.0)] * 2, [0.5] * length, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.ones(3, dtype=dtype)
    assert step(x, [x, x], [-0.5, 1.5], 0.5, torch.tensor(0.5, dtype=torch.float64)).dtype == dtype


def test_step_leaves_its_arguments_alone():
    x, history = double(1.0, 2.0), [double(3.0, 4.0)]
    step(x, history, [1.0], 0.5, 2.0)
    assert x.tolist() == [1, 2]
    assert history[0].tolist() == [3, 4]


def test_gradients_of_step():
    torch.manual_seed(0)
    x, d0, d1 = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    c0, c1, a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.4, 1.4, 0.8, -0.3))
    assert torch.autograd.gradcheck(
        lambda x, d0, d1, c0, c1, a, b: step(x, [d0, d1], [c0, c1], a, b), (x, d0, d1, c0, c1, a, b)
    )


def test_rollout_feeds_every_time_once_and_keeps_every_state():
    seen = []

    def evaluate(x, t):
        seen.append((x.item(), t))
        return double(10.0**-t)

    # row 1 takes the oldest quantity alone, row 2 the one before the newest: history is oldest first
    rows = [[1.0], [1.0, 0.0], [0.0, 1.0, 0.0]]
    states = rollout(evaluate, double(5.0), [0, 1, 2], [(1.0, 1.0)] * 3, rows)
    assert [s.item() for s in states] == pytest.approx([5, 6, 7, 7.1], abs=1e-14)
    assert [t for _, t in seen] == [0, 1, 2]
    assert [x for x, _ in seen] == [s.item() for s in states[:-1]]


@pytest.mark.parametrize("lengths", [(2, 3, 3), (3, 2, 3), (3, 3, 2)])
def test_rollout_refuses_lists_of_different_lengths(lengths):
    times, transitions, rows = lengths
    identity = [[0.0] * i + [1.0] for i in range(rows)]
    with pytest.raises(ValueError, match="zip"):
        rollout(lambda x, t: x, double(1.0), [0] * times, [(1.0, 1.0)] * transitions, identity)
