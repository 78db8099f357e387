"""Solvers as data: rows against independent sources, JSON without loss, and every malformed file refused by name."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dssolver import SolverSpec
from diffusers_dssolver.paths import VPPath
from diffusers_dssolver.solver import MAX_NFE, adams_bashforth_rows, dpm_solver_pp_rows, fold
from tests.problems import DoubleTorch, nonlinear_model, quantity, rollout, specs

BETAS = (0.1, 0.2)  # VPPath is used here for its formulas, which need no schedule


# --- Adams-Bashforth -----------------------------------------------------------------------------------------------


def quadrature_row(nodes, order, i):
    """Weights of the newest `order` values by Gauss-Legendre over [node i, node i+1], exact for these polynomials."""
    used = nodes[max(0, i + 1 - order) : i + 1]
    points, weights = np.polynomial.legendre.leggauss(4)
    t = nodes[i] + (nodes[i + 1] - nodes[i]) * (points + 1) / 2
    row = np.zeros(i + 1)
    for k, own in enumerate(used):
        others = np.delete(used, k)
        basis = np.prod((t[:, None] - others) / (own - others), axis=1)
        row[i + 1 - len(used) + k] = weights @ basis / 2
    return row


@given(st.lists(st.floats(0.3, 1.0), min_size=1, max_size=9), st.integers(1, 4))
def test_adams_bashforth_rows_equal_a_quadrature(widths, order):
    nodes = np.append(np.cumsum(widths)[::-1] / sum(widths), 0.0)
    for i, row in enumerate(adams_bashforth_rows(nodes.tolist(), order)):
        np.testing.assert_allclose(row, quadrature_row(nodes, order, i), rtol=0, atol=1e-12)


TEXTBOOK = {1: (1, [1]), 2: (2, [-1, 3]), 3: (12, [5, -16, 23]), 4: (24, [-9, 37, -59, 55])}


@pytest.mark.parametrize("order", TEXTBOOK)
def test_adams_bashforth_textbook_constants(order):
    divisor, numerators = TEXTBOOK[order]
    spec = SolverSpec.adams_bashforth([(8 - i) / 8 for i in range(9)], order)
    for i in range(order - 1, 8):
        expected = [0.0] * (i + 1 - order) + [n / divisor for n in numerators]
        assert spec.coefficients[i] == pytest.approx(expected, abs=1e-13)
    for i in range(order - 1):  # the order rises with the history
        divisor, numerators = TEXTBOOK[i + 1]
        assert spec.coefficients[i] == pytest.approx([n / divisor for n in numerators], abs=1e-13)


def test_euler_is_the_identity():
    spec = SolverSpec.euler([1.0, 0.7, 0.2, 0.0])
    assert spec.coefficients == ((1.0,), (0.0, 1.0), (0.0, 0.0, 1.0))
    assert spec.nfe == 3
    assert spec.timesteps is None


# --- DPM-Solver++ --------------------------------------------------------------------------------------------------


def path_from_ratio(ratio):
    """alpha, sigma, lambda, float64, from diffusers' sigmas, which are sigma/alpha."""
    alpha = 1 / torch.sqrt(1 + ratio**2)
    return alpha, ratio * alpha, [-math.log(r) if r else math.inf for r in ratio.tolist()]


def our_states(rows, alpha, sigma, timesteps, x):
    path = VPPath(BETAS)
    factors = {t.item(): (a, s) for t, a, s in zip(timesteps, alpha.tolist(), sigma.tolist(), strict=False)}
    transitions = zip(*(f.tolist() for f in path.transition(alpha, sigma)), strict=True)
    return rollout(
        lambda x, t: quantity(path, nonlinear_model(x, t), x, *factors[t], "epsilon"),
        x,
        timesteps.tolist(),
        transitions,
        rows,
    )


def their_states(scheduler, x):
    states = [x]
    for t in scheduler.timesteps:
        states.append(scheduler.step(nonlinear_model(states[-1], t.item()), t, states[-1]).prev_sample)
    return states


