"""The gradient method: its parameters against the classical rows of the package, its gradient against differences, its
optimiser against a closed solution, and what it keeps.
"""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers_dssolver import DSSolverScheduler
from diffusers_dssolver.derive import classical
from dssolver_search.methods import gauss_newton, gradient
from dssolver_search.methods import search as run_module
from dssolver_search.methods.closed_form import fit, validated, warped_nodes
from dssolver_search.methods.gauss_newton import parametrised
from dssolver_search.methods.gradient import PATIENCE, Descent
from dssolver_search.methods.objective import OBJECTIVES, mixed_loss, paper_loss, terminal_loss, trajectory_loss
from dssolver_search.methods.parameters import PARAMETRISATIONS, CorrectionParameters, PaperParameters, current
from dssolver_search.methods.preflight import Preflight
from dssolver_search.pipeline.plan import Plan
from dssolver_search.settings import GROUPS
from dssolver_search.settings import OBJECTIVES as NAMED
from tests.families import WARP, both, make_pipe, make_student, problem_of, searched
from tests.searches import CLOSED_FORM, lines_of, refused, search

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


# --- parameters ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("nfe", [1, 2, 5, 16])
def test_corrections_stand_on_the_classical_rows_of_the_nodes_as_they_are(family, nfe):
    student = make_student(make_pipe(family))
    start = warped_nodes(WARP, nfe)
    rows = [[float(i == j) for j in range(i + 1)] for i in range(nfe)]  # Euler, far from the classical rows
    parameters = CorrectionParameters(Plan(start, rows), student.slopes)
    plan = current(parameters)
    torch.testing.assert_close(plan.unshifted_nodes, start, rtol=0, atol=1e-13)
    assert [pytest.approx(row, abs=1e-12) for row in rows] == plan.rows
    torch.manual_seed(0)
    for p in parameters.parameters():
        torch.nn.init.normal_(p, std=0.3)
    plan = current(parameters)

    def base(at):
        return classical(student.nodes(at).tolist(), student.path).coefficients

    first = 0
    for i, row in enumerate(plan.rows):
        part = parameters.free_coefficients[first : first + i].tolist()
        first += i
        parts = zip(base(plan.unshifted_nodes)[i], rows[i], base(start)[i], [*part, -sum(part)], strict=True)
        wanted = [now + r - before + moved for now, r, before, moved in parts]
        assert row == pytest.approx(wanted, abs=1e-10)
        assert sum(row) == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(plan.offsets, -0.1 * parameters.free_times.detach())
    nodes = plan.unshifted_nodes
    assert nodes[0] == 1 and nodes[-1] == 0 and (nodes.diff() < 0).all()


@pytest.mark.parametrize("free", [("coefficients",), ("nodes", "times"), GROUPS])
def test_only_what_is_free_is_a_parameter(free):
    student = make_student(make_pipe("flow"))
    rows = [[1.0 / (i + 1)] * (i + 1) for i in range(5)]
    parameters = CorrectionParameters(Plan(warped_nodes(WARP, 5), rows), student.slopes, free)
    sizes = {"nodes": 4, "coefficients": 10, "times": 5}
    assert parameters.count == sum(sizes[group] for group in free)
    assert {name for name, _ in parameters.named_parameters()} == {f"free_{group}" for group in free}
    plan = parameters.plan()
    assert (plan.offsets is None) == ("times" not in free)
    (plan.unshifted_nodes[2] + plan.rows[3][1]).backward()


@pytest.mark.parametrize("nfe", range(1, 12))
def test_paper_parameters_start_as_uniform_euler(nfe):
    parameters = PaperParameters(nfe)
    np.testing.assert_allclose(current(parameters).unshifted_nodes, np.linspace(1, 0, nfe + 1), rtol=0, atol=1e-12)
    assert current(parameters).rows == [[0.0] * i + [1.0] for i in range(nfe)]
    if nfe >= 7:
        assert parameters.count == nfe + nfe * (nfe - 1) // 2