def start(seed=0):
    return torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same_trajectory(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max().item() <= tolerance * b.abs().max().item()


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("nfe", [1, 2, 3, 14, 15])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_pp_trajectories_equal_those_of_diffusers(order, nfe, final, monkeypatch):
    """Its sigmas are float32 and taken as given. With float32 inside its steps too the two would agree to 1e-6 only; in
    float64 they agree to rounding, amplified by the cancelling weights of a long last step (sigma_min, order 3)."""
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", DoubleTorch())
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", solver_order=order, final_sigmas_type=final, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(nfe)
    scheduler.sigmas = scheduler.sigmas.double()
    alpha, sigma, lambdas = path_from_ratio(scheduler.sigmas)
    ours = our_states(dpm_solver_pp_rows(lambdas, order), alpha, sigma, scheduler.timesteps, start())
    assert_same_trajectory(ours, their_states(scheduler, start()), 1e-11)


@pytest.mark.parametrize("nfe", [1, 4, 10, 25])
def test_first_order_is_ddim_of_diffusers(nfe):
    """Through the alphas of DDIM itself, in float64, so rounding alone is left. N must divide 1000: DDIM takes
    t - 1000 // N as the time of the next node."""
    ddim = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(nfe)
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    bar = torch.cat([ddim.alphas_cumprod[ddim.timesteps], torch.ones(1, dtype=torch.float64)])
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    nodes = [(nfe - i) / nfe for i in range(nfe + 1)]
    lambdas = [math.log(a / s) if s else math.inf for a, s in zip(alpha.tolist(), sigma.tolist(), strict=True)]
    theirs = their_states(ddim, start())
    for spec in (SolverSpec.euler(nodes), SolverSpec.dpm_solver_pp(nodes, lambdas, 1)):
        assert_same_trajectory(our_states(spec.coefficients, alpha, sigma, ddim.timesteps, start()), theirs, 1e-12)


def test_2m_weight_is_minus_one_over_2r():
    lambdas = [-3.0, -1.0, 0.5, math.inf]
    r = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    spec = SolverSpec.dpm_solver_pp([1.0, 0.6, 0.2, 0.0], lambdas, 2)
    assert spec.coefficients[1] == pytest.approx((-1 / (2 * r), 1 + 1 / (2 * r)), abs=1e-15)
    assert spec.coefficients[2] == (0, 0, 1)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("flat", [0, 1, 4, 8, 17, 18])
def test_steps_without_change_of_lambda_fall_back_to_fewer_quantities(flat, order):
    """lambda stands still where a schedule is clamped (zero terminal SNR, the continuous formula below t = 0.001)."""
    lambdas = [-4.0 + 0.4 * (i - (i > flat)) for i in range(20)]
    rows = dpm_solver_pp_rows(lambdas, order)
    assert all(math.fsum(row) == pytest.approx(1, abs=1e-12) for row in rows)
    assert rows[flat] == (*[0.0] * flat, 1.0)


@pytest.mark.parametrize(
    ("make", "orders"),
    [
        (lambda order: adams_bashforth_rows([1.0, 0.0], order), (0, 5, -1, 1.5, "2")),
        (lambda order: dpm_solver_pp_rows([0.0, 1.0], order), (0, 4, -1, 1.5, "2")),
    ],
)
def test_orders_that_are_not_offered(make, orders):
    for order in orders:
        with pytest.raises(ValueError, match=r"order is .*offered for 1, 2, 3"):
            make(order)


# --- data: JSON, frozen, copied ------------------------------------------------------------------------------------


def bits(value):
    return [bits(v) for v in value] if isinstance(value, (list, tuple)) else None if value is None else value.hex()


@given(specs())
def test_json_round_trip_is_bit_exact(spec):
    for again in (SolverSpec.from_json(spec.to_json()), SolverSpec.from_dict(json.loads(json.dumps(spec.to_dict())))):
        assert again == spec
        for field in dataclasses.fields(SolverSpec):
            assert bits(getattr(again, field.name)) == bits(getattr(spec, field.name))


def test_dict_holds_lists_and_no_absent_key():
    spec = SolverSpec.euler([1.0, 0.5, 0.0])
    assert spec.to_dict() == {"nodes": [1.0, 0.5, 0.0], "coefficients": [[1.0], [0.0, 1.0]]}
    assert all(type(row) is list for row in spec.to_dict()["coefficients"])
    assert SolverSpec((1.0, 0.0), ((1.0,),), (7.5,)).to_dict()["timesteps"] == [7.5]


@pytest.mark.parametrize("name", ["nodes", "coefficients", "timesteps", "nfe", "other"])
def test_frozen(name):
    spec = SolverSpec.euler([1.0, 0.0])
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(spec, name, ())


def test_given_lists_are_copied():
    nodes, rows, times = [1.0, 0.5, 0.0], [[1], [0.0, 1.0]], [999.0, 500.0]
    spec = SolverSpec(nodes, rows, times)
    nodes[0], rows[1][0], times[0] = 0.9, 7.0, 3.0
    rows.append([])
    assert (spec.nodes, spec.coefficients, spec.timesteps) == ((1.0, 0.5, 0.0), ((1.0,), (0.0, 1.0)), (999.0, 500.0))
    assert type(spec.coefficients[0][0]) is float
    data = spec.to_dict()
    data["coefficients"][1][0] = 7.0
    assert spec.coefficients[1][0] == 0
    assert hash(spec) == hash(SolverSpec.from_dict(spec.to_dict()))


# --- data: refused -------------------------------------------------------------------------------------------------

DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]
HOSTILE = {"huge": 10**400, "unprintable": -(10**5000), "deep": DEEP}  # by name: their repr would break the reports
PLAIN = [math.nan, math.inf, -math.inf, True, False, None, "0.5", "nan", [0.5], {}, {"a": 1}, b"1", 1j]
BAD_NUMBERS = [*PLAIN, *HOSTILE]