@pytest.mark.parametrize("nfe", [3, 5, 6, 7, 10])
def test_paper_rows_sum_to_one_and_small_nfe_end_in_second_order(nfe):
    parameters = PaperParameters(nfe)
    generator = torch.Generator().manual_seed(0)
    for p in parameters.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    nodes, rows = (plan := current(parameters)).unshifted_nodes, plan.rows
    assert nodes[0] == 1 and nodes[-1] == 0 and (nodes[1:] < nodes[:-1]).all()
    steps = (nodes[:-1] - nodes[1:]).numpy()
    weights = np.exp(parameters.r.detach().numpy())
    np.testing.assert_allclose(steps, weights / weights.sum(), rtol=1e-9)
    assert [len(row) for row in rows] == list(range(1, nfe + 1))
    free = 0
    for i, row in enumerate(rows):
        assert sum(row) == pytest.approx(1, abs=1e-12)
        masked = nfe <= 6 and i >= nfe - 2
        for j in range(i):
            used = not masked or j == i - 1
            assert row[j] == (parameters.c[i, j].item() if used else 0)
            free += used
    assert parameters.count == nfe + free


# --- objectives ------------------------------------------------------------------------------------------------------


def test_objectives_by_hand():
    assert tuple(OBJECTIVES) == NAMED  # those that the settings offer
    torch.manual_seed(0)
    states, references = [torch.randn(2, 3) for _ in range(4)], [torch.randn(2, 3) for _ in range(4)]
    errors = [((x - y) ** 2).mean() for x, y in zip(states, references, strict=True)]
    assert terminal_loss(states, references) == pytest.approx(errors[3])
    assert trajectory_loss(states, references) == pytest.approx(sum(errors[1:]) / 3)
    assert mixed_loss(states, references) == pytest.approx(errors[3] + sum(errors[1:]) / 3)
    for loss in OBJECTIVES.values():  # the mean of the halves is the whole: batches may be summed
        halves = [loss([s[i : i + 1] for s in states], [r[i : i + 1] for r in references]) for i in (0, 1)]
        assert loss(states, references) == pytest.approx(sum(halves) / 2)
        assert loss([s.bfloat16() for s in states], references).dtype == torch.float32


def test_paper_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    states, references = ([torch.randn(2, 1, 2, 2, generator=generator) for _ in range(4)] for _ in range(2))
    references[-1] = states[-1].clone()
    references[-1].flatten()[0] += 0.0004  # within delta
    references[-1].flatten()[1] -= 0.3  # beyond it
    trajectory = sum(((x - y) ** 2).mean().item() for x, y in zip(states[1:], references[1:], strict=True))
    huber = (0.5 * 0.0004**2 + 0.001 * (0.3 - 0.5 * 0.001)) / 8
    assert paper_loss(states, references).item() == pytest.approx(trajectory + 1000 * huber, rel=1e-5)


# --- gradient --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("objective", "batch_size"), list(zip(OBJECTIVES, [1, 3, 4, 3], strict=True)))
def test_gradient_is_the_central_difference(family, objective, batch_size, exact):
    whole = problem_of(make_student(make_pipe(family, dtype=torch.float64)), steps=20)
    problem = dataclasses.replace(whole, batch_size=batch_size)
    found = fit(problem, 4, WARP, 1e-4, problem.train)
    parameters = parametrised(problem, found)
    torch.manual_seed(0)
    start = 0.05 * torch.randn(parameters.count, dtype=torch.float64)
    vector_to_parameters(start, parameters.parameters())
    value = Descent(problem, found, parameters, OBJECTIVES[objective]).value()
    gradients = torch.cat([p.grad.flatten() for p in parameters.parameters()])
    train = problem.train

    def loss(vector):
        vector_to_parameters(vector, parameters.parameters())
        run = problem.student.run(current(parameters), train.indices, "train")
        wanted = [train.teacher.at(angle) for angle in problem.student.path.angle(run.nodes)]
        return float(OBJECTIVES[objective](run.states, wanted))

    assert value == pytest.approx(loss(start), rel=1e-10)
    at = 0
    for group in GROUPS:  # one direction each
        size = getattr(parameters, f"free_{group}").numel()
        way = torch.zeros_like(start)
        way[at : at + size] = torch.randn(size, dtype=torch.float64)
        difference = (loss(start + 1e-3 * way) - loss(start - 1e-3 * way)) / 2e-3
        assert float(gradients @ way) == pytest.approx(difference, rel=5e-4), group
        assert abs(difference) > 1e-6, group
        at += size


@both
def test_backward_passes_and_recomputation_are_counted(family):
    problem = searched(family)
    sampler = problem.student.sampler
    found = fit(problem, 3, WARP, 1e-4, problem.train)
    before, calls = sampler.network_evaluations, []
    forward = sampler.pipe.transformer.pos_embed.register_forward_hook(lambda *args: calls.append(0))
    Descent(problem, found, parametrised(problem, found), terminal_loss).value()
    forward.remove()
    assert len(calls) == 2 * 3  # once more in the backward pass, whose own cost is that of two
    assert sampler.network_evaluations - before == 4 * (4 * 2 * 3)


def test_gradients_of_two_processes_are_those_of_one():
    problem = searched("flow")
    found = fit(problem, 3, WARP, 1e-4, problem.train)
    whole = Descent(problem, found, parametrised(problem, found), mixed_loss)
    total = whole.value()
    summed, values = 0, 0.0
    for first, last in ((0, 3), (3, 4)):
        share = dataclasses.replace(problem, train=problem.train.part(first, last))
        half = Descent(share, found, parametrised(problem, found), mixed_loss)
        half.samples = 4.0  # what the sum over both gives
        values += half.value()
        summed = summed + torch.cat([p.grad for p in half.parameters.parameters()])
    assert values == pytest.approx(total, rel=1e-9)
    torch.testing.assert_close(summed, torch.cat([p.grad for p in whole.parameters.parameters()]), rtol=1e-6, atol=1e-9)