def good() -> dict:
    return {
        "nodes": [1.0, 0.6, 0.3, 0.0],
        "coefficients": [[1.0], [-0.5, 1.5], [0.25, -1.0, 1.75]],
        "timesteps": [999.0, 600.5, 300.0],
    }


def refusal(data) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (every caller looks at the text)
        SolverSpec.from_dict(data)
    assert len(str(caught.value)) < 300
    return str(caught.value)


def test_the_good_one_is_good():
    assert SolverSpec.from_dict(good()).nfe == 3


@given(st.sampled_from(["nodes", "timesteps"]), st.integers(0, 2), st.sampled_from(BAD_NUMBERS))
def test_a_bad_number_is_named(key, i, value):
    data = good()
    data[key][i] = HOSTILE.get(value, value) if isinstance(value, str) else value
    assert f"{key}[{i}] is" in refusal(data)


@given(st.integers(0, 2), st.data(), st.sampled_from(BAD_NUMBERS))
def test_a_bad_coefficient_is_named(i, draw, value):
    data, j = good(), draw.draw(st.integers(0, i))
    data["coefficients"][i][j] = HOSTILE.get(value, value) if isinstance(value, str) else value
    assert f"coefficients[{i}][{j}] is" in refusal(data)


@given(
    st.sampled_from(["nodes", "coefficients", "timesteps"]),
    st.sampled_from([3, 0.5, True, "1.0, 0.0", b"ab", {}, {0: 1.0}, {1.0}, object()]),
)
def test_not_a_list_is_named(key, value):
    assert f"{key} is" in refusal(good() | {key: value})


@pytest.mark.parametrize("key", ["nodes", "coefficients"])
def test_null_is_no_list(key):
    assert f"{key} is None" in refusal(good() | {key: None})


@given(st.integers(0, 2), st.sampled_from([None, 1.0, "ab", {}, b"1", True]))
def test_a_row_that_is_no_list_is_named(i, value):
    data = good()
    data["coefficients"][i] = value
    assert f"coefficients[{i}] is" in refusal(data)


@given(st.sampled_from(["nodes", "coefficients", "timesteps"]), st.integers(0, 7).filter(lambda n: n not in (3, 4)))
def test_wrong_lengths_are_named(key, length):
    data = good()
    data[key] = (data[key] * 3)[:length]
    message = refusal(data)
    assert key in message if length else f"{key} has 0 entries" in message
    if key != "nodes":
        assert f"{key} has {length} entries; 3 expected" in message


@pytest.mark.parametrize("length", [0, 1, MAX_NFE + 2])
def test_how_many_nodes_there_may_be(length):
    assert f"nodes has {length} entries; 2 to {MAX_NFE + 1} expected" in refusal(good() | {"nodes": [0.5] * length})


@given(st.integers(0, 2), st.sampled_from([-1, 1, 5]))
def test_a_row_of_the_wrong_length_is_named(i, change):
    data, row = good(), [1.0] + [0.0] * (i + change)
    data["coefficients"][i] = row[: i + 1 + change]
    assert f"coefficients[{i}] has {i + 1 + change} entries; {i + 1} expected" in refusal(data)


@given(st.integers(0, 2), st.floats(2e-6, 1e6), st.sampled_from([1, -1]))
def test_rows_that_do_not_sum_to_one_are_named(i, excess, sign):
    data = good()
    data["coefficients"][i][0] += sign * excess
    assert f"coefficients[{i}] sums to" in refusal(data)


def test_rounding_in_a_row_is_allowed():
    data = good()
    data["coefficients"][2][1] += 5e-7
    assert SolverSpec.from_dict(data).coefficients[2][1] == -1.0 + 5e-7


@given(st.integers(0, 3), st.one_of(st.floats(1.0, 1e300, exclude_min=True), st.floats(-1e300, 0.0, exclude_max=True)))
def test_a_node_outside_the_path_is_named(i, value):
    data = good()
    data["nodes"][i] = value
    assert f"nodes[{i}] is {value!r}; every node must lie in [0, 1]" in refusal(data)


@given(st.sampled_from(["nodes", "timesteps"]), st.integers(1, 2), st.floats(0, 1))
def test_what_does_not_fall_is_named(key, i, rise):
    data = good()
    before = data[key][i - 1]
    data[key][i] = min(before + rise, 1.0) if key == "nodes" else before + rise
    assert f"{key}[{i}] is" in (message := refusal(data))
    assert f"not below {key}[{i - 1}]" in message