def test_every_process_gets_the_sum_over_all():
    """Two processes with the same samples are one with each sample twice: the same mean."""
    problem = searched("flow")
    found = fit(problem, 3, WARP, 1e-4, problem.train)
    single = Descent(problem, found, parametrised(problem, found), mixed_loss)
    doubled = dataclasses.replace(problem, reduce=lambda t: 2 * t)
    of_two = Descent(doubled, found, parametrised(problem, found), mixed_loss)
    assert of_two.value() == pytest.approx(single.value(), rel=1e-9)
    for p, q in zip(of_two.parameters.parameters(), single.parameters.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# --- optimiser -------------------------------------------------------------------------------------------------------


@both
def test_descent_lowers_the_held_out_error_and_keeps_its_best(family):
    problem = searched(family)
    found = validated(problem, fit(problem, 4, (0.0, 0.0, 0.0), 1e-4, problem.train))
    seen = []
    descent = Descent(
        problem, found, parametrised(problem, found), terminal_loss, lambda loss, descent: seen.append(descent.reached)
    )
    better = descent.run(12)
    assert 3 <= len(seen) <= 13
    assert better.validation_mse < 0.97 * found.validation_mse
    assert better.validation_mse == min(seen)
    for plan in (better.plan, Plan.of(better.spec)):
        assert problem.score(plan) == pytest.approx(better.validation_mse, rel=1e-9)


class Parabola(torch.nn.Module):
    """Stands for solver parameters: sum of squares, weighted."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def test_lbfgs_ends_at_the_minimum_of_a_parabola(monkeypatch):
    problem = searched("flow")
    found = fit(problem, 3, WARP, 1e-4, problem.train)
    descent, trace = Descent(problem, found, Parabola(), terminal_loss), []
    x = descent.parameters.x

    def value():
        x.grad = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64) * x.detach()
        return float(0.5 * (x.detach() * x.grad).sum())

    monkeypatch.setattr(descent, "value", value)
    monkeypatch.setattr(descent, "judge", trace.append)
    descent.run(40)
    assert x.abs().max() < 1e-5
    assert min(trace) < 1e-10


def test_a_descent_that_does_not_help_ends_and_leaves_the_candidate(monkeypatch):
    problem = searched("flow")
    found = dataclasses.replace(fit(problem, 3, WARP, 1e-4, problem.train), validation_mse=0.0)
    seen = []
    descent = Descent(
        problem, found, parametrised(problem, found), terminal_loss, lambda loss, descent: seen.append(loss)
    )
    assert descent.run(100) is found
    assert len(seen) == PATIENCE
    monkeypatch.setattr(descent, "value", lambda: float("nan"))
    assert descent.run(100) is found
    assert len(seen) == PATIENCE + 1


def test_a_step_that_crosses_nodes_is_not_kept():
    problem = searched("flow")
    found = validated(problem, fit(problem, 3, WARP, 1e-4, problem.train))
    descent = Descent(problem, found, parametrised(problem, found), terminal_loss)
    with torch.no_grad():
        descent.parameters.free_times[1] = -9.0  # a later time than at the node before it
    descent.judge(1.0)
    assert descent.best is found


def test_vectors_and_parameters_are_one():
    problem = searched("flow")
    parameters = parametrised(problem, fit(problem, 3, WARP, 1e-4, problem.train))
    vector = torch.arange(1.0, 9.0, dtype=torch.float64) / 100
    vector_to_parameters(vector, parameters.parameters())
    assert torch.equal(parameters_to_vector(parameters.parameters()), vector)
    assert torch.equal(parameters.free_nodes, vector[:2])


# --- command ----------------------------------------------------------------------------------------------------------

GRADIENT = {**CLOSED_FORM, "method": "gradient", "nfe": [3], "fill_nfe": [], "gradient_calls": 5}


def test_command_keeps_each_stage_only_if_it_is_better_and_says_what_it_cost(models, tmp_path, capsys):
    search(models["vp"], tmp_path, GRADIENT)
    printed = capsys.readouterr()
    facts = json.loads((tmp_path / "scheduler_config.json").read_text())["provenance"]
    result = facts["results"]["3"]
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert list(stages) == ["closed_form", "polish", "gradient"]
    errors = [stage["validation_mse"] for stage in stages.values()]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0]
    assert result["validation_mse"] == errors[2]
    calls = sum("loss" in line for line in lines_of(tmp_path))
    assert calls >= 3
    train, held_out, guided = GRADIENT["num_train_samples"], GRADIENT["num_validation_samples"], 2
    per_call = 3 * guided * (4 * train + held_out)
    first = 3 * guided * 4 * train  # for the scale
    known = guided * held_out if errors[1] == errors[0] else 0  # where it starts feeds the first node itself
    assert stages["gradient"]["network_evaluations"] == first + calls * per_call - known
    assert "everything can be searched by gradients" in printed.err + printed.out
    for name, stage in stages.items():
        assert re.search(rf"{name} +{stage['validation_mse']:.3g} +{stage['network_evaluations']:,}", printed.out)
    assert DSSolverScheduler.from_pretrained(tmp_path).tables == (3,)


def told(verdict):
    def preflight(student, gradients, samples):
        return Preflight("P", 1, "none", 1, {}, 0, 0, 0, verdict, "the reason")

    return preflight


def test_what_gets_no_gradient_stays(model, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "preflight", told("coefficients"))
    seen, plain = [], gradient.parametrised
    monkeypatch.setattr(gradient, "parametrised", lambda *args: seen.append(args[2]) or plain(*args))
    search(model, tmp_path, GRADIENT, polish=0, gradient_calls=1)
    assert seen == [["coefficients"]]


@pytest.mark.parametrize(
    ("method", "verdict"), [("gradient", "forward_only"), ("paper", "forward_only"), ("paper", "coefficients")]
)
def test_methods_without_their_gradients_are_refused(method, verdict, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "preflight", told(verdict))
    with pytest.raises(SystemExit):
        search(model, tmp_path, GRADIENT, method=method)
    assert re.search(rf"error: method {method} .*the reason.*closed_form", capsys.readouterr().err)
    assert not (tmp_path / "scheduler_config.json").exists()


def test_search_over_limits_the_polish_too(model, tmp_path, monkeypatch):
    seen, plain = [], gauss_newton.parametrised
    monkeypatch.setattr(gauss_newton, "parametrised", lambda *args: seen.append(args[2]) or plain(*args))
    search(model, tmp_path, GRADIENT, search_over=["coefficients"])
    assert seen == [["coefficients"]]
    table = json.loads((tmp_path / "scheduler_config.json").read_text())["solvers"]["3"]
    assert "timesteps" not in table


def test_a_parametrisation_is_chosen_by_name(model, tmp_path, monkeypatch, capsys):
    seen = []

    def weights(start, slopes, free):
        seen.append((start.nfe, list(free)))
        return CorrectionParameters(start, slopes, ["coefficients"])

    monkeypatch.setitem(PARAMETRISATIONS, "weights", weights)
    search(model, tmp_path, GRADIENT, parametrisation="weights", gradient_calls=1)
    assert seen == [(3, list(GROUPS))] * 2  # polish and gradient
    assert "timesteps" not in json.loads((tmp_path / "scheduler_config.json").read_text())["solvers"]["3"]
    line = refused(capsys, lambda: search(model, tmp_path / "other", GRADIENT, parametrisation="magic"))
    assert "parametrisation is 'magic'; it must be corrections or weights" in line