def test_the_last_node_must_be_zero():
    assert "nodes[3] is 0.1; the last node must be 0" in refusal(good() | {"nodes": [1.0, 0.6, 0.3, 0.1]})


def test_times_are_not_negative():
    assert "timesteps[2] is -1.0; it must not be negative" in refusal(good() | {"timesteps": [999.0, 600.0, -1.0]})


@given(st.text(max_size=80).filter(lambda key: key not in good()))
def test_an_unknown_key_is_named(key):
    message = refusal(good() | {key: 1})
    assert "unknown key" in message
    assert "coefficients, nodes, timesteps" in message
    assert repr(key)[:50].rstrip("'\"") in message


@pytest.mark.parametrize("key", ["nodes", "coefficients"])
def test_a_missing_key_is_named(key):
    data = good()
    del data[key]
    assert f"lacks the key '{key}'" in refusal(data)


@pytest.mark.parametrize("data", [None, 3, "nodes", [], [["nodes", 1]], b"{}", *HOSTILE])
def test_a_solver_must_be_a_dict(data):
    assert "a solver must be a dict" in refusal(HOSTILE.get(data, data) if isinstance(data, str) else data)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["nodes", "coefficients", "timesteps", "x"]), JSON_VALUES))
def test_arbitrary_json_is_refused_with_the_key(data):
    """Whatever the file holds, the answer is a ValueError about one of its keys; no other exception."""
    data.setdefault("nodes", [0.5])  # keeps the rare valid solver out
    assert any(key in refusal(data | {"nodes": data["nodes"]}) for key in ("nodes", "coefficients", "timesteps", "'x'"))


@given(st.integers(0, len(json.dumps(good())) - 1))
def test_truncated_json_is_refused(length):
    with pytest.raises(ValueError, match="not a solver in JSON"):
        SolverSpec.from_json(json.dumps(good())[:length])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[" * 100_000, "JSON"),
        ('{"nodes":' * 100_000, "JSON"),
        ('{"nodes": ' + "[" * 900 + "]" * 900 + ', "coefficients": []}', "nodes has 1 entries"),
        ('{"nodes": [1' + "0" * 5000 + ', 0], "coefficients": [[1]]}', "digit"),
        ('{"nodes": [1' + "0" * 400 + ', 0], "coefficients": [[1]]}', r"nodes\[0\] .*finite"),
        ('{"nodes": [NaN, 0], "coefficients": [[1]]}', r"nodes\[0\] is nan"),
        ('{"nodes": [1, 0], "coefficients": [[Infinity]]}', r"coefficients\[0\]\[0\] is inf"),
        ('{"nodes": [1, 0], "coefficients": [[1e999]]}', r"coefficients\[0\]\[0\] is inf"),
        ("[]", "must be a dict"),
        ("null", "must be a dict"),
        ("nodes: [1, 0]", "not a solver in JSON"),
        ('{"nodes": [1, 0], "coefficients": [[1]]} trailing', "not a solver in JSON"),
    ],
    ids=range(12),
)
def test_json_text_is_refused(text, names):
    with pytest.raises(ValueError, match=names):
        SolverSpec.from_json(text)


# --- fold ----------------------------------------------------------------------------------------------------------

ROWS = st.lists(st.floats(-100, 100), min_size=1, max_size=12)


@given(ROWS, st.data())
def test_fold_keeps_the_sum_and_the_newest_weights(row, data):
    available = data.draw(st.integers(1, len(row)))
    folded = fold(row, available)
    assert len(folded) == available
    assert folded[1:] == row[len(row) - available + 1 :]
    assert math.fsum(folded) == pytest.approx(math.fsum(row), abs=1e-10)


@given(ROWS)
def test_fold_to_the_whole_row_is_the_row(row):
    assert fold(row, len(row)) == row
    assert fold(tuple(row), len(row)) == row


def test_fold_by_hand():
    row = [1.0, 2.0, 4.0, 8.0]
    assert [fold(row, n) for n in (1, 2, 3, 4)] == [[15.0], [7.0, 8.0], [3.0, 4.0, 8.0], row]
    assert row == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("available", [0, -1, 4, 100])
def test_fold_to_what_is_not_there(available):
    with pytest.raises(ValueError, match=f"available is {available}; a row of 3 weights can be folded to 1..3"):
        fold([0.5, 0.25, 0.25], available)


def test_fold_of_live_tensors_keeps_gradients():
    row = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64, requires_grad=True)
    folded = fold(list(row.unbind()), 2)
    (3 * folded[0] + folded[1]).backward()
    assert row.grad.tolist() == [3, 3, 1]
